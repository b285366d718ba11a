"""The transformers engine, which is the oracle of other tests, against plain numpy.

Legend: S scored positions, K top-k entries, V vocabulary rows.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from teacher_service.engine.factory import build_engine
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.transformers import TransformersEngine
from teacher_service.errors import EngineError, EngineStartError
from teacher_service.scoring import Scorer
from teacher_service.telemetry import RequestRecord
from teacher_service.types import Capability, ScoreJob
from teacher_service.validation import ScoreRequest
from tests.support.engines import LIMITS, Started, job, random_tokens
from tests.support.models import MAX_LEN, VOCAB_ROWS

pytestmark = pytest.mark.asyncio(loop_scope="module")

V = VOCAB_ROWS


def naive_logprobs(checkpoint: Path, one: ScoreJob) -> NDArray[np.float64]:
    """[S, V]: float64 log-softmax of the model's logits, position by position, each from its own prefix alone."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    rows = []
    with torch.inference_mode():
        for position in range(one.score_start, one.num_tokens):
            prefix = torch.from_numpy(one.token_ids[:position].astype(np.int64))[None]
            logits = model(prefix).logits[0, -1].double().numpy() / one.temperature
            rows.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return np.stack(rows)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
async def test_reference_is_a_full_softmax_of_each_prefix(
    reference: Started, float32_checkpoint: Path, temperature: float
) -> None:
    """Sampled, top-k, tail, entropy and candidates are the plain formulas, at the asked temperature."""
    rng = np.random.default_rng(1)
    num_scored, num_logprobs = 30, 5
    candidates = rng.integers(0, V, (num_scored, 4)).astype(np.int32)
    asked = job(
        random_tokens(rng, 40),
        score_start=10,
        num_logprobs=num_logprobs,
        temperature=temperature,
        candidates=candidates,
        return_entropy=True,
    )
    scores = await reference.engine.score(asked)
    expected_SV = naive_logprobs(float32_checkpoint, asked)
    rows = np.arange(num_scored)
    order_SV = np.argsort(-expected_SV, axis=1)
    rest_SR = np.take_along_axis(expected_SV, order_SV[:, num_logprobs:], axis=1)
    assert scores.topk_token_ids is not None
    tolerance = {"rtol": 0, "atol": 2e-5}
    np.testing.assert_allclose(scores.sampled_logprobs, expected_SV[rows, asked.token_ids[10:]], **tolerance)
    np.testing.assert_allclose(
        scores.topk_logprobs, np.take_along_axis(expected_SV, order_SV[:, :num_logprobs], axis=1), **tolerance
    )
    np.testing.assert_allclose(
        scores.topk_logprobs, np.take_along_axis(expected_SV, scores.topk_token_ids, axis=1), **tolerance
    )
    np.testing.assert_allclose(scores.log_tail_mass, np.log(np.exp(rest_SR).sum(axis=1)), **tolerance)
    np.testing.assert_allclose(scores.entropy, -(np.exp(expected_SV) * expected_SV).sum(axis=1), **tolerance)
    np.testing.assert_allclose(
        scores.candidate_logprobs, np.take_along_axis(expected_SV, candidates, axis=1), **tolerance
    )


async def test_reference_tail_is_exact_where_subtraction_would_be_rounding(
    reference: Started, float32_checkpoint: Path
) -> None:
    """At a low temperature the tail is far below float32's resolution around one, and still right."""
    asked = job(random_tokens(np.random.default_rng(2), 30), num_logprobs=20, temperature=0.1)
    scores = await reference.engine.score(asked)
    expected_SV = np.sort(naive_logprobs(float32_checkpoint, asked), axis=1)[:, ::-1]
    expected_S = np.log(np.exp(expected_SV[:, 20:]).sum(axis=1))
    assert (expected_S < -20).any()
    np.testing.assert_allclose(scores.log_tail_mass, expected_S, rtol=1e-4, atol=1e-4)


async def test_reference_tail_is_minus_infinity_with_the_whole_vocabulary(reference: Started) -> None:
    """At K = V nothing is outside the top-k."""
    scores = await reference.engine.score(job(np.int32([1, 2, 3]), num_logprobs=V))
    np.testing.assert_array_equal(scores.log_tail_mass, np.float32([-np.inf, -np.inf]))


