"""The front door's mind: what it answers to each message, and what it gives to which worker. No socket.

Every job lives in the store and, while it is not over, here. A change is on the disk before anybody hears of it.

Owners take turns: the next job is the oldest of the owner whose last turn is longest ago. So with ``n`` owners waiting,
at most ``n - 1`` jobs of others are begun before one's own oldest, however many they have sent. Small jobs pass others
only when a worker asks for them, which it does while it computes a large one, for half of the time at most.

The queue holds a number of jobs, whoever they belong to. When it is full and an owner is refused who has fewer jobs in
it than another, a place is kept for them for a while. An upload that rests, or is too slow, loses its place until it
goes on and there is room; if the disk is needed, it is thrown away.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from secrets import token_hex
from typing import NamedTuple, get_args

from msgspec.structs import replace

from delineate.errors import (
    Busy,
    Conflict,
    DelineateError,
    Denied,
    NotIntroduced,
    OutputError,
    ProtocolError,
    TooLarge,
    Truncated,
    UnknownJob,
    UnknownModel,
    VersionError,
)
from delineate.serving.jobs import (
    UNFINISHED,
    Acknowledged,
    Cancelled,
    Committed,
    Event,
    Failed,
    Finished,
    GivenUp,
    Job,
    Leased,
    Lost,
    Released,
    Reported,
    Stale,
    after,
)
from delineate.serving.protocol import (
    CREDIT,
    FROM_CLIENTS,
    FROM_WORKERS,
    MOST_JSON,
    VERSION,
    Ack,
    Cancel,
    Chunk,
    Commit,
    Credit,
    Data,
    Done,
    Err,
    Fail,
    Fetch,
    Figures,
    Hello,
    JobList,
    Jobs,
    Lane,
    Message,
    Model,
    Open,
    Output,
    Ping,
    Problem,
    Progress,
    Report,
    Role,
    Stats,
    Status,
    Take,
    Welcome,
    Work,
    starting,
    to_json,
)
from delineate.serving.spool import Spool, disk_used, job_key
from delineate.serving.store import Store

STAGE_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, float("inf"))
"""Bounds by which the seconds of stages are counted."""
_MOST_COUNTS = 500
"""So many counters fit into an answer."""
_LANES: tuple[Lane, ...] = get_args(Lane)
_CLAIM_S = 45.0
"""For how long a place is kept for somebody who was refused: longer than clients wait before they ask again."""
_RESTING = 3
"""So many times the queue's length of uploads may rest; beyond, the one that has rested for longest is thrown away."""
_MOST_OWNERS = 1024
"""So many owners' last turns are known."""
_AT_A_TIME = 32
"""So many expired jobs are removed in one tick: each waits for the disk."""
_MOST_CANCELLED = 1000
"""So many cancelled jobs of an owner are known: whoever opens and cancels without end fills no disk."""
_HELD_UP_S = 3.0
"""A tick that comes so long after the one before comes late: the process was stopped, or kept waiting by its disk."""


@dataclass(frozen=True)
class Limits:
    """What a server takes on. Beyond it, clients get ``E_BUSY`` at once, and when to ask again."""

    queue: int = 32
    """Jobs that wait, or are being received."""
    job_bytes: int = 2 * 2**30
    spool_bytes: int = 20 * 2**30
    disk_share: float = 0.75
    """The disk may be this full."""
    keep_s: float = 24 * 3600
    """Results that nobody fetches are kept for this long; what is known of a job, too. No job waits for longer."""
    idle_s: float = 60
    """An upload that rests for longer loses its place in the queue,"""
    bytes_per_s: float = 64 * 1024
    """and so does one that is slower."""
    silence_s: float = 15
    """A job of which its worker says nothing for longer is lost."""
    cancel_s: float = 5
    """A worker that does not stop within this time is given up; it ends itself."""
    job_s: float = 3600
    """A job that runs for longer is ended."""
    small_s: float = 10
    """A job that is expected to take no longer does not wait behind a large one."""
    small_bytes: int = 2**20
    """How large it may be as long as nobody knows how long its model takes."""


class Peer(NamedTuple):
    """Who sent a message: a connection, whose key it showed, and what that allows."""

    id: bytes
    owner: str
    roles: frozenset[Role] = frozenset({"client"})
    local: bool = False
    """Whether it may read the spool."""


class Answer(NamedTuple):
    """A message for a connection."""

    to: bytes
    message: Message
    payload: bytes = b""


@dataclass
class _Connection:
    """A connection that has said HELLO."""

    peer: Peer
    role: Role
    name: str
    heard: float
    models: frozenset[str] = frozenset()
    lanes: dict[Lane, int] = field(default_factory=dict)
    """The lanes that it waits in, with the ids of its questions."""
    watched: dict[str, tuple[int, Progress]] = field(default_factory=dict)
    """Jobs whose progress it wants, with the id of its question and what it heard last."""


