"""The checks themselves, in the order in which one is of use only after those before it passed.

Legend: N tokens, S scored positions.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from protos.arrays import ScoreArrays
from protos.manifest import Manifest
from teacher_service.check.student import Student, differences
from teacher_service.errors import SettingsError, UnauthenticatedError
from teacher_service.transports.caller import (
    CallError,
    ScoreAnswer,
    ScoreCall,
    TeacherCaller,
    calling,
    check_endpoint,
)
from teacher_service.transports.caller_credentials import CallerCredentials

Verdict = Literal["passed", "failed", "skipped"]

NAMES = ("address", "connection", "tls", "authentication", "health", "manifest", "student", "score", "latency")
"""Of the checks, in order."""
NUM_TOKENS = 64
"""N of the sequence that is scored, or the teacher's limit if that is lower."""
NUM_LOGPROBS = 8
"""Top-k that is asked for, or the teacher's limit."""
MASS_TOLERANCE = 1e-2
"""How far the probabilities of top-k and tail may be from 1 together."""
REPEAT_TOLERANCE = 0.1
"""How far two logprobs of one sequence may be apart, in nats: bfloat16 in another batch."""
_CLIENT_NAME = "check"
_SERVING = "SERVING"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckSettings:
    """What to check."""

    endpoint: str
    """`host:port` of gRPC."""
    student: Student | None
    """Whose vocabulary the teacher must fit; None: any."""
    credentials: CallerCredentials
    """What is shown to the teacher."""
    timeout_s: float
    """Seconds that a call may take."""
    repeats: int
    """Sequences to time."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint)
        if not self.timeout_s > 0:
            raise SettingsError(f"--timeout-s is {self.timeout_s:g}; it must be above 0 seconds")
        if self.repeats < 1:
            raise SettingsError(f"--repeats is {self.repeats}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    """One of NAMES."""
    verdict: Verdict
    detail: str
    """What was found; of a failure also what to do."""


class _FailedError(Exception):
    """A check failed: its name, and what to say of it."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(detail)
        self.finding = Finding(check=check, verdict="failed", detail=detail)


def _passed(check: str, detail: str) -> Finding:
    return Finding(check=check, verdict="passed", detail=detail)


def _skipped(check: str, detail: str) -> Finding:
    return Finding(check=check, verdict="skipped", detail=detail)


async def run_checks(settings: CheckSettings) -> AsyncIterator[Finding]:
    """One finding for each of NAMES, as they come; what follows a failure is skipped."""
    seen: set[str] = set()
    try:
        async for finding in _until_failure(settings):
            seen.add(finding.check)
            yield finding
    except _FailedError as exc:
        yield exc.finding
        for name in NAMES:
            if name not in seen and name != exc.finding.check:
                yield _skipped(name, f"after {exc.finding.check} failed")


async def _until_failure(settings: CheckSettings) -> AsyncIterator[Finding]:
    addresses = await _resolve(settings.endpoint)
    yield _passed("address", ", ".join(addresses))
    yield await _connect(addresses, settings)
    async with calling(settings.endpoint, client_name=_CLIENT_NAME, credentials=settings.credentials) as caller:
        state = await _check_tls(caller, settings)
        yield _tls_finding(settings.credentials)
        manifest = await _authenticate(caller, settings)
        yield _token_finding(settings.credentials)
        if state != _SERVING:
            raise _FailedError(
                "health", f"{state}: the teacher loads its model, drains, or its engine died; wait, or see its log"
            )
        yield _passed("health", state)
        if isinstance(manifest, CallError):
            raise _FailedError("manifest", manifest.message)
        yield _passed("manifest", manifest_words(manifest))
        yield _compare(manifest, settings.student)
        answers = [await _score(caller, manifest, settings) for _ in range(1 + settings.repeats)]
        yield _compare_answers(answers)
        yield _latency(answers[1:])


async def _resolve(endpoint: str) -> list[str]:
    host, _, port = endpoint.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
    except OSError as exc:
        raise _FailedError(
            "address",
            f"{host} has no address ({exc.strerror or exc}); check the name, and that this machine's DNS knows it",
        ) from exc
    return sorted({str(one[4][0]) for one in found})


async def _connect(addresses: list[str], settings: CheckSettings) -> Finding:
    port = int(settings.endpoint.rpartition(":")[2])
    failures = [one for one in await asyncio.gather(*(_try(address, port, settings) for address in addresses)) if one]
    if failures:
        raise _FailedError(
            "connection",
            f"{'; '.join(failures)}; start a teacher there, or see whether a firewall or network policy is in between",
        )
    return _passed("connection", f"port {port} is open at each address")


async def _try(address: str, port: int, settings: CheckSettings) -> str | None:
    try:
        async with asyncio.timeout(settings.timeout_s):
            _, writer = await asyncio.open_connection(address, port)
    except TimeoutError:
        return f"nothing answers at {address} port {port} within {settings.timeout_s:g} s"
    except OSError as exc:
        return f"no connection to {address} port {port} ({exc.strerror or exc})"
    writer.close()
    return None


