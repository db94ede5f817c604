"""Every error a user can meet. A message says what happened with the value, where, and what to do.

The command line turns them into exit codes: `UsageError` and below 2, every other `SynthaugError` 1.
"""

from __future__ import annotations

import errno


class SynthaugError(Exception):
    """A job could not be finished, through no fault of its settings (exit code 1)."""

    # Said by who raises it, where its cause does not tell: a later try may do (a hub that is down).
    may_pass: bool = False


class UsageError(SynthaugError):
    """The request itself cannot be carried out: settings, command line or data (exit code 2)."""


class ConfigError(UsageError):
    """A configuration file is missing, is not YAML, or has a key or value that is refused."""


class DatasetError(UsageError):
    """The dataset is missing, or nothing usable is in it, or its labels cannot be made sense of."""


class PlanError(UsageError):
    """The plan asks for something that no arithmetic can give, or that must be refused."""


class LeakError(SynthaugError):
    """An image would be used on both sides of a line that must not be crossed."""


class OutputError(UsageError):
    """The output directory is a file or cannot be written."""


class BusyError(SynthaugError):
    """Another run holds the output directory."""


class TrainingError(SynthaugError):
    """Training broke down (a loss that is not a number, say) before any checkpoint was worth keeping."""


class CheckpointError(UsageError):
    """A checkpoint or base model is missing, unsafe or does not fit the data."""


class ReleaseError(SynthaugError):
    """A release could not be made or published."""


class VerificationError(SynthaugError):
    """A release does not agree with its manifest."""


class LoaderError(UsageError):
    """A loader for training cannot be made as it was asked for."""


_PASSING_ERRNO = frozenset(
    getattr(errno, name)
    for name in ("EIO", "EAGAIN", "ESTALE", "ETIMEDOUT", "ENETDOWN", "ENETUNREACH", "EHOSTUNREACH", "EREMOTEIO")
    if hasattr(errno, name)
)
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# Of httpx, requests and huggingface_hub, which are not imported for their names.
_PASSING_NAMES = (
    "ConnectError",
    "ConnectTimeout",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "ConnectionError",
)


def may_pass(error: BaseException | None) -> bool:
    """Whether the same thing tried again later may do: a hub or a storage that did not answer.

    Settings, data and a full disk stay as they are; a run that holds the output is not waited for.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, SynthaugError) and error.may_pass:
            return True
        if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__name__ in _PASSING_NAMES:
            return True
        if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
            return True
        if getattr(getattr(error, "response", None), "status_code", None) in _PASSING_STATUS:
            return True
        error = error.__cause__
    return False
