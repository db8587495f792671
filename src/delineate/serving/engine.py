"""The front door's mind: what it answers to each message, and what it gives to which worker. No socket.

Every job lives in the store and, while it is not over, here. A change is on the disk before anybody hears of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from secrets import token_hex
from typing import NamedTuple

from msgspec.structs import replace

from delineate.errors import (
    Busy,
    Conflict,
    DelineateError,
    Denied,
    NotIntroduced,
    OutputError,
    ProtocolError,
    UnknownJob,
    UnknownModel,
    VersionError,
)
from delineate.serving.jobs import (
    Acknowledged,
    Cancelled,
    Committed,
    Event,
    Failed,
    Finished,
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
)
from delineate.serving.spool import Spool, job_key
from delineate.serving.store import Store


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
    """Results that nobody fetches are kept for this long; what is known of a job, too."""
    idle_s: float = 60
    """An upload that rests for longer does not count as one of the queue."""
    silence_s: float = 15
    """A worker that says nothing for longer is lost."""
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
    watched: dict[str, tuple[int, Progress | None]] = field(default_factory=dict)
    """Jobs whose progress it wants, with the id of its question and what it heard last."""


class Engine:
    """Answers messages. ``models`` are the bundles on offer by name; they may be replaced at any time."""

    def __init__(self, store: Store, spool: Spool, limits: Limits = Limits(), *, now: float, name: str = "") -> None:
        self.store, self.spool, self.limits, self.name = store, spool, limits, name
        self.models: Mapping[str, Model] = {}
        self.draining = False
        self.counts: dict[str, int] = {}
        self._jobs = {job.key: job for job in store.unfinished()}
        self._leases = {job.lease: job.key for job in self._jobs.values() if job.lease}
        self._connections: dict[bytes, _Connection] = {}
        self._touched = dict.fromkeys(self._jobs, now)
        """When a job was last heard of: its upload, or its worker."""
        self._pace: dict[str, float] = {}
        """Seconds that a model takes for a byte of input."""
        self._ended: dict[str, Job] = {}
        """Jobs that watchers have yet to hear the end of."""
        self._stirred = True
        """Whether something has happened that others may have to hear of."""
        spool.clean(store.keys().__contains__)

    # What comes in

    def handle(self, peer: Peer, message: Message, payload: bytes, now: float) -> list[Answer]:
        """What a message leads to, for its sender and for others."""
        try:
            answers = list(self._handled(peer, message, payload, now))
        except DelineateError as error:
            retry = isinstance(error, Busy | OutputError | NotIntroduced)
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
        for job in list(self._jobs.values()):
            quiet = now - self._touched.get(job.key, now)
            if job.state == "receiving" and quiet > self.limits.keep_s:
                self._forget(job)
            elif (job.state == "running" and quiet > self.limits.silence_s) or (
                job.state == "running" and job.cancelling and now - job.changed > 2 * self.limits.cancel_s
            ):
                self._change(job, Lost(now=now, lease=job.lease))
            elif job.state == "running" and not job.cancelling and now - job.began > self.limits.job_s:
                problem = Problem("E_DEADLINE", f"the job ran for more than {self.limits.job_s:.0f} s", "")
                answers += self._stop(job)
                self._change(job, Failed(now=now, lease=job.lease, problem=problem))
        for job in self.store.older(now - self.limits.keep_s):
            self._forget(job)
        silent = [c for c in self._connections.values() if now - c.heard > 20 * self.limits.silence_s]
        for connection in silent:
            del self._connections[connection.peer.id]
        return [*answers, *self._consequences(now)]

    def gone(self, peer: bytes) -> None:
        """A connection is no more. A worker's jobs stay its own until it has been silent for too long."""
        self._connections.pop(peer, None)

    def lost(self, owner: str, name: str, now: float) -> list[Answer]:
        """A worker's process has ended."""
        for job in list(self._jobs.values()):
            if job.state == "running" and job.worker == _worker(owner, name):
                self._change(job, Lost(now=now, lease=job.lease))
        return list(self._consequences(now))

    def _consequences(self, now: float) -> Iterable[Answer]:
        if self._stirred:
            self._stirred = False
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
            self._touched[job.key] = now
            if job.lease not in held:  # it is another process than the one that had the job
                self._change(job, Lost(now=now, lease=job.lease))
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
                    self.spool.append(job, self._index(job, message.part), message.offset, payload)
                    self._touched[job.key] = now
                    self._count("received bytes", len(payload))
                yield Answer(to, self._credit(job, message.id))
            case Commit():
                job = self._commit(self._job_of(owner, message.job), message, now)
                yield Answer(to, replace(self._progress(job), re=message.id))
            case Status():
                job = self._job_of(owner, message.job)
                told = self._progress(job)
                if message.watch and not job.over:
                    connection.watched[job.key] = message.id, told
                yield Answer(to, replace(told, re=message.id))
            case Jobs():
                latest = self.store.of_owner(owner, message.most)
                yield Answer(
                    to, JobList(jobs=tuple(self._progress(self._jobs.get(j.key, j)) for j in latest), re=message.id)
                )
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
                    self._change(job, Acknowledged(now=now))
                    self.spool.remove(job.key)
                yield Answer(to, Ack(job=id, re=message.id))
            case Cancel(job=str(id)):
                job = self._job_of(owner, id)
                if not job.over and not job.cancelling:
                    yield from self._stop(job)
                    job = self._change(job, Cancelled(now=now))
                yield Answer(to, replace(self._progress(job), re=message.id))
            case _:
                raise ProtocolError(f"{type(message).__name__.upper()} names no job")

    def _open(self, owner: str, message: Open, now: float) -> Credit:
        key = job_key(owner, message.job)
        known = self._jobs.get(key) or self.store.get(key)
        wanted = replace(message, id=0, re=0, owner="")
        if known is not None:
            if known.request != wanted:
                raise Conflict(f"job {message.job} exists, and is another", fix="give each scan a job id of its own")
            self._touched[key] = now
            return self._credit(known, message.id)
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
            raise ProtocolError(
                f"a job of {size:,} bytes; at most {self.limits.job_bytes:,}", fix="send fewer or smaller files"
            )
        self._check_room(size, now)
        job = Job(
            key=key, id=message.job, owner=owner, request=wanted, model_sha256=model.sha256, created=now, changed=now
        )
        self.spool.begin(key)
        self._put(job)
        self._touched[key] = now
        self._count("opened")
        return self._credit(job, message.id)

    def _check_room(self, size: int, now: float) -> None:
        """Raise :class:`Busy` if there is no room for another job."""
        if self.draining:
            raise Busy("the server is stopping", fix="try again in a minute")
        waiting = [
            job
            for job in self._jobs.values()
            if job.state == "queued"
            or (job.state == "receiving" and now - self._touched[job.key] <= self.limits.idle_s)
        ]
        if len(waiting) >= self.limits.queue:
            raise Busy(f"{len(waiting)} jobs are waiting", fix=f"try again in {self._retry_after():.0f} s")
        promised = sum(job.size for job in waiting if job.state == "receiving")
        if self.spool.bytes + promised + size > self.limits.spool_bytes:
            raise Busy("the spool is full", fix="try again later, or fetch and acknowledge results")
        disk = shutil.disk_usage(self.spool.path)
        if disk.used + size > self.limits.disk_share * (disk.used + disk.free):
            raise Busy("the server's disk is nearly full", fix="try again later, or ask who runs the server")

    def _commit(self, job: Job, message: Commit, now: float) -> Job:
        if job.state != "receiving":
            if job.sha256 != message.sha256:
                raise Conflict(f"job {job.id} exists, of another content", fix="give each scan a job id of its own")
            return job
        digests = self.spool.digests(job)
        if digests != message.sha256:
            self.spool.restart(job.key)
            raise Conflict(
                "what arrived is not what was sent", fix="open the job again, and send it from the beginning"
            )
        return self._change(job, Committed(now=now, sha256=digests))

    def _fetch(self, to: bytes, job: Job, name: str, message: Fetch) -> Iterable[Answer]:
        found = [output for output in job.outputs if output.name == name]
        if not found or job.fetched:
            had = "its results have been fetched" if job.fetched else f"it is {job.state}"
            raise UnknownJob(f"job {job.id} has no '{name}': {had}", fix="ask for one of its outputs once it is done")
        [output] = found
        offset = message.offset
        for _ in range(message.count):
            payload = self.spool.read(self.spool.output(job.key, name), offset)
            self._count("sent bytes", len(payload))
            yield Answer(to, Data(job=job.id, output=name, offset=offset, size=output.size, re=message.id), payload)
            offset += len(payload)
            if offset >= output.size or not payload:
                break

    # What a worker says

    def _of_worker(self, connection: _Connection, message: Message, payload: bytes, now: float) -> Iterable[Answer]:
        to, lease = connection.peer.id, getattr(message, "lease", None)
        if isinstance(message, Ping):
            worker = _worker(connection.peer.owner, connection.name)
            for job in self._jobs.values():
                if job.state == "running" and job.worker == worker:
                    self._touched[job.key] = now
            yield Answer(to, Ping(re=message.id))
            return
        if isinstance(message, Take):
            connection.lanes[message.lane] = message.id
            self._stirred = True
            return
        job = self._jobs.get(self._leases.get(lease or "", ""))
        if job is None:
            if isinstance(message, Done | Fail):
                yield Answer(to, Ack(lease=lease, re=message.id))  # somebody else has done it, or it is cancelled
            else:
                yield Answer(to, Cancel(lease=lease, re=message.id))
            return
        self._touched[job.key] = now
        assert lease is not None
        match message:
            case Report():
                job = self._report(job, message, now)
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
                there = self.spool.put_output(job.key, name, message.offset, payload)
                yield Answer(to, Credit(lease=lease, received=(there,), state=job.state, re=message.id))
            case Done():
                self.spool.check_outputs(job.key, message.outputs)
                done = self._change(
                    job, Finished(now=now, lease=lease, outputs=message.outputs, seconds=message.seconds)
                )
                self._learn(done, now)
                yield Answer(to, Ack(lease=lease, re=message.id))
            case Fail():
                if message.released or message.problem is None:
                    self._change(job, Released(now=now, lease=lease))
                else:
                    self._change(job, Failed(now=now, lease=lease, problem=message.problem))
                yield Answer(to, Ack(lease=lease, re=message.id))
            case _:
                raise ProtocolError(f"{type(message).__name__.upper()} without an output")

    def _report(self, job: Job, message: Report, now: float) -> Job:
        # How far it is need not outlive the process: the disk would be busy with it.
        job = after(job, Reported(now=now, lease=message.lease, stage=message.stage, fraction=message.fraction))
        self._jobs[job.key] = job
        self._stirred = True
        return job

    def _given_out(self, now: float) -> Iterable[Answer]:
        """Queued jobs for the workers that wait, oldest first."""
        if self.draining:
            return
        queued = sorted((j for j in self._jobs.values() if j.state == "queued"), key=lambda job: job.created)
        for connection in [c for c in self._connections.values() if c.lanes]:
            for lane in [lane for lane in ("any", "small") if lane in connection.lanes]:
                job = next((one for one in queued if self._fits(one, connection, lane)), None)
                if job is None:
                    continue
                queued.remove(job)
                worker = _worker(connection.peer.owner, connection.name)
                lease = token_hex(8)
                try:
                    job = self._change(job, Leased(now=now, lease=lease, worker=worker, lane=lane))
                except DelineateError:  # the disk is full: it stays queued, and the worker waits
                    return
                self._touched[job.key] = now
                model = self._model_of(job)
                yield Answer(
                    connection.peer.id,
                    Work(
                        lease=lease,
                        model=model,
                        parts=job.request.parts,
                        options=job.request.options,
                        job=job.id,
                        small=self._is_small(job),
                        folder=str(self.spool.folder(job.key)) if connection.peer.local else "",
                        re=connection.lanes.pop(lane),
                    ),
                )

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
            raise ProtocolError(f"there is no part {part}; the job has {len(job.request.parts)}")
        return part

    def _credit(self, job: Job, re: int) -> Credit:
        sizes = tuple(part.size for part in job.request.parts)
        received = self.spool.received(job) if job.state == "receiving" else sizes
        return Credit(job=job.id, received=received, credit=CREDIT, state=job.state, re=re)

    def _progress(self, job: Job) -> Progress:
        position, eta = self._place(job)
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

    def _place(self, job: Job) -> tuple[int, float | None]:
        """Its place in the queue, and the seconds until it is done, as far as known."""
        if job.state == "running":
            expected = self._expected_s(job)
            return 0, None if expected == 0 else max(0.0, expected * (1 - job.fraction))
        if job.state != "queued":
            return 0, None
        running = [one for one in self._jobs.values() if one.state == "running"]
        before = [one for one in self._jobs.values() if one.state == "queued" and one.created < job.created]
        work = sum(self._expected_s(one) * (1 - one.fraction) for one in [*running, *before, job])
        workers = sum(1 for connection in self._connections.values() if connection.role == "worker")
        known = job.model_sha256 in self._pace and workers
        return len(before) + 1, work / workers if known else None

    def _expected_s(self, job: Job) -> float:
        """Seconds that a job is expected to take; 0 as long as its model has done none."""
        return self._pace.get(job.model_sha256, 0.0) * job.size

    def _learn(self, job: Job, now: float) -> None:
        pace = max(now - job.began, 1e-3) / job.size
        before = self._pace.get(job.model_sha256, pace)
        self._pace[job.model_sha256] = 0.8 * before + 0.2 * pace

    def _retry_after(self) -> float:
        """When it may be worth asking again: when about one job more will be done."""
        running = [job for job in self._jobs.values() if job.state == "running"]
        rest = [self._expected_s(job) * (1 - job.fraction) for job in running]
        return min(30.0, max(0.5, *rest)) if rest else 1.0

    # What changes

    def _change(self, job: Job, event: Event) -> Job:
        """Let something happen to a job. On the disk first."""
        try:
            changed = after(job, event)
        except Stale:
            return job
        self._put(changed)
        if changed.state != job.state:
            self._count(changed.state)
        return changed

    def _put(self, job: Job) -> None:
        before = self._jobs.get(job.key)
        self.store.put(job)
        self._stirred = True
        if before is not None and before.lease and before.lease != job.lease:
            self._leases.pop(before.lease, None)
        if job.over:
            self._over(job)
            return
        if job.lease:
            self._leases[job.lease] = job.key
        self._jobs[job.key] = job

    def _over(self, job: Job) -> None:
        self._jobs.pop(job.key, None)
        self._touched.pop(job.key, None)
        if job.state != "done":
            self.spool.remove(job.key)
        self._ended[job.key] = job

    def _forget(self, job: Job) -> None:
        self.spool.remove(job.key)
        self.store.remove(job.key)
        self._jobs.pop(job.key, None)
        self._touched.pop(job.key, None)

    def _stop(self, job: Job) -> Iterable[Answer]:
        """Tell the worker that has a job to stop."""
        for connection in self._connections.values():
            if job.state == "running" and _worker(connection.peer.owner, connection.name) == job.worker:
                yield Answer(connection.peer.id, Cancel(lease=job.lease))

    def _told(self) -> Iterable[Answer]:
        """What those who watch have not heard yet."""
        ended = dict(self._ended)
        self._ended.clear()
        for connection in self._connections.values():
            for key, (question, heard) in list(connection.watched.items()):
                job = self._jobs.get(key) or ended.get(key) or self.store.get(key)
                if job is None:
                    del connection.watched[key]
                    continue
                told = self._progress(job)
                if heard is None or _news(heard, told):
                    connection.watched[key] = question, told
                    yield Answer(connection.peer.id, replace(told, re=question))
                if job.over:
                    del connection.watched[key]

    def _count(self, what: str, by: int = 1) -> None:
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
            if job.state == "running":
                self._change(job, Released(now=now, lease=job.lease))

    @property
    def workers(self) -> int:
        """Number of workers that have said HELLO."""
        return sum(1 for connection in self._connections.values() if connection.role == "worker")

    def figures(self) -> dict[str, float]:
        """Figures for monitoring: counters since the start, and what there is now."""
        by_state = {f"jobs {state}": 0.0 for state in ("receiving", "queued", "running")}
        for job in self._jobs.values():
            by_state[f"jobs {job.state}"] += 1
        now = {"workers": float(self.workers), "connections": float(len(self._connections))}
        return {
            **by_state,
            **now,
            "spool bytes": float(self.spool.bytes),
            **{k: float(v) for k, v in self.counts.items()},
        }


def _worker(owner: str, name: str) -> str:
    return f"{owner}/{name}"


def _news(before: Progress, now: Progress) -> bool:
    """Whether a person would want to hear of it."""
    if (before.state, before.stage, before.position) != (now.state, now.stage, now.position):
        return True
    return abs(now.fraction - before.fraction) >= 0.02