async def _check_tls(caller: TeacherCaller, settings: CheckSettings) -> str:
    """The state that the health service tells: it wants no token, so whatever fails is the connection."""
    try:
        return await caller.check_health(timeout_s=settings.timeout_s)
    except CallError as exc:
        raise _FailedError("tls", exc.message) from exc


async def _authenticate(caller: TeacherCaller, settings: CheckSettings) -> Manifest | CallError:
    """The manifest, or why the teacher has none to give; whatever it is, it has taken the token."""
    try:
        return await caller.get_manifest(timeout_s=settings.timeout_s)
    except CallError as exc:
        if exc.reason == UnauthenticatedError.reason:
            raise _FailedError("authentication", exc.message) from exc
        return exc


def _tls_finding(credentials: CallerCredentials) -> Finding:
    if credentials.tls_ca is None:
        return _skipped("tls", "plain text, as no --tls-ca is given")
    own = "" if credentials.tls_cert is None else f", and takes the certificate {credentials.tls_cert}"
    return _passed("tls", f"the teacher's certificate is signed by {credentials.tls_ca}{own}")


def _token_finding(credentials: CallerCredentials) -> Finding:
    if credentials.token_file is None:
        return _skipped("authentication", "the teacher wants no token")
    return _passed("authentication", f"the teacher takes the token of {credentials.token_file}, or wants none")


def manifest_words(manifest: Manifest) -> str:
    """What a teacher is, in one line."""
    return (
        f"{manifest.model_name} ({manifest.dtype}), {manifest.engine} {manifest.engine_version}, "
        f"{manifest.vocab_rows} vocabulary rows, sequences up to {manifest.max_request_tokens} tokens, "
        f"top-k up to {manifest.max_num_logprobs}; can: {', '.join(sorted(manifest.capabilities)) or 'no more'}"
    )


def _compare(manifest: Manifest, student: Student | None) -> Finding:
    if student is None:
        return _skipped("student", "pass --student MODEL to compare vocabularies")
    if found := differences(manifest, student):
        raise _FailedError(
            "student", f"{'; '.join(found)}; the trainer would refuse this teacher: use models with one token map"
        )
    if manifest.tokenizer is None:
        return _passed("student", f"no token map to compare; the teacher's {manifest.vocab_rows} rows hold every id")
    return _passed("student", f"one token map of {student.tokenizer.token_count} tokens")


async def _score(caller: TeacherCaller, manifest: Manifest, settings: CheckSettings) -> ScoreAnswer:
    num_tokens = min(NUM_TOKENS, manifest.max_request_tokens)
    # the same sequence each time, so that the answers must agree
    token_ids = np.random.default_rng(0).integers(manifest.vocab_rows, size=num_tokens, dtype=np.int32)
    call = ScoreCall(
        token_ids=token_ids, score_start=num_tokens // 2, num_logprobs=min(NUM_LOGPROBS, manifest.max_num_logprobs)
    )
    try:
        return await caller.score(call, manifest=manifest, timeout_s=settings.timeout_s)
    except CallError as exc:
        raise _FailedError("score", exc.message) from exc


def _compare_answers(answers: list[ScoreAnswer]) -> Finding:
    first = answers[0].scores
    if (mass := _farthest_mass(first)) is not None and abs(mass - 1) > MASS_TOLERANCE:
        raise _FailedError(
            "score", f"the probabilities of a position add up to {mass:.4f}, not 1; see the teacher's log"
        )
    apart = max(float(np.abs(one.scores.sampled_logprobs - first.sampled_logprobs).max()) for one in answers)
    if not apart <= REPEAT_TOLERANCE:
        raise _FailedError(
            "score",
            f"{len(answers)} answers for one sequence differ by up to {apart:.3f} nats: replicas of several models "
            "behind one address, or an engine that computes wrongly",
        )
    return _passed(
        "score", f"{first.num_scored} positions, {len(answers)} times; the answers agree to {apart:.1e} nats"
    )


def _farthest_mass(scores: ScoreArrays) -> float | None:
    """Of the positions' total probabilities the one farthest from 1; None without a top-k."""
    if scores.topk_logprobs is None or scores.log_tail_mass is None:
        return None
    mass_S = np.exp(scores.topk_logprobs.astype(np.float64)).sum(-1) + np.exp(scores.log_tail_mass.astype(np.float64))
    return float(mass_S[np.abs(mass_S - 1).argmax()])


def _latency(answers: list[ScoreAnswer]) -> Finding:
    latencies = sorted(one.latency_s for one in answers)
    engine_s = statistics.median(one.timings.engine_s for one in answers)
    return _passed(
        "latency",
        f"median {statistics.median(latencies) * 1e3:.1f} ms, slowest {latencies[-1] * 1e3:.1f} ms "
        f"({len(answers)} calls, one at a time; {engine_s * 1e3:.1f} ms of it in the engine)",
    )
