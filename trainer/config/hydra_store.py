"""verl's configuration under a name of its own, so that ours, of the same name, can build on it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

VERL_CONFIG = "verl_ppo_trainer"
VERL_CONFIG_FOLDER_RESOLVER = "verl_config_folder"


def register_verl_config() -> None:
    """Tell Hydra where verl's ppo_trainer.yaml and its groups lie.

    verl is found, not imported: it reads its environment at import, which is set only once the device is known.
    """
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: verl is not installed; install this package with its trainer or cpu extra")
    folder = Path(spec.submodule_search_locations[0]) / "trainer" / "config"
    ConfigStore.instance().store(name=VERL_CONFIG, node=OmegaConf.load(folder / "ppo_trainer.yaml"), provider="verl")
    OmegaConf.register_new_resolver(VERL_CONFIG_FOLDER_RESOLVER, lambda: str(folder), replace=True)
