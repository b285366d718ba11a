"""The trainer's metrics for Prometheus: over a real port, as of the last step."""

from __future__ import annotations

import socket
import urllib.request
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainer.errors import ConfigError
from trainer.verl_adapter.metrics_port import MetricsPort, MetricsPortMixin


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class _Plain:
    """verl's trainer as far as it matters."""

    def on_init_end(self) -> None:
        """See verl."""

    def _compute_metrics(self, _batch: Any, metrics: dict[str, Any], timing_raw: Any, *, epoch: int) -> None:
        metrics["training/epoch"] = epoch


class _Trainer(MetricsPortMixin, _Plain):
    def __init__(self, address: str | None) -> None:
        self.config = SimpleNamespace(trainer={"metrics_address": address})


def _lines(port: int) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text.splitlines()


def test_a_step_is_offered_until_the_next_one() -> None:
    """Numbers of every kind under the names that the loggers have; text and what the next step lacks are left out."""
    port = _free_port()
    trainer = _Trainer(f"127.0.0.1:{port}")
    trainer.on_init_end()
    assert "trainer_last_step_timestamp_seconds 0.0" in _lines(port)
    trainer._compute_metrics(None, {"a/b": np.float32(0.5), "once": 1, "text": "x"}, {}, epoch=0)
    assert {'trainer_metric{name="a/b"} 0.5', 'trainer_metric{name="once"} 1.0'} <= set(_lines(port))
    trainer._compute_metrics(None, {"a/b": 2.0}, {}, epoch=1)
    lines = _lines(port)
    assert [one for one in lines if one.startswith("trainer_metric{")] == [
        'trainer_metric{name="a/b"} 2.0',
        'trainer_metric{name="training/epoch"} 1.0',
    ]
    assert "trainer_steps_total 2.0" in lines


def test_without_an_address_nothing_is_served() -> None:
    """And steps go on as ever."""
    trainer, metrics = _Trainer(None), dict[str, Any]()
    trainer.on_init_end()
    trainer._compute_metrics(None, metrics, {}, epoch=3)
    assert metrics == {"training/epoch": 3}


def test_a_taken_port_is_named() -> None:
    """Before the first step, with the key to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"trainer.metrics_address=127.0.0.1:{port} can't be listened on"):
            MetricsPort(f"127.0.0.1:{port}").serve()
