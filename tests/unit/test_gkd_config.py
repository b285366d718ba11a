"""The GKD keys: defaults, validation, and agreement with the YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

import trainer.config
from trainer.config import GKDConfig, Mode, check_conflicts
from trainer.config.gkd import ActorConfig, DataConfig, TeacherConfig, TrainerConfig
from trainer.errors import ConfigError
from trainer.teacher import Credentials, TlsFiles
from trainer.verl_adapter.teachers import credentials_of

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
MIXED = {"trainer.enable_off_policy": True, "trainer.gkd_lambda": 0.5}


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


def test_tls_and_token_are_paths_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of Ray may stand in another folder; the public authorities are no path."""
    monkeypatch.chdir(tmp_path)
    teacher = GKDConfig.read(_config(teacher={"tls": {"ca": "ca.pem"}, "token_file": "token"})).teacher
    assert (teacher.tls.ca, teacher.token_file) == (f"{tmp_path / 'ca.pem'}", f"{tmp_path / 'token'}")
    assert GKDConfig.read(_config(teacher={"tls": {"ca": "system"}})).teacher.tls.ca == "system"


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"tls": {"cert": "c", "ca": "a"}}, "cert and key belong together"),
        ({"tls": {"server_name": "teacher"}}, "ca is null, so nothing would be encrypted"),
        ({"tls": {"kee": "k"}}, "did you mean actor_rollout_ref.teacher.tls.key?"),
        ({"token": "t"}, "did you mean actor_rollout_ref.teacher.token_file?"),
    ],
)
def test_half_a_security_setting_is_refused(teacher: dict[str, Any], said: str) -> None:
    """Nobody shall believe that something is encrypted that is not."""
    with pytest.raises(ConfigError) as caught:
        GKDConfig.read(_config(teacher=teacher))
    assert said in str(caught.value)


def test_preflight_and_workers_show_the_same(tmp_path: Path) -> None:
    """Every key reaches the client."""
    tls = {name: f"{tmp_path / name}" for name in ("ca", "cert", "key")} | {"server_name": "teacher"}
    teacher = GKDConfig.read(_config(teacher={"tls": tls, "token_file": f"{tmp_path / 'token'}"})).teacher
    assert credentials_of(teacher) == Credentials(tls=TlsFiles(**tls), token_file=f"{tmp_path / 'token'}")
    assert credentials_of(GKDConfig.read(_config()).teacher) == Credentials()


GKD_GRPO = {"use_teacher_kl_loss": True}


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
    assert gkd.teacher.teachers == {"teacher": ("127.0.0.1:15555",)}
    assert (gkd.teacher.on_failure, gkd.teacher.give_up_s) == ("wait", 600.0)


def test_gkd_only_mode_is_read_from_its_paths() -> None:
    """The keys stand where the documentation puts them."""
    teacher = {"server_ip": "10.0.0.7", "server_port": 1234, "n_server_workers": 3, "temperature": 2.0}
    gkd = GKDConfig.read(_config({**GKD_ONLY, "teacher_kl_temperature": 1.5}, teacher=teacher))
    assert gkd.mode is Mode.GKD
    assert gkd.teacher.teachers == {"teacher": ("10.0.0.7:1234",)}
    assert gkd.teacher.max_inflight == 3 * 64
    assert gkd.request_temperature == pytest.approx(3.0)


def test_endpoints_replace_the_single_address() -> None:
    """A list of replicas wins over server_ip and server_port."""
    gkd = GKDConfig.read(_config(GKD_ONLY, teacher={"endpoints": ["a:1", "b:2"]}))
    assert gkd.teacher.teachers == {"teacher": ("a:1", "b:2")}


def test_a_dns_name_stays_one_name() -> None:
    """It is looked up by the client, again and again."""
    gkd = GKDConfig.read(_config(GKD_ONLY, teacher={"endpoints": "teacher.default.svc:15555"}))
    assert gkd.teacher.teachers == {"teacher": "teacher.default.svc:15555"}


