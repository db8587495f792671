"""The engine's promises, whatever clients, workers and kills do in whatever order.

Hypothesis plays several owners who lose answers, repeat themselves, send bytes twice or with gaps, and change their
minds; workers that die, hang, come back, and hand in what was given to others meanwhile; and the front door's own death
at any time, also between a write to the spool and one to the store.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from delineate.serving.engine import Answer, Engine, Limits, Peer
from delineate.serving.jobs import FINAL, UNFINISHED, Job
from delineate.serving.protocol import (
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
    Hello,
    JobList,
    Jobs,
    Message,
    Model,
    Open,
    Output,
    Part,
    Ping,
    Problem,
    Progress,
    Report,
    Stats,
    Status,
    Take,
    Work,
    decode,
    encode,
)
from delineate.serving.spool import Spool, job_key
from delineate.serving.store import Store

THOROUGH = "DELINEATE_THOROUGH" in os.environ
"""Whether many more histories are tried, which takes minutes."""

LIMITS = Limits(queue=4, job_bytes=60, spool_bytes=150, disk_share=1.0, keep_s=1e9, job_s=1e9, small_bytes=12)
OWNERS = ("A", "B", "C")
"""A and B have keys of their own; the gateway speaks for C."""
IDS = tuple(f"00000000-0000-4000-8000-{number:012d}" for number in range(4))
"""Owners choose the same ids: it does not matter."""
QUESTIONS = {"any": 1, "small": 2}
"""The id of a worker's question for a job, by its lane: a job answers it, perhaps long after it was asked."""
IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""A folder where to wait for the disk costs nothing."""


class Killed(BaseException):
    """The front door's process ended here."""


class MortalStore(Store):
    """A store whose process is killed at one of its writes: before it, or after it."""

    dies: int | None = None
    after = False

    def put(self, job: Job) -> None:
        if self.dies == 0 and not self.after:
            raise Killed
        super().put(job)
        if self.dies == 0:
            raise Killed
        if self.dies is not None:
            self.dies -= 1


@dataclass
class Sent:
    """A job as its owner knows it: what they want, and what they were told."""

    owner: str
    id: str
    parts: tuple[bytes, ...]
    committed: bool = False
    """The server has said so."""
    end: Progress | None = None
    fetched: bool | None = False
    """Whether the server has taken their acknowledgement; None if it died before it answered."""

    @property
    def request(self) -> Open:
        parts = tuple(Part(format="nii", size=len(part), channel=str(index)) for index, part in enumerate(self.parts))
        return Open(job=self.id, model="liver", parts=parts)

    @property
    def sha256(self) -> tuple[str, ...]:
        return tuple(hashlib.sha256(part).hexdigest() for part in self.parts)


@dataclass
class Hand:
    """A worker: its connection, and the jobs it believes it has. ``stale``: what it had in an earlier life."""

    name: str
    local: bool
    connection: int = 0
    held: dict[str, Work] = field(default_factory=dict)
    stale: dict[str, Work] = field(default_factory=dict)

    @property
    def peer(self) -> Peer:
        id = f"{self.name}/{self.connection}".encode()
        return Peer(id, "local" if self.local else "far", frozenset({"worker"}), local=self.local)


