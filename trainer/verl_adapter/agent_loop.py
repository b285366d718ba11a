"""verl's agent-loop worker with a teacher: each response is scored the moment it is complete."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextvars import ContextVar
from typing import Any

import numpy as np
import ray
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from trainer.config import GKDConfig, Mode
from trainer.errors import TeacherError
from trainer.metrics import TeacherCall
from trainer.teacher import RetryPolicy, ScoringPlan, TeacherClient
from trainer.types import TeacherScores
from trainer.verl_adapter import teacher_fields

TEACHER_CALL, TEACHER_ERROR = "gkd_teacher_call", "gkd_teacher_error"
"""Keys of a response's `extra_fields`: what its teacher call cost, or why it failed."""

# verl hands the worker an actor class; the plain class behind it can be subclassed
_PlainWorker: type[Any] = AgentLoopWorkerTQ.__ray_metadata__.modified_class
# max_wait_s bounds the call, not a number of attempts: a teacher may take minutes to come back
_RETRY = RetryPolicy(max_attempts=1_000_000)

_validating: ContextVar[bool] = ContextVar("validating")


class GKDAgentLoopWorker(_PlainWorker):  # type: ignore[misc]  # verl carries no types
    """Scores responses while others still generate; a failure is kept with its response, never lost."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # verl's signature, passed on whole
        super().__init__(*args, **kwargs)
        self._gkd = GKDConfig.model_validate(OmegaConf.to_container(self.config.gkd, resolve=True))
        data = self.config.data
        self._max_tokens = int(data.max_prompt_length + data.max_response_length)
        self._teacher: TeacherClient | None = None
        self._connecting = asyncio.Lock()

    async def _connected_teacher(self) -> TeacherClient:
        async with self._connecting:
            if self._teacher is None:
                settings = self._gkd.teacher
                teacher = TeacherClient(
                    endpoints=settings.addresses,
                    timeout_s=settings.timeout_s,
                    total_timeout_s=settings.max_wait_s,
                    connect_timeout_s=settings.connect_timeout_s,
                    max_inflight=settings.max_inflight,
                    retry=_RETRY,
                    plan=ScoringPlan(
                        num_logprobs=settings.num_logprobs,
                        temperature=self._gkd.request_temperature,
                        max_tokens=self._max_tokens,
                    ),
                    expected_digest=self.config.gkd_manifest_digest,
                )
                await teacher.__aenter__()
                self._teacher = teacher
            return self._teacher

    async def _agent_loop_postprocess(
        self,
        output: AgentLoopOutput | list[AgentLoopOutput],
        validate: bool,
        **kwargs: Any,
    ) -> None:
        _validating.set(validate)
        await super()._agent_loop_postprocess(output, validate, **kwargs)

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        if self._gkd.mode is Mode.GKD and not _validating.get():
            return  # distillation alone has no reward
        await super()._compute_score(outputs, kwargs)

    async def _compute_teacher_logprobs(
        self,
        output: AgentLoopOutput,
        prompt_ids: list[int],
        response_ids: list[int],
        validate: bool,
        sample_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if validate:
            return
        generated_at_s = time.time()
        try:
            teacher = await self._connected_teacher()
            scores = await teacher.score(
                [*prompt_ids, *response_ids],
                score_start=len(prompt_ids),
                num_logprobs=self._gkd.teacher.num_logprobs,
                temperature=self._gkd.request_temperature,
            )
        except TeacherError as exc:
            # raising here would drop the response from the batch without a word; the trainer decides instead
            output.extra_fields[TEACHER_ERROR] = str(exc)
            return
        ids, logprobs = teacher_fields.pack(scores)
        output.extra_fields[teacher_fields.TEACHER_IDS] = ids
        output.extra_fields[teacher_fields.TEACHER_LOGPROBS] = logprobs
        output.extra_fields[TEACHER_CALL] = _describe(scores, generated_at_s)


def _describe(scores: TeacherScores, generated_at_s: float) -> dict[str, float]:
    call = TeacherCall(
        generated_at_s=generated_at_s,
        scored_at_s=time.time(),
        latency_s=scores.timings.total_s,
        scored_tokens=scores.num_scored,
        tail_mass=0.0 if scores.log_tail_mass is None else float(np.exp(scores.log_tail_mass).mean()),
    )
    return dataclasses.asdict(call)


class GKDAgentLoopManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """verl's manager over the worker above. Named in `rollout.agent.agent_loop_manager_class`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(GKDAgentLoopWorker)
