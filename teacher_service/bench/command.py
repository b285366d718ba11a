"""The command's run: measure, show, write, and the exit code."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from teacher_service.bench.measure import Measurement, measure
from teacher_service.bench.screen import Screen
from teacher_service.bench.settings import STDOUT, BenchSettings
from teacher_service.transports.caller import CallError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
"""As shells tell of an end by Ctrl-C."""


def run_bench(settings: BenchSettings) -> int:
    """Measure, and show what was measured, also after Ctrl-C; returns the exit code.

    Raises:
        SettingsError: the teacher can't do what is asked for.
    """
    found = Measurement(settings=settings)
    # stdout is the JSON's alone where that goes there
    screen = Screen(out=sys.stderr if settings.json == STDOUT else sys.stdout, err=sys.stderr)
    exit_code = EXIT_OK
    try:
        with screen:
            asyncio.run(measure(found, screen))
    except CallError as exc:
        screen.say(f"error: {exc.message}")
        exit_code = EXIT_FAILED
    except KeyboardInterrupt:
        screen.say("interrupted")
        exit_code = EXIT_INTERRUPTED
    return _conclude(found, screen, exit_code)


def _conclude(found: Measurement, screen: Screen, exit_code: int) -> int:
    if any(one.num_answered for one in found.levels):
        screen.show(found)
    failure = found.failure()
    if failure is not None:
        screen.say(f"error: no sequence was answered; the first error: {failure}")
        exit_code = exit_code or EXIT_FAILED
    if found.settings.json is not None and found.manifest is not None:
        return _write_json(found, found.settings.json, screen) or exit_code
    return exit_code


def _write_json(found: Measurement, path: Path, screen: Screen) -> int:
    text = json.dumps(found.document(), indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        return EXIT_OK
    try:
        path.write_text(text)
    except OSError as exc:
        screen.say(f"error: can't write {path}: {exc.strerror}; the table above holds the results")
        return EXIT_FAILED
    return EXIT_OK
