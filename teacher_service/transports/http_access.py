"""The refusal of HTTP requests without a token, before anything of them is read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from teacher_service.access import AUTHORIZATION, Access
from teacher_service.errors import TeacherServiceError, UnauthenticatedError
from teacher_service.telemetry import Telemetry

PROBES = frozenset({"/healthz", "/readyz"})
"""Paths that need no token: a probe has none, and they tell nothing but the state."""
METRICS = "/metrics"

_NAME = "HTTP"
"""What metrics call a refused request: its path may be of the caller's invention."""

Answer = Callable[[TeacherServiceError], Response]


class TokenGate:
    """An ASGI application in front of another: passes on what may be asked."""

    def __init__(
        self, app: ASGIApp, access: Access, telemetry: Telemetry, *, answer: Answer, metrics_without_token: bool
    ) -> None:
        """Stand before an application.

        Args:
            app: what is asked.
            access: who may ask.
            telemetry: told of refusals.
            answer: makes an error's response.
            metrics_without_token: whether anybody may read the metrics.
        """
        self._app, self._access, self._telemetry, self._answer = app, access, telemetry, answer
        self._open_paths = PROBES | {METRICS} if metrics_without_token else PROBES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        try:
            self._access.account_of(Headers(scope=scope).get(AUTHORIZATION), "")
        except UnauthenticatedError as exc:
            self._count(exc, scope)
            await self._answer(exc)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _count(self, error: UnauthenticatedError, scope: Scope) -> None:
        with suppress(UnauthenticatedError), self._telemetry.request(_NAME) as record:
            record.client = (scope.get("client") or ("",))[0]
            raise error
