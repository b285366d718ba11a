"""Ray on a machine that is busy: started again, and nothing of the failed start is left."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainer.verl_adapter.ray_start import MAX_STARTS, NODE_TIMED_OUT, start_ray_again


class LateRay:
    """Fails like Ray, with a process left behind by each start, until a start is in time."""

    def __init__(self, late_starts: int, message: str = f"{NODE_TIMED_OUT}. This could happen because ...") -> None:
        self.starts = 0
        self.left: list[subprocess.Popen[bytes]] = []
        self._late_starts = late_starts
        self._message = message

    def run(self) -> None:
        """Start, leave a process behind, and perhaps be late."""
        self.starts += 1
        self.left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        if self.starts <= self._late_starts:
            raise Exception(self._message)  # noqa: TRY002  # Ray's own choice

    def end(self) -> None:
        """End what is left."""
        for one in self.left:
            one.kill()
            one.wait()


def test_ray_is_started_again_and_its_remains_are_ended() -> None:
    """The processes of late starts go, those of the last one and of others stay."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        late = LateRay(late_starts=MAX_STARTS - 1)
        start_ray_again(late.run)
        assert late.starts == MAX_STARTS
        assert [one.poll() is None for one in late.left] == [False] * (MAX_STARTS - 1) + [True]
        assert other.poll() is None
        other.kill()
    late.end()


@pytest.mark.parametrize(
    ("late", "expected"), [(LateRay(MAX_STARTS), MAX_STARTS), (LateRay(1, "the actor died"), 1)], ids=["late", "other"]
)
def test_what_does_not_pass_is_raised(late: LateRay, expected: int) -> None:
    """Ray's own words, after the last start; and at once, where the failure is another."""
    with pytest.raises(Exception, match=r"timed out during startup|the actor died"):
        start_ray_again(late.run)
    assert late.starts == expected
    late.end()
