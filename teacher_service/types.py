"""What travels between transport, scoring core and engine: numpy, frozen, no messages of any wire.

Legend: N tokens, S = N - score_start scored positions, K top-k entries, C candidates per position, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos.arrays import Int32Array, ScoreArrays
from protos.manifest import Capability, Manifest, TokenizerManifest

__all__ = [
    "Capability",
    "EngineInfo",
    "Manifest",
    "Price",
    "ScoreArrays",
    "ScoreJob",
    "ScoreResult",
    "Timings",
    "TokenizerManifest",
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreJob:
    """One sequence to score. An engine may rely on it being valid: scoring checked it."""

    request_id: str
    """Names the request in logs and in the engine; unique among those in flight."""
    token_ids: Int32Array
    """[N]: prompt and response."""
    score_start: int
    """Index of the first token to score, in [1, N)."""
    num_logprobs: int
    """K, in [0, max_num_logprobs]."""
    temperature: float = 1.0
    """Divides the logits before the full softmax."""
    candidate_token_ids: Int32Array | None = None
    """[S, C]: ids whose logprobs are wanted as well. None: none."""
    return_entropy: bool = False
    """Whether the entropy per position is wanted."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.token_ids.shape[0])

    @property
    def num_scored(self) -> int:
        """S."""
        return self.num_tokens - self.score_start

    @property
    def num_candidates(self) -> int:
        """C; 0 where none are wanted."""
        return 0 if self.candidate_token_ids is None else int(self.candidate_token_ids.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """Memory that scoring one sequence takes beyond the loaded model, in bytes."""

    held_bytes: int
    """In main memory, from its entry into the engine until it is answered; those of all sequences add up."""
    peak_bytes: int = 0
    """Where the model computes, while it computes this sequence. Engines compute them one after another or in steps of
    bounded size, so that of many sequences the largest counts."""
    held_device_bytes: int = 0
    """Where the model computes, from the sequence's entry into the engine until it is answered; those of all sequences
    add up, and the largest peak comes on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Where the time of one request went, in seconds."""

    queue_s: float
    """Waiting for admission."""
    engine_s: float
    """In the engine."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreResult:
    """One scored sequence."""

    scores: ScoreArrays
    """The distribution at the S positions."""
    manifest_digest: str
    """Digest of the teacher that answered."""
    timings: Timings
    """Where the time went."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What a loaded engine is and can do: the engine's part of the manifest."""

    name: str
    """`vllm`, `transformers` or `fake`."""
    version: str
    """Version of the engine's library."""
    model_name: str
    """Name of the model."""
    weights_digest: str | None
    """Digest of the weight files; None where there are none."""
    tokenizer: TokenizerManifest | None
    """What the tokenizer maps; None where there is none."""
    vocab_rows: int
    """V, rows of the LM head."""
    dtype: str
    """Arithmetic type of the weights, e.g. `bfloat16`."""
    max_model_len: int
    """Longest sequence the model was built for, in tokens."""
    max_request_tokens: int
    """Longest sequence the engine can score, in tokens."""
    max_num_logprobs: int
    """Largest K the engine can answer."""
    capabilities: frozenset[Capability]
    """What the engine can do beyond top-k and sampled logprobs at temperature 1 (wire types are the service's)."""
    device_free_bytes: int | None = None
    """Memory left on the device that computes, with the model loaded; None: it computes in main memory."""
    route: str = "only"
    """Which of its ways of scoring the engine takes."""
    route_reason: str | None = None
    """Why the engine takes a slower way than its fastest; None: it takes the fastest, or has only one."""
    runner: str | None = None
    """vLLM's model runner, `V1` or `V2`; None: another engine."""
    warnings: tuple[str, ...] = ()
    """What the operator should know."""
