"""Which LoRA adapters are taken: their configuration, as PEFT writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teacher_service.engine.vllm.adapter import Adapter
from teacher_service.errors import EngineStartError


def _written(folder: Path, **config: object) -> str:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, **config}))
    return f"{folder}"


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear", r".*\\.(q|v)_proj", None])
def test_an_adapter_of_other_layers_is_taken(tmp_path: Path, modules: object) -> None:
    """By name, by PEFT's word for all of them, by a regular expression."""
    assert Adapter.read(_written(tmp_path, target_modules=modules)).rank == 8


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": r".*(q_proj|lm_head)"},
    ],
)
def test_an_adapter_of_the_lm_head_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    """However it is named; the remedy is to merge it."""
    with pytest.raises(EngineStartError, match=r"changes lm_head.*merge_and_unload"):
        Adapter.read(_written(tmp_path, **config))


@pytest.mark.parametrize("config", [{"r": None}, {"target_modules": "("}])
def test_a_broken_configuration_is_no_adapter(tmp_path: Path, config: dict[str, object]) -> None:
    """The error names the file and what to give."""
    with pytest.raises(EngineStartError, match=r"is no LoRA adapter.*adapter_config\.json"):
        Adapter.read(_written(tmp_path, **config))
