"""The running service: wiring, readiness, the watch over the engine, drain, signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from structlog.typing import FilteringBoundLogger

from protos.hosts import is_loopback
from teacher_service import memory
from teacher_service.access import AcceptedTokens, Access
from teacher_service.admission import AdmissionLimits
from teacher_service.config import ServiceSettings
from teacher_service.engine import model_files
from teacher_service.engine.base import Engine
from teacher_service.errors import AddressError, EngineDeadError, TeacherServiceError
from teacher_service.scoring import Scorer, ScoringLimits
from teacher_service.telemetry import Telemetry
from teacher_service.tls import ServerTls
from teacher_service.transports.grpc import GrpcTransport
from teacher_service.transports.http import HttpTransport
from teacher_service.types import EngineInfo

PROGRESS_PERIOD_S = 30.0
"""Between two lines of the log while the model loads."""
# For answers that are scored but not written yet, once no work is left.
_WRITE_GRACE_S = 2.0
_ENGINE_CLOSE_TIMEOUT_S = 20.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What a second signal leaves for closing the engine before the process ends regardless.
_ABORT_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where the service listens."""

    grpc: str
    """`host:port` of gRPC."""
    http: str
    """`host:port` of HTTP."""
    tls: bool = False
    """Whether both speak TLS alone."""

    @property
    def http_url(self) -> str:
        """The URL of HTTP."""
        return f"{'https' if self.tls else 'http'}://{self.http}"


