"""A TCP proxy between a client and a service that breaks connections on command, in the ways a network does.

It runs in a thread of its own, so that it works beside any event loop and beside tests that have none. It understands
so much of HTTP/2 that it finds the answers, those to health checks among them: a frame is 3 bytes of length, 1 of type,
1 of flags, 4 of stream, and a payload; answers travel in DATA frames, each behind a prefix of 5 bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

_TIMEOUT_S = 10.0
"""Bound of what the proxy's thread is asked to do."""
_CHUNK_BYTES = 1 << 16
_FRAME_HEADER_BYTES = 9
_LENGTH_BYTES = 3
_MESSAGE_START = _FRAME_HEADER_BYTES + 5
_DATA = 0
_MAX_HELD_FRAMES = 4096
_SEED = 0


@dataclass(frozen=True, slots=True)
class BlackHole:
    """Swallow every byte, of new connections too, and close nothing.

    What was swallowed stays lost: a connection that it met is dead for good, as behind a firewall that forgot it.
    """


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset all connections, and new ones as soon as they are accepted."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Hold back whatever the service sends."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Truncate:
    """Close the connection in the middle of an answer."""

    every: int = 1
    """Strikes one answer of so many."""


class Part(Enum):
    """Where a byte is flipped."""

    FRAME_LENGTH = "frame length"
    """In the length of a frame: whatever follows on the connection is misread."""
    PREFIX = "prefix"
    """In the flag and length that gRPC puts before a message."""
    MESSAGE = "message"
    """In the message."""


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Flip one bit of an answer."""

    part: Part
    every: int = 1
    """Strikes one answer of so many."""


Fault = BlackHole | Reset | Delay | Truncate | Corrupt


class FaultyProxy:
    """Passes bytes between whoever connects to `endpoint` and `target`, until told otherwise."""

    def __init__(self, target: str, loop: asyncio.AbstractEventLoop) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._loop = loop
        self.fault: Fault | None = None
        """What happens now; `set_fault` changes it."""
        self.endpoint = ""
        """`host:port` to connect to."""
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._random = random.Random(_SEED)  # noqa: S311 - where a bit flips is no secret
        self._num_answers = 0
        self.num_strikes = 0
        """Connections that were reset, swallowed or cut, pieces held back, and bits flipped so far."""

    def set_fault(self, fault: Fault | None) -> None:
        """Do this from now on; None: pass everything. Callable from any thread; in force when it returns."""
        asyncio.run_coroutine_threadsafe(self._set_fault(fault), self._loop).result(_TIMEOUT_S)

    async def open(self) -> None:
        """Listen; called in the proxy's loop."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.endpoint = f"{host}:{port}"

    async def close(self) -> None:
        """End everything; called in the proxy's loop."""
        if self._server is not None:
            self._server.close()
        while self._connections:  # one may have been accepted meanwhile
            tasks = list(self._connections)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _set_fault(self, fault: Fault | None) -> None:
        self.fault = fault
        if isinstance(fault, Reset):
            for writers in self._connections.values():
                self.num_strikes += 1
                for writer in writers:
                    _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writers = [writer]
        try:
            if isinstance(self.fault, Reset):
                self.num_strikes += 1
                return
            if isinstance(self.fault, BlackHole):
                self.num_strikes += 1
                await _swallow(reader)
                return
            service = await asyncio.open_connection(*self._target)
            writers.append(service[1])
            await _Relay(self).run((reader, writer), service)
        except (OSError, asyncio.CancelledError):
            # One side is gone, or the test is over. The cancellation ends here: asyncio's streams would log it.
            return
        finally:
            for one in writers:
                _reset(one)
            del self._connections[task]

    def hold_s(self) -> float:
        """Seconds for which what comes from the service now is held back."""
        if not isinstance(self.fault, Delay):
            return 0.0
        self.num_strikes += 1
        return self.fault.delay_s

    def strike(self, frame: bytearray) -> bool:
        """Cut or flip an answer whose turn it is; returns whether the connection ends after it."""
        fault = self.fault
        if not isinstance(fault, Truncate | Corrupt) or not _is_answer(frame):
            return False
        self._num_answers += 1
        if self._num_answers % fault.every:
            return False
        self.num_strikes += 1
        if isinstance(fault, Truncate):
            del frame[len(frame) // 2 :]
            return True
        bounds = {
            Part.FRAME_LENGTH: (0, _LENGTH_BYTES),
            Part.PREFIX: (_FRAME_HEADER_BYTES, _MESSAGE_START),
            Part.MESSAGE: (_MESSAGE_START, len(frame)),
        }
        first, end = bounds[fault.part]
        frame[self._random.randrange(first, end)] ^= 1 << self._random.randrange(8)
        return False


class _Relay:
    """One connection that reached the service."""

    def __init__(self, proxy: FaultyProxy) -> None:
        self._proxy = proxy
        self._is_swallowed = False
        """Whether a black hole met it."""
        self._held: asyncio.Queue[tuple[float, bytearray] | None] = asyncio.Queue(_MAX_HELD_FRAMES)
        """What the service sent, and when it may go on; None: nothing will follow."""

    async def run(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        service: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Pass both ways until one side ends; what it sent before has arrived by then."""
        requests = asyncio.ensure_future(self._pass_requests(client[0], service[1]))
        receiving = asyncio.ensure_future(self._receive_answers(service[0]))
        sending = asyncio.ensure_future(self._send_answers(client[1]))
        try:
            await asyncio.wait([requests, sending], return_when=asyncio.FIRST_COMPLETED)
            if self._is_swallowed:
                await requests  # the client hears of nothing, not even of a service that ended
        finally:
            for one in (requests, receiving, sending):
                one.cancel()
            await asyncio.gather(requests, receiving, sending, return_exceptions=True)

    async def _pass_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            if not self._swallows():
                writer.write(chunk)
                await writer.drain()

    async def _receive_answers(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # a service that was killed: what it sent before goes on
            while frame := await _read_frame(reader):
                is_cut = self._proxy.strike(frame)
                await self._held.put((loop.time() + self._proxy.hold_s(), frame))
                if is_cut:
                    break
        await self._held.put(None)

    async def _send_answers(self, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while (held := await self._held.get()) is not None:
            due_s, frame = held
            await asyncio.sleep(max(due_s - loop.time(), 0))
            if not self._swallows():
                writer.write(frame)
                await writer.drain()
        if not self._is_swallowed:
            writer.close()  # with FIN, so that what was sent arrives
            await writer.wait_closed()

    def _swallows(self) -> bool:
        if isinstance(self._proxy.fault, BlackHole) and not self._is_swallowed:
            self._is_swallowed = True
            self._proxy.num_strikes += 1
        return self._is_swallowed


@contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    """A proxy to `host:port` that passes everything at first; at the end its connections and its thread are gone."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="faulty-proxy")
    thread.start()
    proxy = FaultyProxy(target, loop)
    try:
        asyncio.run_coroutine_threadsafe(proxy.open(), loop).result(_TIMEOUT_S)
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(proxy.close(), loop).result(_TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_TIMEOUT_S)
        loop.close()


async def _read_frame(reader: asyncio.StreamReader) -> bytearray:
    """The next frame, header and payload; at the end of the stream, what is left of one."""
    try:
        header = await reader.readexactly(_FRAME_HEADER_BYTES)
        return bytearray(header + await _read_up_to(reader, int.from_bytes(header[:_LENGTH_BYTES])))
    except asyncio.IncompleteReadError as exc:
        return bytearray(exc.partial)


async def _read_up_to(reader: asyncio.StreamReader, num_bytes: int) -> bytes:
    try:
        return await reader.readexactly(num_bytes)
    except asyncio.IncompleteReadError as exc:
        return exc.partial


async def _swallow(reader: asyncio.StreamReader) -> None:
    while await reader.read(_CHUNK_BYTES):
        pass


def _is_answer(frame: bytearray) -> bool:
    return len(frame) > _MESSAGE_START and frame[_LENGTH_BYTES] == _DATA


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST, whatever is still to be sent."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
