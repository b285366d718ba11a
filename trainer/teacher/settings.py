"""What a client is told when it is made, checked at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from protos.arrays import Float32Array
from protos.credential_files import CredentialFileError
from protos.hosts import is_loopback
from trainer.errors import ConfigError, TeacherCredentialsError
from trainer.teacher.compatibility import ScoringPlan, StudentInfo
from trainer.teacher.credentials import Credentials, Identity
from trainer.teacher.resolver import Naming, Resolve, check_endpoints, split_endpoint
from trainer.teacher.retry import RetryPolicy

_log = structlog.get_logger(__name__)

CREDENTIAL_FILE = "CREDENTIAL_FILE"
"""Reason of a failure before anything was sent: a token or TLS file can't be used."""

_TIMES = (
    "timeout_s",
    "total_timeout_s",
    "connect_timeout_s",
    "health_period_s",
    "resolve_period_s",
    "canary_period_s",
    "report_period_s",
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClientSettings:
    """The settings of a client; their meaning is told where `TeacherClient` takes them."""

    endpoints: Sequence[str] | str
    timeout_s: float
    total_timeout_s: float
    connect_timeout_s: float
    wait_ready_s: float
    max_inflight: int
    retry: RetryPolicy
    student: StudentInfo | None
    plan: ScoringPlan
    expected_digest: str | None
    hedge_percentile: float | None
    health_period_s: float
    resolve_period_s: float
    canary_period_s: float
    canary_tolerance: float
    canary_reference: Float32Array | None
    report_period_s: float
    resolve: Resolve
    credentials: Credentials

    def __post_init__(self) -> None:
        check_endpoints(self.endpoints)
        for name in _TIMES:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}, must be finite and > 0 seconds")
        if not self.wait_ready_s >= 0:
            raise ConfigError(f"wait_ready_s is {self.wait_ready_s}, must be >= 0 seconds")
        if self.max_inflight < 1:
            raise ConfigError(f"max_inflight is {self.max_inflight}, must be >= 1")
        if not self.canary_tolerance > 0:
            raise ConfigError(f"canary_tolerance is {self.canary_tolerance}, must be > 0 nats")
        if self.hedge_percentile is not None and not 0.5 < self.hedge_percentile < 1:
            raise ConfigError(
                f"hedge_percentile is {self.hedge_percentile}, must be in (0.5, 1): 0.95 hedges one call in twenty, "
                "None none"
            )

    @property
    def naming(self) -> Naming | None:
        """The name that resolves to the replicas; None where they are listed."""
        if not isinstance(self.endpoints, str):
            return None
        return Naming(name=self.endpoints, resolve=self.resolve, period_s=self.resolve_period_s)

    def identity(self) -> Identity:
        """What the client shows from now on.

        Raises:
            TeacherCredentialsError: a file can't be used.
        """
        known_as = split_endpoint(self.endpoints)[0] if isinstance(self.endpoints, str) else None
        try:
            identity = Identity(self.credentials, known_as=known_as)
        except CredentialFileError as exc:
            raise TeacherCredentialsError(f"{exc}", endpoint=self.where, reason=CREDENTIAL_FILE) from exc
        hosts = {split_endpoint(one)[0] for one in self._listed}
        if identity.sends_token and not identity.is_private and not all(map(is_loopback, hosts)):
            _log.warning(
                "the token and all token ids travel in plain text; set actor_rollout_ref.teacher.tls.ca where others "
                "share the network",
                endpoints=self.where,
            )
        return identity

    @property
    def _listed(self) -> Sequence[str]:
        return [self.endpoints] if isinstance(self.endpoints, str) else self.endpoints

    @property
    def where(self) -> str:
        """The teacher's whereabouts, for messages."""
        return self.endpoints if isinstance(self.endpoints, str) else ", ".join(self.endpoints)