async def test_reference_says_what_it_is(reference: Started, float32_checkpoint: Path) -> None:
    """The manifest's engine part: limits from the model, digests from its files, all capabilities."""
    info = reference.info
    assert (info.name, info.model_name, info.dtype) == ("transformers", float32_checkpoint.name, "float32")
    assert (info.vocab_rows, info.max_model_len, info.max_request_tokens) == (V, MAX_LEN, MAX_LEN)
    assert info.capabilities == {
        Capability.TEMPERATURE,
        Capability.CANDIDATES,
        Capability.ENTROPY,
        Capability.EXACT_TAIL_MASS,
    }
    assert info.tokenizer is not None
    assert info.weights_digest is not None


async def test_reference_drops_a_queued_job_that_is_cancelled(reference: Started) -> None:
    """A cancelled job behind a running one ends at once, and the engine goes on."""
    long = job(random_tokens(np.random.default_rng(3), MAX_LEN))
    running, queued = (asyncio.create_task(reference.engine.score(long)) for _ in range(2))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    assert (await running).num_scored == MAX_LEN - 1


async def test_nan_weights_are_an_error_of_the_job(float32_checkpoint: Path, tmp_path: Path) -> None:
    """A broken checkpoint is answered with EngineError, not with NaN: scoring checks what any engine says."""
    model = AutoModelForCausalLM.from_pretrained(float32_checkpoint)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    engine = TransformersEngine(model=str(tmp_path))
    try:
        info = await engine.start()
        assert info.tokenizer is None
        scorer = Scorer(engine, LIMITS)
        scorer.open(info)
        request = ScoreRequest(token_ids=[1, 2, 3], score_start=1)
        with pytest.raises(EngineError, match="NaN"):
            await scorer.score(request, timeout_s=20.0, record=RequestRecord(method="test"))
    finally:
        await engine.close()


async def test_a_torn_download_stops_the_start(float32_checkpoint: Path, tmp_path: Path) -> None:
    """Weights that end too early are an error that names the folder."""
    torn = shutil.copytree(float32_checkpoint, tmp_path / "torn")
    os.truncate(torn / "model.safetensors", 1000)
    engine = build_engine("transformers", EngineOptions(model=str(torn)))
    with pytest.raises(EngineStartError, match=str(torn)):
        await engine.start()
    await engine.close()


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "float31"), ("device", "abacus"), ("max_model_len", MAX_LEN + 1)]
)
async def test_reference_refuses_settings_that_can_not_be(
    float32_checkpoint: Path, option: str, value: str | int
) -> None:
    """An unknown dtype or device and too long a model length are named."""
    settings = {"dtype": "auto", "device": "auto", "max_model_len": None} | {option: value}
    engine = TransformersEngine(model=str(float32_checkpoint), **settings)
    with pytest.raises(EngineStartError, match=str(value)):
        await engine.start()
    await engine.close()


OWN_MODEL = """
from transformers import Qwen3Config, Qwen3ForCausalLM
class OwnConfig(Qwen3Config):
    model_type = "own"
class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


async def test_a_checkpoint_of_its_own_code_is_served_only_if_that_is_trusted(
    float32_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the flag the start is refused before anything of it runs; with it the answers are those of the code."""
    # where transformers copies such code to
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = shutil.copytree(float32_checkpoint, tmp_path / "own")
    (own / "own.py").write_text(OWN_MODEL)
    config = json.loads((own / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (own / "config.json").write_text(json.dumps(config))
    refused = build_engine("transformers", EngineOptions(model=str(own)))
    with pytest.raises(EngineStartError, match=r"type 'own'.*--trust-remote-code"):
        await refused.start()
    await refused.close()
    one = job(random_tokens(np.random.default_rng(0), 12), score_start=4, num_logprobs=2)
    answers = []
    for options in (
        EngineOptions(model=str(own), trust_remote_code=True),
        EngineOptions(model=str(float32_checkpoint)),
    ):
        engine = build_engine("transformers", options)
        await engine.start()
        answers.append((await engine.score(one)).sampled_logprobs)
        await engine.close()
    np.testing.assert_array_equal(*answers)
