"""How long work tells how far it is, and how it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from delineate.errors import Cancelled

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and out of how much."""

Say = Callable[[str], None]
"""Told what happens, a line at a time."""


class Cancel(Protocol):
    """A token that somebody else sets to stop the work: a ``threading.Event`` is one."""

    def is_set(self) -> bool: ...


def check(cancel: Cancel | None) -> None:
    """Raise :class:`Cancelled` where the token is set."""
    if cancel is not None and cancel.is_set():
        raise Cancelled("the work was cancelled", fix="call again to start over")


def counting(what: str, progress: Progress | None, cancel: Cancel | None) -> Callable[[int, int], None]:
    """A callback that passes on how much is done of ``what``, and stops where the token is set."""

    def count(done: int, total: int) -> None:
        check(cancel)
        if progress is not None:
            progress(what, done, total)

    return count
