"""Progress bars with rate and remaining time, on stderr; plain log lines where there is no terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

logger = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 15.0


class Bar(Protocol):
    def update(self, n: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


class _LoggedBar:
    """For logs and flows: a line every few seconds, and one at the end if it took that long."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done, self._note = 0, ""
        self._started = self._last = time.monotonic()

    def update(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._last >= _LOG_EVERY_SECONDS:
            self._last = time.monotonic()
            self._report()

    def note(self, text: str) -> None:
        self._note = text

    def _report(self) -> None:
        seconds = time.monotonic() - self._started
        rate = self._done / seconds if seconds > 0 else 0.0
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate > 0 else ""
        whole = f"/{self._total}" if self._total else ""
        logger.info("%s: %d%s %s, %.1f/s%s %s", self._title, self._done, whole, self._unit, rate, left, self._note)


class _TerminalBar:
    def __init__(self, bar: object) -> None:
        self._bar = bar

    def update(self, n: int = 1) -> None:
        self._bar.update(n)  # type: ignore[attr-defined]

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)  # type: ignore[attr-defined]


Listener = Callable[[str, int, int | None, str], None]
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `listener(title, done, total, note)` called at every step of every bar of this process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class _ToldBar:
    """A bar that tells its listeners too."""

    def __init__(self, bar: Bar, title: str, total: int | None) -> None:
        self._bar, self._title, self._total = bar, title, total
        self._done, self._note = 0, ""

    def update(self, n: int = 1) -> None:
        self._bar.update(n)
        self._done += n
        for listener in _listeners:
            listener(self._title, self._done, self._total, self._note)

    def note(self, text: str) -> None:
        self._note = text
        self._bar.note(text)


@contextmanager
def progress(title: str, total: int | None, unit: str) -> Iterator[Bar]:
    """A bar over `total` things (None where it is not known); `with progress(...) as bar: bar.update(n)`."""
    # --quiet asks for warnings only: the logged bar then says nothing either.
    if not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO):
        logged: Bar = _LoggedBar(title, total, unit)
        yield _ToldBar(logged, title, total) if _listeners else logged
        return
    from tqdm import tqdm

    with tqdm(desc=title, total=total, unit=f" {unit}", file=sys.stderr, smoothing=0.1, dynamic_ncols=True) as bar:
        drawn: Bar = _TerminalBar(bar)
        yield _ToldBar(drawn, title, total) if _listeners else drawn
