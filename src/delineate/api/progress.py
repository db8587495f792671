"""How long-running work reports progress, and how it is cancelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from delineate.errors import Cancelled

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is in total."""

Say = Callable[[str], None]
"""Called with messages, one line at a time."""


class Cancel(Protocol):
    """A token that is set elsewhere to stop the work, such as a ``threading.Event``."""

    def is_set(self) -> bool: ...


def check(cancel: Cancel | None) -> None:
    """Raise :class:`Cancelled` if the token is set."""
    if cancel is not None and cancel.is_set():
        raise Cancelled("the work was cancelled", fix="call again to start over")


def counting(what: str, progress: Progress | None, cancel: Cancel | None) -> Callable[[int, int], None]:
    """A callback that passes on how much of ``what`` is done, and raises once the token is set."""

    def count(done: int, total: int) -> None:
        check(cancel)
        if progress is not None:
            progress(what, done, total)

    return count
