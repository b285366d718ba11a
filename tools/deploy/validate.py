"""Hold manifests against Kubernetes' own schemas, unknown fields refused. Run by .venv-deploy's Python.

Of a custom resource, for which Kubernetes has no schema, the pod templates are held against theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

VERSIONS = ("1.30", "1.37")
"""The oldest that has all that we use (preStop's sleep), and the newest known."""


def main() -> int:
    """Check the files that the command line names; 1 if any fails."""
    problems = [
        f"{path}: {problem}"
        for path in sys.argv[1:]
        for manifest in yaml.safe_load_all(Path(path).read_text())
        for problem in problems_of(manifest)
    ]
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


def problems_of(manifest: dict[str, Any]) -> Iterator[str]:
    """What the schemas of any version don't allow."""
    custom = "." in manifest["apiVersion"] and not manifest["apiVersion"].partition("/")[0].endswith(".k8s.io")
    for one in templates_in(manifest) if custom else [manifest]:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(one, version, strict=True)
            except kubernetes_validate.ValidationError as exc:
                where = ".".join(str(step) for step in exc.path)
                yield f"{manifest['kind']}/{manifest['metadata']['name']} {where}: {exc.message} (Kubernetes {version})"


def templates_in(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template below, as an object of its own."""
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": node}
            return
        for value in node.values():
            yield from templates_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from templates_in(value)


if __name__ == "__main__":
    sys.exit(main())
