"""Whatever is wrong with the fast route, the service starts, answers by the public route, and says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.engine.factory import build_engine
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm import launch
from teacher_service.engine.vllm.fast import probe
from teacher_service.engine.vllm.seam_table import FAST_PARTS
from teacher_service.engine.vllm.seams import Seam
from tests.integration import test_engines
from tests.integration.test_engines import START_TIMEOUT_S
from tests.support import failing_fast_route
from tests.support.engines import Started, job, random_tokens
from tests.support.service import running_service, score_request

pytestmark = test_engines.pytestmark  # whatever starts vLLM needs the same


def _wrong_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(probe, "SUPPORTED_VERSIONS", ("0.1",))


def _wrong_signature(patch: pytest.MonkeyPatch) -> None:
    looked_up = "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks"
    patch.setattr(probe, "SEAMS", (Seam(FAST_PARTS, looked_up, parameters=(("self", "another"),)),))


def _raising_worker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(launch, "SCORING_EXTENSION", f"{failing_fast_route.__name__}.RaisingExtension")


def _raising_scheduler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(launch, "SCHEDULERS", {False: f"{failing_fast_route.__name__}.RaisingScheduler"})


def _unconstructible_scheduler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(launch, "SCHEDULERS", {False: f"{failing_fast_route.__name__}.UnconstructibleScheduler"})


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (_wrong_version, "is not among the tested versions 0.1"),
        (_wrong_signature, "KVCacheManager.get_computed_blocks takes (self, request"),
        (_raising_worker, "failed in install_scoring"),
        (_raising_scheduler, "the fast route failed at its start: EngineDeadError"),
        (_unconstructible_scheduler, "the fast route failed at its start: EngineStartError"),
    ],
)
async def test_the_service_answers_by_the_public_route(
    monkeypatch: pytest.MonkeyPatch,
    float32_checkpoint: Path,
    reference: Started,
    break_it: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    """The reason stands in one warning, in the manifest and in the metric; answers are right."""
    break_it(monkeypatch)
    tokens = random_tokens(np.random.default_rng(1), 40)
    engine = build_engine("vllm", EngineOptions(model=str(float32_checkpoint), kv_cache_bytes=64 << 20))
    async with running_service(engine, ready_timeout_s=START_TIMEOUT_S) as service:
        manifest = (await service.stub.GetManifest(pb.GetManifestRequest())).manifest
        assert (manifest.engine, manifest.route) == ("vllm", "flat")
        assert reason in manifest.route_reason
        answer = await service.stub.Score(score_request(tokens.tolist(), 20))
        (labels,) = [name for name in await service.metrics() if name.startswith("teacher_engine_route{")]
        log = [json.loads(line) for line in service.log.getvalue().splitlines()]
    expected = await reference.engine.score(job(tokens, score_start=20, num_logprobs=0))
    np.testing.assert_allclose(
        np.frombuffer(answer.sampled_logprobs, dtype="<f4"), expected.sampled_logprobs, rtol=0, atol=1e-4
    )
    assert 'route="flat"' in labels
    assert manifest.route_reason.replace("\\", "\\\\").replace('"', '\\"') in labels
    (warning,) = [line["event"] for line in log if line["level"] == "warning"]
    assert warning.startswith("scoring by vLLM's public route")
    assert warning.endswith(manifest.route_reason)
