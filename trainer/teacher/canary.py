"""A short sequence with a known answer, which every replica is asked for: one that answers otherwise is another model.

Legend: N tokens.
"""

from __future__ import annotations

import hashlib

import numpy as np

from protos.arrays import Float32Array
from protos.codec import WireDtype
from protos.manifest import Manifest
from trainer.errors import ShapeError, TeacherMismatchError
from trainer.teacher.request import CheckedRequest, build_request

CANARY_DRIFT = "CANARY_DRIFT"
"""Reason for a replica whose answer to the canary moved."""

_NUM_TOKENS = 16
_BYTES_PER_TOKEN = 5
_OTHER_BYTES = 32
"""A token id takes 5 bytes at most on the wire, the other fields some 20."""


def canary_token_ids(manifest: Manifest) -> list[int]:
    """[N] ids that any process derives from a manifest alone, within its limits; 2 <= N <= 16."""
    num_ids = manifest.vocab_rows
    if manifest.tokenizer is not None:
        num_ids = min(num_ids, manifest.tokenizer.token_count)
    fitting = (manifest.max_request_bytes - _OTHER_BYTES) // _BYTES_PER_TOKEN
    num_tokens = max(min(_NUM_TOKENS, manifest.max_request_tokens, fitting), 2)
    digests = (hashlib.sha256(f"canary {i} {manifest.digest}".encode()).digest() for i in range(num_tokens))
    return [int.from_bytes(digest[:8], "little") % num_ids for digest in digests]


class Canary:
    """The sequence, and the answer that all replicas of a teacher owe."""

    def __init__(self, manifest: Manifest, *, tolerance: float, reference: Float32Array | None) -> None:
        """Make the request.

        Args:
            manifest: of the teacher.
            tolerance: mean absolute difference of the sampled logprobs, in nats, above which a replica drifted.
            reference: [N - 1] the answer of a client before this one; None: the first answer is the reference.

        Raises:
            ShapeError: the reference is of another sequence.
        """
        built = build_request(
            manifest,
            canary_token_ids(manifest),
            score_start=1,
            num_logprobs=0,
            temperature=1.0,
            wire_dtype=WireDtype.FLOAT32,
            candidate_token_ids=None,
            return_entropy=False,
        )
        # a remembered answer would say how the teacher was, not how it is
        built.message.ClearField("idempotency_key")
        if reference is not None and reference.shape != (built.num_scored,):
            raise ShapeError(
                f"canary_reference has shape {list(reference.shape)}, this teacher's canary [{built.num_scored}]; pass "
                "the reference of a client of the same teacher, or None"
            )
        self.request: CheckedRequest = built
        self.reference = reference
        """[N - 1] sampled logprobs; None before the first answer."""
        self._tolerance = tolerance

    def check(self, logprobs: Float32Array, endpoint: str) -> None:
        """Compare a replica's answer with the reference, or make it the reference.

        Args:
            logprobs: [N - 1] sampled logprobs.
            endpoint: `host:port` of the replica.

        Raises:
            TeacherMismatchError: it drifted.
        """
        if self.reference is None:
            self.reference = logprobs.copy()
            return
        drift = float(np.abs(logprobs - self.reference).mean())
        if drift > self._tolerance:
            raise TeacherMismatchError(
                f"the teacher at {endpoint} answers the canary {drift:.3g} nats per token off the reference, allowed "
                f"are {self._tolerance:g}: its weights, its numerics or its hardware differ; restart it, or raise "
                "canary_tolerance",
                endpoint=endpoint,
                reason=CANARY_DRIFT,
                metadata={"drift": f"{drift:.6g}", "tolerance": f"{self._tolerance:g}"},
            )