def test_routes_choose_by_value() -> None:
    """Each value its own teacher, and one for the rest; without that one, others are refused by name."""
    routes: dict[str, Any] = {"math": ["a:1", "b:2"], "*": "c:3"}
    teacher = GKDConfig.read(_config(GKD_ONLY, teacher={"routes": routes})).teacher
    assert teacher.teachers == {"math": ("a:1", "b:2"), "*": "c:3"}
    assert [teacher.teacher_for(one) for one in ("math", "code", None)] == ["math", "*", "*"]
    del routes["*"]
    teacher = GKDConfig.read(_config(GKD_ONLY, teacher={"routes": routes})).teacher
    with pytest.raises(ConfigError, match=r"data_source='code'.*knows only math"):
        teacher.teacher_for("code")


def test_fail_gives_up_after_one_attempts_time() -> None:
    """The others wait for max_wait_s."""
    for on_failure, expected in (("wait", 9.0), ("degrade", 9.0), ("fail", 4.0)):
        teacher = {"on_failure": on_failure, "timeout_s": 4.0, "max_wait_s": 9.0}
        assert GKDConfig.read(_config(GKD_GRPO, teacher=teacher)).teacher.give_up_s == expected


def test_degrade_leaves_some_unscored() -> None:
    """A batch may then hold responses without scores, whichever were selected."""
    teacher = {"on_failure": "degrade"}
    assert GKDConfig.read(_config(GKD_GRPO, teacher=teacher)).scores_partly
    assert not GKDConfig.read(_config(GKD_GRPO)).scores_partly
    assert not GKDConfig.read(_config({}, teacher=teacher)).scores_partly


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
        ({}, {"teacher": {"on_failure": "ignore"}}, "teacher.on_failure='ignore'"),
        ({}, {"teacher": {"min_coverage": -0.1}}, "teacher.min_coverage=-0.1"),
        ({}, {"teacher": {"hedge_percentile": 1.0}}, "teacher.hedge_percentile=1.0"),
        ({}, {"teacher": {"temperature": float("inf")}}, "teacher.temperature=inf"),
        ({}, {"trainer": {"gkd_lambda": 1.5}}, "trainer.gkd_lambda=1.5"),
        ({}, {"data": {"off_policy_batch_size": 0}}, "data.off_policy_batch_size=0"),
    ],
)
def test_out_of_range_values_are_refused(actor: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    """The error names the key and the value."""
    with pytest.raises(ConfigError, match=message):
        GKDConfig.read(_config({**GKD_ONLY, **actor}, **sections))


def _check(config: dict[str, Any]) -> None:
    check_conflicts(GKDConfig.read(config), config)


@pytest.mark.parametrize(
    ("actor", "n", "changes", "message"),
    [
        (GKD_GRPO, 4, {"trainer.enable_off_policy": True}, "off-policy data is not supported with GRPO"),
        ({}, 4, {"trainer.enable_off_policy": True}, "off-policy data is not supported with GRPO"),
        ({**GKD_ONLY, "gkd_select_strategy": "best"}, 4, {}, "=best ranks responses by reward, and there is none"),
        ({**GKD_ONLY, "gkd_select_strategy": "worst"}, 4, {}, "=worst ranks responses by reward, and there is none"),
        ({**GKD_GRPO, "gkd_select_k": 5}, 4, {}, r"gkd_select_k=5 .*rollout\.n=4"),
        (GKD_ONLY, 1, {"actor_rollout_ref.teacher.on_failure": "degrade"}, "on_failure=degrade goes on with GRPO"),
        (GKD_ONLY, 1, {"actor_rollout_ref.teacher.routes": {}}, "teacher.routes is empty"),
        (
            GKD_ONLY,
            1,
            {"actor_rollout_ref.teacher.routes": {"a": "h:1"}, "actor_rollout_ref.teacher.endpoints": ["h:2"]},
            "would be ignored beside teacher.routes",
        ),
        (
            GKD_ONLY,
            1,
            {"trainer.v1.trainer_mode": "separate_async", "trainer.v1.sampler.max_off_policy_threshold": None},
            "max_off_policy_threshold=null leaves the age of responses unbounded",
        ),
        (
            GKD_ONLY,
            1,
            {
                "trainer.v1.trainer_mode": "colocate_async",
                "trainer.enable_off_policy": True,
                "trainer.gkd_lambda": 0.5,
            },
            "use trainer.v1.trainer_mode=sync",
        ),
        (
            {**GKD_GRPO, "shuffle": True},
            4,
            {"actor_rollout_ref.teacher.on_failure": "degrade"},
            "the scored tokens of each mini-batch are counted",
        ),
        ({**GKD_ONLY, "gkd_select_strategy": "random", "gkd_select_k": 2}, 1, {}, r"gkd_select_k=2 .*rollout\.n=1"),
        (
            {**GKD_GRPO, "gkd_select_strategy": "best"},
            4,
            {"reward.reward_model.enable": True, "reward.reward_model.enable_resource_pool": False},
            "reward.reward_model.enable_resource_pool=true",
        ),
        ({**GKD_GRPO, "gkd_select_strategy": "random", "shuffle": True}, 4, {}, "actor.shuffle=true"),
        ({**GKD_ONLY, "strategy": "veomni"}, 1, {}, "actor.strategy=veomni.* use fsdp, fsdp2, megatron"),
        ({**GKD_ONLY, "use_kl_loss": True}, 1, {}, "actor.use_kl_loss=true"),
        ({**GKD_ONLY, "entropy_coeff": 0.01}, 1, {}, "actor.entropy_coeff=0.01"),
        (GKD_ONLY, 1, {"algorithm.use_kl_in_reward": True}, "algorithm.use_kl_in_reward=true"),
        (GKD_ONLY, 1, {"distillation.enabled": True}, "distillation.enabled=true"),
        (GKD_ONLY, 1, {**MIXED, "algorithm.filter_groups.enable": True}, "algorithm.filter_groups.enable=true"),
        (GKD_ONLY, 1, {**MIXED, "data.train_batch_size": 8, "data.gen_batch_size": 4}, "data.gen_batch_size=4"),
        (
            GKD_ONLY,
            1,
            {**MIXED, "trainer.v1.sampler.sync_refill_failed_groups": True},
            "sync_refill_failed_groups=true",
        ),
    ],
)
def test_contradictions_are_refused_at_start(
    actor: dict[str, Any], n: int, changes: dict[str, Any], message: str
) -> None:
    """Two keys that can't both be meant, or one that would be ignored: an error with its remedy."""
    config = _config(actor, n)
    for key, value in changes.items():
        OmegaConf.update(nested := OmegaConf.create(config), key, value, force_add=True)
        config = OmegaConf.to_container(nested)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=message):
        _check(config)


