"""A LoRA adapter that the teacher answers with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_service.errors import EngineStartError


@dataclass(frozen=True, slots=True)
class Adapter:
    """A folder in PEFT's form, whose rank is known."""

    folder: Path
    rank: int

    @classmethod
    def read(cls, path: str) -> Adapter:
        """Look at an adapter's configuration.

        Raises:
            EngineStartError: there is none.
        """
        folder = Path(path).expanduser()
        try:
            rank = int(json.loads((folder / "adapter_config.json").read_text())["r"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise EngineStartError(
                f"{path} is no LoRA adapter: its adapter_config.json can't be read ({exc}); give the folder that PEFT "
                "wrote"
            ) from exc
        return cls(folder, rank)

    def request(self) -> Any:
        """What vLLM takes beside each sequence."""
        from vllm.lora.request import LoRARequest

        return LoRARequest("teacher", 1, str(self.folder))
