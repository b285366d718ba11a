"""Callers of the abuse test: every door of the service, over several connections, as told to wait or to hang up."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any, Self

import grpc
import httpx
import numpy as np
from google.protobuf.message import DecodeError

from protos.arrays import ScoreArrays
from protos.codec import scores_from_pb
from protos.teacher.v1 import teacher_pb2 as pb
from tests.support.abuse import CONTENT_TYPES, NUM_CONNECTIONS, Case, Door, Kind, V
from tests.support.service import UNLIMITED, Outcome, json_of, outcome_of_rpc_error, outcome_of_stream_answer

CALL_TIMEOUT_S = 100.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a case came to."""

    outcome: Outcome
    scores: ScoreArrays | None = None
    overloads: tuple[Outcome, ...] = ()
    """Refusals before it, after each of which the caller waited as told."""


class Stream:
    """One ScoreStream: asks many things at once and tells the answers apart by their ids."""

    def __init__(self, channel: grpc.aio.Channel, client: str) -> None:
        score_stream = channel.stream_stream("/teacher.v1.TeacherService/ScoreStream")
        self._call = score_stream(timeout=CALL_TIMEOUT_S, metadata=metadata_of(client))
        self._write_lock = asyncio.Lock()
        self._waiting: dict[str, asyncio.Future[pb.ScoreStreamResponse]] = {}
        self._reading = asyncio.create_task(self._read())
        self._count = 0

    def free_id(self) -> str:
        """One that no message had."""
        self._count += 1
        return f"{self._count}"

    async def ask(self, stream_id: str, payload: bytes) -> pb.ScoreStreamResponse:
        """Send a message, and wait for the answer with this id."""
        answered = self._waiting[stream_id] = asyncio.get_running_loop().create_future()
        async with self._write_lock:
            await self._call.write(payload)
        return await answered

    async def close(self) -> None:
        """End it in order; fails where the service did not."""
        await self._call.done_writing()
        await self._reading

    async def hang_up(self) -> None:
        """End it at once."""
        self._call.cancel()
        self._reading.cancel()
        await asyncio.wait({self._reading})

    async def _read(self) -> None:
        try:
            async for payload in self._call:
                answer = pb.ScoreStreamResponse.FromString(payload)
                self._waiting.pop(answer.id).set_result(answer)
        except grpc.aio.AioRpcError as exc:
            for asked in self._waiting.values():
                asked.set_exception(exc)
            raise


