"""Filters of warnings for a while."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

_LOCK = threading.Lock()
_IN_USE: Counter[object] = Counter()


@contextmanager
def filtered_warnings(action: Literal["error", "ignore"], message: str = "", module: str = "") -> Iterator[None]:
    """Refuse or ignore warnings, in all threads, until the block ends. ``message`` and ``module`` match beginnings.

    ``warnings.catch_warnings`` puts back the filters that it found, so where the blocks of two threads overlap, the
    filter of one stays for good. Here each block takes away what it has added.
    """
    with _LOCK:
        # In a group, so that it equals no filter of anybody else's: Python would take that one out.
        warnings.filterwarnings(action, f"(?:{message})", module=module)
        filter = warnings.filters[0]
        _IN_USE[filter] += 1
    try:
        yield
    finally:
        with _LOCK:
            _IN_USE[filter] -= 1
            if not _IN_USE[filter]:
                del _IN_USE[filter]
                with suppress(ValueError):  # somebody else has put other filters in place
                    warnings.filters.remove(filter)  # type: ignore[attr-defined]
