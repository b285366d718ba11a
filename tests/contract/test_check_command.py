"""`check` against the real service with the analytic teacher behind it, against faulty ones, and against none."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

from protos.arrays import ScoreArrays
from protos.codec import WireDtype, scores_to_pb
from protos.manifest import TokenizerManifest
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.check.checks import NAMES, CheckSettings, Finding, run_checks
from teacher_service.check.student import Student, read_student
from teacher_service.engine.fake import FakeEngine
from teacher_service.errors import SettingsError
from teacher_service.transports.caller_credentials import CallerCredentials
from tests.support.certificates import Authority
from tests.support.models import VOCAB_ROWS, write_checkpoint
from tests.support.service import running_service
from tests.support.teacher_stub import Step, fails, running_stub, stub_manifest
from tests.support.waiting import TIMEOUT_S

ROOT = Path(__file__).parents[2]
TOKEN = "a1" * 16
PLAIN = CallerCredentials()


async def found(
    endpoint: str, credentials: CallerCredentials = PLAIN, student: Student | None = None, timeout_s: float = TIMEOUT_S
) -> dict[str, Finding]:
    """By check; each has one finding, in order."""
    settings = CheckSettings(
        endpoint=endpoint, student=student, credentials=credentials, timeout_s=timeout_s, repeats=2
    )
    findings = [one async for one in run_checks(settings)]
    assert sorted(one.check for one in findings) == sorted(NAMES)
    return {one.check: one for one in findings}


def failure(findings: dict[str, Finding]) -> tuple[str, str]:
    """The one check that failed, and why; those after it were skipped for it, those before it were not."""
    [failed] = [one for one in findings.values() if one.verdict == "failed"]
    after = [name for name, one in findings.items() if one.detail == f"after {failed.check} failed"]
    assert after == [name for name in NAMES if name in after], "skipped out of order"
    assert failed.check not in after
    return failed.check, failed.detail


def student_of(*tokens: str, vocab_rows: int = 32) -> Student:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = TokenizerManifest.from_vocabulary(vocabulary, {})
    return Student(tokenizer=tokenizer, highest_id=len(tokens) - 1, vocab_rows=vocab_rows)


async def test_a_teacher_that_is_well(tmp_path: Path) -> None:
    """With TLS and a token everything is checked, and the details say what was found."""
    authority = Authority(tmp_path, "authority")
    pair, token_file = authority.sign("server"), tmp_path / "tokens"
    token_file.write_text(f"{TOKEN}\n")
    async with running_service(FakeEngine(), tls_cert=pair.cert, tls_key=pair.key, token_file=token_file) as service:
        credentials = CallerCredentials(tls_ca=authority.cert, token_file=token_file)
        findings = await found(service.addresses.grpc, credentials, student_of("a", "b"))
        assert {one.verdict for one in findings.values()} == {"passed"}
        assert findings["address"].detail == "127.0.0.1"
        assert "32 vocabulary rows" in findings["manifest"].detail
        assert re.search(r"32 positions, 3 times; the answers agree to 0\.0e\+00 nats", findings["score"].detail)
        assert re.search(r"median [\d.]+ ms.*2 calls", findings["latency"].detail)

        check, _ = failure(await found(service.addresses.grpc, CallerCredentials(tls_ca=authority.cert)))
        assert check == "authentication"
        check, detail = failure(await found(service.addresses.grpc))
        assert (check, "if it serves with TLS, pass --tls-ca" in detail) == ("tls", True)


async def test_what_was_not_asked_for_is_skipped_and_says_how_to_ask() -> None:
    """Plain text, no token, no student."""
    async with running_service(FakeEngine()) as service:
        findings = await found(service.addresses.grpc)
    assert [name for name, one in findings.items() if one.verdict == "skipped"] == ["tls", "authentication", "student"]
    assert "--tls-ca" in findings["tls"].detail
    assert "--student" in findings["student"].detail


async def test_nobody_is_there() -> None:
    """No such name; a port that is closed; a port that says nothing."""
    check, detail = failure(await found("no-such-host.invalid:15555"))
    assert (check, "no-such-host.invalid has no address" in detail) == ("address", True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check, detail = failure(await found(f"127.0.0.1:{port}", timeout_s=0.5))
        assert check == "tls"
        assert "no connection within 0.5 s" in detail
    check, detail = failure(await found(f"127.0.0.1:{port}"))
    assert (check, f"no connection to 127.0.0.1 port {port}" in detail) == ("connection", True)


async def test_a_teacher_that_loads_is_not_well() -> None:
    """It answers, but serves nothing."""
    engine = FakeEngine()
    engine.loading_gate.clear()
    async with running_service(engine, ready=False) as service:
        check, detail = failure(await found(service.addresses.grpc))
        engine.loading_gate.set()
    assert check == "health"
    assert "NOT_SERVING: the teacher loads its model" in detail


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (student_of("a", "c"), r"differ, first among the ids 0 to 1023: the teacher's has 2 tokens, the student's 2"),
        (student_of("a", "b", vocab_rows=1), r"the student's LM head has 1 rows, and the token map reaches id 1"),
    ],
)
async def test_a_student_that_does_not_fit(student: Student, said: str) -> None:
    """As the trainer would see it."""
    manifest = stub_manifest(tokenizer=TokenizerManifest.from_vocabulary({"a": 0, "b": 1}, {}))
    async with running_stub(manifest) as stub:
        check, detail = failure(await found(stub.endpoint, student=student))
    assert check == "student"
    assert re.search(said, detail)


async def _half_the_mass(request: pb.ScoreRequest, _context: object) -> pb.ScoreResponse:
    num_scored, num_logprobs = len(request.token_ids) - request.score_start, request.num_logprobs
    half = np.full(num_scored, np.log(0.25), np.float32)
    scores = ScoreArrays(
        sampled_logprobs=half,
        topk_token_ids=np.tile(np.arange(num_logprobs, dtype=np.int32), (num_scored, 1)),
        topk_logprobs=np.full((num_scored, num_logprobs), np.log(0.25 / num_logprobs), np.float32),
        log_tail_mass=half,
    )
    return scores_to_pb(scores, wire_dtype=WireDtype.FLOAT32, manifest_digest=stub_manifest().digest)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (fails(grpc.StatusCode.INTERNAL, "ENGINE_FAILED", message="broken"), "says: broken"),
        (_half_the_mass, "add up to 0.5000, not 1"),
    ],
)
async def test_a_teacher_that_scores_wrongly(step: Step, said: str) -> None:
    """Refusals are told in the teacher's words; probabilities that don't add up are noticed."""
    async with running_stub() as stub:
        stub.script.extend([step] * 3)
        check, detail = failure(await found(stub.endpoint))
    assert check == "score"
    assert said in detail


def test_a_student_is_read_from_its_files(tmp_path: Path) -> None:
    """Without its weights; and what is no model is refused with the flag's name."""
    student = read_student(f"{write_checkpoint(tmp_path / 'model')}")
    assert student.vocab_rows == VOCAB_ROWS
    assert student.highest_id < VOCAB_ROWS
    with pytest.raises(SettingsError, match="--student '/no/such/model' can't be read"):
        read_student("/no/such/model")


async def _run(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "teacher_service", "check", *arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_the_command_line() -> None:
    """A table or JSON on stdout; 0, 1 for a failure and 2 for a wrong flag."""
    async with running_service(FakeEngine()) as service:
        code, out, err = await _run("--endpoint", service.addresses.grpc)
        assert (code, err) == (0, "")
        assert all(name in out for name in NAMES)
        code, out, _ = await _run("--endpoint", service.addresses.grpc, "--json")
        assert (code, list(json.loads(out))) == (0, list(NAMES))
    code, out, _ = await _run("--endpoint", service.addresses.grpc, "--json")
    assert (code, json.loads(out)["connection"]["verdict"]) == (1, "failed")
    code, _, err = await _run("--endpoint", "nowhere")
    assert (code, "--endpoint is 'nowhere'" in err) == (2, True)
