"""`python -m trainer.main_ppo <hydra overrides>`: train, distil, or both."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Set
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from trainer.config.hydra_store import register_verl_config
from trainer.errors import GKDError
from trainer.verl_adapter.cpu.warm_workers import warm_workers
from trainer.verl_adapter.prepare import keys_of, prepare

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell has it."""


def main() -> None:
    """Entry point of `gkd-train` and `python -m trainer.main_ppo`."""
    register_verl_config()
    try:
        _compose_and_run()
    except SystemExit as exc:
        # Hydra has printed what it could not compose; it never says which key was meant
        if exc.code == 1:
            _suggest_keys(keys_of([one for one in sys.argv[1:] if not one.startswith("-")]))
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


@hydra.main(config_path="config", config_name="ppo_trainer", version_base=None)  # type: ignore[untyped-decorator]
def _compose_and_run(config: DictConfig) -> None:
    user_keys = keys_of(HydraConfig.get().overrides.task)
    try:
        with warm_workers(config, user_keys):
            run = prepare(config, user_keys)
            from trainer.verl_adapter.launch import launch  # imports verl, which reads the environment set above

            launch(config, run, user_keys)
    except GKDError as exc:
        # Ray wraps an error of a worker in one whose text is the whole remote traceback
        sys.exit(f"error: {getattr(exc, 'cause', exc)}")
    except KeyboardInterrupt:
        print("interrupted; everything was stopped", file=sys.stderr)  # noqa: T201  # for the user
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
