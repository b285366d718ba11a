"""Everything the trainer refuses or fails with. All pickle: Ray carries them between processes."""

from __future__ import annotations

from collections.abc import Mapping


class GKDError(Exception):
    """Base of the trainer's errors."""


class ConfigError(GKDError, ValueError):
    """A key is unknown, a value is out of range, or two keys contradict each other."""


class DatasetError(GKDError, ValueError):
    """A data file lacks the columns or rows that the run needs."""


class SelectionError(GKDError, ValueError):
    """The responses to score can't be told from their rewards."""


class ShapeError(GKDError, ValueError):
    """Two arrays that must agree in shape don't."""


class NumericsError(GKDError, ArithmeticError):
    """A number that must be finite is not."""


class TeacherLostError(GKDError):
    """The run ends because the teacher could not score what the step needs."""


class CheckpointError(GKDError):
    """A checkpoint could not be written."""


class TeacherRequestError(GKDError, ValueError):
    """The arguments of a teacher call are out of range; nothing was sent."""


class TeacherError(GKDError):
    """A teacher call failed."""

    def __init__(
        self,
        message: str,
        *,
        endpoint: str,
        reason: str,
        metadata: Mapping[str, str] | None = None,
        retry_delay_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.endpoint = endpoint
        """`host:port` of the teacher."""
        self.reason = reason
        """Machine-readable reason, the service's own where it gave one."""
        self.metadata = dict(metadata or {})
        """The offending value and the limit, as the service said."""
        self.retry_delay_s = retry_delay_s
        """Seconds after which the service expects a retry to succeed; None where it named no delay."""

    def __reduce__(self) -> tuple[object, ...]:
        state = (type(self), self.message, self.endpoint, self.reason, self.metadata, self.retry_delay_s)
        return (_rebuild, state)


def _rebuild(
    cls: type[TeacherError],
    message: str,
    endpoint: str,
    reason: str,
    metadata: dict[str, str],
    retry_delay_s: float | None,
) -> TeacherError:
    return cls(message, endpoint=endpoint, reason=reason, metadata=metadata, retry_delay_s=retry_delay_s)


class TeacherUnavailableError(TeacherError):
    """No teacher could be reached, or none was ready, within the allowed time and retries."""


class TeacherOverloadedError(TeacherError):
    """The teacher's queue stayed full through all retries."""


class TeacherDeadlineError(TeacherError):
    """The teacher did not answer before the deadline."""


class TeacherRefusedError(TeacherError):
    """The teacher refused the request; sending it again can't help."""


class TeacherCredentialsError(TeacherError):
    """Client and teacher don't accept each other: a token or certificate is missing, wrong, or past its time."""


class TeacherFailedError(TeacherError):
    """The teacher failed on the request."""


class TeacherAnswerError(TeacherError):
    """The teacher's answer contradicts the contract or the request."""


class TeacherMismatchError(TeacherError):
    """The teacher does not fit the student: another token map, or too small a model."""


class TeacherClosedError(TeacherError):
    """The client was closed while the call was under way."""
