"""Runs a server, or a worker for one elsewhere, as a process of its own: its settings are JSON, in its argument.

Says where it listens, or that it was taken up, in a line of JSON; or what is wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from delineate.errors import DelineateError
from delineate.serving.engine import Limits
from delineate.serving.server import Server, serve_elsewhere
from delineate.serving.settings import Replicas, Settings, WorkerSettings


def main() -> None:
    values = json.loads(sys.argv[1])
    elsewhere = values.pop("elsewhere", False)
    values["state"] = Path(values["state"])
    try:
        if elsewhere:
            values |= {"key": Path(values["key"]), "bundles": tuple(map(Path, values["bundles"]))}
            serve_elsewhere(WorkerSettings(**values), lambda: print("{}", flush=True))
        else:
            values["bundles"] = {name: Path(path) for name, path in values["bundles"].items()}
            values["limits"] = Limits(**{"disk_share": 1.0, **values.get("limits", {})})  # however full this disk is
            if "replicas" in values:
                values["replicas"] = Replicas(**values["replicas"])
            Server(Settings(**values)).run(lambda address: print(msgspec.json.encode(address).decode(), flush=True))
    except DelineateError as error:
        print(json.dumps({"code": error.code, "message": error.message}), flush=True)


if __name__ == "__main__":
    main()
