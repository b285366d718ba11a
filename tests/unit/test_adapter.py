"""Which LoRA adapters are taken: their configuration, as PEFT writes it, their tensors, and where vLLM puts them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from protos.arrays import ScoreArrays
from teacher_service.engine.vllm.adapter import (
    Adapter,
    AdapterError,
    check_effect,
    check_placed,
    detach_from_logits,
    max_rank,
    placement,
)
from teacher_service.errors import EngineStartError

PREFIX = "base_model.model.model.layers.0."
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
ADAPTER = Adapter(Path("adapters/one"), 8)


def _tensors(**ranks: int) -> dict[str, Any]:
    """lora_A and lora_B of each module of layer 0."""
    return {
        f"{PREFIX}self_attn.{module}.lora_{part}.weight": np.ones((rank, 16) if part == "A" else (32, rank), np.float32)
        for module, rank in ranks.items()
        for part in "AB"
    }


def _written(folder: Path, tensors: dict[str, Any] | None = None, **config: object) -> str:
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(_tensors(q_proj=8, v_proj=8) if tensors is None else tensors, folder / "adapter_model.safetensors")
    return f"{folder}"


def _read(path: str, vllm_version: str = "0.33.0") -> Adapter:
    return Adapter.read(path, vllm_version=vllm_version)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear", r".*\\.(q|v)_proj", None])
def test_an_adapter_of_other_layers_is_taken(tmp_path: Path, modules: object) -> None:
    """By name, by PEFT's word for all of them, by a regular expression."""
    assert _read(_written(tmp_path, target_modules=modules)).rank == 8


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"fan_in_fan_out": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": [0]},
    ],
)
def test_what_does_not_change_the_answer_or_is_applied_is_taken(tmp_path: Path, config: dict[str, object]) -> None:
    """Where the layers and first weights came from is past; vLLM applies rank-stabilised scales."""
    assert _read(_written(tmp_path, **config)).rank == 8


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": r".*(q_proj|lm_head)"},
    ],
)
def test_an_adapter_of_the_lm_head_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    """However it is named; the remedy is to merge it."""
    with pytest.raises(EngineStartError, match=r"changes lm_head.*merge_and_unload"):
        _read(_written(tmp_path, **config))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, r"it is a DoRA adapter, .* \(use_dora\)"),
        ({"use_qalora": True}, r"QALoRA adapter \(use_qalora\)"),
        ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, r"block-diagonal \(use_bdlora\)"),
        ({"lora_bias": True}, r"lora_B has a bias \(lora_bias\)"),
        ({"bias": "lora_only"}, r"changes biases \(bias is 'lora_only'\)"),
        ({"modules_to_save": ["embed_tokens"]}, r"replaces whole modules \(modules_to_save\)"),
        ({"trainable_token_indices": [1]}, r"\(trainable_token_indices\)"),
        ({"alora_invocation_tokens": [1]}, r"\(alora_invocation_tokens\)"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"repeats layers \(layer_replication\)"),
        ({"ensure_weight_tying": True}, r"\(ensure_weight_tying\)"),
        ({"arrow_config": {"top_k": 2}}, r"\(arrow_config\)"),
        ({"kasa_config": {"beta": 0.1}}, r"\(kasa_config\)"),
        ({"monteclora_config": {"n": 2}}, r"\(monteclora_config\)"),
        ({"init_lora_weights": "pissa_niter_16"}, r"base model's weights \(init_lora_weights is 'pissa_niter_16'\)"),
        ({"init_lora_weights": "olora"}, r"base model's weights \(init_lora_weights is 'olora'\)"),
        ({"peft_type": "ADALORA"}, r"of type ADALORA, not LORA"),
    ],
)
def test_what_vllm_leaves_out_is_refused(tmp_path: Path, config: dict[str, object], reason: str) -> None:
    """Before a model is loaded, with the reason and the remedy."""
    with pytest.raises(EngineStartError, match=rf"vLLM 0\.33\.0 can't apply .*{reason}.*; merge it into the model"):
        _read(_written(tmp_path, **config))


