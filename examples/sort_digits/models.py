"""Tiny Qwen3 models and their tokenizer: the real architecture at a size that two cores can train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHARACTERS = "\n0123456789=+- ,.?abc"
ROLES = ("system", "user", "assistant")
VOCAB_ROWS = 32
"""LM-head rows of the task's models; more than the tokenizer has tokens, as in real models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """What sets the number of parameters."""

    hidden_size: int
    num_heads: int
    intermediate_size: int
    num_layers: int = 2
    head_dim: int = 32


TEACHER_SIZE = ModelSize(hidden_size=128, num_heads=4, intermediate_size=256)
STUDENT_SIZE = ModelSize(hidden_size=64, num_heads=2, intermediate_size=128)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, one per role, and ChatML's markers: 14 tokens of prompt for five digits."""
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(CHARACTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(size: ModelSize, *, seed: int, vocab_rows: int = VOCAB_ROWS, max_len: int = 4096) -> Qwen3ForCausalLM:
    """A randomly initialised float32 Qwen3 with tied embeddings."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=vocab_rows,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        head_dim=size.head_dim,
        max_position_embeddings=max_len,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def save_model(model: Qwen3ForCausalLM, directory: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write weights in `dtype`, config and tokenizer as a Hugging Face checkpoint; the model itself keeps its dtype."""
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    saved = Qwen3ForCausalLM(model.config).to(dtype)
    saved.load_state_dict(weights)
    saved.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
