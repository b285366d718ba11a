"""verl's agent-loop worker with a teacher: each response is scored the moment it is known that it is to be."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from protos import tracing
from trainer.config import REWARD_STRATEGIES, GKDConfig, Mode
from trainer.errors import TeacherError
from trainer.metrics import TeacherCall
from trainer.selection import select_by_reward, select_random
from trainer.types import TeacherScores
from trainer.verl_adapter import ground_truth as _ground_truth  # noqa: F401  # its decorator registers the loop
from trainer.verl_adapter import teacher_fields
from trainer.verl_adapter.dataset import conversation_text
from trainer.verl_adapter.prompt_group import PromptGroup
from trainer.verl_adapter.teachers import Teachers

GENERATED_AT, TEACHER_CALL, TEACHER_ERROR = "gkd_generated_at_s", "gkd_teacher_call", "gkd_teacher_error"
"""Keys of a response's `extra_fields`: when it was complete; what its teacher call cost, or why it failed, as
`{"teacher": NAME, "message": TEXT, "ended_at_s": TIME}`. A response that was not selected has neither of the
last two."""
LOST_TAG = "gkd_teacher_lost"
"""Tag of a response that the teacher was asked about in vain: why it did not score it."""

# verl hands the worker an actor class; the plain class behind it can be subclassed
_PlainWorker: type[Any] = AgentLoopWorkerTQ.__ray_metadata__.modified_class


TRACED_AS = "gkd-trainer"
"""What the trainer's spans are said to come from."""


@dataclass
class _Response:
    """One response under way: verl's steps for it share this through a context variable."""

    validate: bool
    outputs: list[AgentLoopOutput]
    generated_at_s: float = field(default_factory=time.time)
    scoring: asyncio.Task[None] | None = None
    """Under way beside the reward, where the selection does not depend on it."""


_current: ContextVar[_Response] = ContextVar("response")


