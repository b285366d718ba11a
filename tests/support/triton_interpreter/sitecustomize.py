"""On PYTHONPATH with TRITON_INTERPRET=1: vLLM's CPU build takes PyPI's Triton, whose interpreter runs its kernels.

That build looks for a Triton with a backend for CPUs, whose driver is active. The interpreter uses no backend, so an
entry in the list is enough. It has to be there before vLLM is imported, in every process that vLLM starts.
"""

from __future__ import annotations

import os


class _ActiveDriver:
    """What vLLM looks at."""

    @staticmethod
    def is_active() -> bool:
        """Whether the backend can be used."""
        return True


def _pretend_a_cpu_backend() -> None:
    try:
        from triton import backends
    except ImportError:
        return  # a process that does not have Triton on its path
    backends.backends.setdefault("cpu", backends.Backend(compiler=None, driver=_ActiveDriver))


if os.environ.get("TRITON_INTERPRET") == "1":
    _pretend_a_cpu_backend()
