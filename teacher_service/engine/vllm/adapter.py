"""A LoRA adapter that the teacher answers with: what is served, what is refused before a model is loaded, and why.

vLLM is silent where it leaves out a part of an adapter, and the base model then answers under the adapter's digest. So
each part of the folder is either one that vLLM applies, or the start fails.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from protos.arrays import ScoreArrays
from teacher_service.errors import EngineStartError

LM_HEAD = "lm_head"
ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the LM head."""
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `max_lora_rank`: `vllm.config.lora.MaxLoRARanks`, the same in 0.24 to 0.33."""
PATTERNS_SINCE = (0, 32)
"""First release of vLLM that reads `rank_pattern` and `alpha_pattern`; earlier ones scale all modules alike."""
NO_EFFECT_NATS = 1e-6
"""Answers that differ by less are equal: a float32 logprob near -10 has steps of this size."""
MERGE = "merge it into the model (PEFT's merge_and_unload) and serve the result"

_ADAPTER_ID = 1
_WEIGHTS = "adapter_model.safetensors"
_OPAQUE_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")
"""vLLM's other names. They are pickles, whose tensors can't be listed without loading them."""
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Initialisations of PEFT that leave the base model as it is. All others that have a name change its weights."""
_UNSUPPORTED = {
    "use_dora": "it is a DoRA adapter, which also rescales each weight",
    "use_qalora": "it is a QALoRA adapter",
    "use_bdlora": "it is block-diagonal",
    "lora_bias": "its lora_B has a bias",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces single token embeddings",
    "alora_invocation_tokens": "it is active only after certain tokens",
    "layer_replication": "it repeats layers",
    "ensure_weight_tying": "it ties the embedding's update to the LM head's",
    "arrow_config": "it mixes several adapters",
    "kasa_config": "it also changes the base weights (KaSA)",
    "monteclora_config": "its updates are drawn at random (MonteCLoRA)",
}
"""Keys of PEFT's configuration that vLLM does not read, or reads only to fail in the engine's process; all are off by
default."""
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)
_LM_HEAD_REASON = f"it changes {LM_HEAD}, which vLLM applies to one row per request and not to those of a prompt"
_FUSED_EXPERTS = (".experts", ".experts.base_layer")
"""Modules whose tensors hold the updates of all experts, one after the other."""


class AdapterError(RuntimeError):
    """A loaded adapter does not do what it should, on any route; the service must not start with it."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A folder in PEFT's form that vLLM applies as PEFT does."""

    folder: Path
    rank: int
    """The largest of its modules."""

    @classmethod
    def read(cls, path: str, *, vllm_version: str) -> Adapter:
        """Look at an adapter's configuration and at the shapes of its tensors.

        Raises:
            EngineStartError: there is none, or this vLLM can't apply a part of it.
        """
        folder = Path(path).expanduser()
        try:
            config, shapes = _read_config(folder), _read_shapes(folder)
        except (OSError, ValueError) as exc:
            raise EngineStartError(
                f"{path} is no LoRA adapter: {exc}; give the folder that PEFT wrote, with adapter_config.json and "
                f"{_WEIGHTS}"
            ) from exc
        if reasons := [*_unsupported(config, vllm_version), *_misfits(config, shapes)]:
            raise EngineStartError(
                f"vLLM {vllm_version} can't apply the LoRA adapter {path}: {'; '.join(reasons)}; {MERGE}"
            )
        rank = max([config["r"], *_pattern(config, "rank").values()])
        max_rank(rank)
        return cls(folder, rank)

    def request(self) -> Any:
        """What vLLM takes beside each sequence."""
        from vllm.lora.request import LoRARequest

        return LoRARequest("teacher", _ADAPTER_ID, str(self.folder))


def max_rank(rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM's list that takes an adapter of this rank.

    Raises:
        EngineStartError: the list ends below it.
    """
    for allowed in MAX_LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise EngineStartError(f"the LoRA adapter has rank {rank}, and vLLM takes at most {MAX_LORA_RANKS[-1]}; {MERGE}")


def _read_config(folder: Path) -> Mapping[str, Any]:
    """PEFT's configuration, whose entries that are read here have the right types.

    Raises:
        ValueError: they have not, or it is no JSON.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"its adapter_config.json holds a {type(config).__name__}, not an object")  # noqa: TRY004
    ranks = _pattern(config, "rank")
    for name, rank in {"r": config.get("r"), **ranks}.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"its rank {name} is {rank!r}, not a positive integer")
    for name, alpha in {"lora_alpha": config.get("lora_alpha"), **_pattern(config, "alpha")}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"its scale {name} is {alpha!r}, not a finite number")
    if "target_modules" not in config:
        raise ValueError("its adapter_config.json has no target_modules")
    targets = config["target_modules"]
    names = targets if isinstance(targets, list) else [targets or ""]
    if not all(isinstance(one, str) for one in names):
        raise ValueError(f"its target_modules is {targets!r}, neither a text nor a list of names")
    for pattern in (*ranks, config["target_modules"]):
        if isinstance(pattern, str):
            _compiled(pattern)
    return config


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as exc:
        raise ValueError(f"{pattern!r} in its adapter_config.json is no regular expression: {exc}") from exc