class GKDAgentLoopWorker(_PlainWorker):  # type: ignore[misc]  # verl carries no types
    """Scores responses while others still generate; a failure is kept with its response, never lost."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # verl's signature, passed on whole
        super().__init__(*args, **kwargs)
        tracing.start_tracing(TRACED_AS)
        self._gkd = GKDConfig.model_validate(OmegaConf.to_container(self.config.gkd, resolve=True))
        self._teachers = Teachers(
            self._gkd,
            digests=self.config.gkd_manifest_digests,
            max_tokens=int(self.config.data.max_prompt_length + self.config.data.max_response_length),
        )
        self._groups: dict[str, PromptGroup] = {}

    async def _run_prompt(
        self, prompt: dict[str, Any], sampling_params: dict[str, Any], trajectory: dict[str, Any], trace: bool = False
    ) -> None:
        rollout = self.config.actor_rollout_ref.rollout
        num_responses = prompt.get("__rollout_n__", rollout.val_kwargs.n if trajectory["validate"] else rollout.n)
        uid = prompt["uid"]
        self._groups[uid] = PromptGroup(int(num_responses))
        try:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        finally:
            del self._groups[uid]

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        try:
            return await super()._run_agent_loop(
                sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
            )
        finally:
            self._groups[kwargs["uid"]].settle(kwargs["session_id"])  # the siblings of a failed response go on

    async def _agent_loop_postprocess(
        self, output: AgentLoopOutput | list[AgentLoopOutput], validate: bool, **kwargs: Any
    ) -> None:
        response = _Response(validate=validate, outputs=output if isinstance(output, list) else [output])
        _current.set(response)
        try:
            await super()._agent_loop_postprocess(output, validate, **kwargs)
        finally:
            if response.scoring is not None:
                response.scoring.cancel()  # nothing to do but after a failed reward
        await self._report_loss(response, f"{kwargs['uid']}_{kwargs['session_id']}")

    async def _report_loss(self, response: _Response, key: str) -> None:
        """Tell the trainer at once that a response has no scores: it decides before it takes the batch."""
        for number, output in enumerate(response.outputs):
            if (error := output.extra_fields.get(TEACHER_ERROR)) is not None:
                # verl's key of this part of the conversation
                await tq.async_kv_put(key=f"{key}_{number}", partition_id="train", tag={LOST_TAG: error["message"]})

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        response = _current.get()
        if not response.validate:
            if self._gkd.actor.gkd_select_strategy not in REWARD_STRATEGIES:
                response.scoring = asyncio.create_task(self._score(response, kwargs))
            if self._gkd.mode is Mode.GKD:
                return  # distillation alone has no reward
        await super()._compute_score(outputs, kwargs)
        self._groups[kwargs["uid"]].settle(kwargs["session_id"], outputs[-1].reward_score)

    async def _compute_teacher_logprobs(
        self,
        output: AgentLoopOutput,
        prompt_ids: list[int],
        response_ids: list[int],
        validate: bool,
        sample_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if validate or sample_kwargs is None:
            return
        response = _current.get()
        await (response.scoring or self._score(response, sample_kwargs))

    async def _score(self, response: _Response, kwargs: dict[str, Any]) -> None:
        """Fill in the teacher's fields: its scores if the response is selected, no rows if it is not."""
        selected = kwargs["session_id"] in await self._selected(self._groups[kwargs["uid"]], kwargs)
        for output in response.outputs:  # an agent loop may have cut its conversation into several sequences
            output.extra_fields[GENERATED_AT] = response.generated_at_s
            scores = await self._score_output(output, kwargs) if selected else None
            if scores is None:
                ids, logprobs = teacher_fields.unscored(self._gkd.teacher.num_logprobs)
            else:
                ids, logprobs = teacher_fields.pack(scores)
            output.extra_fields[teacher_fields.TEACHER_IDS] = ids
            output.extra_fields[teacher_fields.TEACHER_LOGPROBS] = logprobs

    async def _selected(self, group: PromptGroup, kwargs: dict[str, Any]) -> frozenset[int]:
        actor = self._gkd.actor
        match actor.gkd_select_strategy:
            case "all":
                return frozenset(range(group.num_responses))
            case "random":
                return select_random(
                    num_responses=group.num_responses,
                    k=actor.gkd_select_k,
                    seed=self._gkd.trainer.data_partition_seed,
                    group=f"{kwargs['global_steps']}|{conversation_text(kwargs['raw_prompt'])}",
                )
            case "best" | "worst":
                rewards = await group.rewards()
                return select_by_reward(rewards, k=actor.gkd_select_k, best=actor.gkd_select_strategy == "best")

    async def _score_output(self, output: AgentLoopOutput, kwargs: dict[str, Any]) -> TeacherScores | None:
        settings = self._gkd.teacher
        name = settings.teacher_for(kwargs.get(settings.route_key))
        asked_at_s = time.time()
        try:
            with tracing.in_step(self.config.gkd_run_id, int(kwargs["global_steps"])):
                scores, num_inflight = await self._teachers.score(
                    name,
                    [*output.prompt_ids, *output.response_ids],
                    score_start=len(output.prompt_ids),
                    affinity=kwargs["uid"],
                )
        except TeacherError as exc:
            # raising here would drop the response from the batch without a word; the trainer decides instead
            output.extra_fields[TEACHER_ERROR] = {"teacher": name, "message": str(exc), "ended_at_s": time.time()}
            return None
        call = TeacherCall(
            teacher=name,
            asked_at_s=asked_at_s,
            scored_at_s=time.time(),
            latency_s=scores.timings.total_s,
            scored_tokens=scores.num_scored,
            tail_mass=0.0 if scores.log_tail_mass is None else float(np.exp(scores.log_tail_mass).mean()),
            num_inflight=num_inflight,
        )
        output.extra_fields[TEACHER_CALL] = dataclasses.asdict(call)
        return scores


class GKDAgentLoopManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """verl's manager over the worker above. Named in `rollout.agent.agent_loop_manager_class`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(GKDAgentLoopWorker)
