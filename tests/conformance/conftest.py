"""Which function is tested: `--divergence-function module:attribute`, or DIVERGENCE_FUNCTION in the environment."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Iterator

import pytest
import torch

from tests.conformance.reference import Divergence

DEFAULT = "trainer.losses:topk_divergence"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known to pytest only where this folder is named on the command line; the variable is read in any case."""
    parser.addoption(
        "--divergence-function",
        metavar="MODULE:ATTRIBUTE",
        help=f"the function that tests/conformance tests (default: $DIVERGENCE_FUNCTION, or {DEFAULT})",
    )


@pytest.fixture(scope="session")
def divergence(request: pytest.FixtureRequest) -> Divergence:
    """The function under test."""
    option = request.config.getoption("--divergence-function", default=None)
    name = option or os.environ.get("DIVERGENCE_FUNCTION") or DEFAULT
    try:
        function: Divergence = pkgutil.resolve_name(name)
    except (AttributeError, ImportError, ValueError) as error:
        raise pytest.UsageError(f"no function {name!r}, which must be MODULE:ATTRIBUTE: {error}") from error
    return function


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """For tensors this small, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