class Callers:
    """Several connections to one service, over each of its doors."""

    def __init__(self, grpc_address: str, http_address: str) -> None:
        own_connection = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        self.http_address = http_address.removeprefix("http://")
        self.channels = [
            grpc.aio.insecure_channel(grpc_address, options=own_connection) for _ in range(NUM_CONNECTIONS)
        ]
        # idle connections are dropped well before the service drops them, which it does after 5 s
        limits = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
        self.https = [
            httpx.AsyncClient(base_url=http_address, timeout=CALL_TIMEOUT_S, limits=limits)
            for _ in range(NUM_CONNECTIONS)
        ]
        self._streams: dict[tuple[int, str], Stream] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(one.close() for one in self.channels), *(one.aclose() for one in self.https))

    async def send_all(self, cases: list[Case]) -> list[tuple[Case, Reply]]:
        """All at once; then the streams end."""
        replies = await asyncio.gather(*(self._settle(case) for case in cases))
        await asyncio.gather(*(stream.close() for stream in self._streams.values()))
        self._streams = {}
        return list(zip(cases, replies, strict=True))

    async def metrics(self) -> dict[str, float]:
        """Every sample by name and labels."""
        text = (await self.https[0].get("/metrics")).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    async def send(self, case: Case) -> Reply:
        """Once."""
        match case.door:
            case Door.UNARY:
                return await self._by_unary(case)
            case Door.STREAM:
                return await self._by_stream(case)
            case _:
                return await self._by_http(case)

    async def _settle(self, case: Case) -> Reply:
        if case.kind is Kind.CANCELLED:
            return await self._cancelled(case)
        overloads: list[Outcome] = []
        while True:
            reply = await self.send(case)
            if case.kind is not Kind.GOOD or reply.outcome.reason != "OVERLOADED":
                return Reply(outcome=reply.outcome, scores=reply.scores, overloads=tuple(overloads))
            overloads.append(reply.outcome)
            assert reply.outcome.retry_delay_s is not None
            await asyncio.sleep(reply.outcome.retry_delay_s)

    async def _cancelled(self, case: Case) -> Reply:
        is_http = case.door not in (Door.UNARY, Door.STREAM)
        sending = asyncio.create_task(self._hang_up(case) if is_http else self.send(case))
        await asyncio.wait({sending}, timeout=case.cancel_after_s)
        sending.cancel()
        await asyncio.wait({sending})
        return Reply(outcome=Outcome("CANCELLED")) if sending.cancelled() else sending.result()

    async def _by_unary(self, case: Case) -> Reply:
        score = self.channels[case.connection].unary_unary("/teacher.v1.TeacherService/Score")
        try:
            answer = await score(
                body_of(case), timeout=case.timeout_s or CALL_TIMEOUT_S, metadata=metadata_of(case.client)
            )
        except grpc.aio.AioRpcError as exc:
            return Reply(outcome=outcome_of_rpc_error(exc))
        return answered(case, pb.ScoreResponse.FromString(answer))

    async def _by_stream(self, case: Case) -> Reply:
        """One with others on a shared stream, unless it could end the stream or has an id that others may have."""
        alone = case.kind is Kind.CANCELLED or isinstance(case.request, bytes) or case.stream_id is not None
        channel = self.channels[case.connection]
        if alone:
            stream = Stream(channel, case.client)
        else:
            key = (case.connection, case.client)
            stream = self._streams[key] = self._streams.get(key) or Stream(channel, case.client)
        stream_id = stream.free_id() if case.stream_id is None else case.stream_id
        try:
            answer = await stream.ask(answer_id_of(case, stream_id), stream_payload(case, stream_id))
        except asyncio.CancelledError:
            await stream.hang_up()
            raise
        if alone:
            await stream.close()
        if answer.HasField("response"):
            return answered(case, answer.response)
        return Reply(outcome=outcome_of_stream_answer(answer))

    async def _by_http(self, case: Case) -> Reply:
        headers = {"content-type": CONTENT_TYPES[case.door], **dict(metadata_of(case.client))}
        if case.timeout_s is not None:
            headers["x-request-timeout-s"] = f"{case.timeout_s}"
        answer = await self.https[case.connection].request(
            case.method, case.path, content=body_of(case), headers=headers | dict(case.headers)
        )
        if answer.status_code != 200:
            return Reply(outcome=outcome_of_problem(answer))
        if case.door is Door.JSON:
            return Reply(outcome=Outcome("OK"), scores=scores_from_json(answer.json()))
        return answered(case, pb.ScoreResponse.FromString(answer.content))

    async def _hang_up(self, case: Case) -> Reply:
        """Send it over a connection of its own, all or half, and wait to be cancelled: httpx would leave it open."""
        host, port = self.http_address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        try:
            body = body_of(case)
            head = f"POST /v1/score HTTP/1.1\r\nHost: teacher\r\nContent-Type: {CONTENT_TYPES[case.door]}\r\n"
            sent = body[: len(body) // 2] if case.door is Door.TORN else body
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + sent)
            await asyncio.sleep(CALL_TIMEOUT_S)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        raise AssertionError("it is cancelled before")


def metadata_of(client: str) -> tuple[tuple[str, str], ...]:
    return (("x-client-id", client),) if client else ()


def body_of(case: Case) -> bytes:
    if isinstance(case.request, bytes):
        return case.request
    return json_of(case.request).encode() if case.door in (Door.JSON, Door.TORN) else case.request.SerializeToString()


def stream_payload(case: Case, stream_id: str) -> bytes:
    if isinstance(case.request, bytes):
        return case.request
    message = pb.ScoreStreamRequest(id=stream_id, request=case.request, timeout_s=case.stream_timeout_s)
    return message.SerializeToString()


def answer_id_of(case: Case, stream_id: str) -> str:
    """What the service calls it: a message that it can't read has no id, and a long one is cut."""
    if not isinstance(case.request, bytes):
        return stream_id[:128]
    with contextlib.suppress(DecodeError):
        return pb.ScoreStreamRequest.FromString(case.request).id
    return ""


def outcome_of_problem(answer: httpx.Response) -> Outcome:
    problem = answer.json()
    assert (answer.headers["content-type"], problem["status"]) == ("application/problem+json", answer.status_code)
    return Outcome(
        problem["reason"], problem["title"], problem["detail"], problem["metadata"], problem.get("retry_delay_s")
    )


def answered(case: Case, answer: pb.ScoreResponse) -> Reply:
    """An answer's arrays, which keep the contract."""
    request = case.request
    assert isinstance(request, pb.ScoreRequest)
    assert answer.wire_dtype == (request.wire_dtype or pb.WIRE_DTYPE_FLOAT32)
    scores = scores_from_pb(
        answer,
        num_scored=len(request.token_ids) - request.score_start,
        num_logprobs=request.num_logprobs,
        vocab_rows=V,
        num_candidates=request.candidates.count,
    )
    return Reply(outcome=Outcome("OK"), scores=scores)


def scores_from_json(answer: dict[str, Any]) -> ScoreArrays:
    """Floats may be the string `-Infinity`."""
    floats = ("sampled_logprobs", "topk_logprobs", "log_tail_mass", "entropy", "candidate_logprobs")
    arrays = {name: np.array(answer[name]).astype(np.float32) for name in floats if name in answer}
    ids = answer.get("topk_token_ids")
    return ScoreArrays(**arrays, topk_token_ids=None if ids is None else np.array(ids, dtype=np.int32))