def _read_shapes(folder: Path) -> Mapping[str, Sequence[int]] | None:
    """The shapes of the adapter's tensors by name, from the file's header; None where they can't be listed.

    Raises:
        ValueError: there is no file, or a broken one.
    """
    path = folder / _WEIGHTS
    if not path.is_file():
        if any((folder / name).is_file() for name in _OPAQUE_WEIGHTS):
            return None
        raise ValueError(f"it has no {_WEIGHTS}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as exc:
        raise ValueError(f"its {_WEIGHTS} is broken ({exc}); is the copy complete?") from exc
    if not any(map(_TENSOR.fullmatch, shapes)):
        raise ValueError(f"its {_WEIGHTS} holds no lora_A")
    return shapes


def _unsupported(config: Mapping[str, Any], vllm_version: str) -> Iterator[str]:
    """What the configuration says that vLLM would leave out."""
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        yield f"it is of type {kind}, not LORA"
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            yield f"{reason} ({key})"
    if (bias := config.get("bias", "none")) != "none":
        yield f"it changes biases (bias is {bias!r})"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        yield f"its initialisation changes the base model's weights (init_lora_weights is {init!r})"
    if any(_names_lm_head(config.get(key)) for key in ("target_modules", "modules_to_save")):
        yield _LM_HEAD_REASON
    patterns = [f"{name}_pattern" for name in ("rank", "alpha") if _pattern(config, name)]
    if patterns and _release(vllm_version) < PATTERNS_SINCE:
        yield (
            f"its modules have ranks or scales of their own ({' and '.join(patterns)}), which vLLM reads since "
            f"{'.'.join(map(str, PATTERNS_SINCE))}"
        )


def _misfits(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]] | None) -> Iterator[str]:
    """What the tensors say that vLLM would leave out, or that contradicts the configuration."""
    if shapes is None:
        return
    modules: dict[str, dict[str, Sequence[int]]] = {}
    others: list[str] = []
    for name, shape in shapes.items():
        if (found := _TENSOR.fullmatch(name)) is None:
            others.append(name)
        else:
            modules.setdefault(found["module"], {})[found["linear"] or found["embedding"]] = shape
    if others:
        yield f"it holds {_some(others)}, which is no lora_A or lora_B"
    if any(module.rpartition(".")[2] == LM_HEAD for module in modules) and not _names_lm_head(config["target_modules"]):
        yield _LM_HEAD_REASON
    if halves := [module for module, parts in modules.items() if len(parts) < 2]:
        yield f"{_some(halves)} has only one of lora_A and lora_B"
    wrong = [
        f"{module} has lora_A {list(parts['A'])} and lora_B {list(parts['B'])}, rank {_rank_of(module, config)} by its "
        "configuration"
        for module, parts in modules.items()
        if len(parts) == 2 and not _has_rank(module, parts["A"], parts["B"], _rank_of(module, config))
    ]
    if wrong:
        yield _some(wrong)


def _has_rank(module: str, shape_a: Sequence[int], shape_b: Sequence[int], rank: int) -> bool:
    """Whether lora_A is `[rank, in]` and lora_B `[out, rank]`; those of fused experts have a multiple."""
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        return False
    return shape_a[0] % rank == 0 if module.endswith(_FUSED_EXPERTS) else shape_a[0] == rank


def _rank_of(module: str, config: Mapping[str, Any]) -> int:
    """By PEFT's rule: the first pattern that is the end of the module's name counts."""
    for pattern, rank in _pattern(config, "rank").items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return int(rank)
    return int(config["r"])


