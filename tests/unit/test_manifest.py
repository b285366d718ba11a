"""Digests of the manifest change with everything that matters, and with nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from protos.manifest import RANGE_DIGEST_BYTES, RANGE_SIZE, Capability, Manifest, TokenizerManifest

VOCABULARY = {f"token {i}": i for i in range(2 * RANGE_SIZE + 10)}
TOKENIZER = TokenizerManifest.from_vocabulary(VOCABULARY, {"eos": 1})
MANIFEST = Manifest(
    model_name="m",
    weights_digest="aa",
    tokenizer=TOKENIZER,
    vocab_rows=4096,
    dtype="bfloat16",
    max_model_len=64,
    max_num_logprobs=8,
    max_request_tokens=60,
    max_request_bytes=1000,
    capabilities=frozenset({Capability.ENTROPY}),
    engine="vllm",
    engine_version="1",
    service_version="2",
)
CHANGES: dict[str, Any] = {
    "model_name": "n",
    "weights_digest": None,
    "tokenizer": None,
    "vocab_rows": 4097,
    "dtype": "float32",
    "max_model_len": 65,
    "max_num_logprobs": 9,
    "max_request_tokens": 61,
    "max_request_bytes": 1001,
    "capabilities": frozenset({Capability.ENTROPY, Capability.CANDIDATES}),
    "engine": "fake",
    "engine_version": "1.1",
    "service_version": "2.1",
    "route": "fast",
}


def test_every_field_is_tried_below() -> None:
    """A new field of the manifest needs a line in the table."""
    assert set(CHANGES) == {one.name for one in dataclasses.fields(Manifest)} - {"digest", "route_reason"}


def test_a_reason_is_no_part_of_the_digest() -> None:
    """Two replicas that took the slower route for reasons of their own answer alike."""
    assert dataclasses.replace(MANIFEST, route_reason="vLLM 9 is not tested").digest == MANIFEST.digest


@pytest.mark.parametrize("field", CHANGES)
def test_the_digest_changes_with_each_field(field: str) -> None:
    """Two teachers that differ anywhere have different digests."""
    assert dataclasses.replace(MANIFEST, **{field: CHANGES[field]}).digest != MANIFEST.digest


def test_equal_manifests_have_equal_digests() -> None:
    """The order in which capabilities were named does not matter."""
    one = dataclasses.replace(MANIFEST, capabilities=frozenset([Capability.ENTROPY, Capability.CANDIDATES]))
    two = dataclasses.replace(MANIFEST, capabilities=frozenset([Capability.CANDIDATES, Capability.ENTROPY]))
    assert one.digest == two.digest
    assert len(one.digest) == 64


def test_a_received_manifest_keeps_its_senders_digest() -> None:
    """Answers repeat the sender's digest, also where this side knows fewer fields."""
    assert dataclasses.replace(MANIFEST, received_digest="theirs").digest == "theirs"


def test_one_moved_token_changes_the_digest_and_its_range_alone() -> None:
    """The first range that differs tells where two token maps part."""
    moved = TokenizerManifest.from_vocabulary(VOCABULARY | {"other": RANGE_SIZE + 5}, {"eos": 1})
    swapped = TokenizerManifest.from_vocabulary({**VOCABULARY, "token 3": 4, "token 4": 3}, {"eos": 1})
    assert len({moved.digest, swapped.digest, TOKENIZER.digest}) == 3
    assert ranges_that_differ(moved, TOKENIZER) == [1]
    assert ranges_that_differ(swapped, TOKENIZER) == [0]


def ranges_that_differ(one: TokenizerManifest, other: TokenizerManifest) -> list[int]:
    pairs = zip(one.range_digests, other.range_digests, strict=True)
    return [i for i, (mine, theirs) in enumerate(pairs) if mine != theirs]


def test_special_roles_are_no_part_of_the_tokenizer_digest() -> None:
    """A base and an instruct model with one token map differ in their end token alone."""
    other = TokenizerManifest.from_vocabulary(VOCABULARY, {"eos": 2, "pad": 0})
    assert other.digest == TOKENIZER.digest
    assert other.special_token_ids == {"eos": 2, "pad": 0}


def test_the_order_of_the_vocabulary_does_not_matter() -> None:
    """Ids decide, not the order of a dict."""
    backwards = dict(reversed(VOCABULARY.items()))
    assert TokenizerManifest.from_vocabulary(backwards, {"eos": 1}) == TOKENIZER


def test_a_token_with_a_newline_is_not_two_tokens() -> None:
    """Tokens are escaped before they are digested."""
    one = TokenizerManifest.from_vocabulary({'a"]\n[1, "b': 0}, {})
    two = TokenizerManifest.from_vocabulary({"a": 0, "b": 1}, {})
    assert one.digest != two.digest


def test_ranges_cover_all_ids() -> None:
    """Three ranges for 2058 ids, each of the documented width."""
    assert TOKENIZER.token_count == 2058
    assert [len(one) for one in TOKENIZER.range_digests] == [RANGE_DIGEST_BYTES] * 3


@pytest.mark.parametrize(("vocabulary", "complaint"), [({}, "empty"), ({"a": -1}, "'a' has the id -1")])
def test_a_vocabulary_without_sense_is_refused(vocabulary: dict[str, int], complaint: str) -> None:
    """Nothing to compare, or an id that no model has."""
    with pytest.raises(ValueError, match=complaint):
        TokenizerManifest.from_vocabulary(vocabulary, {})
