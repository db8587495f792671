"""Ray clusters: how to connect to one, and what each node has room for."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from delineate.core.warning_filters import filtered_warnings
from delineate.errors import ClusterError

_STORE_BYTES = 80 * 2**20
"""Shared memory of a ray of our own: what it runs exchanges files, and ray takes no less."""
_KNOCK_SECONDS = 5.0
_LEAST_GPUS = 1e-4
"""The smallest part of a GPU that ray can share out."""
_ROUNDING = 1e-6
"""What a number of runs may lack through rounding: 1.0 // 0.2 is 4."""


@dataclass(frozen=True)
class Request:
    """What each run, or replica, takes of its node; ``gpus`` None takes one if the cluster has any."""

    cpus: int = 1
    gpus: float | None = None
    memory_gb: float = 0.0


@dataclass(frozen=True)
class Share:
    """What each run, or replica, takes of a cluster; ``nodes`` by their ids: the name, and how many fit at a time."""

    resources: Mapping[str, float]
    nodes: Mapping[str, tuple[str, int]]

    @property
    def room(self) -> int:
        """How many fit at a time."""
        return sum(many for _, many in self.nodes.values())

    @property
    def options(self) -> dict[str, Any]:
        """The options by which ray is asked for it."""
        cpus, gpus, memory = (self.resources[name] for name in ("CPU", "GPU", "memory"))
        return {"num_cpus": cpus, "num_gpus": gpus, "memory": memory or None}


def share_of(ray: ModuleType, request: Request, what: str) -> Share:
    """What a request means on the cluster to which ``ray`` is connected; ``what`` asks: a run, a replica.

    Raises :class:`ClusterError` if no node could ever give as much, or ray cannot share GPUs out like that.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    gpus = request.gpus
    if gpus is None:
        gpus = float(any(node["Resources"].get("GPU") for node in nodes.values()))
    if gpus and (gpus < _LEAST_GPUS or (gpus > 1 and gpus % 1)):
        raise ClusterError(
            f"a {what} asks for {gpus:g} GPUs, and ray shares out whole ones or parts of one",
            fix=f"ask for a whole number, or for {_LEAST_GPUS:g} to 1",
        )
    wanted = {"CPU": request.cpus, "GPU": gpus, "memory": request.memory_gb * 1e9}
    rooms = {name: _room(node["Resources"], wanted) for name, node in nodes.items()}
    if not sum(rooms.values()):
        there = sorted({_described(node["Resources"]) for node in nodes.values()})
        raise ClusterError(
            f"a {what} asks for {_described(wanted)}, and no node of the cluster has as much ({'; '.join(there[:8])})",
            fix=f"ask for less with the options that end in -a-{what}, or add a larger node first",
        )
    return Share(
        wanted, {name: (str(nodes[name]["NodeManagerHostname"]), room) for name, room in rooms.items() if room}
    )


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """The module ``ray``, connected within the block to ``ray://HOST:PORT``, or to a ray of its own if ``local``.

    Raises :class:`ClusterError` if that cannot be.
    """
    try:
        import ray
    except ImportError as error:
        raise ClusterError("a cluster needs ray, which is missing", fix="pip install 'delineate[cluster]'") from error
    if address == "local":
        from delineate.core.limits import usable_cores

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send them over the internet
        settings: dict[str, Any] = {
            "num_cpus": usable_cores(),
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
        }
    else:
        _knock(address)
        settings = {}
    try:
        with filtered_warnings("ignore"):  # of what becomes an error below
            _connect(ray, address, settings)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"ray does not start at {address}: {_said(error)}",
            fix="install the same versions of Python and ray here and on the cluster",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, address: str, settings: Mapping[str, Any]) -> None:
    for tries_left in (2, 1, 0):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **settings)
            return
        except ConnectionError:  # now and then, the process that a head starts for its client dies, or never answers
            if not tries_left:
                raise


def _knock(address: str) -> None:
    """Raise :class:`ClusterError` unless a ray that takes our token has its client's port at ``ray://HOST:PORT``.

    Ray itself would try for half a minute, and not say what is wrong.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None or parts.scheme != "ray" or parts.path:
        raise ClusterError(
            f"'{address[:100]}' is no address of a cluster", fix="write --cluster ray://HOST:10001 or --cluster local"
        )
    try:
        socket.create_connection((host, port), timeout=_KNOCK_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at {address}: {error.strerror or error}",
            fix="start ray there (ray start --head), and see that this machine can reach its client's port (10001)",
        ) from error
    if problem := _refusal(parts.netloc):
        raise ClusterError(f"{address} {problem[0]}", fix=problem[1])


def _refusal(place: str) -> tuple[str, str] | None:
    """Why what listens at ``HOST:PORT`` is no cluster for us, and what to do; None if it is one."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc
    from ray.exceptions import AuthenticationError

    messages: Any = ray_client_pb2
    calls: Any = ray_client_pb2_grpc
    ping = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
    channel = init_grpc_channel(place)  # with our token, if we have one
    try:
        calls.RayletDriverStub(channel).ClusterInfo(ping, timeout=_KNOCK_SECONDS)
    except (grpc.RpcError, AuthenticationError) as error:
        if isinstance(error, AuthenticationError) or error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return (
                "does not take this machine's token",
                "copy ~/.ray/auth_token from the head to this machine, and export RAY_AUTH_MODE=token",
            )
        return (
            f"does not answer as a ray does ({error.code().name.lower().replace('_', ' ')})",
            "give the client's port of the head: 10001, or what --ray-client-server-port said",
        )
    finally:
        channel.close()
    return None


def _said(error: BaseException) -> str:
    """What an error of ray's says, in a line: of a traceback within it, the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[-1:] if any(line.startswith("Traceback") for line in lines) else lines)[:500]


def _room(resources: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many runs fit on a node at a time."""
    return min(int(resources.get(name, 0.0) / amount + _ROUNDING) for name, amount in wanted.items() if amount)


def _described(resources: Mapping[str, float]) -> str:
    said = [f"{name} {resources.get(name, 0.0):g}" for name in ("CPU", "GPU")]
    return f"{', '.join(said)}, memory {resources.get('memory', 0.0) / 1e9:.3g} GB"
