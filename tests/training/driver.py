"""Runs command lines of Delineate as processes of their own, forked from one that has loaded torch already.

Read as JSON from standard input: rounds of cases, those of a round at once; each round may ``load``
modules before, which its processes then share. A case has ``arguments``,
the ``environment`` added, the file that takes its ``output``, and, where something is to happen once a
stage has begun to be shown, ``stage`` with a ``signal`` to the process or a file to ``touch``.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path


def child(case: dict) -> int:
    os.environ.update(case["environment"])
    output = os.open(case["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # As from a terminal, whatever started the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from delineate.cli import main, terminal

    progress, happened = terminal.Terminal.progress, []

    def and_then(self: terminal.Terminal, what: str, done: int, total: int) -> None:
        progress(self, what, done, total)
        if case.get("stage") is not None and what.startswith(case["stage"]) and not happened:
            happened.append(what)
            if "signal" in case:
                os.kill(os.getpid(), case["signal"])
            else:
                Path(case["touch"]).touch()

    terminal.Terminal.progress = and_then
    sys.argv = ["delineate", *case["arguments"]]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def run_at_once(cases: list[dict]) -> list[int]:
    children = []
    for case in cases:
        pid = os.fork()
        if pid == 0:
            status = child(case)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


if __name__ == "__main__":
    statuses = []
    for part in json.load(sys.stdin):
        for name in part["load"]:
            importlib.import_module(name)
        statuses.append(run_at_once(part["cases"]))
    print(json.dumps(statuses))
