"""The trainer's metrics for Prometheus, beside the loggers of `trainer.logger`."""

from __future__ import annotations

import numbers
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from trainer.errors import ConfigError

METRIC = "trainer_metric"
"""One gauge for all, told apart by the name that the loggers have."""


class MetricsPort:
    """What the last step logged, offered at an address."""

    def __init__(self, address: str) -> None:
        """Serve nothing yet.

        Args:
            address: `host:port`.
        """
        self._address = address
        self.registry = CollectorRegistry()
        self._metric = Gauge(METRIC, "What trainer.logger got for the last step.", ["name"], registry=self.registry)
        self._steps = Counter("trainer_steps_total", "Steps of this process.", registry=self.registry)
        self._last_step_s = Gauge(
            "trainer_last_step_timestamp_seconds", "When the last step ended; 0: none has.", registry=self.registry
        )

    def serve(self) -> None:
        """Answer `GET /metrics` from now on, by a thread that ends with the process.

        Raises:
            ConfigError: the address can't be listened on.
        """
        host, _, port = self._address.rpartition(":")
        try:
            start_http_server(int(port), addr=host.strip("[]"), registry=self.registry)
        except OSError as exc:
            raise ConfigError(
                f"trainer.metrics_address={self._address} can't be listened on ({exc.strerror or exc}); name another "
                "port, or leave it out"
            ) from exc

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Take over what a step logged; what it did not is gone."""
        self._metric.clear()
        for name, value in metrics.items():
            if isinstance(value, numbers.Real):
                self._metric.labels(name).set(float(value))
        self._steps.inc()
        self._last_step_s.set(time.time())


class MetricsPortMixin:
    """Offers the metrics of verl's trainer, if `trainer.metrics_address` says where."""

    config: Any
    _port: MetricsPort | None = None

    def on_init_end(self) -> None:
        """Called by verl before the first step."""
        super().on_init_end()  # type: ignore[misc]  # verl's trainer follows in the class order
        address = self.config.trainer.get("metrics_address")
        if address is not None:
            self._port = MetricsPort(address)
            self._port.serve()

    def _compute_metrics(self, batch: Any, metrics: dict[str, Any], *rest: Any, **more: Any) -> None:
        super()._compute_metrics(batch, metrics, *rest, **more)  # type: ignore[misc]
        if self._port is not None:
            self._port.update(metrics)
