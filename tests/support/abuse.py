"""Requests that abuse a teacher, seeded: good ones, each known bad kind, ones that are cancelled, ones that expire.

Legend: N tokens, S scored positions, K top-k entries, C candidates per position, V vocabulary rows.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from protos.teacher.v1 import teacher_pb2 as pb
from tests.support.models import MAX_LEN, VOCAB_ROWS
from tests.support.service import json_of, score_request

V = VOCAB_ROWS
MAX_REQUEST_BYTES = 128 << 10
MAX_RESPONSE_BYTES = 340_000
"""The longest sequence with K = V takes 396 kB, the largest good request 277 kB."""
HELD_BYTES = 3_000_000
"""Of the memory budget, beside what scoring itself takes: the largest good request holds 2.6 MB of it, and
`OVER_MEMORY` would need 3.3 MB."""
OVER_MEMORY = {"num_logprobs": 64, "num_candidates": 28}
"""Of the longest sequence. Its answer is within the limit: 324 kB."""
LONG = 300
"""Scored positions up to which all V logprobs stay within the limits."""

Rng = np.random.Generator


class Kind(enum.StrEnum):
    """What a request is for."""

    GOOD = "good"
    BAD = "bad"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Door(enum.StrEnum):
    """The way in."""

    UNARY = "Score"
    STREAM = "ScoreStream"
    JSON = "HTTP JSON"
    PROTOBUF = "HTTP protobuf"
    TORN = "HTTP JSON torn off"
    """The caller hangs up in the middle of its body."""


SCORING_DOORS = (Door.UNARY, Door.STREAM, Door.JSON, Door.PROTOBUF)
NUM_CONNECTIONS = 3
CLIENTS = ("", "trainer-1", "trainer-2")
CONTENT_TYPES = {
    Door.JSON: "application/json",
    Door.TORN: "application/json",
    Door.PROTOBUF: "application/x-protobuf",
}
SHARES = {Kind.GOOD: 0.45, Kind.BAD: 0.3, Kind.CANCELLED: 0.125, Kind.EXPIRED: 0.125}


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """A sequence whose distributions are known."""

    token_ids: NDArray[np.int32]
    """[N]."""
    logprobs_NV: NDArray[np.float64]
    """[N - 1, V] at temperature 1; row i predicts token i + 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One request, and what it should come to."""

    kind: Kind
    door: Door
    request: pb.ScoreRequest | bytes
    """Bytes go as they are: over a stream as one message, else as the body."""
    known: Known | None = None
    """Where the request can be answered: its sequence."""
    reason: str = "OK"
    """Of the refusal that is due."""
    client: str = ""
    """Name that it gives itself; empty: none."""
    connection: int = 0
    """Which of the caller's connections takes it."""
    timeout_s: float | None = None
    """None: the caller's usual one."""
    cancel_after_s: float | None = None
    stream_id: str | None = None
    """None: one that is free."""
    stream_timeout_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Over HTTP, beside the usual ones or in their place."""
    method: str = "POST"
    path: str = "/v1/score"


def lengths(rng: Rng, count: int) -> list[int]:
    """Lengths from the shortest to the longest, both among them; most are short, and some end with a cache block."""
    edges = [2, 3, 127, 128, 129, 256, 257, MAX_LEN - 1, MAX_LEN]
    drawn = np.exp(rng.uniform(np.log(2), np.log(MAX_LEN), count - len(edges)))
    return [*edges, *drawn.astype(int).tolist()]


def token_pool(rng: Rng, count: int) -> list[NDArray[np.int32]]:
    """Sequences of `lengths`, half of which begin alike, as siblings do."""
    prompt = rng.integers(0, V, MAX_LEN)
    pool = [rng.integers(0, V, length) for length in lengths(rng, count)]
    for tokens in pool[::2]:
        shared = len(tokens) // 2
        tokens[:shared] = prompt[:shared]
    return [tokens.astype(np.int32) for tokens in pool]


def burst(rng: Rng, pool: list[Known], size: int) -> list[Case]:
    """Cases of all kinds in random order; of the bad ones, each refusal equally often."""
    counts = {kind: round(share * size) for kind, share in SHARES.items()}
    counts[Kind.GOOD] += size - sum(counts.values())
    bad = [BAD_CASES[number % len(BAD_CASES)](rng, pool) for number in range(counts[Kind.BAD])]
    cases = [
        *(_good(rng, pool) for _ in range(counts[Kind.GOOD])),
        *bad,
        *(_cancelled(rng, pool) for _ in range(counts[Kind.CANCELLED])),
        *(_expired(rng, pool) for _ in range(counts[Kind.EXPIRED])),
    ]
    return [
        replace(cases[i], client=str(rng.choice(CLIENTS)), connection=int(rng.integers(NUM_CONNECTIONS)))
        for i in rng.permutation(size)
    ]


def _good(rng: Rng, pool: list[Known]) -> Case:
    known = pool[rng.integers(len(pool))]
    num_tokens = len(known.token_ids)
    start = int(rng.choice([1, num_tokens - 1, rng.integers(1, num_tokens)]))
    choices = [0, 1, 8, 64] + ([V] if num_tokens - start <= LONG else [])
    request = score_request(known.token_ids, start, int(rng.choice(choices)), return_entropy=bool(rng.integers(2)))
    door = _door(rng)
    if rng.random() < 0.5:
        request.temperature = float(rng.choice([0.7, 1.0, 2.0, 5.0]))
    if rng.random() < 0.3:
        request.candidates.CopyFrom(_candidates(rng, num_tokens - start, int(rng.integers(1, 6))))
    if rng.random() < 0.1:
        # of its own, and up to 128 characters long
        request.idempotency_key = "ключ" * int(rng.integers(1, 31)) + f"{rng.integers(16**8):08x}"
    if door is not Door.JSON:
        request.wire_dtype = int(rng.integers(4))
    return Case(kind=Kind.GOOD, door=door, request=request, known=known)


def _cancelled(rng: Rng, pool: list[Known]) -> Case:
    door = Door.TORN if rng.random() < 0.1 else None
    good = _good(rng, pool)
    return replace(good, kind=Kind.CANCELLED, door=door or good.door, cancel_after_s=float(rng.uniform(0, 0.5)))


def _expired(rng: Rng, pool: list[Known]) -> Case:
    timeout_s = float(rng.uniform(0.0005, 0.02))
    return replace(_good(rng, pool), kind=Kind.EXPIRED, timeout_s=timeout_s, stream_timeout_s=timeout_s)


def _door(rng: Rng) -> Door:
    return SCORING_DOORS[rng.integers(len(SCORING_DOORS))]


def _candidates(rng: Rng, num_rows: int, width: int) -> pb.Candidates:
    return pb.Candidates(count=width, token_ids=rng.integers(0, V, (num_rows, width)).astype("<i4").tobytes())


BadCase = Callable[[Rng, list[Known]], Case]


def _spoilt(reason: str, spoil: Callable[[Rng, pb.ScoreRequest], None], *, but: tuple[Door, ...] = ()) -> BadCase:
    """A good request with one field made bad."""

    def make(rng: Rng, pool: list[Known]) -> Case:
        good = _good(rng, pool)
        while good.door in but:
            good = _good(rng, pool)
        assert isinstance(good.request, pb.ScoreRequest)
        spoil(rng, good.request)
        return replace(good, kind=Kind.BAD, known=None, reason=reason)

    return make


def _raw(reason: str, make_body: Callable[[Rng, pb.ScoreRequest, Door], bytes], *doors: Door) -> BadCase:
    """Bytes in the place of a request."""

    def make(rng: Rng, pool: list[Known]) -> Case:
        good, door = _good(rng, pool), doors[rng.integers(len(doors))]
        assert isinstance(good.request, pb.ScoreRequest)
        return Case(kind=Kind.BAD, door=door, request=make_body(rng, good.request, door), reason=reason)

    return make


def _around(reason: str, door: Door, **changes: list[object]) -> BadCase:
    """A good request in a bad envelope: one of the values for each field of the case."""

    def make(rng: Rng, pool: list[Known]) -> Case:
        chosen = {name: values[rng.integers(len(values))] for name, values in changes.items()}
        return replace(_good(rng, pool), kind=Kind.BAD, door=door, known=None, reason=reason, **chosen)

    return make


def _set(name: str, *values: object) -> Callable[[Rng, pb.ScoreRequest], None]:
    return lambda rng, request: setattr(request, name, values[rng.integers(len(values))])


def _spoil_start(rng: Rng, request: pb.ScoreRequest) -> None:
    request.score_start = int(rng.choice([0, -1, -(2**31), len(request.token_ids), 2**31 - 1]))


def _spoil_token(rng: Rng, request: pb.ScoreRequest) -> None:
    request.token_ids[rng.integers(len(request.token_ids))] = int(rng.choice([-1, V, 2**31 - 1, -(2**31)]))


def _lengthen(rng: Rng, request: pb.ScoreRequest) -> None:
    request.token_ids.extend([1] * int(rng.integers(MAX_LEN, 20_000)))


def _spoil_candidates(rng: Rng, request: pb.ScoreRequest) -> None:
    """A row too many, a row cut short, or an id outside the vocabulary."""
    num_scored = len(request.token_ids) - request.score_start
    good = _candidates(rng, num_scored, 3)
    ids = np.frombuffer(good.token_ids, dtype="<i4").copy()
    ids[rng.integers(ids.size)] = rng.choice([-1, V])
    bad = [good.token_ids + good.token_ids[:12], good.token_ids + bytes(4), ids.tobytes()]
    request.candidates.CopyFrom(pb.Candidates(count=3, token_ids=bad[rng.integers(3)]))


def _spoil_candidate_count(rng: Rng, request: pb.ScoreRequest) -> None:
    request.candidates.CopyFrom(pb.Candidates(count=int(rng.choice([0, -1, 2**31 - 1])), token_ids=b"1234"))


def _enlarge(rng: Rng, request: pb.ScoreRequest) -> None:
    # at most three times the limit: far above it, gRPC itself refuses, without a reason
    request.token_ids.extend([1] * int(rng.integers(MAX_REQUEST_BYTES, 3 * MAX_REQUEST_BYTES)))


def _longest(rng: Rng, request: pb.ScoreRequest, *, num_logprobs: int, num_candidates: int = 0) -> None:
    request.Clear()
    request.token_ids.extend(rng.integers(0, V, MAX_LEN).tolist())
    request.score_start, request.num_logprobs = 1, num_logprobs
    if num_candidates:
        request.candidates.CopyFrom(_candidates(rng, MAX_LEN - 1, num_candidates))


def _garbage(rng: Rng, _: pb.ScoreRequest, __: Door) -> bytes:
    """Random bytes that are no message of either kind, as hardly any are."""
    while True:
        body = rng.bytes(int(rng.integers(16, 2000)))
        if not any(_parses(kind, body) for kind in (pb.ScoreRequest, pb.ScoreStreamRequest)):
            return body


def _parses(kind: type[pb.ScoreRequest | pb.ScoreStreamRequest], body: bytes) -> bool:
    try:
        kind.FromString(body)
    except DecodeError:
        return False
    return True


def _truncated(rng: Rng, request: pb.ScoreRequest, door: Door) -> bytes:
    """A good body that ends in the middle of its token ids, which come first."""
    if door is Door.JSON:
        body = json_of(request).encode()
        return body[: rng.integers(len(body))]
    # over a stream the request is a field itself, of which too much is announced as well
    whole = pb.ScoreStreamRequest(id="t", request=request) if door is Door.STREAM else request
    tokens = pb.ScoreRequest(token_ids=request.token_ids).ByteSize()
    return whole.SerializeToString()[: int(rng.integers(2, tokens)) + (3 if door is Door.STREAM else 0)]


def _with_field(_: Rng, request: pb.ScoreRequest, __: Door) -> bytes:
    return json_of(request)[:-1].encode() + b', "num_logprob": 3}'


def _without_request(_: Rng, __: pb.ScoreRequest, ___: Door) -> bytes:
    return pb.ScoreStreamRequest(id="nothing").SerializeToString()


BAD_CASES: tuple[BadCase, ...] = (
    _spoilt("EMPTY_SEQUENCE", lambda _, request: request.ClearField("token_ids")),
    _spoilt("SCORE_START_OUT_OF_RANGE", _spoil_start),
    _spoilt("TOKEN_ID_OUT_OF_RANGE", _spoil_token),
    _spoilt("SEQUENCE_TOO_LONG", _lengthen),
    _spoilt("NUM_LOGPROBS_OUT_OF_RANGE", _set("num_logprobs", -1, V + 1, 2**31 - 1)),
    _spoilt("INVALID_TEMPERATURE", _set("temperature", 0.0, -1.0, np.nan, np.inf, -np.inf, 1e-38, 1e-5, 1e5)),
    _spoilt("INVALID_CANDIDATES", _spoil_candidates),
    _spoilt("INVALID_CANDIDATES", _spoil_candidate_count, but=(Door.JSON,)),  # JSON has no count
    _spoilt("INVALID_IDEMPOTENCY_KEY", _set("idempotency_key", "", "k" * 129)),
    _spoilt("INVALID_WIRE_DTYPE", _set("wire_dtype", 4, 99, -1), but=(Door.JSON,)),  # nor a wire type
    _spoilt("REQUEST_TOO_LARGE", _enlarge),
    _spoilt("ANSWER_TOO_LARGE", lambda rng, request: _longest(rng, request, num_logprobs=V)),
    _spoilt("OVER_MEMORY_BUDGET", lambda rng, request: _longest(rng, request, **OVER_MEMORY)),
    _raw("MALFORMED_REQUEST", _garbage, *SCORING_DOORS),
    _raw("MALFORMED_REQUEST", _truncated, *SCORING_DOORS),
    _raw("MALFORMED_REQUEST", _without_request, Door.STREAM),
    _raw("UNKNOWN_FIELD", _with_field, Door.JSON),
    _around("UNSUPPORTED_CONTENT_TYPE", Door.PROTOBUF, headers=[{"content-type": "text/plain"}, {"content-type": ""}]),
    _around(
        "INVALID_TIMEOUT",
        Door.JSON,
        headers=[{"x-request-timeout-s": value} for value in ("0", "-1", "nan", "inf", "soon", "")],
    ),
    _around("INVALID_TIMEOUT", Door.STREAM, stream_timeout_s=[0.0, -1.0, np.nan, np.inf]),
    _around("INVALID_STREAM_ID", Door.STREAM, stream_id=["", "x" * 129]),
    _around("NOT_FOUND", Door.PROTOBUF, path=["/v1/scores", "/"]),
    _around("METHOD_NOT_ALLOWED", Door.PROTOBUF, method=["PUT", "DELETE", "PATCH"]),
)
"""Each refusal that a serving teacher knows."""
