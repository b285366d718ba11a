"""The engine that the other tests need: by itself it shows in minutes whether this machine can run them."""

from __future__ import annotations

import pytest

from tests.docker.conftest import BASE, BUILD_TIMEOUT_S, Docker

pytestmark = [pytest.mark.docker, pytest.mark.timeout(BUILD_TIMEOUT_S)]


def test_the_base_image_is_what_the_locks_are_for(engine: Docker) -> None:
    """Python 3.11 with a pip that can install into another environment."""
    code = "import sys, pip; print(sys.version_info[:2], int(pip.__version__.split('.')[0]) >= 23)"
    assert engine("run", "--rm", "--network=none", BASE, "python3", "-c", code) == "(3, 11) True"
