"""The V2 worker, driven step by step with hand-made batches, against a plain log_softmax; and its mutations, caught."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytestmark = [
    pytest.mark.vllm_v2,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs vLLM's V2 runner in Triton's interpreter, TRITON_INTERPRET=1; run `make test-vllm-v2`",
    ),
    # vLLM's imports still use what torch has deprecated.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]
NUM_SCHEDULES = 60
MIN_EVENTS = 3
MUTATIONS = {
    "rows shifted by one": ("index_of(rows),", "index_of(rows) + 1,"),
    "targets shifted by one": ("all_token_ids[at[1], at[2]]", "all_token_ids[at[1], at[2] - 1]"),
    "first chunk lost": ("if here is not None:", "if here is not None and computed > 0:"),
    "later chunks lost": ("if here is not None:", "if here is not None and here.at.start == 0:"),
    "last row lost": ("num_tokens=num_tokens,", "num_tokens=min(num_tokens, prompt_len - 2 - computed),"),
    "rows of the batch's first request": ("offset=int(input_batch.query_start_loc_np[i])", "offset=0"),
    "targets of another request": ("states.append(state)", "states.append(i)"),
    "answered a step early": ("computed + num_tokens >= prompt_len", "computed + num_tokens >= prompt_len - 1"),
    "answered a step late": ("computed + num_tokens >= prompt_len", "computed + num_tokens > prompt_len"),
    "answered again once resumed": (" or prompt_len < int(input_batch.prefill_len_np[i])", ""),
    "kept after its end": ("self._requests.pop(req_id, None)", "pass"),
    "also scored by vLLM's own code": ("self.uses_prompt_logprobs[req_idx] = False", "pass"),
    "others hidden from vLLM's own code": ("uses_prompt_logprobs[req_idx] = False", "uses_prompt_logprobs[:] = False"),
}  # fmt: skip
"""What is wrong, the text of v2.py that is replaced for it, and by what."""


@pytest.fixture
def v2() -> ModuleType:
    """The module under test. Not imported above, since it imports vLLM's V2 runner."""
    import vllm.v1.worker.cpu.shm  # noqa: F401 - first, as in vLLM's worker for CPUs: it replaces what needs CUDA

    from teacher_service.engine.vllm.fast import v2

    return v2


@pytest.fixture(params=MUTATIONS)
def mutated_v2(v2: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module under test with one fault."""
    old, new = MUTATIONS[request.param]
    source = Path(str(v2.__file__)).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"v2.py does not hold {old!r} once; bring MUTATIONS up to date"
    module = ModuleType("mutated_v2")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(source.replace(old, new), "mutated_v2.py", "exec"), vars(module))  # noqa: S102 - the project's own code
    return module


def _run_schedules(v2: ModuleType) -> Counter[str]:
    """Drive the worker; returns how often each event happened."""
    from tests.support import v2_schedules

    events = Counter(dict.fromkeys(v2_schedules.EVENTS, 0))
    for seed in range(NUM_SCHEDULES):
        events.update(v2_schedules.run(seed, v2.install))
    return events


def test_every_answer_equals_a_plain_log_softmax(v2: ModuleType) -> None:
    """Whatever comes between: chunks, prefix hits, pauses, preemptions, aborts, decode steps, vLLM's own requests."""
    events = _run_schedules(v2)
    assert not {event: times for event, times in events.items() if times < MIN_EVENTS}, "too rare"


def test_a_mutated_worker_is_caught(mutated_v2: ModuleType) -> None:
    """Each fault shows within the same schedules."""
    with pytest.raises((AssertionError, KeyError)):
        _run_schedules(mutated_v2)


def test_ranks_without_prompt_logprobs_are_left_alone(v2: ModuleType) -> None:
    """Those of a pipeline but its last."""
    runner = SimpleNamespace(prompt_logprobs_worker=None)
    v2.install(runner, score=None)
    assert runner.prompt_logprobs_worker is None
