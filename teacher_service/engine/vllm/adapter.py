"""A LoRA adapter that the teacher answers with."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from teacher_service.errors import EngineStartError

LM_HEAD = "lm_head"
ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the LM head."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A folder in PEFT's form, whose rank is known."""

    folder: Path
    rank: int

    @classmethod
    def read(cls, path: str) -> Adapter:
        """Look at an adapter's configuration.

        Raises:
            EngineStartError: there is none, or it changes the LM head.
        """
        folder = Path(path).expanduser()
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            rank = int(config["r"])
            changes_lm_head = any(_names_lm_head(config.get(key)) for key in ("target_modules", "modules_to_save"))
        except (OSError, ValueError, KeyError, TypeError, re.error) as exc:
            raise EngineStartError(
                f"{path} is no LoRA adapter: its adapter_config.json can't be read ({exc}); give the folder that PEFT "
                "wrote"
            ) from exc
        if changes_lm_head:
            raise EngineStartError(
                f"the LoRA adapter {path} changes lm_head, and vLLM can't apply that to the rows of a prompt; merge it "
                "into the model (PEFT's merge_and_unload) and serve the result"
            )
        return cls(folder, rank)

    def request(self) -> Any:
        """What vLLM takes beside each sequence."""
        from vllm.lora.request import LoRARequest

        return LoRARequest("teacher", 1, str(self.folder))


def _names_lm_head(modules: str | list[str] | None) -> bool:
    """Whether PEFT would take the LM head for one of these: a list holds names, a string is a regular expression."""
    if isinstance(modules, str):
        return modules != ALL_LINEAR and re.fullmatch(modules, LM_HEAD) is not None
    return LM_HEAD in (modules or [])


def detach_from_logits(model: Any) -> None:
    """Let a model with adapters make logits of any rows, in the worker; `Adapter.read` refuses what that would lose.

    vLLM's form of the LM head for adapters takes one row per request, whereas scoring has one per position: it fails
    there, or on a GPU reads beyond its table.
    """
    for processor in (one for one in model.modules() if type(one).__name__ == "LogitsProcessorWithLoRA"):
        processor._get_logits = partial(_base_logits, processor.base_layer)


def _base_logits(base_layer: Any, hidden_states: Any, lm_head: Any, embedding_bias: Any = None) -> Any:
    return base_layer._get_logits(hidden_states, getattr(lm_head, "base_layer", lm_head), embedding_bias)
