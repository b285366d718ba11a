"""The GKD keys: defaults, validation, and agreement with the YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

import trainer.config
from trainer.config import GKDConfig, Mode
from trainer.config.gkd import ActorConfig, DataConfig, TeacherConfig, TrainerConfig
from trainer.errors import ConfigError

YAML = Path(trainer.config.__file__).parent / "ppo_trainer.yaml"


def _config(actor: dict[str, Any] | None = None, n: int = 1, **sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "actor_rollout_ref": {
            "actor": {"strategy": "fsdp2", **(actor or {})},
            "rollout": {"n": n},
            "teacher": sections.get("teacher", {}),
        },
        "trainer": {"total_epochs": 1, **sections.get("trainer", {})},
        "data": {"train_files": "x", **sections.get("data", {})},
    }


GKD_ONLY = {"use_teacher_kl_loss": True, "gkd_only_mode": True}


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("actor_rollout_ref.actor", ActorConfig),
        ("actor_rollout_ref.teacher", TeacherConfig),
        ("trainer", TrainerConfig),
        ("data", DataConfig),
    ],
)
def test_yaml_and_code_agree_on_keys_and_defaults(path: str, model: type[BaseModel]) -> None:
    """Every key of the YAML is one of the model's, with the same default, and none is missing."""
    section = OmegaConf.to_container(OmegaConf.select(OmegaConf.load(YAML), path))
    assert section == model().model_dump()


def test_defaults_are_the_documented_ones() -> None:
    """Without a key, a run is plain GRPO with the documented defaults."""
    gkd = GKDConfig.read(_config())
    assert gkd.mode is Mode.GRPO
    assert gkd.actor.teacher_kl_coef == 1.0
    assert gkd.actor.teacher_kl_temperature == 1.0
    assert (gkd.actor.gkd_select_strategy, gkd.actor.gkd_select_k) == ("all", 1)
    assert (gkd.trainer.enable_off_policy, gkd.trainer.gkd_lambda, gkd.trainer.data_partition_seed) == (
        False,
        1.0,
        12345,
    )
    assert gkd.teacher.addresses == ("127.0.0.1:15555",)


def test_gkd_only_mode_is_read_from_its_paths() -> None:
    """The keys stand where the documentation puts them."""
    teacher = {"server_ip": "10.0.0.7", "server_port": 1234, "n_server_workers": 3, "temperature": 2.0}
    gkd = GKDConfig.read(_config({**GKD_ONLY, "teacher_kl_temperature": 1.5}, teacher=teacher))
    assert gkd.mode is Mode.GKD
    assert gkd.teacher.addresses == ("10.0.0.7:1234",)
    assert gkd.teacher.max_inflight == 3 * 64
    assert gkd.request_temperature == pytest.approx(3.0)


def test_endpoints_replace_the_single_address() -> None:
    """A list of replicas wins over server_ip and server_port."""
    gkd = GKDConfig.read(_config(GKD_ONLY, teacher={"endpoints": ["a:1", "b:2"]}))
    assert gkd.teacher.addresses == ("a:1", "b:2")


def test_unknown_teacher_key_names_the_nearest() -> None:
    """A misspelled key fails, and says what was meant."""
    with pytest.raises(ConfigError, match=r"teacher\.server_prt is not a key .* did you mean .*teacher\.server_port\?"):
        GKDConfig.read(_config(GKD_ONLY, teacher={"server_prt": 1}))


@pytest.mark.parametrize(
    ("actor", "sections", "message"),
    [
        ({"teacher_kl_coef": -1}, {}, "actor.teacher_kl_coef=-1"),
        ({"teacher_kl_coef": float("nan")}, {}, "actor.teacher_kl_coef=nan"),
        ({"teacher_kl_temperature": 0}, {}, "actor.teacher_kl_temperature=0"),
        ({"gkd_select_k": 0}, {}, "actor.gkd_select_k=0"),
        ({"gkd_select_strategy": "bset"}, {}, "actor.gkd_select_strategy='bset'"),
        ({}, {"teacher": {"server_port": 0}}, "teacher.server_port=0"),
        ({}, {"teacher": {"temperature": float("inf")}}, "teacher.temperature=inf"),
        ({}, {"trainer": {"gkd_lambda": 1.5}}, "trainer.gkd_lambda=1.5"),
        ({}, {"data": {"off_policy_batch_size": 0}}, "data.off_policy_batch_size=0"),
    ],
)
def test_out_of_range_values_are_refused(actor: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    """The error names the key and the value."""
    with pytest.raises(ConfigError, match=message):
        GKDConfig.read(_config({**GKD_ONLY, **actor}, **sections))


@pytest.mark.parametrize(
    ("actor", "sections", "message"),
    [
        ({"gkd_only_mode": False}, {}, "gkd_only_mode=true"),
        ({"gkd_select_strategy": "best"}, {}, "gkd_select_strategy=best"),
        ({}, {"trainer": {"enable_off_policy": True}}, "enable_off_policy=true"),
    ],
)
def test_what_is_not_offered_is_refused_at_start(actor: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    """A key that would be ignored is an error with its remedy."""
    with pytest.raises(ConfigError, match=message):
        GKDConfig.read(_config({**GKD_ONLY, **actor}, **sections))
