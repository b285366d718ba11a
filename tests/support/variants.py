"""The tiny checkpoint in other forms: with a LoRA adapter, with the adapter merged, and in 8 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, ALPHA = 8, 16
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
_WEIGHTS = "model.safetensors"


def write_adapter(base: Path, directory: Path, *, seed: int = 0, **config: object) -> Path:
    """Write an adapter of `base` in PEFT's form; large enough that nobody takes the base model for it."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in _adapted_weights(base).items():
        rows, columns = weight.shape
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(RANK, columns, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(rows, RANK, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "bias": "none", "target_modules": [one.rpartition(".")[2] for one in ADAPTED],
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(described | config))
    return directory


def write_merged(base: Path, adapter: Path, directory: Path) -> Path:
    """Write the checkpoint that `base` with the adapter stands for: W + alpha / r * B A."""
    shutil.copytree(base, directory)
    weights, parts = load_file(base / _WEIGHTS), load_file(adapter / "adapter_model.safetensors")
    for name in _adapted_weights(base):
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        weights[name] += ALPHA / RANK * parts[f"{prefix}.lora_B.weight"] @ parts[f"{prefix}.lora_A.weight"]
    save_file(weights, directory / _WEIGHTS, metadata={"format": "pt"})
    return directory


def write_int8(base: Path, directory: Path) -> Path:
    """Write the checkpoint with 8-bit linear layers as llm-compressor does: a scale per row, inputs at run time."""
    shutil.copytree(base, directory)
    weights: dict[str, Tensor] = {}
    for name, weight in load_file(base / _WEIGHTS).items():
        weights[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            weights[f"{name}_scale"] = scale
    save_file(weights, directory / _WEIGHTS, metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": numbers | {"strategy": "channel", "dynamic": False},
                "input_activations": numbers | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _adapted_weights(base: Path) -> dict[str, Tensor]:
    return {
        name: weight
        for name, weight in load_file(base / _WEIGHTS).items()
        if name.removesuffix(".weight").endswith(ADAPTED)
    }
