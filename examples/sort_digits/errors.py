"""What ends a demo run early."""

from __future__ import annotations


class DemoError(Exception):
    """The run can't go on; the message says why, and what to do or read."""
