"""A job as a value, and what may happen to it. Pure: no socket, no disk, no clock.

::

    receiving ─Committed→ queued ─Leased→ running ─Finished→ done
                            ↑                │ ├─Failed→ failed
                            └── Lost, Released ┘ └─Lost twice→ failed (E_QUARANTINED)
    queued, running ─GivenUp→ failed (E_DEADLINE, E_TRUNCATED)
    receiving, queued ─Cancelled→ cancelled
    running ─Cancelled→ running, and cancelled as soon as its worker says anything of an end, or is lost

A worker holds a running job by a lease; whatever it says with an old one is :class:`Stale` and changes nothing. So a
result is taken once, whoever else still works on the job.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from delineate.serving.protocol import FINAL, Open, Output, Problem, State

MOST_LOSSES = 2
"""A job that has ended this many workers is not given to another: it may be what ends them."""

UNFINISHED: tuple[State, ...] = ("receiving", "queued", "running")


class Job(Struct, frozen=True, kw_only=True):
    """A job of ``owner``. ``key`` is its folder and its row; ``id`` is what its owner calls it.

    Times are seconds since 1970: ``queued`` is when it was committed, ``began`` when its worker got it, ``changed``
    when anything last happened that is worth a place on the disk. ``sha256`` are those of its parts. ``taken`` is the
    lease whose results were taken. ``fetched``: its owner has them.
    """

    key: str
    id: str
    owner: str
    request: Open
    model_sha256: str
    created: float
    changed: float
    state: State = "receiving"
    sha256: tuple[str, ...] = ()
    queued: float = 0.0
    lease: str = ""
    worker: str = ""
    began: float = 0.0
    losses: int = 0
    stage: str = ""
    fraction: float = 0.0
    cancelling: bool = False
    fetched: bool = False
    problem: Problem | None = None
    taken: str = ""
    outputs: tuple[Output, ...] = ()
    seconds: dict[str, float] = {}

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in FINAL

    @property
    def size(self) -> int:
        """Bytes of its input."""
        return sum(part.size for part in self.request.parts)


class Event(Struct, frozen=True, kw_only=True):
    """Something that happens to a job at ``now``."""

    now: float


class Committed(Event, frozen=True, kw_only=True):
    """All of its input is on the disk, whole, with these digests."""

    sha256: tuple[str, ...]


class Leased(Event, frozen=True, kw_only=True):
    """A worker gets it."""

    lease: str
    worker: str


class Reported(Event, frozen=True, kw_only=True):
    lease: str
    stage: str
    fraction: float


class Finished(Event, frozen=True, kw_only=True):
    lease: str
    outputs: tuple[Output, ...]
    seconds: dict[str, float] = {}


class Failed(Event, frozen=True, kw_only=True):
    """The worker lives, and says why it cannot be done."""

    lease: str
    problem: Problem


class Released(Event, frozen=True, kw_only=True):
    """The worker stops in good order, or never got the job: it is not the job's fault."""

    lease: str


class Lost(Event, frozen=True, kw_only=True):
    """The worker died, or has been silent for too long."""

    lease: str


class GivenUp(Event, frozen=True, kw_only=True):
    """It has waited, or run, for too long, or its input is gone."""

    problem: Problem


class Cancelled(Event, frozen=True, kw_only=True):
    """The owner wants no result."""


class Acknowledged(Event, frozen=True, kw_only=True):
    """The owner has its results."""


class Stale(Exception):
    """An event that a job is past: of an old lease, or of a state that it has left. It changes nothing."""


def after(job: Job, event: Event) -> Job:
    """The job after an event. Raises :class:`Stale` if it is past that."""
    match event:
        case Committed() if job.state == "receiving":
            return _changed(job, event, state="queued", sha256=event.sha256, queued=event.now)
        case Leased() if job.state == "queued":
            return _changed(job, event, state="running", lease=event.lease, worker=event.worker, began=event.now)
        case Reported() if _holds(job, event.lease):
            return replace(job, stage=event.stage, fraction=event.fraction)
        case Finished() if _holds(job, event.lease):
            if job.cancelling:
                return _over(job, event, "cancelled")
            job = replace(job, outputs=event.outputs, seconds=event.seconds, taken=event.lease)
            return _over(job, event, "done", stage="", fraction=1.0)
        case Failed() if _holds(job, event.lease):
            return _failed(job, event, event.problem)
        case GivenUp() if job.state in ("queued", "running"):
            return _failed(job, event, event.problem)
        case Released() if _holds(job, event.lease):
            return _again(job, event)
        case Lost() if _holds(job, event.lease):
            job = replace(job, losses=job.losses + 1)
            if job.losses < MOST_LOSSES:
                return _again(job, event)
            problem = Problem(
                "E_QUARANTINED",
                f"the job ended {job.losses} workers, the last one in {job.stage or 'its beginning'}, "
                "and is not tried again",
                "see the server's log; a scan much larger than others may need more memory than the server has",
            )
            return _failed(job, event, problem)
        case Cancelled() if job.state == "running" and not job.cancelling:
            return _changed(job, event, cancelling=True)
        case Cancelled() if job.state in ("receiving", "queued"):
            return _over(job, event, "cancelled")
        case Acknowledged() if job.over and not job.fetched:
            return _changed(job, event, fetched=True)
    raise Stale(f"{type(event).__name__} of a job that is {job.state}")


def _holds(job: Job, lease: str) -> bool:
    return job.state == "running" and job.lease == lease


def _changed(job: Job, event: Event, **changes: Any) -> Job:
    return replace(job, changed=event.now, **changes)


def _over(job: Job, event: Event, state: State, **changes: Any) -> Job:
    return _changed(job, event, state=state, lease="", **changes)


def _failed(job: Job, event: Event, problem: Problem) -> Job:
    if job.cancelling:
        return _over(job, event, "cancelled")
    return _over(job, event, "failed", problem=problem)


def _again(job: Job, event: Event) -> Job:
    if job.cancelling:
        return _over(job, event, "cancelled")
    return _changed(job, event, state="queued", lease="", stage="", fraction=0.0)
