"""`python -m trainer.main_ppo <hydra overrides>`: train, distil, or both."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Set
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from trainer.config import GKDConfig, check_conflicts
from trainer.errors import ConfigError, GKDError
from trainer.verl_adapter.cpu.environment import apply_config_defaults, set_environment
from trainer.verl_adapter.defaults import choose_micro_batches
from trainer.verl_adapter.preflight import preflight

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell has it."""
VERL_CONFIG = "verl_ppo_trainer"
VERL_CONFIG_FOLDER_RESOLVER = "verl_config_folder"


def main() -> None:
    """Entry point of `gkd-train` and `python -m trainer.main_ppo`."""
    _register_verl_config()
    try:
        _compose_and_run()
    except SystemExit as exc:
        # Hydra has printed what it could not compose; it never says which key was meant
        if exc.code == 1:
            _suggest_keys(_user_keys([one for one in sys.argv[1:] if not one.startswith("-")]))
        raise


def _suggest_keys(user_keys: Set[str]) -> None:
    with hydra.initialize_config_dir(str(Path(__file__).parent / "config"), version_base=None):
        composed = OmegaConf.to_container(hydra.compose("ppo_trainer"))
    known = _dotted_keys(composed)
    for key in sorted(user_keys - known):
        near = _nearest(key, known)
        if key and near:
            print(f"unknown key {key}; did you mean {' or '.join(near)}?", file=sys.stderr)  # noqa: T201  # for the user


def _nearest(key: str, known: Set[str]) -> list[str]:
    """The keys most likely meant: another section's key of nearly this name, then keys of nearly this path."""
    by_name = {one: one.rpartition(".")[2] for one in known}
    names = difflib.get_close_matches(key.rpartition(".")[2], set(by_name.values()), n=1, cutoff=0.85)
    elsewhere = sorted(one for one, name in by_name.items() if name in names)
    elsewhere.sort(key=lambda one: -difflib.SequenceMatcher(None, key, one).ratio())
    return list(dict.fromkeys([*elsewhere[:2], *difflib.get_close_matches(key, known, n=3)]))[:3]


def _dotted_keys(section: object, prefix: str = "") -> set[str]:
    if not isinstance(section, dict):
        return set()
    found = set()
    for name, value in section.items():
        found |= {f"{prefix}{name}"} | _dotted_keys(value, f"{prefix}{name}.")
    return found


def _register_verl_config() -> None:
    """Give verl's ppo_trainer.yaml a name of its own, so that ours, of the same name, can build on it.

    verl is found, not imported: it reads its environment at import, which is set only once the device is known.
    """
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: verl is not installed; install this package with its trainer or cpu extra")
    folder = Path(spec.submodule_search_locations[0]) / "trainer" / "config"
    ConfigStore.instance().store(name=VERL_CONFIG, node=OmegaConf.load(folder / "ppo_trainer.yaml"), provider="verl")
    OmegaConf.register_new_resolver(VERL_CONFIG_FOLDER_RESOLVER, lambda: str(folder), replace=True)


@hydra.main(config_path="config", config_name="ppo_trainer", version_base=None)  # type: ignore[untyped-decorator]
def _compose_and_run(config: DictConfig) -> None:
    user_keys = _user_keys(HydraConfig.get().overrides.task)
    try:
        if config.trainer.device == "cpu":
            set_environment()
            apply_config_defaults(config, user_keys)
        choose_micro_batches(config, user_keys)
        resolved = _resolved(config)
        gkd = GKDConfig.read(resolved)
        check_conflicts(gkd, resolved)
        run = preflight(config, gkd, user_keys)
        from trainer.verl_adapter.launch import launch  # imports verl, which reads the environment set above

        launch(config, run, user_keys)
    except GKDError as exc:
        # Ray wraps an error of a worker in one whose text is the whole remote traceback
        sys.exit(f"error: {getattr(exc, 'cause', exc)}")
    except KeyboardInterrupt:
        print("interrupted; everything was stopped", file=sys.stderr)  # noqa: T201  # for the user
        sys.exit(INTERRUPTED)


def _user_keys(overrides: list[str]) -> Set[str]:
    return frozenset(one.split("=", 1)[0].lstrip("+~") for one in overrides)


def _resolved(config: DictConfig) -> dict[str, object]:
    container = OmegaConf.to_container(config, resolve=True)
    if not isinstance(container, dict):
        raise ConfigError("the configuration is not a mapping")
    return {str(key): value for key, value in container.items()}


if __name__ == "__main__":
    main()