def test_all_reasons_are_given_at_once(tmp_path: Path) -> None:
    """So that a second start does not bring the next one."""
    with pytest.raises(EngineStartError, match=r"\(use_dora\); .*\(lora_bias\); "):
        _read(_written(tmp_path, use_dora=True, lora_bias=True))


MIXED = {"rank_pattern": {"v_proj": 24}, "alpha_pattern": {"layers.0.self_attn.q_proj": 4}}


def test_mixed_ranks_are_taken_where_vllm_reads_them(tmp_path: Path) -> None:
    """Since 0.32; the largest is what vLLM has to hold."""
    path = _written(tmp_path, _tensors(q_proj=8, v_proj=24), **MIXED)
    assert _read(path, "0.32.0+cpu").rank == 24


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_mixed_ranks_are_refused_where_vllm_ignores_them(tmp_path: Path, name: str) -> None:
    """0.31 scales all modules by lora_alpha / r."""
    path = _written(tmp_path, _tensors(q_proj=8, v_proj=24 if name == "rank_pattern" else 8), **{name: MIXED[name]})
    with pytest.raises(
        EngineStartError, match=rf"vLLM 0\.31\.0.*ranks or scales of their own \({name}\).* since 0\.32"
    ):
        _read(path, "0.31.0+cpu")


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (16, 16), (24, 32), (48, 64), (257, 320), (321, 512), (512, 512)]
)
def test_a_rank_is_rounded_up_to_what_vllm_takes(rank: int, allowed: int) -> None:
    """vLLM takes no rank between those of its list."""
    assert max_rank(rank) == allowed


def test_a_rank_above_the_largest_is_refused(tmp_path: Path) -> None:
    """Before a model is loaded: value, limit, remedy."""
    path = _written(tmp_path, _tensors(q_proj=513, v_proj=513), r=513)
    with pytest.raises(EngineStartError, match=r"has rank 513, and vLLM takes at most 512; merge it"):
        _read(path)


def _renamed(tensors: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


Q_PROJ = _tensors(q_proj=8)
EMBEDDING = f"{PREFIX.removesuffix('layers.0.')}embed_tokens"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (
            _tensors(q_proj=8, v_proj=4),
            r"v_proj has lora_A \[4, 16\] and lora_B \[32, 4\], rank 8 by its configuration",
        ),
        (_tensors(q_proj=4, v_proj=4), r"q_proj has lora_A .* \(and 1 more such\)"),
        (dict(list(Q_PROJ.items())[:1]), r"layers\.0\.self_attn\.q_proj has only one of lora_A and lora_B"),
        (Q_PROJ | {f"{PREFIX}q_proj.lora_magnitude_vector": np.ones(32)}, r"lora_magnitude_vector, which is no lora_A"),
        (Q_PROJ | {f"{PREFIX}q_proj.lora_B.bias": np.ones(32)}, r"lora_B\.bias, which is no lora_A"),
        (Q_PROJ | {f"{EMBEDDING}.base_layer.weight": np.ones((4, 4))}, r"base_layer\.weight, which is no lora_A"),
        (_renamed(Q_PROJ, "lora_A.", "lora_A.default."), r"lora_A\.default\.weight, which is no lora_A"),
        (_renamed(Q_PROJ, "model.layers.0.self_attn.q_proj", "lm_head"), r"it changes lm_head"),
        (Q_PROJ | {f"{PREFIX}conv.lora_{part}.weight": np.ones((8, 8, 1, 1)) for part in "AB"}, r"\[8, 8, 1, 1\]"),
    ],
)
def test_tensors_that_vllm_leaves_out_or_misreads_are_refused(
    tmp_path: Path, tensors: dict[str, Any], reason: str
) -> None:
    """By name and shape, from the header of their file."""
    with pytest.raises(EngineStartError, match=rf"can't apply .*{reason}.*; merge it into the model"):
        _read(_written(tmp_path, tensors))


