"""One ScoreStream: many sequences in flight, answers in completion order, each failing alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import NoReturn, cast

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.errors import (
    DrainingError,
    InvalidStreamIdError,
    InvalidTimeoutError,
    MalformedRequestError,
    TeacherServiceError,
)
from teacher_service.scoring import Scorer
from teacher_service.telemetry import RequestRecord, Telemetry
from teacher_service.transports import messages
from teacher_service.transports.grpc_access import Caller, Context, metadata_of

MAX_STREAM_ID_LENGTH = 128


class ScoreStreamSession:
    """The server's side of one stream."""

    def __init__(
        self,
        scorer: Scorer,
        telemetry: Telemetry,
        context: Context,
        *,
        caller: Caller,
        max_inflight: int,
        closing: asyncio.Event,
    ) -> None:
        self._scorer = scorer
        self._telemetry = telemetry
        self._context = context
        self._caller = caller
        self._slots = asyncio.Semaphore(max_inflight)
        self._closing = closing
        self._write_lock = asyncio.Lock()
        self._ids: set[str] = set()
        self._num_answering = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def run(self, payloads: AsyncIterator[bytes]) -> None:
        """Answer until the caller has sent its last sequence and every answer is written.

        Raises:
            DrainingError: the server closes; everything taken was answered.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                watcher = tasks.create_task(self._end_on_closing())
                await self._read_all(payloads, tasks)
                await self._quiet.wait()
                watcher.cancel()
        except ExceptionGroup as group:
            for error in group.exceptions:
                if isinstance(error, DrainingError):
                    raise error from None
            raise

    async def _read_all(self, payloads: AsyncIterator[bytes], tasks: asyncio.TaskGroup) -> None:
        incoming = aiter(payloads)
        while True:
            # a slot before the read: without one nothing is read, and HTTP/2 flow control holds the sender back
            await self._slots.acquire()
            payload = await anext(incoming, None)
            if payload is None:
                return
            self._num_answering += 1
            self._quiet.clear()
            tasks.create_task(self._answer(payload))

    async def _end_on_closing(self) -> NoReturn:
        await self._closing.wait()
        await self._quiet.wait()
        raise DrainingError("the service shut down; open the stream on another replica")

    async def _answer(self, payload: bytes) -> None:
        answer = pb.ScoreStreamResponse()
        try:
            with self._telemetry.request("ScoreStream", metadata_of(self._context)) as record:
                record.client, record.account = self._caller.client, self._caller.account
                record.received_bytes = len(payload)
                message = messages.parse(pb.ScoreStreamRequest, payload)
                answer.id = message.id[:MAX_STREAM_ID_LENGTH]
                messages.check_body_size(len(payload), self._scorer.limits.max_request_bytes)
                answer.response.CopyFrom(await self._score(message, record))
                record.sent_bytes = answer.ByteSize()
        except TeacherServiceError as exc:
            answer.error.CopyFrom(messages.error_to_pb(exc))
        try:
            async with self._write_lock:
                await self._context.write(answer.SerializeToString())
        finally:
            self._slots.release()
            self._num_answering -= 1
            if self._num_answering == 0:
                self._quiet.set()

    async def _score(self, message: pb.ScoreStreamRequest, record: RequestRecord) -> pb.ScoreResponse:
        self._check_id(message.id)
        self._ids.add(message.id)
        try:
            if not message.HasField("request"):
                raise MalformedRequestError(
                    f"the message with id {message.id!r} has no request; set what to score",
                    metadata={"field": "request", "value": "unset", "limit": "set"},
                )
            wire_dtype = messages.wire_dtype_of(message.request)
            result = await self._scorer.score(
                messages.request_from_pb(message.request), timeout_s=self._timeout_s(message), record=record
            )
            return await messages.result_to_pb(result, wire_dtype, record)
        finally:
            # before the answer is written: who has read it may use the id again
            self._ids.discard(message.id)

    def _check_id(self, stream_id: str) -> None:
        if not 1 <= len(stream_id) <= MAX_STREAM_ID_LENGTH:
            raise InvalidStreamIdError(
                f"id has {len(stream_id)} characters, outside [1, {MAX_STREAM_ID_LENGTH}]; give every sequence of a "
                "stream an id",
                metadata={"field": "id", "value": f"{len(stream_id)}", "limit": f"[1, {MAX_STREAM_ID_LENGTH}]"},
            )
        if stream_id in self._ids:
            raise InvalidStreamIdError(
                f"id {stream_id!r} is in flight on this stream; give every sequence an id of its own",
                metadata={"field": "id", "value": stream_id, "limit": "unique among those in flight"},
            )

    def _timeout_s(self, message: pb.ScoreStreamRequest) -> float | None:
        # None without a deadline, though the stubs know no None
        remaining_s = cast("float | None", self._context.time_remaining())
        if not message.HasField("timeout_s"):
            return remaining_s
        if not (math.isfinite(message.timeout_s) and message.timeout_s > 0):
            raise InvalidTimeoutError(
                f"timeout_s is {message.timeout_s}; it must be finite and > 0, or unset for the stream's own deadline",
                metadata={"field": "timeout_s", "value": f"{message.timeout_s}", "limit": "(0, inf)"},
            )
        return message.timeout_s if remaining_s is None else min(message.timeout_s, remaining_s)
