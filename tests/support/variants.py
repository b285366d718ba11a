"""The tiny checkpoint in other forms: with a LoRA adapter, with the adapter merged, and in 8 bits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, ALPHA = 8, 16
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
_WEIGHTS = "model.safetensors"
_EMBEDDING = "model.embed_tokens.weight"


def write_adapter(
    base: Path,
    directory: Path,
    *,
    seed: int = 0,
    prefix: str = "base_model.model.",
    trained: bool = True,
    embedding: bool = False,
    **config: Any,
) -> Path:
    """Write an adapter of `base` in PEFT's form; large enough that nobody takes the base model for it.

    Args:
        base: the checkpoint's folder.
        directory: the new folder.
        seed: of its weights.
        prefix: what stands before the names of the model's modules.
        trained: whether lora_B is other than zero.
        embedding: whether it also changes the embedding, yet not the LM head, where the two are one.
        config: what differs in its configuration, e.g. `r`.
    """
    directory.mkdir()
    described: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "bias": "none", "target_modules": [one.rpartition(".")[2] for one in ADAPTED],
    }  # fmt: skip
    described |= config
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in _adapted_weights(base).items():
        rows, columns = weight.shape
        module = name.removesuffix(".weight")
        rank = described.get("rank_pattern", {}).get(module.rpartition(".")[2], described["r"])
        lora_b = 0.2 * torch.randn(rows, rank, generator=generator)
        tensors[f"{prefix}{module}.lora_A.weight"] = 0.2 * torch.randn(rank, columns, generator=generator)
        tensors[f"{prefix}{module}.lora_B.weight"] = lora_b if trained else torch.zeros_like(lora_b)
    if embedding:
        rows, columns = load_file(base / _WEIGHTS)[_EMBEDDING].shape
        name = f"{prefix}{_EMBEDDING.removesuffix('.weight')}.lora_embedding"
        tensors[f"{name}_A"] = 0.2 * torch.randn(described["r"], rows, generator=generator)
        tensors[f"{name}_B"] = 0.02 * torch.randn(columns, described["r"], generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return directory


def write_merged(base: Path, adapter: Path, directory: Path) -> Path:
    """Write the checkpoint that `base` with the adapter stands for: W + scale * B A."""
    shutil.copytree(base, directory)
    weights, parts = load_file(base / _WEIGHTS), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name in _adapted_weights(base):
        module = name.removesuffix(".weight")
        lora_a, lora_b = (parts[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        alpha = config.get("alpha_pattern", {}).get(module.rpartition(".")[2], config["lora_alpha"])
        rank = lora_a.shape[0]
        weights[name] += alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * lora_b @ lora_a
    name = f"base_model.model.{_EMBEDDING.removesuffix('.weight')}.lora_embedding"
    if f"{name}_A" in parts:
        weights["lm_head.weight"] = weights[_EMBEDDING].clone()
        weights[_EMBEDDING] += config["lora_alpha"] / config["r"] * (parts[f"{name}_B"] @ parts[f"{name}_A"]).T
        model = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(model | {"tie_word_embeddings": False}))
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