class Engine:
    """Answers messages. ``models`` are the bundles on offer by name; they may be replaced at any time."""

    def __init__(self, store: Store, spool: Spool, limits: Limits, *, now: float, name: str = "") -> None:
        self.store, self.spool, self.limits, self.name = store, spool, limits, name
        self.models: Mapping[str, Model] = {}
        self.draining = False
        self.counts: dict[str, float] = {}
        self._jobs = {job.key: job for job in store.unfinished()}
        self._leases = {job.lease: job.key for job in self._jobs.values() if job.lease}
        self._connections: dict[bytes, _Connection] = {}
        self._began = self._ticked = now
        """No job has waited, or run, since before this: the clock may have been put right since the last process."""
        self._until = dict.fromkeys(self._jobs, now)
        """Until when an upload keeps its place, and until when a worker has to say something of its job."""
        self._turn = 0
        self._turns: dict[str, int] = {}
        """The number of each owner's last turn; the last one comes last."""
        self._refused: dict[str, float] = {}
        """Owners for whom a place is kept, and until when."""
        self._pace: dict[str, float] = {}
        """Seconds that a model takes for a byte of input."""
        self._ended: dict[str, Job] = {}
        """Jobs that watchers have yet to hear the end of."""
        self._stirred = True
        """Whether something has happened that others may have to hear of."""
        for job in self._jobs.values():
            self._heard_of(job, now)
            spool.clean_attempts(job.key, job.lease)
        spool.clean(store.keys().__contains__)
        for job in filter(None, map(store.get, spool.keys())):
            if job.over:  # the last process may have been killed before it did this
                self._clear(job)

    # What comes in

    def handle(self, peer: Peer, message: Message, payload: bytes, now: float) -> list[Answer]:
        """What a message leads to, for its sender and for others."""
        try:
            answers = list(self._handled(peer, message, payload, now))
        except DelineateError as error:
            retry = isinstance(error, Busy | OutputError | NotIntroduced) or (
                isinstance(error, UnknownJob) and isinstance(message, Chunk | Commit)  # an upload begins again
            )
            self._count(f"refused {error.code}")
            problem = Problem(error.code, error.message[:2000], getattr(error, "fix", "")[:2000])
            answers = [
                Answer(
                    peer.id,
                    Err(
                        problem=problem,
                        retryable=retry,
                        retry_after=self._retry_after() if retry else 0.0,
                        job=getattr(message, "job", None),
                        lease=getattr(message, "lease", None),
                        re=message.id,
                    ),
                )
            ]
        return [*answers, *self._consequences(now)]

    def tick(self, now: float) -> list[Answer]:
        """What the time leads to; to be called every second or so."""
        answers: list[Answer] = []
        held_up, self._ticked = now - self._ticked, now
        if held_up > _HELD_UP_S:
            self._excuse(held_up, now)
        with self._trying():
            for job in self.store.older(now - self.limits.keep_s, _AT_A_TIME):
                self._forget(job)
        for job in list(self._jobs.values()):
            with self._trying():
                answers += self._looked_after(job, now)
        silent = [c for c in self._connections.values() if now - c.heard > 20 * self.limits.silence_s]
        for connection in silent:
            del self._connections[connection.peer.id]
        self._stirred = True
        return [*answers, *self._consequences(now)]

    def _looked_after(self, job: Job, now: float) -> Iterable[Answer]:
        limits, late = self.limits, now - self._until[job.key]
        if job.state == "receiving" and late > limits.keep_s:
            self._forget(job)
        elif job.state == "queued" and now - max(job.queued, self._began) > limits.keep_s:
            waited = f"no worker took the job within {limits.keep_s:.0f} s"
            self._change(job, GivenUp(now=now, problem=Problem("E_DEADLINE", waited, "ask who runs the server")))
        elif job.state == "running":
            self.spool.measure(job.key)
            if late > 0 or (job.cancelling and now - job.changed > 2 * limits.cancel_s):
                self._change(job, Lost(now=now, lease=job.lease))
            elif now - max(job.began, self._began) > limits.job_s and not job.cancelling:
                ran = f"the job ran for more than {limits.job_s:.0f} s"
                self._change(job, GivenUp(now=now, problem=Problem("E_DEADLINE", ran, "send a smaller scan")))
                return self._stop(job)
        return ()

    def _excuse(self, seconds: float, now: float) -> None:
        """Wait so much longer for news of every job: the front door was held up itself, and could not hear any."""
        for key, job in self._jobs.items():
            self._until[key] = min(self._until[key] + seconds, now + self._patience_s(job))

    def gone(self, peer: bytes) -> None:
        """A connection is no more. A worker's jobs stay its own until it has been silent for too long."""
        self._connections.pop(peer, None)

    def unsent(self, to: bytes, message: Message, now: float) -> None:
        """A message could not be handed over: the connection is no more, and a job that it offered goes back."""
        self.gone(to)
        job = self._jobs.get(self._leases.get(message.lease, "")) if isinstance(message, Work) else None
        if job is not None:
            with self._trying():
                self._change(job, Released(now=now, lease=job.lease))

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """What cannot be written now is tried again with the next tick: nothing has changed."""
        try:
            yield
        except DelineateError as error:
            self._count(f"refused {error.code}")

    def _consequences(self, now: float) -> Iterable[Answer]:
        if self._stirred:
            yield from self._given_out(now)
            yield from self._told()
            self._stirred = False

    # What a client says

    def _handled(self, peer: Peer, message: Message, payload: bytes, now: float) -> Iterable[Answer]:
        if isinstance(message, Hello):
            yield from self._hello(peer, message, now)
            return
        connection = self._connections.get(peer.id)
        if connection is None or connection.peer.owner != peer.owner:
            raise NotIntroduced("the first message is HELLO", fix="say it again: the server may have restarted")
        connection.heard = now
        allowed = FROM_WORKERS if connection.role == "worker" else FROM_CLIENTS
        if not isinstance(message, allowed):
            raise ProtocolError(f"{type(message).__name__.upper()} is not for a {connection.role} to say")
        if connection.role == "worker":
            yield from self._of_worker(connection, message, payload, now)
            return
        owner = peer.owner
        if message.owner and message.owner != owner:
            if connection.role != "gateway":
                raise Denied("only a gateway asks for others")
            owner = message.owner
        yield from self._of_client(connection, owner, message, payload, now)

    def _hello(self, peer: Peer, message: Hello, now: float) -> Iterable[Answer]:
        if VERSION not in message.versions:
            raise VersionError(
                f"the client speaks delineate/{list(message.versions)}", fix=f"this server speaks delineate/{VERSION}"
            )
        if message.role not in peer.roles:
            raise Denied(f"this key is not for a {message.role}", fix="add a key of that role on the server")
        self._connections[peer.id] = _Connection(peer, message.role, message.client, now, frozenset(message.models))
        yield Answer(
            peer.id,
            Welcome(
                version=VERSION,
                server=self.name,
                models=tuple(self.models.values()),
                most_bytes=self.limits.job_bytes,
                re=message.id,
            ),
        )
        if message.role != "worker":
            return
        worker = _worker(peer.owner, message.client)
        for connection in list(self._connections.values()):
            same = connection.role == "worker" and _worker(connection.peer.owner, connection.name) == worker
            if same and connection.peer.id != peer.id:
                del self._connections[connection.peer.id]
        held = set(message.leases)
        for job in list(self._jobs.values()):
            if job.state != "running" or job.worker != worker:
                continue
            if job.lease not in held:  # it is another process than the one that had the job
                self._change(job, Lost(now=now, lease=job.lease))
                continue
            self._heard_of(job, now)
            if job.cancelling:
                yield Answer(peer.id, Cancel(lease=job.lease))
        for lease in held - set(self._leases):
            yield Answer(peer.id, Cancel(lease=lease))

    def _of_client(
        self, connection: _Connection, owner: str, message: Message, payload: bytes, now: float
    ) -> Iterable[Answer]:
        to = connection.peer.id
        match message:
            case Ping():
                yield Answer(to, Ping(re=message.id))
            case Open():
                yield Answer(to, self._open(owner, message, now))
            case Chunk(job=str(id)):
                job = self._job_of(owner, id)
                if job.state == "receiving":
                    self._receive(job, message, payload, now)
                yield Answer(to, self._credit(job, message.id))
            case Commit():
                job = self._commit(self._job_of(owner, message.job), message, now)
                yield Answer(to, replace(self._progress(job, self._places()), re=message.id))
            case Status():
                job = self._job_of(owner, message.job)
                told = self._progress(job, self._places())
                if message.watch and not job.over:
                    connection.watched[job.key] = message.id, told
                yield Answer(to, replace(told, re=message.id))
            case Jobs():
                yield Answer(to, JobList(jobs=tuple(self._latest(owner, message.most)), re=message.id))
            case Fetch(job=str(id), output=str(name)):
                yield from self._fetch(to, self._job_of(owner, id), name, message)
            case Stats() if connection.role == "gateway":
                yield Answer(
                    to,
                    Figures(
                        figures=self.figures(), ready=self.ready, models=tuple(self.models.values()), re=message.id
                    ),
                )
            case Ack(job=str(id)):
                job = self._job_of(owner, id)
                if job.over and not job.fetched:
                    self._acknowledge(job, now)
                yield Answer(to, Ack(job=id, re=message.id))
            case Cancel(job=str(id)):
                job = self._job_of(owner, id)
                if not job.over and not job.cancelling:
                    yield from self._stop(job)
                    job = self._change(job, Cancelled(now=now))
                    with self._trying():
                        self.store.remove_cancelled(owner, _MOST_CANCELLED)
                yield Answer(to, replace(self._progress(job, self._places()), re=message.id))
            case _:
                raise ProtocolError(f"{type(message).__name__.upper()} names no job")

    def _open(self, owner: str, message: Open, now: float) -> Credit:
        key = job_key(owner, message.job)
        known = self._jobs.get(key) or self.store.get(key)
        wanted = replace(message, id=0, re=0, owner="")
        if known is not None:
            if known.request != wanted:
                raise Conflict(f"job {message.job} exists, and is another", fix="give each scan a job id of its own")
            return self._credit(known, message.id)
        if not self.models:
            raise starting()
        model = self.models.get(message.model)
        if model is None or message.model_sha256 not in (None, model.sha256):
            raise UnknownModel(
                f"there is no model '{message.model}'" + (" with this digest" if model else ""),
                fix=f"there are {', '.join(self.models) or 'none'}",
            )
        known_channels = {"", message.options.quantity, *model.channels}
        if any(part.channel not in known_channels for part in message.parts):
            # Told to who asked, and written nowhere: it may be anything, even a patient's name.
            raise ProtocolError(
                f"'{model.name}' has no such channel", fix=f"name them as the model does: {', '.join(model.channels)}"
            )
        size = sum(part.size for part in message.parts)
        if size > self.limits.job_bytes:
            raise TooLarge(
                f"the scan has {size:,} bytes; at most {self.limits.job_bytes:,}", fix="send fewer or smaller files"
            )
        self._make_room(key, owner, size, now)
        job = Job(
            key=key, id=message.job, owner=owner, request=wanted, model_sha256=model.sha256, created=now, changed=now
        )
        self.store.put(job)
        self._jobs[key] = job
        self._until[key] = now + self.limits.idle_s
        self._stirred = True
        self._count("opened")
        return self._credit(job, message.id)

    def _receive(self, job: Job, message: Chunk, payload: bytes, now: float) -> None:
        index = self._index(job, message.part)
        self._keep_place(job, now)
        new = self.spool.append(job, index, message.offset, payload)
        until = self._until[job.key] + new / self.limits.bytes_per_s
        self._until[job.key] = min(until, now + self.limits.idle_s)
        self._count("received bytes", new)

    def _keep_place(self, job: Job, now: float) -> None:
        """Raise :class:`Busy` if an upload has lost its place, and there is none now."""
        if now > self._until[job.key]:
            self._make_room(job.key, job.owner, self._missing(job), now)
            self._until[job.key] = now + self.limits.idle_s

    def _make_room(self, key: str, owner: str, size: int, now: float) -> None:
        """Raise :class:`Busy` if there is no room for another job, or for one that rested."""
        if self.draining:
            raise Busy("the server is stopping", fix="try again in a minute")
        others = [job for job in self._jobs.values() if job.key != key]
        waiting = [job for job in others if self._waits(job, now)]
        resting = [job for job in others if job.state == "receiving" and not self._waits(job, now)]
        resting.sort(key=lambda job: self._until[job.key])
        self._check_place(owner, key in self._jobs, waiting, now)

        size += sum(self._missing(job) for job in waiting)
        disk = shutil.disk_usage(self.spool.path)
        short_spool = self.spool.total_bytes + size - self.limits.spool_bytes
        short_disk = disk.used + size - self.limits.disk_share * (disk.used + disk.free)
        short, given_up = max(short_spool, short_disk), resting[: max(0, len(resting) - _RESTING * self.limits.queue)]
        for job in resting:
            if short - sum(self.spool.size(job.key) for job in given_up) > 0 and job not in given_up:
                given_up.append(job)
        if short - sum(self.spool.size(job.key) for job in given_up) > 0:
            if short_disk > short_spool:
                raise Busy("the server's disk is nearly full", fix="try again later, or ask who runs the server")
            raise Busy("the spool is full", fix="try again later, or fetch and acknowledge results")
        for job in given_up:
            self._forget(job)

    def _check_place(self, owner: str, again: bool, waiting: list[Job], now: float) -> None:
        """Raise :class:`Busy` if the queue is full, but for places that are kept for others with fewer jobs in it."""
        held = Counter(job.owner for job in waiting)
        mine = held[owner] + again  # of two with nothing in the queue, one who had a place gives way
        self._refused = {one: until for one, until in self._refused.items() if until > now}
        kept = sum(1 for one in self._refused if one != owner and held[one] < mine)
        if len(waiting) + kept >= self.limits.queue:
            self._refused[owner] = now + _CLAIM_S
            raise Busy(f"{len(waiting)} jobs are waiting", fix=f"try again in {self._retry_after():.0f} s")
        self._refused.pop(owner, None)

    def _waits(self, job: Job, now: float) -> bool:
        """Whether a job takes one of the queue's places."""
        return job.state == "queued" or (job.state == "receiving" and now <= self._until[job.key])

    def _missing(self, job: Job) -> int:
        """Bytes of a job's input that have yet to come."""
        return job.size - sum(self.spool.received(job)) if job.state == "receiving" else 0

    def _commit(self, job: Job, message: Commit, now: float) -> Job:
        if job.state != "receiving":
            if job.sha256 and job.sha256 != message.sha256:
                raise Conflict(f"job {job.id} exists, of another content", fix="give each scan a job id of its own")
            return job
        if len(message.sha256) != len(job.request.parts):
            raise ProtocolError(f"{len(message.sha256)} digests for {len(job.request.parts)} parts")
        self._keep_place(job, now)
        digests = self.spool.digests(job)
        if digests != message.sha256:
            self.spool.remove(job.key)
            raise Conflict(
                "what arrived is not what was sent", fix="open the job again, and send it from the beginning"
            )
        return self._change(job, Committed(now=now, sha256=digests))

    def _acknowledge(self, job: Job, now: float) -> None:
        """Nobody wants a job's results any more. Written down first: until then, they can be fetched again."""
        try:
            self._change(job, Acknowledged(now=now))
        except OutputError:  # on a full disk, there is room to write it down once they are gone
            self.spool.remove(job.key)
            self._change(job, Acknowledged(now=now))

    def _fetch(self, to: bytes, job: Job, name: str, message: Fetch) -> Iterable[Answer]:
        found = [output for output in job.outputs if output.name == name]
        if not found or job.fetched:
            had = "its results have been fetched" if job.fetched else f"it is {job.state}"
            raise UnknownJob(f"job {job.id} has no '{name}': {had}", fix="ask for one of its outputs once it is done")
        [output] = found
        offset = message.offset
        for _ in range(message.count):
            payload = self.spool.read(self.spool.output(job.key, job.taken, name), offset)
            if not payload and offset < output.size:
                raise Truncated(f"'{name}' has {offset:,} of {output.size:,} bytes", fix="send the scan again")
            self._count("sent bytes", len(payload))
            yield Answer(to, Data(job=job.id, output=name, offset=offset, size=output.size, re=message.id), payload)
            offset += len(payload)
            if offset >= output.size or not payload:
                break

    # What a worker says

    def _of_worker(self, connection: _Connection, message: Message, payload: bytes, now: float) -> Iterable[Answer]:
        to, lease = connection.peer.id, getattr(message, "lease", None)
        if isinstance(message, Ping):
            yield Answer(to, Ping(re=message.id))
            return
        if isinstance(message, Take):
            connection.lanes[message.lane] = message.id
            self._stirred = True
            return
        job = self._jobs.get(self._leases.get(lease or "", ""))
        if job is None or job.worker != _worker(connection.peer.owner, connection.name):
            if isinstance(message, Done | Fail):
                yield Answer(to, Ack(lease=lease, re=message.id))  # somebody else has done it, or it is cancelled
            else:
                yield Answer(to, Cancel(lease=lease, re=message.id))
            return
        self._heard_of(job, now)
        assert lease is not None
        match message:
            case Report():
                # How far it is need not outlive the process: the disk would be busy with it.
                event = Reported(now=now, lease=lease, stage=message.stage, fraction=message.fraction)
                self._jobs[job.key] = after(job, event)
                self._stirred = True
                if job.cancelling:  # it may not have heard
                    yield Answer(to, Cancel(lease=lease))
            case Fetch():
                index = self._index(job, message.part)
                offset, size = message.offset, job.request.parts[index].size
                for _ in range(message.count):
                    chunk = self.spool.read(self.spool.part(job.key, index), offset)
                    yield Answer(to, Data(lease=lease, part=index, offset=offset, size=size, re=message.id), chunk)
                    offset += len(chunk)
                    if offset >= size or not chunk:
                        break
            case Chunk(output=str(name)):
                if message.offset + len(payload) > self.limits.job_bytes:
                    raise TooLarge(f"output {name} has more than {self.limits.job_bytes:,} bytes")
                there = self.spool.put_output(job.key, lease, name, message.offset, payload)
                yield Answer(to, Credit(lease=lease, received=(there,), state=job.state, re=message.id))
            case Done():
                if self._are_there(job, message.outputs, connection.peer):
                    seconds = _with_waiting(job, message.seconds)
                    self._change(job, Finished(now=now, lease=lease, outputs=message.outputs, seconds=seconds))
                    self._learn(job, message.seconds, now)
                    self._measure(seconds)
                else:
                    self._change(job, Lost(now=now, lease=lease))
                yield Answer(to, Ack(lease=lease, re=message.id))
            case Fail():
                self.spool.withdraw(job.key, lease)  # first: what it left may be what filled the disk
                if message.released or message.problem is None:
                    self._change(job, Released(now=now, lease=lease))
                else:
                    self._change(job, Failed(now=now, lease=lease, problem=message.problem))
                yield Answer(to, Ack(lease=lease, re=message.id))
            case _:
                raise ProtocolError(f"{type(message).__name__.upper()} without an output")

    def _are_there(self, job: Job, outputs: tuple[Output, ...], peer: Peer) -> bool:
        """Whether a worker wrote, or sent, what it says."""
        try:
            self.spool.check_outputs(job.key, job.lease, outputs, digests=not peer.local)
        except Truncated:
            return False
        return True

    def _given_out(self, now: float) -> Iterable[Answer]:
        """Queued jobs for the workers that wait."""
        if self.draining:
            return
        failed: set[str] = set()
        held: dict[str, list[Job]] = {}
        for running in self._jobs.values():
            if running.state == "running":
                held.setdefault(running.worker, []).append(running)
        # Whoever is idle comes first: others take a job ahead.
        for connection in sorted(self._connections.values(), key=lambda one: len(held.get(_worker_of(one), ()))):
            if now - connection.heard > self.limits.silence_s / 3:  # it pings more often, if it is there
                continue
            has = held.setdefault(_worker_of(connection), [])
            for lane in [lane for lane in _LANES if lane in connection.lanes]:
                if (work := self._next_work(connection, lane, has, failed, now)) is not None:
                    yield Answer(connection.peer.id, replace(work, re=connection.lanes.pop(lane)))

    def _next_work(
        self, connection: _Connection, lane: Lane, has: list[Job], failed: set[str], now: float
    ) -> Work | None:
        """The next job for a worker that waits in a lane, added to those that it has. Those ``failed`` wait."""
        for job in self._queue():
            if job.key in failed or not self._fits(job, connection, lane):
                continue
            if has and (job.losses or any(one.losses for one in has)):
                break  # a job that has ended a worker is alone with the next, or others would share the blame
            try:
                work = self._lend(job, connection, now)
            except DelineateError as error:  # a full disk: it stays queued, and is tried again with the next tick
                self._count(f"refused {error.code}")
                failed.add(job.key)
                if isinstance(error, Truncated):  # what is gone does not come back, and others wait behind it
                    with self._trying():
                        self._change(job, GivenUp(now=now, problem=Problem(error.code, error.message, error.fix)))
            else:
                has.append(job)
                return work
        return None

    def _lend(self, job: Job, connection: _Connection, now: float) -> Work:
        """Give a job to a worker."""
        lease, local = token_hex(8), connection.peer.local
        work = Work(
            lease=lease,
            model=self._model_of(job),
            parts=job.request.parts,
            options=job.request.options,
            job=job.id,
            small=self._is_small(job),
            folder=str(self.spool.folder(job.key) / lease) if local else "",
        )
        try:
            if local:
                self.spool.lend(job.key, lease, len(job.request.parts))
            job = self._change(
                job, Leased(now=now, lease=lease, worker=_worker(connection.peer.owner, connection.name))
            )
        except DelineateError:
            self.spool.withdraw(job.key, lease)
            raise
        self._heard_of(job, now)
        self._turn += 1
        self._turns.pop(job.owner, None)
        self._turns[job.owner] = self._turn
        if len(self._turns) > _MOST_OWNERS:
            del self._turns[next(iter(self._turns))]
        return work

    def _queue(self) -> list[Job]:
        """Queued jobs in the order in which they are given out."""
        queued = [job for job in self._jobs.values() if job.state == "queued"]
        queued.sort(key=lambda job: (job.queued, job.key))
        ahead: Counter[str] = Counter()
        order: list[tuple[int, int, int, Job]] = []
        for job in queued:
            order.append((ahead[job.owner], self._turns.get(job.owner, 0), len(order), job))
            ahead[job.owner] += 1
        return [job for *_, job in sorted(order, key=lambda place: place[:3])]

    def _fits(self, job: Job, connection: _Connection, lane: Lane) -> bool:
        known = not connection.models or job.model_sha256 in connection.models
        return known and (lane == "any" or self._is_small(job))

    def _is_small(self, job: Job) -> bool:
        """Whether a job may be done in between, while a large one waits."""
        if job.model_sha256 not in self._pace:
            return job.size <= self.limits.small_bytes
        return self._expected_s(job) <= self.limits.small_s

    def _model_of(self, job: Job) -> Model:
        now = self.models.get(job.request.model)
        if now is not None and now.sha256 == job.model_sha256:
            return now
        return Model(name=job.request.model, sha256=job.model_sha256, channels=(), targets=())

    # What is known of jobs

    def _job_of(self, owner: str, id: str) -> Job:
        key = job_key(owner, id)
        job = self._jobs.get(key) or self.store.get(key)
        if job is None:
            raise UnknownJob(f"there is no job {id} of this key", fix="open it first; results are kept for a day")
        return job

    def _index(self, job: Job, part: int) -> int:
        if part >= len(job.request.parts):
            raise ProtocolError(f"there is no part {part} of {len(job.request.parts)}")
        return part

    def _credit(self, job: Job, re: int) -> Credit:
        sizes = tuple(part.size for part in job.request.parts)
        received = self.spool.received(job) if job.state == "receiving" else sizes
        return Credit(job=job.id, received=received, credit=CREDIT, state=job.state, re=re)

    def _latest(self, owner: str, most: int) -> Iterable[Progress]:
        """An owner's latest jobs, as many as one message holds."""
        places, room = self._places(), MOST_JSON - 1024
        for job in self.store.of_owner(owner, most):
            told = self._progress(self._jobs.get(job.key, job), places)
            room -= len(to_json(told)) + 1
            if room < 0:
                return
            yield told

    def _progress(self, job: Job, places: Mapping[str, tuple[int, float | None]]) -> Progress:
        position, eta = places.get(job.key, (0, None))
        return Progress(
            job=job.id,
            state=job.state,
            model=job.request.model,
            stage=job.stage,
            fraction=job.fraction,
            position=position,
            eta_s=eta,
            created=job.created,
            outputs=() if job.fetched else job.outputs,
            seconds=job.seconds,
            problem=job.problem,
        )

    def _places(self) -> dict[str, tuple[int, float | None]]:
        """Each job's place in the queue, and the seconds until it is done, as far as known."""
        places: dict[str, tuple[int, float | None]] = {}
        work, workers = 0.0, self.workers
        for job in self._jobs.values():
            if job.state == "running":
                left = self._expected_s(job) * (1 - job.fraction)
                places[job.key] = 0, left if job.model_sha256 in self._pace else None
                work += left
        for position, job in enumerate(self._queue(), start=1):
            work += self._expected_s(job)
            places[job.key] = position, work / workers if workers and job.model_sha256 in self._pace else None
        return places

    def _expected_s(self, job: Job) -> float:
        """Seconds that a job is expected to take; 0 as long as its model has done none."""
        return self._pace.get(job.model_sha256, 0.0) * job.size

    def _learn(self, job: Job, seconds: Mapping[str, float], now: float) -> None:
        took = now - job.began - seconds.get("wait", 0.0)  # workers take a job ahead
        pace = max(took, 1e-3) / job.size
        before = self._pace.get(job.model_sha256, pace)
        self._pace[job.model_sha256] = 0.8 * before + 0.2 * pace

    def _measure(self, seconds: Mapping[str, float]) -> None:
        """Count what the stages of a job took, for a histogram: how many took at most so long, and their sum."""
        for stage, took in seconds.items():
            if f"stage {stage} sum" not in self.counts and (len(self.counts) > _MOST_COUNTS or len(stage) > 20):
                continue  # workers choose these names
            for most in STAGE_SECONDS:
                self._count(f"stage {stage} {most:g}", float(took <= most))
            self._count(f"stage {stage} sum", took)

    def _retry_after(self) -> float:
        """When it may be worth asking again: when one job more will be done, about."""
        running = [job for job in self._jobs.values() if job.state == "running"]
        rest = min((self._expected_s(job) * (1 - job.fraction) for job in running), default=1.0)
        return min(30.0, max(0.5, rest))

    # What changes

    def _change(self, job: Job, event: Event) -> Job:
        """Let something happen to a job. On the disk first."""
        try:
            changed = after(job, event)
        except Stale:
            return job
        self.store.put(changed)
        self._stirred = True
        if changed.state != job.state:
            self._count(changed.state)
        if changed.over:
            self._over(job, changed)
            return changed
        if job.lease and not changed.lease:
            del self._leases[job.lease]
            self.spool.withdraw(job.key, job.lease)
        if changed.lease:
            self._leases[changed.lease] = job.key
        self._jobs[job.key] = changed
        return changed

    def _over(self, before: Job, job: Job) -> None:
        self._jobs.pop(job.key, None)
        self._until.pop(job.key, None)
        self._leases.pop(before.lease, None)
        self._clear(job)
        self._ended[job.key] = job

    def _clear(self, job: Job) -> None:
        """Keep nothing of a job that is over but results that nobody has fetched."""
        if job.state == "done" and not job.fetched:
            self.spool.settle(job.key, job.taken)
        else:
            self.spool.remove(job.key)

    def _forget(self, job: Job) -> None:
        """Know nothing of a job any more."""
        self.spool.remove(job.key)
        self.store.remove(job.key)
        self._jobs.pop(job.key, None)
        self._until.pop(job.key, None)
        self._count("forgotten")

    def _heard_of(self, job: Job, now: float) -> None:
        """An upload, or a worker's job, that there is news of."""
        self._until[job.key] = now + self._patience_s(job)

    def _patience_s(self, job: Job) -> float:
        """For how long nothing need be heard of an upload, or of a worker's job."""
        return self.limits.silence_s if job.state == "running" else self.limits.idle_s

    def _stop(self, job: Job) -> Iterable[Answer]:
        """Tell the worker that has a job to stop."""
        for connection in self._connections.values():
            if job.state == "running" and _worker(connection.peer.owner, connection.name) == job.worker:
                yield Answer(connection.peer.id, Cancel(lease=job.lease))

    def _told(self) -> Iterable[Answer]:
        """What those who watch have not heard yet."""
        places = self._places()
        known = self._ended | self._jobs
        self._ended.clear()
        news = {}
        for connection in self._connections.values():
            for key, (question, heard) in list(connection.watched.items()):
                job = known.get(key)
                if job is None:
                    del connection.watched[key]
                    continue
                if key not in news:
                    news[key] = self._progress(job, places)
                told = news[key]
                if _news(heard, told):
                    connection.watched[key] = question, told
                    yield Answer(connection.peer.id, replace(told, re=question))
                if job.over:
                    del connection.watched[key]

    def _count(self, what: str, by: float = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + by

    @property
    def idle(self) -> bool:
        """Whether no job is running."""
        return not any(job.state == "running" for job in self._jobs.values())

    @property
    def ready(self) -> bool:
        """Whether a job that comes now would be done."""
        return bool(self.models) and self.workers > 0 and not self.draining

    def release(self, now: float) -> None:
        """Give every running job back to the queue: the server stops."""
        for job in list(self._jobs.values()):
            with self._trying():
                self._change(job, Released(now=now, lease=job.lease))

    @property
    def workers(self) -> int:
        """Number of workers that have said HELLO."""
        return sum(1 for connection in self._connections.values() if connection.role == "worker")

    def figures(self) -> dict[str, float]:
        """Figures for monitoring: counters since the start, and what there is now.

        A name is what is counted, or one word for it and then which: ``workers``, ``jobs queued``, ``refused E_BUSY``.
        """
        by_state = {f"jobs {state}": 0.0 for state in UNFINISHED}
        for job in self._jobs.values():
            by_state[f"jobs {job.state}"] += 1
        now = {"workers": float(self.workers), "connections": float(len(self._connections))}
        return {
            **by_state,
            **now,
            "spool bytes": float(self.spool.total_bytes),
            "disk used": disk_used(self.spool.path),
            "disk limit": self.limits.disk_share,
            **{k: float(v) for k, v in self.counts.items()},
        }


def _worker(owner: str, name: str) -> str:
    return f"{owner}/{name}"


def _worker_of(connection: _Connection) -> str:
    return _worker(connection.peer.owner, connection.name)


def _with_waiting(job: Job, seconds: Mapping[str, float]) -> dict[str, float]:
    """The seconds of a worker's stages, with those of the upload and in the queue."""
    before = {"receive": job.queued - job.created, "wait": job.began - job.queued}
    spent = {stage: max(0.0, before.get(stage, 0.0)) + seconds.get(stage, 0.0) for stage in {**before, **seconds}}
    return {stage: round(value, 4) for stage, value in spent.items()}


def _news(before: Progress, now: Progress) -> bool:
    """Whether a person would want to hear of it."""
    if (before.state, before.stage, before.position) != (now.state, now.stage, now.position):
        return True
    return abs(now.fraction - before.fraction) >= 0.02
