"""What the CPU switch sets, and what it leaves to the user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from trainer.verl_adapter.cpu import environment
from trainer.verl_adapter.defaults import choose_micro_batches


def _config() -> DictConfig:
    return OmegaConf.create(
        {
            "actor_rollout_ref": {
                "actor": {"strategy": "fsdp", "use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": None},
                "rollout": {"log_prob_micro_batch_size_per_gpu": None},
                "ref": {"log_prob_micro_batch_size_per_gpu": None},
                "model": {"override_config": {}},
            },
            "trainer": {"n_gpus_per_node": 8, "v1": {"trainer_mode": "sync"}},
            "ray_kwargs": {"ray_init": {"num_cpus": None}},
        }
    )


def test_defaults_fill_in_where_the_user_is_silent() -> None:
    """Every default is applied, and Ray counts as many workers as the trainer has."""
    config = _config()
    environment.apply_config_defaults(config, frozenset())
    for key, value in environment.CONFIG_DEFAULTS.items():
        assert OmegaConf.select(config, key) == value
    assert config.ray_kwargs.ray_init.num_gpus == 1


def test_the_user_wins() -> None:
    """A key of the command line keeps its value."""
    config = _config()
    config.trainer.n_gpus_per_node = 2
    environment.apply_config_defaults(config, {"trainer.n_gpus_per_node", "actor_rollout_ref.actor.strategy"})
    assert config.trainer.n_gpus_per_node == 2
    assert config.ray_kwargs.ray_init.num_gpus == 2
    assert config.actor_rollout_ref.actor.strategy == "fsdp"


def test_micro_batches_are_packed_by_tokens_unless_sized() -> None:
    """verl refuses to run without a micro-batch size; packing needs none."""
    config = _config()
    choose_micro_batches(config, frozenset())
    assert config.actor_rollout_ref.actor.use_dynamic_bsz is True


def test_a_given_micro_batch_size_serves_every_pass() -> None:
    """The actor's size is also that of the logprob passes, whose own size may still be given."""
    config = _config()
    config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu = 4
    config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu = 2
    given = {"actor.ppo_micro_batch_size_per_gpu", "ref.log_prob_micro_batch_size_per_gpu"}
    choose_micro_batches(config, {f"actor_rollout_ref.{name}" for name in given})
    assert config.actor_rollout_ref.actor.use_dynamic_bsz is False
    assert config.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu == 4
    assert config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu == 2


def test_environment_reaches_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray workers get the driver's values, the user's own included."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    config = _config()
    environment.apply_config_defaults(config, frozenset())
    env_vars = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert env_vars.OMP_NUM_THREADS == "4"
    assert env_vars.VERL_PLATFORM == "cpu"


def test_choosing_the_environment_imports_nothing_heavy() -> None:
    """verl, vLLM, Ray and torch read the environment at import, so they come after it."""
    code = (
        "import sys; import trainer.verl_adapter.cpu.environment; "
        "print([m for m in ('verl', 'vllm', 'ray', 'torch') if m in sys.modules])"
    )
    root = Path(environment.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 f16c", False),
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("processor\t: 0", True),
    ],
)
def test_the_processor_says_whether_it_has_bfloat16(tmp_path: Path, line: str, expected: bool) -> None:
    """And where it says nothing, verl's own choice stays."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: bf16 avx512_bf16\n{line}\n")
    assert environment.has_bfloat16(cpuinfo) is expected
    assert environment.has_bfloat16(tmp_path / "missing")


def test_without_bfloat16_all_is_float32_but_for_what_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bfloat16 is dozens of times slower."""
    for has, expected in ((True, None), (False, "float32")):
        monkeypatch.setattr(environment, "has_bfloat16", lambda has=has: has)
        config = _config()
        environment.apply_config_defaults(config, frozenset())
        assert OmegaConf.select(config, "actor_rollout_ref.rollout.dtype") == expected
    config = _config()
    environment.apply_config_defaults(config, frozenset({"actor_rollout_ref.rollout.dtype"}))
    assert OmegaConf.select(config, "actor_rollout_ref.rollout.dtype") is None
    assert config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == "fp32"


def test_separate_async_has_a_rollout_engine_of_its_own() -> None:
    """Ray counts its worker too, and verl's message that fails at INFO is not reached."""
    config = _config()
    config.trainer.v1.trainer_mode = "separate_async"
    environment.apply_config_defaults(config, frozenset())
    for key, value in environment.SEPARATE_ASYNC_DEFAULTS.items():
        assert OmegaConf.select(config, key) == value
    assert config.ray_kwargs.ray_init.num_gpus == 2
    assert environment.ENVIRONMENT["VERL_LOGGING_LEVEL"] == "WARN"
