"""The teachers of an agent-loop worker: connected when first needed, one client each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from trainer.config import GKDConfig, TeacherConfig
from trainer.errors import TeacherCredentialsError, TeacherError, TeacherUnavailableError
from trainer.teacher import Credentials, ScoringPlan, TeacherClient, TlsFiles
from trainer.teacher.settings import CREDENTIAL_FILE
from trainer.types import TeacherScores

_log = structlog.get_logger(__name__)

_RECONNECT_DELAY_S = 1.0
"""Between two attempts to reach a teacher that fail at once."""


@dataclass
class _Teacher:
    """One teacher and what is known of it."""

    endpoints: tuple[str, ...] | str
    digest: str
    client: TeacherClient | None = None
    connecting: asyncio.Lock = field(default_factory=asyncio.Lock)
    lost: TeacherError | None = None
    """Why the last call was given up; None once the teacher has answered again."""


class Teachers:
    """Scores sequences by the teacher of their route, within the time that `teacher.on_failure` allows."""

    def __init__(self, gkd: GKDConfig, *, digests: Mapping[str, str], max_tokens: int) -> None:
        """Connect to nothing yet.

        Args:
            gkd: the run's GKD keys.
            digests: of each teacher's manifest, as checked before the run.
            max_tokens: longest prompt plus response.
        """
        self._settings = gkd.teacher
        self._plan = ScoringPlan(
            num_logprobs=gkd.teacher.num_logprobs, temperature=gkd.request_temperature, max_tokens=max_tokens
        )
        self._teachers = {
            name: _Teacher(endpoints=endpoints, digest=digests[name])
            for name, endpoints in gkd.teacher.teachers.items()
        }

    async def score(
        self, name: str, token_ids: Sequence[int], *, score_start: int, affinity: str
    ) -> tuple[TeacherScores, int]:
        """The teacher's distribution at the response's positions, and how many calls it had under way.

        Args:
            name: which teacher.
            token_ids: prompt and response.
            score_start: length of the prompt.
            affinity: equal for responses of one prompt, which then share a replica's prefix cache.

        Raises:
            TeacherError: not scored within `TeacherConfig.give_up_s`.
        """
        teacher = self._teachers[name]
        if self._settings.on_failure == "degrade" and teacher.lost is not None and not _serves(teacher.client):
            raise teacher.lost  # it was waited for once: another wait per step would stop the run after all
        try:
            client = await self._connected(teacher)
            scores = await client.score(
                token_ids,
                score_start=score_start,
                num_logprobs=self._plan.num_logprobs,
                temperature=self._plan.temperature,
                affinity=affinity,
            )
        except TeacherError as error:
            teacher.lost = error
            raise
        teacher.lost = None
        return scores, client.num_inflight + 1

    async def _connected(self, teacher: _Teacher) -> TeacherClient:
        async with teacher.connecting:
            give_up_at = time.monotonic() + self._settings.give_up_s
            while teacher.client is None:
                try:
                    client = self._client(teacher)
                    await client.__aenter__()
                    teacher.client = client
                except (TeacherCredentialsError, TeacherUnavailableError) as error:
                    # it was there before the run began: it is being restarted, or credentials are being changed
                    is_over = self._settings.on_failure == "degrade" or time.monotonic() >= give_up_at
                    if is_over or error.reason == CREDENTIAL_FILE:
                        raise
                    _log.warning("no teacher yet", reason=error.reason, error=str(error))
                    await asyncio.sleep(_RECONNECT_DELAY_S)
            return teacher.client

    def _client(self, teacher: _Teacher) -> TeacherClient:
        settings = self._settings
        return TeacherClient(
            endpoints=teacher.endpoints,
            timeout_s=settings.timeout_s,
            total_timeout_s=settings.give_up_s,
            connect_timeout_s=settings.connect_timeout_s,
            wait_ready_s=settings.give_up_s,
            max_inflight=settings.max_inflight,
            hedge_percentile=settings.hedge_percentile,
            plan=self._plan,
            expected_digest=teacher.digest,
            credentials=credentials_of(settings),
        )


def credentials_of(settings: TeacherConfig) -> Credentials:
    """What the run shows to its teachers."""
    tls = settings.tls
    return Credentials(
        tls=None if tls.ca is None else TlsFiles(ca=tls.ca, cert=tls.cert, key=tls.key, server_name=tls.server_name),
        token_file=settings.token_file,
    )


def _serves(client: TeacherClient | None) -> bool:
    """Whether some replica would take a call now."""
    return client is not None and client.is_serving