class Serving(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="delineate-laws-", dir=IN_MEMORY))
        self.now = 1e6
        self.sent: dict[tuple[str, str], Sent] = {}
        self.hands = [Hand("near", True), Hand("near2", True), Hand("far", False)]
        self.generation = 0
        self.start()

    def start(self) -> None:
        self.store = MortalStore(self.folder / "jobs.sqlite")
        self.engine = Engine(self.store, Spool(self.folder / "spool"), LIMITS, now=self.now)
        self.engine.models = {"liver": Model(name="liver", sha256="1" * 64, channels=("0", "1"), targets=("liver",))}
        self.generation += 1
        self.counted_from = len(self.live())

    def stop(self) -> None:
        self.store.close()
        self.engine.spool.close()

    def teardown(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    # How messages come and go

    def client(self, owner: str) -> Peer:
        if owner == "C":
            return Peer(b"gateway", "local", frozenset({"client", "worker", "gateway"}), local=True)
        return Peer(owner.encode(), owner)

    def deliver(self, peer: Peer, message: Message, payload: bytes = b"") -> list[Answer]:
        """What the engine answers to a message, as it would travel; a kill, and the next front door, meanwhile."""
        self.now += 0.001
        message, payload = decode(encode(message, payload))
        try:
            answers = self.engine.handle(peer, message, payload, self.now)
        except Killed:
            self.killed()
            return []
        return self.travelled(answers)

    def travelled(self, answers: list[Answer]) -> list[Answer]:
        """Answers, once they are over the wire; workers take up what is theirs."""
        said = []
        for to, message, payload in answers:
            assert decode(encode(message, payload)) == (message, payload)
            said.append(Answer(to, message, payload))
            if isinstance(message, Progress):  # an answer, or what somebody wanted to hear of their own
                assert message.job in [id for owner, id in self.sent if self.client(owner).id == to] or message.re == 5
            for hand in self.hands:
                if hand.peer.id == to and isinstance(message, Work):
                    self.check_order(message)
                    hand.held[message.lease] = message
                if hand.peer.id == to and isinstance(message, Cancel) and message.lease in hand.held:
                    hand.stale[message.lease] = hand.held.pop(message.lease)
        return said

    def ask(self, owner: str, message: Message, payload: bytes = b"") -> Message | None:
        """The answer to an owner's message; None if the front door was killed before it."""
        peer = self.client(owner)
        if peer.id not in self.engine._connections:
            self.deliver(peer, Hello(versions=(1,), client=owner, role="gateway" if owner == "C" else "client"))
        answers = self.deliver(peer, replace(message, owner=owner if owner == "C" else "", id=5), payload)
        found = [one for one in answers if one.to == peer.id and one.message.re == 5]
        if not found:
            return None
        self.payloads = [one.payload for one in found]
        return found[0].message

    def tell(self, hand: Hand, message: Message, payload: bytes = b"") -> list[Answer]:
        """A worker's message; it says HELLO first if it is not known."""
        if hand.peer.id not in self.engine._connections:
            self.greet(self.hands.index(hand), True)
        return self.deliver(hand.peer, message, payload)

    def killed(self) -> None:
        self.stop()
        self.start()

    def hear(self, job: Sent, answer: Message | None) -> None:
        """Take up what an owner is told, and check it against what they were told before."""
        if isinstance(answer, Progress):
            assert answer.job == job.id
            if answer.state != "receiving":
                job.committed |= answer.state in ("queued", "running", "done", "failed")
            if job.end is not None:
                assert (answer.state, answer.problem) == (job.end.state, job.end.problem), "it ended twice"
                assert answer.outputs in (job.end.outputs, ())
            elif answer.state in FINAL:
                job.end = answer

    def check_order(self, work: Work) -> None:
        """Of an owner's jobs, the oldest comes first: but a small one may be given to who asks for it."""
        key = self.engine._leases[work.lease]
        given = self.engine._jobs[key]
        older = [
            job
            for job in self.engine._jobs.values()
            if job.owner == given.owner and job.state == "queued" and job.queued < given.queued
        ]
        assert not older or (work.re == QUESTIONS["small"] and work.small)

    # What owners do

    @rule(owner=st.sampled_from(OWNERS), id=st.sampled_from(IDS), size=st.integers(1, 25), count=st.integers(1, 2))
    def open(self, owner, id, size, count) -> None:
        self.opened(owner, id, size, count)

    def opened(self, owner: str, id: str, size: int, count: int) -> Sent | None:
        """Begin a job, which may be one that is under way, or another of the same id; None if that was refused."""
        known = self.sent.get((owner, id))
        parts = tuple(f"{owner}{id[-2:]}{size}{part}".encode().ljust(size, b"~")[:size] for part in range(count))
        job = Sent(owner, id, parts)
        another = known is not None and known.request != job.request
        there = job_key(owner, id) in self.engine._jobs
        answer = self.ask(owner, job.request)
        if answer is None:  # it is there, or it is not
            self.sent.setdefault((owner, id), job)
            return None
        if isinstance(answer, Err):
            assert answer.problem.code == "E_BUSY" or (another and answer.problem.code == "E_CONFLICT")
            assert answer.retryable == (answer.problem.code == "E_BUSY")
            assert not answer.retryable or (answer.retry_after > 0 and not (known and known.committed))
            return None
        if known is None or another:
            assert known is None or not known.committed
            self.sent[owner, id] = job
        if not there and answer.state == "receiving":
            assert self.waiting() <= LIMITS.queue
            assert self.promised() <= LIMITS.spool_bytes
        return self.sent[owner, id]

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), start=st.integers(0, 25), length=st.integers(0, 12), again=st.booleans())
    def chunk(self, data, start, length, again) -> None:
        job = data.draw(self.any_job())
        part = data.draw(st.integers(0, len(job.parts) - 1))
        payload = job.parts[part][start : start + length]
        for _ in range(1 + again):
            answer = self.ask(job.owner, Chunk(job=job.id, part=part, offset=start), payload)
            if isinstance(answer, Err):
                assert answer.problem.code in ("E_CONFLICT", "E_BUSY", "E_UNKNOWN_JOB")
                if answer.problem.code == "E_UNKNOWN_JOB":
                    assert not job.committed
                    assert answer.retryable

    @rule(owner=st.sampled_from(OWNERS), id=st.sampled_from(IDS), size=st.integers(1, 25), lost=st.booleans())
    def upload(self, owner, id, size, lost) -> None:
        """As a good client does: from where the server says, and COMMIT."""
        job = self.sent.get((owner, id)) or self.opened(owner, id, size, 1)
        answer = self.ask(owner, job.request) if job else None
        if not isinstance(answer, Credit):
            return
        for index, (start, part) in enumerate(zip(answer.received, job.parts, strict=True)):
            for offset in range(start, len(part), 10):
                said = self.ask(owner, Chunk(job=id, part=index, offset=offset), part[offset : offset + 10])
                if not isinstance(said, Credit):
                    return
        said = self.ask(owner, Commit(job=id, sha256=job.sha256))
        if not lost:
            self.hear(job, said)
            assert not isinstance(said, Err) or said.problem.code in ("E_CONFLICT", "E_BUSY")

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def commit_something_else(self, data) -> None:
        job = data.draw(self.any_job())
        answer = self.ask(job.owner, Commit(job=job.id, sha256=("0" * 64,) * len(job.parts)))
        if answer is not None and not (isinstance(answer, Progress) and answer.state == "cancelled"):
            assert isinstance(answer, Err)
            assert answer.problem.code in ("E_CONFLICT", "E_TRUNCATED", "E_UNKNOWN_JOB", "E_BUSY")

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), watch=st.booleans())
    def status(self, data, watch) -> None:
        job = data.draw(self.any_job())
        answer = self.ask(job.owner, Status(job=job.id, watch=watch))
        self.hear(job, answer)
        if isinstance(answer, Err):
            assert answer.problem.code == "E_UNKNOWN_JOB"
            assert not job.committed

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), lost=st.booleans())
    def cancel(self, data, lost) -> None:
        job = data.draw(self.any_job())
        answer = self.ask(job.owner, Cancel(job=job.id))
        if not lost:
            self.hear(job, answer)

    @precondition(lambda self: any(job.end for job in self.sent.values()))
    @rule(data=st.data(), acknowledge=st.booleans(), lost=st.booleans())
    def fetch(self, data, acknowledge, lost) -> None:
        job = data.draw(st.sampled_from([job for job in self.sent.values() if job.end is not None]))
        for output in job.end.outputs:
            found = b""
            while len(found) < output.size:
                answer = self.ask(job.owner, Fetch(job=job.id, output=output.name, offset=len(found), count=2))
                if answer is None:
                    return
                if job.fetched is None:
                    job.fetched = isinstance(answer, Err)
                if job.fetched:
                    assert answer.problem.code == "E_UNKNOWN_JOB"
                    break
                found += b"".join(self.payloads)
            else:
                assert hashlib.sha256(found).hexdigest() == output.sha256
                assert found.partition(b"|")[2] == b"|".join(job.parts)
        if acknowledge:
            answer = self.ask(job.owner, Ack(job=job.id))
            assert isinstance(answer, Ack | None)
            job.fetched = job.fetched or (True if answer is not None else None)

    @rule(owner=st.sampled_from(OWNERS))
    def list_jobs(self, owner) -> None:
        answer = self.ask(owner, Jobs(most=100))
        if answer is None:
            return
        assert isinstance(answer, JobList)
        there = {job.job for job in answer.jobs}
        assert {job.id for job in self.sent.values() if job.owner == owner and job.committed} <= there
        assert there <= {id for of, id in self.sent if of == owner}
        for told in answer.jobs:
            self.hear(self.sent[owner, told.job], told)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def look_at_somebody_elses(self, data) -> None:
        job = data.draw(self.any_job())
        for owner in OWNERS:
            if (owner, job.id) not in self.sent:
                for message in (Status(job=job.id), Fetch(job=job.id, output="label.vtk"), Cancel(job=job.id),
                                Commit(job=job.id, sha256=job.sha256), Ack(job=job.id)):  # fmt: skip
                    answer = self.ask(owner, message)
                    assert answer is None or answer.problem.code == "E_UNKNOWN_JOB"

    # What workers do

    @rule(number=st.integers(0, 2), same=st.booleans())
    def greet(self, number, same) -> None:
        """A worker comes, comes back, or another process does under its name."""
        hand = self.hands[number]
        hand.connection += 1
        if not same:
            hand.stale |= hand.held
            hand.held = {}
        held = tuple(hand.held)
        self.deliver(hand.peer, Hello(versions=(1,), client=hand.name, role="worker", leases=held))

    @rule(number=st.integers(0, 2), lane=st.sampled_from(["any", "small"]), undelivered=st.sampled_from([0, 0, 1]))
    def take(self, number, lane, undelivered) -> None:
        hand = self.hands[number]
        before = set(hand.held)
        self.tell(hand, Take(lane=lane, id=QUESTIONS[lane]))
        for lease in set(hand.held) - before if undelivered else ():
            try:
                self.engine.unsent(hand.peer.id, hand.held.pop(lease), self.now)
            except Killed:
                self.killed()

    @rule(number=st.integers(0, 2), stage=st.sampled_from(["decode", "segment"]))
    def report(self, number, stage) -> None:
        hand = self.hands[number]
        self.tell(hand, Ping())
        for lease in list(hand.held):
            self.tell(hand, Report(lease=lease, stage=stage, fraction=0.5))

    @rule(number=st.integers(0, 2))
    def work(self, number) -> None:
        """As a good worker does."""
        hand = self.hands[number]
        self.take(number, "any", False)
        for lease, work in list(hand.held.items()):
            self.tell(hand, Report(lease=lease, stage="segment", fraction=0.5))
            self.write(hand, lease, work)
            hand.held.pop(lease, None)

    @precondition(lambda self: any(hand.held or hand.stale for hand in self.hands))
    @rule(data=st.data(), lost=st.booleans())
    def done(self, data, lost) -> None:
        hand, lease, work = data.draw(self.any_work())
        self.write(hand, lease, work)
        if not lost:
            hand.held.pop(lease, None)

    @precondition(lambda self: any(hand.held or hand.stale for hand in self.hands))
    @rule(data=st.data(), released=st.booleans())
    def fail(self, data, released) -> None:
        hand, lease, _ = data.draw(self.any_work())
        problem = None if released else Problem("E_FORMAT", f"attempt {lease}")
        self.tell(hand, Fail(lease=lease, problem=problem, released=released))
        hand.held.pop(lease, None)

    def write(self, hand: Hand, lease: str, work: Work) -> None:
        """Make a result of what was received, and hand it in."""
        if hand.local:
            with suppress(FileNotFoundError):  # somebody else has the job, or had it
                folder = Path(work.folder)
                parts = [(folder / f"in{index}").read_bytes() for index in range(len(work.parts))]
                (folder / "out").mkdir(exist_ok=True)
                (folder / "out" / "label.vtk").write_bytes(result := b"|".join([lease.encode(), *parts]))
                (folder / "decoded").mkdir(exist_ok=True)
                (folder / "decoded" / "scan.npy").write_bytes(bytes(20))
                self.hand_in(hand, lease, result)
            return
        parts = []
        for index, part in enumerate(work.parts):
            answers = self.tell(hand, Fetch(lease=lease, part=index))
            parts += [one.payload for one in answers if isinstance(one.message, Data)]
            if len(parts) <= index or len(parts[index]) != part.size:
                return
        result = b"|".join([lease.encode(), *parts])
        for offset in range(0, len(result), 40):
            piece = result[offset : offset + 40]
            self.tell(hand, Chunk(lease=lease, output="label.vtk", offset=offset), piece)
        self.hand_in(hand, lease, result)

    def hand_in(self, hand: Hand, lease: str, result: bytes) -> None:
        output = Output("label.vtk", len(result), hashlib.sha256(result).hexdigest())
        self.tell(hand, Done(lease=lease, outputs=(output,), seconds={"infer": 1.0, "wait": 0.1}))

    # What time and death do

    @rule(seconds=st.sampled_from([0.5, 3.0, 16.0, 61.0, 400.0]))
    def pass_time(self, seconds) -> None:
        """The front door looks every other second: later, it would count as held up."""
        steps = ceil(seconds / 2)
        for _ in range(steps):
            self.look(seconds / steps)

    @rule(seconds=st.sampled_from([16.0, 400.0]))
    def be_held_up(self, seconds) -> None:
        """The front door is stopped, and goes on: that is nobody's loss."""
        before = dict(self.engine._jobs)
        self.look(seconds)
        for key, job in self.engine._jobs.items():
            assert job.losses == before[key].losses

    def look(self, seconds: float) -> None:
        self.now += seconds
        try:
            self.travelled(self.engine.tick(self.now))
        except Killed:
            self.killed()

    @rule(
        how=st.sampled_from(["", "", "now", "soon", "chunk"]),
        writes=st.integers(0, 2),
        after=st.booleans(),
        data=st.data(),
    )
    def die(self, how, writes, after, data) -> None:
        """At once; between a write to the spool, one to the store, and the answer; or in the middle of a chunk."""
        if how == "soon":
            self.store.dies, self.store.after = writes, after
        if how == "chunk" and self.sent:
            job = data.draw(self.any_job())
            known = self.engine._jobs.get(job_key(job.owner, job.id))
            if known is not None and known.state == "receiving" and known.request == job.request:
                here = self.engine.spool.received(known)[0]
                self.engine.spool.append(known, 0, here, job.parts[0][here : here + 3])
        if how in ("now", "chunk"):
            self.killed()

    @precondition(lambda self: any(job.state == "queued" for job in self.engine._jobs.values()))
    @rule(data=st.data())
    def lose_a_scan(self, data) -> None:
        """As when the jobs are restored from a copy, and the spool is not."""
        queued = sorted(job.key for job in self.engine._jobs.values() if job.state == "queued")
        shutil.rmtree(self.engine.spool.folder(data.draw(st.sampled_from(queued))), ignore_errors=True)

    # What always holds

    def any_job(self) -> st.SearchStrategy[Sent]:
        return st.sampled_from([self.sent[name] for name in sorted(self.sent)])

    def any_work(self) -> st.SearchStrategy[tuple[Hand, str, Work]]:
        found = [(hand, *one) for hand in self.hands for one in [*hand.held.items(), *hand.stale.items()]]
        return st.sampled_from(found)

    def live(self) -> list[Job]:
        return self.store.unfinished()

    def waiting(self) -> int:
        return sum(self.engine._waits(job, self.now) for job in self.engine._jobs.values())

    def promised(self) -> int:
        """Bytes of the spool, when all that has a place has arrived."""
        jobs = [job for job in self.engine._jobs.values() if self.engine._waits(job, self.now)]
        return self.engine.spool.total_bytes + sum(self.engine._missing(job) for job in jobs)

    @invariant()
    def no_committed_job_is_lost_and_none_ends_twice(self) -> None:
        for job in self.sent.values():
            kept = self.store.get(job_key(job.owner, job.id))
            if job.committed:
                assert kept is not None
                assert kept.state != "receiving"
                assert kept.request == job.request
                assert kept.sha256 == job.sha256
            if job.end is not None:
                assert (kept.state, kept.outputs) == (job.end.state, job.end.outputs)
            if kept is not None and kept.state == "failed":
                code = kept.problem.code
                assert kept.losses == 2 if code == "E_QUARANTINED" else code in ("E_FORMAT", "E_TRUNCATED")

    @invariant()
    def memory_and_disk_agree(self) -> None:
        engine, kept = self.engine, {job.key: job for job in self.live()}
        forgetful = {
            key: replace(job, stage=kept[key].stage, fraction=kept[key].fraction) for key, job in engine._jobs.items()
        }
        assert forgetful == kept
        assert engine._leases == {job.lease: job.key for job in kept.values() if job.state == "running"}
        assert set(engine._until) == set(kept)
        assert not engine._ended or engine._stirred
        for key in kept:
            engine.spool.measure(key)
        files = [path for path in (self.folder / "spool").rglob("*") if path.is_file()]
        assert engine.spool.total_bytes == sum({path.stat().st_ino: path.stat().st_size for path in files}.values())
        assert {path.relative_to(self.folder / "spool").parts[0] for path in files} <= self.store.keys()
        for path in files:
            key, *place = path.relative_to(self.folder / "spool").parts
            job = self.store.get(key)
            if job.over:
                assert (job.state, job.fetched, place[:2]) == ("done", False, [job.taken, "out"])
        assert set(engine.spool._parts) <= set(kept)
        attempts = {
            path.name for path in (self.folder / "spool").glob("*/*") if path.is_dir() and path.parent.name in kept
        }
        assert attempts <= set(engine._leases)

    @invariant()
    def figures_add_up(self) -> None:
        self.ask("C", Stats())
        figures, states = self.engine.figures(), Counter(job.state for job in self.live())
        assert [figures[f"jobs {state}"] for state in UNFINISHED] == [states[state] for state in UNFINISHED]
        ended = sum(figures.get(what, 0) for what in (*FINAL, "forgotten"))
        assert self.counted_from + figures.get("opened", 0) == sum(states.values()) + ended
        assert figures["spool bytes"] == self.engine.spool.total_bytes
        places = sorted(place for place, _ in self.engine._places().values() if place)
        assert places == list(range(1, states["queued"] + 1))


@pytest.mark.parametrize("after", [False, True])
def test_a_server_that_dies_within_an_acknowledgement_has_the_whole_result_or_none(after: bool) -> None:
    state = Serving()
    state.upload(id=IDS[0], lost=False, owner="A", size=1)
    state.work(number=0)
    state.list_jobs(owner="A")
    [job] = state.sent.values()
    only = SimpleNamespace(draw=lambda _: job)
    state.store.dies, state.store.after = 0, after
    state.fetch(data=only, acknowledge=True, lost=False)
    assert job.fetched is None
    state.fetch(data=only, acknowledge=False, lost=False)
    assert job.fetched == after
    state.teardown()


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=1000 if THOROUGH else 30,
    stateful_step_count=60 if THOROUGH else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
