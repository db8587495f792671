"""A front door in a process of its own, as the server runs it. It notes every path that Python opens.

``python a_door.py FOLDER NOTES SETTINGS``: notes go to the file NOTES, a JSON list a line, ``[event, *paths]``;
SETTINGS is JSON of what to change in the server's settings.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

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
    from delineate.serving.engine import Limits
    from delineate.serving.server import Settings, _front_door

    changes = json.loads(settings)
    changes["limits"] = Limits(**changes.get("limits", {}))
    _front_door(Settings(Path(folder), **changes))


if __name__ == "__main__":
    main(*sys.argv[1:])
