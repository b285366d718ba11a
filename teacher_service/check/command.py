"""The command's run: check, show, and the exit code."""

from __future__ import annotations

import asyncio
import json
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teacher_service.check.checks import CheckSettings, Finding, run_checks

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
"""As shells tell of an end by Ctrl-C."""
_MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "-"}
_COLOURS = {"passed": "green", "failed": "red", "skipped": "dim"}


def run_check(settings: CheckSettings, *, as_json: bool) -> int:
    """Check a teacher and show what was found; returns the exit code."""
    try:
        findings = asyncio.run(_collect(settings))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if as_json:
        document = {one.check: {"verdict": one.verdict, "detail": one.detail} for one in findings}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        _show(settings, findings)
    return EXIT_FAILED if any(one.verdict == "failed" for one in findings) else EXIT_OK


async def _collect(settings: CheckSettings) -> list[Finding]:
    return [one async for one in run_checks(settings)]


def _show(settings: CheckSettings, findings: list[Finding]) -> None:
    table = Table(title=escape(f"teacher at {settings.endpoint}"), title_justify="left")
    table.add_column("check")
    table.add_column("verdict")
    table.add_column("found", overflow="fold")
    for one in findings:
        table.add_row(one.check, f"[{_COLOURS[one.verdict]}]{_MARKS[one.verdict]}[/]", escape(one.detail))
    Console(highlight=False, emoji=False).print(table)
