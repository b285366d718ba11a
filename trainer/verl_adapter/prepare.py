"""From a composed configuration to a checked run. Imports neither verl nor Ray."""

from __future__ import annotations

from collections.abc import Iterable, Set

from omegaconf import DictConfig, OmegaConf

from trainer.config import GKDConfig, check_conflicts
from trainer.errors import ConfigError
from trainer.verl_adapter.cpu.environment import apply_config_defaults, set_environment
from trainer.verl_adapter.defaults import choose_for_async, choose_micro_batches
from trainer.verl_adapter.preflight import CheckedRun, preflight


def prepare(config: DictConfig, user_keys: Set[str]) -> CheckedRun:
    """Fill in what the machine and verl need, and check all that can be checked before anything is started.

    Args:
        config: the composed configuration; changed in place. Hydra's own section may be in it.
        user_keys: dotted keys that the command line names.

    Raises:
        GKDError: see `GKDConfig.read`, `check_conflicts` and `preflight`.
    """
    if config.trainer.device == "cpu":
        set_environment()
        apply_config_defaults(config, user_keys)
    choose_micro_batches(config, user_keys)
    choose_for_async(config, user_keys)
    resolved = _resolved(config)
    gkd = GKDConfig.read(resolved)
    check_conflicts(gkd, resolved)
    return preflight(config, gkd, user_keys)


def keys_of(overrides: Iterable[str]) -> Set[str]:
    """The dotted keys that Hydra overrides name."""
    return frozenset(one.split("=", 1)[0].lstrip("+~") for one in overrides)


def _resolved(config: DictConfig) -> dict[str, object]:
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    container = OmegaConf.to_container(own, resolve=True)
    if not isinstance(container, dict):
        raise ConfigError("the configuration is not a mapping")
    return {str(key): value for key, value in container.items()}