@pytest.mark.parametrize(
    ("actor", "n", "sections"),
    [
        ({}, 4, {}),
        ({"use_kl_loss": True, "entropy_coeff": 0.1, "shuffle": True}, 4, {}),
        (GKD_ONLY, 1, {"trainer": {"enable_off_policy": True, "gkd_lambda": 0.7}, "data": {"off_policy_files": "y"}}),
        ({**GKD_ONLY, "gkd_select_strategy": "random"}, 2, {}),
        ({**GKD_GRPO, "shuffle": True, "use_kl_loss": True}, 4, {}),
        *(({**GKD_GRPO, "gkd_select_strategy": one, "gkd_select_k": 2}, 4, {}) for one in ("random", "best", "worst")),
    ],
)
def test_what_belongs_together_is_let_pass(actor: dict[str, Any], n: int, sections: dict[str, Any]) -> None:
    """The refusals above refuse nothing else."""
    _check(_config(actor, n, **sections))


def test_modes_follow_the_two_switches() -> None:
    """use_teacher_kl_loss and gkd_only_mode choose among three modes."""
    assert GKDConfig.read(_config({"gkd_only_mode": True})).mode is Mode.GRPO
    assert GKDConfig.read(_config(GKD_ONLY)).mode is Mode.GKD
    assert GKDConfig.read(_config(GKD_GRPO)).mode is Mode.GKD_GRPO
