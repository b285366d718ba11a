"""The short sequence of which every replica owes the same answer."""

from __future__ import annotations

import numpy as np
import pytest

from protos.arrays import Float32Array
from protos.manifest import Capability, Manifest, TokenizerManifest
from tests.support.teacher_stub import stub_manifest
from trainer.errors import ShapeError, TeacherMismatchError
from trainer.teacher.canary import Canary, canary_token_ids

TOKENIZER = TokenizerManifest.from_vocabulary({f"t{i}": i for i in range(10)}, {})


def canary(manifest: Manifest, reference: Float32Array | None = None) -> Canary:
    return Canary(manifest, tolerance=0.1, reference=reference)


def logprobs(value: float) -> Float32Array:
    return np.full(15, value, dtype=np.float32)


def test_the_sequence_follows_from_the_manifest() -> None:
    """Every process asks the same of the same teacher, and another sequence of another one."""
    assert canary_token_ids(stub_manifest()) == canary_token_ids(stub_manifest())
    assert canary_token_ids(stub_manifest()) != canary_token_ids(stub_manifest(model_name="other"))
    assert len(set(canary_token_ids(stub_manifest(vocab_rows=150_000)))) == 16


@pytest.mark.parametrize(
    ("manifest", "num_tokens"),
    [
        (stub_manifest(), 16),
        (stub_manifest(tokenizer=TOKENIZER), 16),
        (stub_manifest(max_request_tokens=5), 5),
        (stub_manifest(max_request_tokens=2), 2),
        (stub_manifest(vocab_rows=150_000, max_request_bytes=64), 6),
        (stub_manifest(vocab_rows=1), 16),
    ],
)
def test_it_is_within_all_limits(manifest: Manifest, num_tokens: int) -> None:
    """Length, bytes, and ids that stand for tokens; `build_request` would refuse it otherwise."""
    ids = list(canary(manifest).request.message.token_ids)
    assert len(ids) == num_tokens
    limit = manifest.vocab_rows if manifest.tokenizer is None else manifest.tokenizer.token_count
    assert max(ids) < limit


def test_it_is_computed_anew_each_time() -> None:
    """A teacher that remembers answers by their key would show how it was, not how it is."""
    able = stub_manifest(capabilities=frozenset({Capability.IDEMPOTENCY}))
    assert not canary(able).request.message.HasField("idempotency_key")


def test_the_first_answer_is_the_reference() -> None:
    """Later ones may differ by the tolerance on average, not by more."""
    one = canary(stub_manifest())
    one.check(logprobs(-2.0), "a:1")
    one.check(logprobs(-2.09), "b:1")
    with pytest.raises(TeacherMismatchError, match=r"b:1 answers the canary 0.11 nats per token off .* 0.1") as caught:
        one.check(logprobs(-1.89), "b:1")
    assert caught.value.reason == "CANARY_DRIFT"
    assert one.reference is not None
    assert one.reference.tolist() == [-2.0] * 15


def test_a_reference_can_be_brought() -> None:
    """Another client's counts from the first answer on."""
    with pytest.raises(TeacherMismatchError):
        canary(stub_manifest(), logprobs(-2.0)).check(logprobs(-3.0), "a:1")


def test_a_reference_of_another_sequence_is_refused() -> None:
    """Before anything is compared."""
    with pytest.raises(ShapeError, match=r"shape \[3\], this teacher's canary \[15\]"):
        canary(stub_manifest(), np.zeros(3, dtype=np.float32))
