"""A front door in a process of its own. It notes every path that Python opens.

``python a_door.py FOLDER NOTES SETTINGS``: notes go to the file NOTES, a JSON list a line, ``[event, *paths]``;
SETTINGS is JSON: ``bind``, ``plain``, ``limits``, ``drain_s``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from delineate.serving.front_door import FrontDoor

_TELLING = (
    "open",
    "os.",
    "shutil.",
    "sqlite3.connect",
    "tempfile.",
    "glob.",
    "subprocess.",
    "pickle.",
    "ctypes.dlopen",
)
"""Beginnings of the audit events that name a path, or that should not happen."""


def note_everything(notes: Path) -> None:
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    known = set()

    def note(event: str, arguments: tuple) -> None:
        if not event.startswith(_TELLING):
            return
        paths = [os.fsdecode(one) for one in arguments if isinstance(one, str | bytes | os.PathLike)]
        if event == "open":
            paths = paths[: 1 if isinstance(arguments[0], str | bytes | os.PathLike) else 0]  # the others are modes
        line = json.dumps([event, *paths])
        if line not in known:
            known.add(line)
            os.write(descriptor, f"{line}\n".encode())

    sys.addaudithook(note)


def main(folder: str, notes: str, settings: str) -> None:
    note_everything(Path(notes))
    from delineate.serving.engine import Engine, Limits
    from delineate.serving.front_door import FrontDoor
    from delineate.serving.models import offered
    from delineate.serving.spool import Spool
    from delineate.serving.store import Store

    logging.basicConfig(level=logging.INFO)
    state, given = Path(folder), json.loads(settings)
    store = Store(state / "jobs.sqlite")
    limits = Limits(**{"disk_share": 1.0, **given.get("limits", {})})
    engine = Engine(store, Spool(state / "spool"), limits, now=time.time())
    engine.models = offered(state / "models")
    keys = None if given.get("plain") else state / "server.json"
    door = FrontDoor(engine, state / "door.sock", bind=given["bind"], keys=keys)
    threading.Thread(target=end_with_parent, args=(door, os.getppid()), daemon=True).start()
    (state / ".address").write_text(door.address, encoding="utf-8")
    (state / ".address").replace(state / "address")
    try:
        door.run(given.get("drain_s", 0.0))
    finally:
        door.close()
        store.close()


def end_with_parent(door: FrontDoor, parent: int) -> None:
    """A test that was killed leaves no front door behind."""
    while os.getppid() == parent:
        time.sleep(0.5)
    door.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
