"""What a server, its workers and its replicas are told, and what a server tells others: where it listens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from delineate.cluster import Request
from delineate.errors import ServingError
from delineate.io.locks import is_locked
from delineate.serving.engine import Limits


@dataclass(frozen=True)
class Replicas:
    """Workers on a cluster: ``local``, or ``ray://HOST:PORT``. ``reach`` is where its nodes find the server.

    ``at_most`` None takes as many as fit. A replica that nobody has needed for ``idle_s`` is given up.
    """

    cluster: str = "local"
    request: Request = field(default_factory=Request)
    at_least: int = 1
    at_most: int | None = None
    idle_s: float = 60.0
    reach: str = ""


@dataclass(frozen=True)
class Settings:
    """What a server is told. ``bundles`` by name; ``bind`` and ``http`` may be empty for none of them.

    ``plain``: no keys, which only a loopback address may do. ``replicas``: workers on a ray cluster, too. ``engine``
    runs the networks; answers can be repeated to the last bit with ``torch``, whatever else the machine does.
    """

    state: Path
    bundles: Mapping[str, Path] = field(default_factory=dict)
    bind: str = "tcp://127.0.0.1:7420"
    http: str = ""
    plain: bool = False
    limits: Limits = field(default_factory=Limits)
    workers: int = 1
    device: str = "auto"
    precision: str = "auto"
    engine: str = "torch"
    threads: int | None = None
    drain_s: float = 60.0
    replicas: Replicas | None = None

    @property
    def keys(self) -> Path:
        """The file of keys."""
        return self.state / "server.json"

    @property
    def models(self) -> Path:
        """The folder of bundles on offer."""
        return self.state / "models"

    @property
    def socket(self) -> Path:
        """The Unix socket for this machine."""
        return self.state / "door.sock"

    @property
    def spool(self) -> Path:
        return self.state / "spool"

    @property
    def store(self) -> Path:
        return self.state / "jobs.sqlite"

    @property
    def address(self) -> Path:
        """The file that says where the server listens."""
        return self.state / "address.json"


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker for a server elsewhere is told. ``key`` also says where the server is.

    ``bundles`` are those of the server, to the byte; ``state`` holds copies of them, and the jobs under way.
    """

    state: Path
    key: Path
    bundles: tuple[Path, ...]
    device: str = "auto"
    precision: str = "auto"
    engine: str = "torch"
    threads: int | None = None

    @property
    def models(self) -> Path:
        """The folder of bundles."""
        return self.state / "models"


class Address(msgspec.Struct, frozen=True):
    """Where a running server listens, and whether it does without keys."""

    zmq: str
    http: str
    pid: int
    plain: bool = False


def read_address(state: Path) -> Address:
    """Where the server of a state folder listens. Raises :class:`ServingError` if none is running."""
    try:
        if is_locked(state / ".lock"):
            return msgspec.json.decode((state / "address.json").read_bytes(), type=Address)
    except (OSError, msgspec.MsgspecError):
        pass
    raise ServingError(f"no server is running in '{state}'", fix="start one: delineate serve BUNDLE")
