"""A CA, a stranger's CA, certificates and tokens for one test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.certificates import Authority, Pair

TOKEN, OTHER_TOKEN = "a1" * 16, "b2" * 16


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The one that is trusted."""
    return Authority(tmp_path, "authority")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """Another one."""
    return Authority(tmp_path, "stranger")


@pytest.fixture
def server(authority: Authority) -> Pair:
    """The service's certificate."""
    return authority.sign("server")


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file with one token."""
    path = tmp_path / "tokens"
    path.write_text(f"{TOKEN}\n")
    return path