class TeacherServer:
    """Both transports over one scorer, and the life of the engine behind them."""

    def __init__(
        self,
        settings: ServiceSettings,
        engine: Engine,
        telemetry: Telemetry,
        *,
        progress_period_s: float = PROGRESS_PERIOD_S,
    ) -> None:
        """Listen to nothing yet.

        Raises:
            SettingsError: the token file, the certificate, its key or the clients' CA can't be used.
        """
        self._settings = settings
        self._engine = engine
        self._telemetry = telemetry
        self._progress_period_s = progress_period_s
        self._scorer = Scorer(engine, _limits(settings))
        access, tls = _access(settings, telemetry.logger), _tls(settings, telemetry.logger)
        self._grpc = GrpcTransport(
            self._scorer,
            telemetry,
            max_stream_inflight=settings.max_stream_inflight,
            access=access,
            tls=tls,
            reflection=settings.reflection,
        )
        self._http = HttpTransport(
            self._scorer,
            telemetry,
            access=access,
            tls=tls,
            docs=settings.http_docs,
            metrics_without_token=settings.metrics_without_token,
        )
        self._addresses: Addresses | None = None
        self.ready = asyncio.Event()
        """Set once the model is loaded and work is taken."""
        _watch_scorer(telemetry, self._scorer)

    @property
    def addresses(self) -> Addresses:
        """Where the service listens; known within `listening`."""
        if self._addresses is None:
            raise RuntimeError("the service has no addresses; ask within `listening`")
        return self._addresses

    @property
    def queued_requests(self) -> int:
        """Sequences that wait for the engine."""
        return self._scorer.admission.queued_requests

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Addresses]:
        """Hold both ports open, though nothing is loaded yet; at the end close them and the engine.

        Raises:
            AddressError: a port can't be opened, or the port file can't be written.
        """
        host = self._settings.host
        port_file = self._settings.port_file
        try:
            grpc_port = await self._grpc.start(host, self._settings.grpc_port)
            http_port = await self._http.start(host, self._settings.http_port)
            self._addresses = Addresses(
                grpc=_join(host, grpc_port), http=_join(host, http_port), tls=self._settings.tls_cert is not None
            )
            if port_file is not None:
                _write_port_file(port_file, self._addresses)
            _warn_of_exposure(self._settings, self._telemetry.logger)
            self._telemetry.logger.info("listening", grpc=self._addresses.grpc, http=self._addresses.http)
            yield self._addresses
        finally:
            if port_file is not None:
                port_file.unlink(missing_ok=True)
            await asyncio.gather(self._grpc.stop(_WRITE_GRACE_S), self._http.stop(_WRITE_GRACE_S))
            await self._close_engine()

    async def run(self, *, stop: asyncio.Event, abort: asyncio.Event) -> None:
        """Load the model and serve until `stop`, then drain; `abort` ends the drain at once.

        Raises:
            EngineStartError: the model can't be loaded.
            EngineDeadError: the engine died; in-flight calls were told.
        """
        life = asyncio.create_task(self._live())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({life, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                life.result()
            await self._drain(life, abort)
        finally:
            stopping.cancel()
            life.cancel()
            await asyncio.gather(life, stopping, return_exceptions=True)

    async def _live(self) -> NoReturn:
        """Load the model, open the gates, and raise once the engine is dead."""
        info, load_s = await self._load()
        self._scorer.open(info)
        await self._grpc.set_serving(serving=True)
        self.ready.set()
        self._telemetry.engine_loaded(info.name, info.route, reason=info.route_reason, load_s=load_s)
        for warning in info.warnings:
            self._telemetry.logger.warning(warning)
        self._telemetry.logger.info(
            "ready",
            model=info.model_name,
            engine=info.name,
            route=info.route,
            **({} if info.runner is None else {"runner": info.runner}),
            max_request_tokens=info.max_request_tokens,
            dtype=info.dtype,
            load_s=round(load_s, 1),
        )
        cause = await self._engine.wait_dead()
        self._scorer.fail(cause)
        await self._grpc.set_serving(serving=False)
        raise EngineDeadError(
            f"the engine died: {_cause_of(cause)}; its log above may say why. Restart the service"
        ) from cause

    async def _load(self) -> tuple[EngineInfo, float]:
        """What the engine is once it has loaded, and the seconds that it took."""
        began_s = time.perf_counter()
        reporting = asyncio.create_task(self._report_loading(began_s))
        try:
            info = await self._engine.start()
        finally:
            reporting.cancel()
        return info, time.perf_counter() - began_s

    async def _report_loading(self, began_s: float) -> NoReturn:
        """A line now and then, so that a long load can be told from a hung one."""
        model = self._settings.model
        weights_bytes = None if model is None else model_files.weights_bytes(model)
        while True:
            await asyncio.sleep(self._progress_period_s)
            self._telemetry.logger.info(
                "loading",
                load_s=round(time.perf_counter() - began_s, 1),
                weights_bytes=weights_bytes,
                resident_bytes=await asyncio.to_thread(memory.resident_bytes),
            )

    async def _drain(self, life: asyncio.Task[NoReturn], abort: asyncio.Event) -> None:
        self._scorer.begin_drain()
        await self._grpc.set_serving(serving=False)
        admission = self._scorer.admission
        self._telemetry.logger.info(
            "draining",
            inflight_requests=admission.inflight_requests,
            queued_requests=admission.queued_requests,
            drain_timeout_s=self._settings.drain_timeout_s,
        )
        idle = asyncio.create_task(self._scorer.wait_idle())
        aborting = asyncio.create_task(abort.wait())
        try:
            await asyncio.wait(
                {idle, aborting, life},
                timeout=self._settings.drain_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if life.done():
                life.result()
            drained = idle.done()
        finally:
            idle.cancel()
            aborting.cancel()
        if not drained:
            self._telemetry.logger.warning("drain cut short", inflight_requests=admission.inflight_requests)
            self._scorer.abort_work()
            await self._scorer.wait_idle()

    async def _close_engine(self) -> None:
        try:
            async with asyncio.timeout(_ENGINE_CLOSE_TIMEOUT_S):
                await self._engine.close()
        except TimeoutError:
            self._telemetry.logger.warning("the engine did not close in time", timeout_s=_ENGINE_CLOSE_TIMEOUT_S)


async def run_until_signalled(server: TeacherServer) -> int:
    """Serve until SIGTERM or SIGINT, then drain; returns the exit code.

    A second signal drops the work in flight; the code is then 128 plus the signal's number.

    Raises:
        AddressError, EngineStartError, EngineDeadError: see `TeacherServer`.
    """
    signals = _Signals()
    with signals:
        async with server.listening():
            announcing = asyncio.create_task(_announce(server))
            try:
                await server.run(stop=signals.stop, abort=signals.abort)
            finally:
                announcing.cancel()
    return signals.exit_code


async def _announce(server: TeacherServer) -> None:
    """Say on stdout that work is taken, and where; whatever the log level."""
    await server.ready.wait()
    addresses = server.addresses
    sys.stdout.write(f"ready: grpc {addresses.grpc} http {addresses.http_url}\n")
    sys.stdout.flush()


class _Signals:
    """Turns the first signal into `stop` and the second into `abort`."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.abort = asyncio.Event()
        self.exit_code = 0

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._receive, number)

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    def _receive(self, number: signal.Signals) -> None:
        if not self.stop.is_set():
            self.stop.set()
            return
        self.exit_code = 128 + number
        if not self.abort.is_set():
            self.abort.set()
            # a thread, since a library may hold the event loop
            timer = threading.Timer(_ABORT_GRACE_S, os._exit, [self.exit_code])
            timer.daemon = True
            timer.start()


def _limits(settings: ServiceSettings) -> ScoringLimits:
    return ScoringLimits(
        admission=AdmissionLimits(
            max_inflight_requests=settings.max_inflight_requests,
            max_inflight_tokens=settings.max_inflight_tokens,
            max_client_inflight_requests=settings.max_client_inflight_requests,
            max_queued_requests=settings.max_queued_requests,
            max_queued_tokens=settings.max_queued_tokens,
        ),
        max_num_logprobs=settings.max_num_logprobs,
        max_request_bytes=settings.max_request_bytes,
        max_response_bytes=settings.max_response_bytes,
        memory_budget_bytes=settings.memory_budget_bytes,
        answer_cache_bytes=settings.answer_cache_bytes,
        answer_cache_s=settings.answer_cache_seconds,
        max_timeout_s=settings.max_timeout_s,
    )


def _access(settings: ServiceSettings, logger: FilteringBoundLogger) -> Access:
    return Access(None if settings.token_file is None else AcceptedTokens(settings.token_file, logger))


def _tls(settings: ServiceSettings, logger: FilteringBoundLogger) -> ServerTls | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return ServerTls(cert=settings.tls_cert, key=settings.tls_key, client_ca=settings.tls_client_ca, logger=logger)


def _warn_of_exposure(settings: ServiceSettings, logger: FilteringBoundLogger) -> None:
    """One line for each thing that others could read or do, and that may not be meant."""
    if is_loopback(settings.host):
        return
    if settings.token_file is None and settings.tls_client_ca is None:
        logger.warning("anybody who reaches this service may use it; see docs/security.md", host=settings.host)
    elif settings.tls_cert is None:
        logger.warning(
            "tokens and token ids travel in plain text; pass --tls-cert and --tls-key where others share the network",
            host=settings.host,
        )


def _watch_scorer(telemetry: Telemetry, scorer: Scorer) -> None:
    admission = scorer.admission
    telemetry.watch("teacher_inflight_requests", "Sequences in the engine.", lambda: admission.inflight_requests)
    telemetry.watch("teacher_inflight_tokens", "Tokens in the engine.", lambda: admission.inflight_tokens)
    telemetry.watch(
        "teacher_memory_reserved_bytes",
        "Main memory that the sequences in the engine may take.",
        lambda: admission.reserved_bytes,
    )
    telemetry.watch(
        "teacher_memory_budget_bytes", "The most of it; 0 while loading.", lambda: admission.budget_bytes or 0
    )
    telemetry.watch("teacher_queued_requests", "Sequences that wait.", lambda: admission.queued_requests)
    telemetry.watch("teacher_queued_tokens", "Tokens that wait.", lambda: admission.queued_tokens)
    telemetry.watch(
        "teacher_joined_requests",
        "Requests that wait for the computation of an equal one; they are in no queue.",
        lambda: scorer.joined_requests,
    )
    telemetry.watch(
        "teacher_answer_cache_bytes",
        "Main memory that the answers kept for repeated requests take, of what the engine leaves of the budget.",
        lambda: scorer.answer_cache.num_bytes,
    )


def _write_port_file(path: Path, addresses: Addresses) -> None:
    """Write whole or not at all: a reader polls for it."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as exc:
        raise AddressError(
            f"can't write the port file {path}: {exc.strerror}; pass a --port-file in a writable folder",
            metadata={"field": "--port-file", "value": f"{path}"},
        ) from exc
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump({"grpc": addresses.grpc, "http": addresses.http}, file)
        Path(temporary).replace(path)
    except OSError as exc:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise AddressError(f"can't write the port file {path}: {exc.strerror}; pass another --port-file") from exc


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _cause_of(cause: BaseException) -> str:
    if isinstance(cause, TeacherServiceError):
        return cause.message
    return f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
