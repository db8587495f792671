"""One training at a time in a run folder, and which processes belong to it.

The first process of a training holds ``RUN/.lock`` with a lock of the operating system, which is released
however the process ends. The processes that it starts for ``--devices`` recognise it by a word in that file;
variables that a scheduler or an earlier launch left in the environment are ignored.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from delineate.errors import OutputError, RunInUse
from delineate.io.locks import is_locked, lock_file

_GROUP = "DELINEATE_GROUP"
_LAUNCHERS = (
    "LOCAL_RANK", "RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
)  # fmt: skip
"""Environment variables by which launchers tell Lightning's processes apart."""

_held: dict[tuple[Path, int], str] = {}
"""The folders that this process holds, with their words, by folder and thread."""


@contextmanager
def holding(folder: Path) -> Iterator[bool]:
    """Hold a run folder for one training; yields whether this process is the first of that training.

    It yields False in helper processes, which the first one has started. If the same thread already holds the
    folder, this joins that hold. Raises :class:`RunInUse`, :class:`OutputError`.
    """
    key = (folder.resolve(), threading.get_ident())
    if key in _held:
        yield True
        return
    path = folder / ".lock"
    if (word := os.environ.get(_GROUP)) is not None and _holder(path).get("group") == word:
        yield False
        return
    is_new = not folder.exists()
    descriptor = _locked(path)
    try:
        _held[key] = _sign(descriptor, path)
        stop_file(folder).unlink(missing_ok=True)  # it was meant for an earlier run
        yield True
    finally:
        _held.pop(key, None)
        # Before the lock is released: later, the files could be another run's.
        with suppress(OSError):
            stop_file(folder).unlink(missing_ok=True)
            path.unlink()
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # a run that was refused leaves nothing behind
                folder.rmdir()


def in_use(folder: Path) -> bool:
    """Whether a training runs in ``folder`` now, as far as this disk's locks tell."""
    return is_locked(folder / ".lock")


def stop_file(folder: Path) -> Path:
    """The file that asks the training in ``folder`` to stop; only counts while a training holds the folder."""
    return folder / "stop"


@contextmanager
def launching(folder: Path, devices: int) -> Iterator[None]:
    """Let processes started within the block join this one's group, and no other."""
    word = _held.get((folder.resolve(), threading.get_ident()))
    if word is None:  # a helper keeps what it inherited from the first
        yield
        return
    before = {name: os.environ.get(name) for name in (*_LAUNCHERS, _GROUP)}
    for name in _LAUNCHERS:
        os.environ.pop(name, None)
    if devices > 1:
        os.environ[_GROUP] = word
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _locked(path: Path) -> int:
    """A locked descriptor of the file at ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return lock_file(path)
    except BlockingIOError:
        raise RunInUse(_in_use(path)) from None
    except OSError as error:
        raise OutputError(
            f"the run folder '{path.parent}' cannot be used: {error.strerror}", fix="choose another --out"
        ) from error


def _sign(descriptor: int, path: Path) -> str:
    """Write into the lock file who holds it; returns the word of the group."""
    word = token_hex(16)
    about = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "group": word,
    }
    text = json.dumps(about).encode()
    try:
        os.ftruncate(descriptor, 0)
        # A full disk may take only part of it.
        if os.pwrite(descriptor, text, 0) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written: {error.strerror}", fix="free some space") from error
    return word


def _in_use(path: Path) -> str:
    holder = _holder(path)
    who = "process {pid} on {host}, since {since}".format(**holder) if holder else "a process that has just started"
    return (
        f"another training is running in '{path.parent}' ({who}); wait until it ends, stop it "
        f"(Ctrl-C there, or: touch '{stop_file(path.parent)}'), or use another --out, for example "
        "--out run$SLURM_PROCID in a job array"
    )


def _holder(path: Path) -> dict[str, str]:
    """What the lock file says about its holder; empty if nothing has been written yet."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(holder, dict) and all(name in holder for name in ("pid", "host", "since", "group"))
    return {name: str(value) for name, value in holder.items()} if known else {}
