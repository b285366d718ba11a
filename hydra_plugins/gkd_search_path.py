"""Found by Hydra when this package is installed: lets verl's own entry point compose this project's configuration."""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

VERL_MAIN = "verl.trainer.main_ppo"


class GKDSearchPathPlugin(SearchPathPlugin):
    """Puts our ppo_trainer.yaml before verl's in `python -m verl.trainer.main_ppo`, and in no other program."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra before it composes."""
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is None or spec.name != VERL_MAIN:
            return
        from trainer.config.hydra_store import register_verl_config

        register_verl_config()
        search_path.prepend(provider="gkd", path="pkg://trainer.config")
