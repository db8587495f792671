"""A study's runs on a ray cluster, or on a ray of its own on this machine.

The study's folder and its data must be where they are for every node. A run is a task of ray that starts
``delineate`` and waits for it. When its worker dies, so does the run, and the study repeats it elsewhere.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from types import ModuleType
from typing import Any

from delineate.cluster import Request, share_of
from delineate.errors import ClusterError
from delineate.studies.processes import Ended, end_of, ending_with_us, start

_ANSWER_SECONDS = 120
_TICK_SECONDS = 1.0
_INSTALL = "install the same delineate there, for the Python that ray uses"


class RayCluster:
    """A :class:`~delineate.studies.running.Launcher` on the cluster to which ``ray`` is connected.

    ``room`` is how many runs fit at a time. Raises :class:`ClusterError` if no node could ever run what is requested.
    """

    def __init__(self, ray: ModuleType, request: Request) -> None:
        share = share_of(ray, request, "run")
        self.room = share.room
        self._nodes = {node: host for node, (host, _) in share.nodes.items()}
        self._cpus, self._gpus = request.cpus, share.resources["GPU"]
        self._ray = ray
        self._stopping = threading.Event()
        # Whether it is repeated is the study's to decide: a run left behind may have to end first.
        self._task = ray.remote(_run).options(**share.options, max_retries=0)

    def options(self, device: str) -> list[str]:
        """What every command is told, so that a run uses what it asked for."""
        device = "cpu" if device == "auto" and not self._gpus else device
        return ["--device", device, "--threads", str(self._cpus)]

    def check_folders(self, out: Path, data: Sequence[Path]) -> None:
        """Raise :class:`ClusterError` if a node does not see the folders of the study and its data, or cannot write."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        word = token_hex(16)
        token = out / f".shared-{word}"
        out.mkdir(parents=True, exist_ok=True)
        token.write_text(word, encoding="ascii")
        look = self._ray.remote(_look)
        try:
            asked = {}
            for node, host in self._nodes.items():
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
                asked[host, node] = task.remote(str(token), word, [str(place) for place in data])
            for (host, _), answer in asked.items():
                self._judge(host, answer)
        except ImportError as error:  # a head unpacks what its clients send
            raise ClusterError(f"the head cannot run delineate: {error}", fix=_INSTALL) from error
        finally:
            for path in out.glob(f"{token.name}*"):
                with suppress(OSError):
                    path.unlink()

    def _judge(self, host: str, answer: Any) -> None:
        """Raise if a node's answer to ``_look`` is not good."""
        from ray.exceptions import RayError

        try:
            theirs, problem = self._ray.get(answer, timeout=_ANSWER_SECONDS)
        except RayError as error:
            said = str(error).strip().splitlines()
            raise ClusterError(
                f"'{host}' cannot run delineate: {said[-1] if said else type(error).__name__}",
                fix=_INSTALL,
            ) from error
        if problem:
            raise ClusterError(
                f"on '{host}', {problem}",
                fix="put the data and --out into a folder that all nodes share under one path, and can write to",
            )
        if theirs != (ours := version("delineate")):
            raise ClusterError(
                f"'{host}' has delineate {theirs}, this machine {ours}",
                fix="install the same version on all nodes",
            )

    def __call__(self, command: Sequence[str], log: Path) -> Ended:
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        if self._stopping.is_set():
            return Ended(128 + signal.SIGTERM)
        try:
            run = self._task.remote(list(command), str(log.absolute()), os.getcwd())
            cancelled = False
            while not self._ray.wait([run], timeout=_TICK_SECONDS)[0]:
                if self._stopping.is_set() and not cancelled:
                    self._ray.cancel(run, force=False)
                    cancelled = True
            return self._ray.get(run)
        except TaskCancelledError:
            return Ended(128 + signal.SIGTERM)
        except RayTaskError as error:  # of our own function: the log cannot be written, for example
            raise ClusterError(f"a run cannot be started: {error.cause}") from error
        except RayError as error:
            if not self._ray.is_initialized():
                raise self._gone() from error
            return Ended(1, lost=True)
        except ConnectionError as error:
            raise self._gone() from error

    def _gone(self) -> ClusterError:
        return ClusterError(
            "the cluster does not answer any more",
            fix="start it again, then run the same command to resume",
        )

    def stop(self) -> None:
        self._stopping.set()


def _run(command: Sequence[str], log: str, folder: str) -> Ended:
    """On a worker: run ``delineate`` to its end, in ``folder`` if it exists here."""
    process = None
    try:
        within = Path(folder) if os.path.isdir(folder) else None
        process = start(command, Path(log), within=within, before=ending_with_us())
        return end_of(process)
    except KeyboardInterrupt:  # ray's way to cancel a task
        if process is None:
            return Ended(128 + signal.SIGTERM)
        os.kill(process.pid, signal.SIGTERM)
        return end_of(process)


def _look(token: str, word: str, data: Sequence[str]) -> tuple[str, str]:
    """On a worker: its version, and what is wrong with the folders as it sees them."""
    path = Path(token)
    try:
        same = path.read_text(encoding="ascii") == word
    except (OSError, ValueError):
        same = False
    problem = ""
    if not same:
        problem = f"'{path.parent}' is not the folder that it is here"
    elif lost := [place for place in data if not os.path.isdir(place)]:
        problem = f"there is no '{lost[0]}'"
    else:
        try:
            path.with_name(f"{path.name}-{os.getpid()}").write_text(word, encoding="ascii")
        except OSError as error:
            problem = f"'{path.parent}' cannot be written to ({error.strerror})"
    return version("delineate"), problem