def test_tensors_of_embeddings_and_fused_experts_are_taken(tmp_path: Path) -> None:
    """Named without `.weight`, and with one rank for each expert."""
    tensors = {
        f"{EMBEDDING}.lora_embedding_A": np.ones((8, 96)),
        f"{EMBEDDING}.lora_embedding_B": np.ones((16, 8)),
        f"{PREFIX}mlp.experts.base_layer.lora_A.weight": np.ones((32, 16)),
        f"{PREFIX}mlp.experts.base_layer.lora_B.weight": np.ones((16, 32)),
    }
    assert _read(_written(tmp_path, tensors)).rank == 8


def test_a_pickle_of_tensors_is_taken_unseen(tmp_path: Path) -> None:
    """It can't be listed without loading it; what vLLM drops of it is noticed once it is loaded."""
    path = _written(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert _read(path).rank == 8


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"r": None}, r"its rank r is None, not a positive integer"),
        ({"r": 0}, r"its rank r is 0"),
        ({"lora_alpha": "16"}, r"lora_alpha is '16', not a finite number"),
        ({"lora_alpha": float("nan")}, r"lora_alpha is nan, not a finite number"),
        ({"lora_alpha": True}, r"lora_alpha is True, not a finite number"),
        ({"r": True}, r"its rank r is True, not a positive integer"),
        ({"rank_pattern": ["a"]}, r"rank_pattern is \['a'\], not a mapping"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"scale q_proj is 'x', not a finite number"),
        ({"target_modules": 3}, r"target_modules is 3, neither"),
        ({"rank_pattern": {"v_proj": 2.5}}, r"its rank v_proj is 2\.5, not a positive integer"),
        ({"target_modules": "("}, r"'\(' in its adapter_config\.json is no regular expression"),
        ({"rank_pattern": {"(": 4}}, r"'\(' in its adapter_config\.json is no regular expression"),
    ],
)
def test_a_broken_configuration_is_no_adapter(tmp_path: Path, config: dict[str, object], cause: str) -> None:
    """The error names the cause and what to give."""
    with pytest.raises(EngineStartError, match=rf"is no LoRA adapter: .*{cause}.*; give the folder that PEFT wrote"):
        _read(_written(tmp_path, **config))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, r"it has no adapter_model\.safetensors"),
        (b"\x10\0\0\0\0\0\0\0{", r"adapter_model\.safetensors is broken .* is the copy complete\?"),
        (b"\x02\0\0\0\0\0\0\0{}", r"holds no lora_A"),
    ],
)
def test_an_incomplete_folder_is_no_adapter(tmp_path: Path, content: bytes | None, cause: str) -> None:
    """Without weights, with half of them, with none inside."""
    path = _written(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    with pytest.raises(EngineStartError, match=rf"is no LoRA adapter.*{cause}"):
        _read(path)


def _weights(*inputs: int) -> SimpleNamespace:
    """As vLLM holds them: one lora_A, or a list of those of a packed layer."""
    parts = [np.ones((8, size)) for size in inputs]
    return SimpleNamespace(lora_a=parts[0] if len(parts) == 1 else [*parts, None])


def _model(loras: dict[str, SimpleNamespace], **input_sizes: int | None) -> SimpleNamespace:
    """A model whose layers, by name, take inputs of a size; None: a layer that states none."""
    layers = {
        name: SimpleNamespace(base_layer=SimpleNamespace() if size is None else SimpleNamespace(input_size=size))
        for name, size in input_sizes.items()
    }
    manager = SimpleNamespace(
        modules=layers,
        get_adapter={1: SimpleNamespace(loras=loras)}.get,
        _get_lora_layer_weights=lambda adapter, name: adapter.loras.get(name),
    )
    return SimpleNamespace(lora_manager=manager)


def test_an_adapter_that_is_all_placed_is_taken() -> None:
    """Each module in one worker or another, those of a packed layer together."""
    first = placement(_model({"qkv": _weights(16, 16), "embed": _weights(96), "head": _weights(9)}, qkv=16, embed=None))
    second = placement(_model({"qkv": _weights(16, 16), "embed": _weights(96), "head": _weights(9)}, head=9, other=4))
    assert first == {"dropped": ["head"], "misfits": []}
    assert second == {"dropped": ["qkv", "embed"], "misfits": []}
    check_placed([first, second], ADAPTER)


def test_an_embedding_takes_a_row_of_its_vocabulary() -> None:
    """It also has an input size, that of its rows."""
    model = _model({"embed": _weights(96)}, embed=16)
    model.lora_manager.modules["embed"].base_layer.org_vocab_size = 96
    assert placement(model) == {"dropped": [], "misfits": []}


def test_tensors_that_vllm_moved_to_another_name_are_placed() -> None:
    """Those of fused experts stay in its list, 0.31's at least, after it copied them."""
    loras = {"mlp.experts": _weights(16), "mlp.experts.base_layer": _weights(16)}
    assert placement(_model(loras, **{"mlp.experts": None})) == {"dropped": [], "misfits": []}


def test_modules_that_no_worker_has_are_refused() -> None:
    """vLLM drops them without a word: another prefix, another model."""
    loras = {"model.a": _weights(16), "other.a": _weights(16), "other.b": _weights(16)}
    parts = [placement(_model(loras, **{"model.a": 16})), {"dropped": ["other.b", "other.a", "model.a"], "misfits": []}]
    with pytest.raises(AdapterError, match=r"no layer other\.a \(and 1 more such\), .* adapters/one .*another prefix"):
        check_placed(parts, ADAPTER)


def test_modules_of_another_size_are_refused() -> None:
    """vLLM copies a smaller matrix into a corner of its own."""
    with pytest.raises(AdapterError, match=r"another size: qkv takes 16 inputs, the adapter's 12"):
        check_placed([placement(_model({"qkv": _weights(16, 12)}, qkv=16))], ADAPTER)


def _scores(sampled: float, top: float | None = None) -> ScoreArrays:
    return ScoreArrays(
        sampled_logprobs=np.array([-1.0, sampled], np.float32),
        topk_logprobs=None if top is None else np.array([[-1.0, -3.0], [top, -2.0]], np.float32),
    )


@pytest.mark.parametrize(
    ("ours", "theirs"), [(_scores(-2.0), _scores(-2.01)), (_scores(-2.0, -0.5), _scores(-2.0, -0.51))]
)
def test_an_adapter_that_changes_an_answer_has_an_effect(ours: ScoreArrays, theirs: ScoreArrays) -> None:
    """In the logprob of a given token, or of a likely one."""
    check_effect(ours, theirs, ADAPTER)


@pytest.mark.parametrize(("top", "count"), [(None, 2), (-0.5, 6)])
def test_an_adapter_without_effect_is_refused(top: float | None, count: int) -> None:
    """The error says what was compared, and what it most often means."""
    ours, theirs = _scores(-2.0, top), _scores(-2.0 - 2e-7, top)
    with pytest.raises(AdapterError, match=rf"adapters/one has no effect: {count} logprobs are .*all zero.*trained"):
        check_effect(ours, theirs, ADAPTER)


class LogitsProcessorWithLoRA:
    """vLLM's form for adapters, by name; the base layer says what it is called with."""

    def __init__(self) -> None:
        self.base_layer = SimpleNamespace(_get_logits=lambda *args, **named: (args, named))

    def _get_logits(self, *args: object, **named: object) -> None:
        raise AssertionError(f"the adapted LM head is called with {args}, {named}")


def test_the_lm_head_is_the_base_models_with_whatever_vllm_hands_it() -> None:
    """0.28 gives a bias, later versions also whether to leave the shards apart."""
    processor: Any = LogitsProcessorWithLoRA()
    detach_from_logits(SimpleNamespace(modules=lambda: [SimpleNamespace(), processor]))
    assert processor._get_logits("hidden", "head", None) == (("hidden", "head", None), {})
    assert processor._get_logits("hidden", "head", None, True) == (("hidden", "head", None, True), {})
    wrapped = SimpleNamespace(base_layer="inner head")
    assert processor._get_logits("hidden", wrapped, skip_gather=True) == (
        ("hidden", "inner head"),
        {"skip_gather": True},
    )
