"""What a teacher is, as plain values, and the digests that let a client compare it with its student."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field

RANGE_SIZE = 1024
"""Width of one range of token ids with a digest of its own."""
RANGE_DIGEST_BYTES = 8
"""Bytes kept of a range's SHA-256: it only has to tell where two token maps part."""
SPECIAL_ROLES = ("eos", "bos", "pad", "unk")
"""Roles of special tokens that both sides tell; transformers has each as `<role>_token_id`."""


class Capability(enum.StrEnum):
    """What an engine can do beyond top-k and sampled logprobs at temperature 1."""

    TEMPERATURE = "temperature"
    """A temperature other than 1, applied before the full softmax."""
    CANDIDATES = "candidates"
    """Logprobs of given token ids."""
    ENTROPY = "entropy"
    """Entropy of the full distribution."""
    EXACT_TAIL_MASS = "exact_tail_mass"
    """The tail mass comes from the full softmax, not from one minus the sum of the top-k."""
    WIRE_FLOAT16 = "wire_float16"
    """float16 on the wire."""
    WIRE_BFLOAT16 = "wire_bfloat16"
    """bfloat16 on the wire."""
    IDEMPOTENCY = "idempotency"
    """A repeated request is not computed again while it is under way, nor for a short time after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerManifest:
    """What a tokenizer maps, compact enough to send and fine enough to name a difference."""

    digest: str
    """SHA-256, lowercase hex, over every (id, token) pair in order of id."""
    token_count: int
    """Number of (id, token) pairs."""
    range_size: int
    """Width of one range of ids."""
    range_digests: tuple[bytes, ...]
    """One digest per range of ids."""
    special_token_ids: Mapping[str, int]
    """Ids by role (eos, bos, pad, unk). No part of the digest: roles differ between base and instruct models."""

    @classmethod
    def from_vocabulary(cls, vocabulary: Mapping[str, int], special_token_ids: Mapping[str, int]) -> TokenizerManifest:
        """Digest a token map.

        Args:
            vocabulary: token to id, added and special tokens included (`tokenizer.get_vocab()`).
            special_token_ids: ids by role.

        Raises:
            ValueError: the vocabulary is empty or holds a negative id.
        """
        if not vocabulary:
            raise ValueError("the tokenizer's vocabulary is empty; a token map needs at least one token")
        pairs = sorted((token_id, token) for token, token_id in vocabulary.items())
        if pairs[0][0] < 0:
            raise ValueError(f"token {pairs[0][1]!r} has the id {pairs[0][0]}; ids are >= 0")
        whole = hashlib.sha256()
        ranges = [hashlib.sha256() for _ in range(pairs[-1][0] // RANGE_SIZE + 1)]
        for token_id, token in pairs:
            line = json.dumps([token_id, token]).encode() + b"\n"
            whole.update(line)
            ranges[token_id // RANGE_SIZE].update(line)
        return cls(
            digest=whole.hexdigest(),
            token_count=len(pairs),
            range_size=RANGE_SIZE,
            range_digests=tuple(one.digest()[:RANGE_DIGEST_BYTES] for one in ranges),
            special_token_ids=dict(special_token_ids),
        )


_NOT_DIGESTED = ("digest", "route_reason")
"""A reason is a text for people; it may differ between replicas that answer alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a teacher is. Field meanings: `protos/teacher/v1/teacher.proto`."""

    model_name: str
    weights_digest: str | None
    tokenizer: TokenizerManifest | None
    vocab_rows: int
    dtype: str
    max_model_len: int
    max_num_logprobs: int
    max_request_tokens: int
    max_request_bytes: int
    capabilities: frozenset[Capability]
    engine: str
    engine_version: str
    service_version: str
    route: str = "only"
    route_reason: str | None = None
    digest: str = field(init=False)
    """SHA-256 over all other fields but `route_reason`, lowercase hex. A received manifest keeps its sender's, which
    answers repeat."""
    received_digest: InitVar[str | None] = None

    def __post_init__(self, received_digest: str | None) -> None:
        object.__setattr__(self, "digest", received_digest or _digest_of_fields(self))


def _digest_of_fields(manifest: Manifest) -> str:
    values: dict[str, object] = {
        one.name: getattr(manifest, one.name) for one in dataclasses.fields(manifest) if one.name not in _NOT_DIGESTED
    }
    values["capabilities"] = sorted(manifest.capabilities)
    values["tokenizer"] = None if manifest.tokenizer is None else manifest.tokenizer.digest
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
