"""When the fast route is taken, and when it is not: versions, signatures, and the sequence scored by both routes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from protos.arrays import ScoreArrays
from teacher_service.engine.vllm.fast import self_check
from teacher_service.engine.vllm.fast.probe import ProbeError, check_frontend, check_runner
from teacher_service.types import EngineInfo

SCORES = ScoreArrays(
    sampled_logprobs=np.float32([-1.0, -2.0]),
    topk_token_ids=np.int32([[3], [4]]),
    topk_logprobs=np.float32([[-0.5], [-0.25]]),
    log_tail_mass=np.float32([-0.9, -1.5]),
)


def engine_info(**changes: Any) -> EngineInfo:
    given: dict[str, Any] = {
        "name": "vllm", "version": "1", "model_name": "m", "weights_digest": None, "tokenizer": None, "vocab_rows": 50,
        "dtype": "float32", "max_model_len": 512, "max_request_tokens": 511, "max_num_logprobs": 16,
        "capabilities": frozenset(),
    }  # fmt: skip
    return EngineInfo(**given | changes)


@pytest.mark.parametrize("version", ["0.27.1", "0.29.0", "1.28.0"])
def test_a_version_that_was_not_tested_is_refused_by_name(version: str) -> None:
    """The message names it, and those that were."""
    with pytest.raises(ProbeError, match=rf"vLLM {version} is not among the tested versions 0\.28"):
        check_frontend(version)


def test_a_runner_that_lacks_a_part_is_refused_by_name() -> None:
    """As the V2 runner does."""
    with pytest.raises(ProbeError, match="has no num_prompt_logprobs"):
        check_runner(SimpleNamespace())


def test_a_method_with_another_signature_is_refused() -> None:
    """It would be called with what it does not take."""

    class Runner(SimpleNamespace):
        def _get_prompt_logprobs_dict(self, hidden_states: Any) -> None: ...

    names = ("num_prompt_logprobs", "requests", "query_start_loc", "input_batch", "model", "model_config")
    with pytest.raises(ProbeError, match="takes \\('hidden_states',\\), not"):
        check_runner(Runner(**dict.fromkeys(names)))


@pytest.mark.parametrize("name", ["sampled_logprobs", "topk_logprobs"])
@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_routes_that_differ_are_told_apart(name: str, wrong: float) -> None:
    """By more than rounding, or by NaN."""
    self_check.compare(SCORES, SCORES, dtype="float32")
    values = getattr(SCORES, name).copy()
    values[-1] += wrong
    with pytest.raises(ProbeError, match=f"the fast route's {name} differ"):
        self_check.compare(dataclasses.replace(SCORES, **{name: values}), SCORES, dtype="float32")


def test_half_precision_may_differ_by_its_rounding() -> None:
    """A tenth of a nat is rounding in bfloat16, a nat is not."""
    for difference, is_wrong in ((0.1, False), (1.0, True)):
        other = dataclasses.replace(SCORES, sampled_logprobs=SCORES.sampled_logprobs - np.float32(difference))
        if is_wrong:
            with pytest.raises(ProbeError):
                self_check.compare(other, SCORES, dtype="bfloat16")
        else:
            self_check.compare(other, SCORES, dtype="bfloat16")


@pytest.mark.parametrize("max_request_tokens", [2, 3, 20, 511])
def test_the_sequence_that_is_compared_fits_any_engine(max_request_tokens: int) -> None:
    """It has a prompt and at least one scored token."""
    job = self_check.make_job(engine_info(max_request_tokens=max_request_tokens, max_num_logprobs=3))
    assert 2 <= job.num_tokens <= max_request_tokens
    assert 1 <= job.score_start < job.num_tokens
    assert job.num_logprobs == 3
    assert job.token_ids.max() < 50
