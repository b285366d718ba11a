"""`python -m teacher_service serve|check|bench …`: the command line."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic.fields import FieldInfo

from teacher_service.config import ServiceSettings, flag_of, load_settings, variable_of
from teacher_service.engine.options import EngineOptions
from teacher_service.errors import SettingsError, TeacherServiceError

if TYPE_CHECKING:
    from teacher_service.engine.base import Engine

EXIT_FAILED = 1
EXIT_USAGE = 2


def main() -> None:
    """Entry of the console script `gkd-teacher`."""
    build_app()()


def build_app() -> typer.Typer:
    """The command line; each setting is an option of `serve`."""
    app = typer.Typer(
        name="teacher_service",
        help="A logprob service: token ids in, the teacher's distribution at the response positions out.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    serve.__signature__ = _signature_from_settings()  # type: ignore[attr-defined] # typer reads it
    app.command()(serve)
    app.command()(check)
    app.command()(bench)
    return app


def serve(**flags: Any) -> None:
    """Serve a teacher over gRPC and HTTP until SIGTERM or SIGINT; a second signal ends without waiting for work."""
    try:
        settings = load_settings({name: value for name, value in flags.items() if value is not None})
    except SettingsError as exc:
        _fail(exc, EXIT_USAGE)
    run_service(settings, _build_engine)


Endpoint = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the teacher serves gRPC.")]
TlsCa = Annotated[
    Path | None,
    typer.Option(help="PEM file of the CA that signed the teacher's certificate, or system; unset: plain text."),
]
TlsCert = Annotated[Path | None, typer.Option(help="PEM file of a certificate to show.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file of its private key.")]
TlsServerName = Annotated[
    str | None, typer.Option(help="Name that the teacher's certificate must have; unset: the endpoint's own.")
]
TokenFile = Annotated[Path | None, typer.Option(help="File whose first line is the token to send.")]


def check(
    endpoint: Endpoint,
    student: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder or hub id of a student that the teacher must fit.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 10.0,
    repeats: Annotated[int, typer.Option(help="Sequences to time.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = None,
    token_file: TokenFile = None,
) -> None:
    """Check a running teacher from this machine: connection, TLS, token, health, manifest, one sequence, latency."""
    from teacher_service.check.checks import CheckSettings
    from teacher_service.check.command import run_check
    from teacher_service.check.student import read_student
    from teacher_service.transports.caller_credentials import CallerCredentials

    try:
        settings = CheckSettings(
            endpoint=endpoint,
            student=None if student is None else read_student(student),
            credentials=CallerCredentials(
                tls_ca=tls_ca,
                tls_cert=tls_cert,
                tls_key=tls_key,
                tls_server_name=tls_server_name,
                token_file=token_file,
            ),
            timeout_s=timeout_s,
            repeats=repeats,
        )
        exit_code = run_check(settings, as_json=json)
    except SettingsError as exc:
        _fail(exc, EXIT_USAGE)
    sys.exit(exit_code)


def bench(
    endpoint: Endpoint,
    sequences: Annotated[int, typer.Option(help="Sequences to score at each concurrency.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    response_tokens: Annotated[int, typer.Option(help="Tokens of a response; these are scored.")] = 512,
    num_logprobs: Annotated[int, typer.Option(help="Most likely tokens to ask for per scored token.")] = 64,
    concurrency: Annotated[
        list[int], typer.Option(help="Sequences in flight at a time; give the flag again for each level.")
    ] = [1, 8, 64],  # noqa: B006 - typer copies it, and takes no tuple of any length
    siblings: Annotated[int, typer.Option(help="Responses per prompt; above 1 a prefix cache shows.")] = 1,
    wire_dtype: Annotated[
        str, typer.Option(metavar="float32|float16|bfloat16", help="Type of the logprobs in the answers.")
    ] = "float32",
    temperature: Annotated[float, typer.Option(help="Divides the teacher's logits.")] = 1.0,
    timeout_s: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 60.0,
    warm_up: Annotated[int, typer.Option(help="Sequences to score first, unmeasured.")] = 8,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the token ids; unset: a new one, so that no cache knows them from an earlier run."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the results as JSON; - for stdout.")] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = None,
    token_file: TokenFile = None,
) -> None:
    """Measure a running teacher: throughput, latency and size of the answers at each concurrency."""
    # here, so that --help and a wrong flag answer without loading grpc
    from teacher_service.bench.command import run_bench
    from teacher_service.bench.settings import BenchSettings, new_seed, parse_wire_dtype
    from teacher_service.transports.caller_credentials import CallerCredentials

    try:
        exit_code = run_bench(
            BenchSettings(
                endpoint=endpoint,
                sequences=sequences,
                prompt_tokens=prompt_tokens,
                response_tokens=response_tokens,
                num_logprobs=num_logprobs,
                concurrency=tuple(concurrency),
                siblings=siblings,
                wire_dtype=parse_wire_dtype(wire_dtype),
                temperature=temperature,
                timeout_s=timeout_s,
                warm_up=warm_up,
                seed=new_seed() if seed is None else seed,
                json=json,
                credentials=CallerCredentials(
                    tls_ca=tls_ca,
                    tls_cert=tls_cert,
                    tls_key=tls_key,
                    tls_server_name=tls_server_name,
                    token_file=token_file,
                ),
            )
        )
    except SettingsError as exc:
        _fail(exc, EXIT_USAGE)
    sys.exit(exit_code)


def run_service(settings: ServiceSettings, build_engine: Callable[[ServiceSettings], Engine]) -> NoReturn:
    """Serve until told to stop, and end the process with the exit code.

    Args:
        settings: how to serve.
        build_engine: makes the engine, on the service's event loop.
    """
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            exit_code = runner.run(_serve(settings, build_engine))
    except TeacherServiceError as exc:
        _fail(exc, EXIT_USAGE if isinstance(exc, SettingsError) else EXIT_FAILED)
    sys.exit(exit_code)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's; None, for asyncio's own, where it is not to be had (Windows)."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


async def _serve(settings: ServiceSettings, build_engine: Callable[[ServiceSettings], Engine]) -> int:
    # here, so that --help and a wrong flag answer without loading grpc
    from protos.tracing import start_tracing
    from teacher_service.server import TeacherServer, run_until_signalled
    from teacher_service.telemetry import Telemetry, build_logger

    start_tracing("gkd-teacher")
    telemetry = Telemetry(build_logger(level=settings.log_level, log_format=settings.log_format))
    return await run_until_signalled(TeacherServer(settings, build_engine(settings), telemetry))


def _build_engine(settings: ServiceSettings) -> Engine:
    from teacher_service.engine.factory import build_engine

    # a setting that an engine takes has the same name there
    shared = {one.name for one in dataclasses.fields(EngineOptions)} & set(ServiceSettings.model_fields)
    return build_engine(settings.engine, EngineOptions(**{name: getattr(settings, name) for name in shared}))


def _fail(error: TeacherServiceError, exit_code: int) -> NoReturn:
    typer.echo(f"error: {error.message}", err=True)
    sys.exit(exit_code)


def _signature_from_settings() -> inspect.Signature:
    """The parameters of `serve`: one option for each setting, so that a setting is written down once."""
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_option(name, field),
                # text, as in the environment: one place parses and refuses values, whichever way they came
                annotation=_parameter_type(field) | None,
            )
            for name, field in ServiceSettings.model_fields.items()
        ]
    )


def _option(name: str, field: FieldInfo) -> Any:
    flag = flag_of(name)
    default = "unset" if field.default is None else field.default
    return typer.Option(
        None,
        f"{flag}/--no-{flag[2:]}" if _is_switch(field) else flag,
        metavar=None if _is_switch(field) else _metavar(field),
        help=f"{field.description} [env: {variable_of(name)}; default: {default}]",
        show_default=False,
    )


def _is_switch(field: FieldInfo) -> bool:
    return bool in (field.annotation, *typing.get_args(field.annotation))


def _is_mapping(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is Mapping


def _parameter_type(field: FieldInfo) -> Any:
    if _is_mapping(field):
        return list[str]
    return bool if _is_switch(field) else str


def _metavar(field: FieldInfo) -> str:
    """What stands for the value in --help: the choices, or the type's name."""
    if _is_mapping(field):
        return "KEY=VALUE"
    kinds = [kind for kind in typing.get_args(field.annotation) if kind is not types.NoneType]
    if not kinds:
        kinds = [field.annotation]
    return "|".join(kind.__name__.upper() if isinstance(kind, type) else str(kind) for kind in kinds)


if __name__ == "__main__":
    main()