def _pattern(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Values by module.

    Raises:
        ValueError: it is no mapping.
    """
    found = config.get(f"{name}_pattern") or {}
    if not isinstance(found, dict):
        raise ValueError(f"its {name}_pattern is {found!r}, not a mapping from modules")  # noqa: TRY004
    return found


def _names_lm_head(modules: str | list[str] | None) -> bool:
    """Whether PEFT would take the LM head for one of these: a list holds names, a string is a regular expression."""
    if isinstance(modules, str):
        return modules != ALL_LINEAR and re.fullmatch(modules, LM_HEAD) is not None
    return LM_HEAD in (modules or [])


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number; none where the version does not begin with numbers, as that of a development build."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return () if found is None else (int(found[1]), int(found[2]))


def _some(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{items[0]} (and {len(items) - 1} more such)"


def detach_from_logits(model: Any) -> None:
    """Let a model with adapters make logits of any rows, in the worker; `Adapter.read` refuses what that would lose.

    vLLM's form of the LM head for adapters takes one row per request, whereas scoring has one per position: it fails
    there, or on a GPU reads beyond its table. It also refuses to leave logits in shards, which the base form does.
    """
    for processor in (one for one in model.modules() if type(one).__name__ == "LogitsProcessorWithLoRA"):
        processor._get_logits = partial(_base_logits, processor.base_layer)


def _base_logits(base_layer: Any, hidden_states: Any, lm_head: Any, *others: Any, **named: Any) -> Any:
    """`LogitsProcessor._get_logits` of the base model, whatever else this version hands it."""
    return base_layer._get_logits(hidden_states, getattr(lm_head, "base_layer", lm_head), *others, **named)


def placement(model: Any) -> dict[str, list[str]]:
    """Where a loaded adapter went, in the worker: modules that this part of the model lacks, and of another size.

    vLLM drops the first without a word, and copies the second into a corner of a larger matrix.
    """
    manager = model.lora_manager
    weights = manager.get_adapter(_ADAPTER_ID)
    placed: set[int] = set()
    misfits: list[str] = []
    for name, layer in manager.modules.items():
        if (here := manager._get_lora_layer_weights(weights, name)) is None:
            continue
        placed.add(id(here))
        size = _num_inputs(layer.base_layer)
        parts = here.lora_a if isinstance(here.lora_a, list) else [here.lora_a]
        misfits += [
            f"{name} takes {size} inputs, the adapter's {part.shape[-1]}"
            for part in parts
            if part is not None and size is not None and part.shape[-1] != size
        ]
    dropped = [
        name
        for name, one in weights.loras.items()
        if id(one) not in placed and not name.endswith(_FUSED_EXPERTS[1])  # its tensors are those of `.experts` now
    ]
    return {"dropped": dropped, "misfits": misfits}


def _num_inputs(layer: Any) -> int | None:
    """Columns of a layer's lora_A: rows of an embedding, inputs of a linear layer; None: a layer of experts."""
    size = getattr(layer, "org_vocab_size", getattr(layer, "input_size", None))
    return None if size is None else int(size)


def check_placed(placements: Sequence[Mapping[str, Sequence[str]]], adapter: Adapter) -> None:
    """Check what `placement` says in each worker. Each holds a part of the layers, so one of them must have a module.

    Raises:
        AdapterError: none has it, or it is of another size.
    """
    dropped = sorted(set[str].intersection(*(set(one["dropped"]) for one in placements)))
    if dropped:
        raise AdapterError(
            f"the model has no layer {_some(dropped)}, which the LoRA adapter {adapter.folder} changes: the adapter "
            "belongs to another model, or its tensors carry another prefix; give the model that it was trained on, or "
            f"{MERGE}"
        )
    misfits = [misfit for one in placements for misfit in one["misfits"]]
    if misfits:
        raise AdapterError(
            f"the LoRA adapter {adapter.folder} belongs to a model of another size: {_some(misfits)}; give the model "
            "that it was trained on"
        )


def check_effect(with_adapter: ScoreArrays, without: ScoreArrays, adapter: Adapter) -> None:
    """Check that an adapter changes the answer to one sequence.

    Raises:
        AdapterError: it does not.
    """
    pairs = [
        (ours, theirs)
        for name in ("sampled_logprobs", "topk_logprobs")
        if (ours := getattr(with_adapter, name)) is not None and (theirs := getattr(without, name)) is not None
    ]
    if max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs) > NO_EFFECT_NATS:
        return
    raise AdapterError(
        f"the LoRA adapter {adapter.folder} has no effect: {sum(ours.size for ours, _ in pairs)} logprobs are the same "
        f"with and without it, to {NO_EFFECT_NATS} nats. Its lora_B may be all zero, as before the first step of "
        "training; give a trained adapter, or serve the base model without --lora"
    )
