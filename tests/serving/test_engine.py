"""The engine's rules, one by one: places and turns, time, a full disk, a replaced model, and what a message costs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import ceil
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from delineate.errors import OutputError
from delineate.serving.engine import Engine, Limits, Peer
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
    Lane,
    Message,
    Model,
    Open,
    Options,
    Output,
    Part,
    Ping,
    Problem,
    Progress,
    Report,
    Status,
    Take,
    Work,
    decode,
    encode,
)
from delineate.serving.spool import Spool, job_key
from delineate.serving.store import Store

LIVER = Model(name="liver", sha256="1" * 64, channels=("T1",), targets=("liver",))
WORKER = Peer(b"worker", "local", frozenset({"worker"}), local=True)
IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""A folder where to wait for the disk costs nothing."""


class House:
    """An engine over a real store and spool, with a clock, and messages that travel as they would."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits, self.now, self.jobs = folder, limits, 1e6, 0
        self.start()

    def start(self) -> None:
        self.store = Store(self.folder / "jobs.sqlite")
        self.engine = Engine(self.store, Spool(self.folder / "spool"), self.limits, now=self.now)
        self.engine.models = {"liver": LIVER}

    def close(self) -> None:
        self.store.close()
        self.engine.spool.close()

    def restart(self) -> None:
        self.close()
        self.start()

    def say(self, peer: Peer, message: Message, payload: bytes = b"") -> list[Message]:
        """What a peer hears in answer to its message."""
        self.now += 1e-3
        answers = self.engine.handle(peer, *decode(encode(message, payload)), self.now)
        for _, answer, content in answers:
            assert decode(encode(answer, content)) == (answer, content)
        self.payloads = [answer.payload for answer in answers if answer.to == peer.id]
        return [answer.message for answer in answers if answer.to == peer.id]

    def ask(self, owner: str, message: Message, payload: bytes = b"") -> Message:
        peer = Peer(owner.encode(), owner)
        if peer.id not in self.engine._connections:
            self.say(peer, Hello(versions=(1,)))
        return self.say(peer, message, payload)[0]

    def open(self, owner: str = "A", size: int = 4, id: str = "") -> str | Err:
        self.jobs += 1
        id = id or f"00000000-0000-4000-8000-{self.jobs:012d}"
        answer = self.ask(owner, Open(job=id, model="liver", parts=(Part(format="nii", size=size),)))
        return answer if isinstance(answer, Err) else id

    def commit(self, owner: str = "A", size: int = 4) -> str | Err:
        """A job that was sent whole."""
        id = self.open(owner, size)
        if isinstance(id, Err):
            return id
        assert isinstance(self.ask(owner, Chunk(job=id, offset=0), bytes(size)), Credit)
        assert self.ask(owner, Commit(job=id, sha256=(hashlib.sha256(bytes(size)).hexdigest(),))).state == "queued"
        return id

    def hire(self, peer: Peer = WORKER, **about: object) -> None:
        self.say(peer, Hello(versions=(1,), client=peer.id.decode(), role="worker", **about))

    def take(self, lane: Lane = "any", peer: Peer = WORKER) -> Work | None:
        if peer.id not in self.engine._connections:
            self.hire(peer)
        works = [one for one in self.say(peer, Take(lane=lane)) if isinstance(one, Work)]
        return works[0] if works else None

    def finish(self, work: Work, peer: Peer = WORKER, result: bytes = b"result") -> None:
        out = Path(work.folder) / "out"
        out.mkdir()
        (out / "label.vtk").write_bytes(result)
        output = Output("label.vtk", len(result), hashlib.sha256(result).hexdigest())
        assert isinstance(self.say(peer, Done(lease=work.lease, outputs=(output,)))[0], Ack)

    def state(self, id: str, owner: str = "A") -> str:
        return self.ask(owner, Status(job=id)).state

    def tick(self, seconds: float) -> None:
        """Time passes, and the front door looks every second, as it does."""
        steps = max(1, ceil(seconds))
        for _ in range(steps):
            self.now += seconds / steps
            self.engine.tick(self.now)


@pytest.fixture
def make() -> Iterator[Callable[..., House]]:
    made: list[House] = []

    def one(**limits: float) -> House:
        folder = Path(tempfile.mkdtemp(prefix="delineate-engine-", dir=IN_MEMORY))
        house = House(folder, Limits(**({"disk_share": 1.0} | limits)))
        made.append(house)
        return house

    yield one
    for house in made:
        house.close()
        shutil.rmtree(house.folder)


@pytest.fixture
def house(make) -> House:
    return make()


def busy(answer: object) -> bool:
    if not isinstance(answer, Err) or answer.problem.code != "E_BUSY":
        return False
    assert answer.retryable
    assert 0 < answer.retry_after <= 30
    return True


# Places


def test_the_33rd_job_is_refused_at_once_with_a_time_to_ask_again(house) -> None:
    ids = [house.commit() for _ in range(32)]
    assert busy(house.open())
    house.take()
    assert not busy(house.open())
    assert house.ask("A", Open(job=ids[5], model="liver", parts=(Part(format="nii", size=4),))).state == "queued"


def test_whoever_has_fewer_jobs_gets_the_place_that_becomes_free(make) -> None:
    house = make(queue=4)
    for _ in range(4):
        house.commit("A")
    assert busy(house.open("B"))
    house.take()
    assert busy(house.open("A"))
    assert not busy(house.open("B"))


def test_a_place_is_not_kept_for_long(make) -> None:
    house = make(queue=4)
    for _ in range(4):
        house.commit("A")
    assert busy(house.open("B"))
    house.take()
    house.now += 60
    assert not busy(house.open("A"))


def test_an_upload_that_rests_gives_up_its_place_and_gets_one_again_when_there_is_one(make) -> None:
    house = make(queue=2)
    resting = house.open()
    house.now += 61
    others = [house.commit() for _ in range(2)]
    assert not any(map(busy, others))
    chunk = Chunk(job=resting, offset=0)
    assert busy(house.ask("A", chunk, b"1234"))
    assert busy(house.ask("A", Commit(job=resting, sha256=("0" * 64,))))
    house.take()
    assert house.ask("A", chunk, b"1234").received == (4,)
    assert busy(house.open())


def test_an_upload_that_trickles_does_not_keep_its_place_from_others(make) -> None:
    house = make(queue=1)
    slow, refused = house.open(size=1000), 0
    while busy(house.open("B")):
        refused += 1
        house.now += 20
        house.ask("A", Chunk(job=slow, offset=refused), b"1")
        assert refused < 5
    assert refused > 1


def test_an_upload_that_makes_progress_keeps_its_place(make) -> None:
    house = make(queue=1)
    chunk = bytes(2**20)
    steady = house.open(size=20 * 2**20)
    for number in range(20):
        house.now += 15
        house.ask("A", Chunk(job=steady, offset=number * 2**20), chunk)
        assert busy(house.open("B"))


def test_the_spool_holds_what_was_announced_and_resting_uploads_make_room(make) -> None:
    house = make(spool_bytes=100)
    first = house.open(size=60)
    assert busy(house.open(size=50))
    house.ask("A", Chunk(job=first, offset=0), bytes(30))
    assert busy(house.open(size=50))
    house.now += 61
    second = house.open(size=80)
    assert not busy(second)
    answer = house.ask("A", Chunk(job=first, offset=30), bytes(30))
    assert (answer.problem.code, answer.retryable) == ("E_UNKNOWN_JOB", True)  # so that the client begins again
    assert house.engine.spool.total_bytes == 0


def test_nobody_loses_their_upload_when_that_would_not_make_enough_room(make) -> None:
    house = make(spool_bytes=100)
    for _ in range(6):
        house.commit(size=10)
    resting = house.open(size=20)
    house.ask("A", Chunk(job=resting, offset=0), bytes(10))
    house.now += 61
    assert busy(house.open(size=60))
    assert house.state(resting) == "receiving"


def test_only_so_many_uploads_rest(make) -> None:
    house = make(queue=2)
    for _ in range(30):
        assert not busy(house.open())
        house.now += 61
    assert len(house.engine._jobs) <= 2 + 3 * 2


def test_a_scan_that_is_too_large_for_the_server_is_refused_for_good(make) -> None:
    answer = make(job_bytes=100).open(size=101)
    assert (answer.problem.code, answer.retryable) == ("E_TOO_LARGE", False)


def test_a_server_that_stops_takes_no_more_jobs_but_what_is_under_way(house) -> None:
    id = house.open()
    house.engine.draining = True
    assert busy(house.open())
    assert house.ask("A", Chunk(job=id, offset=0), b"1234").received == (4,)
    assert house.take() is None


# Said twice


def test_everything_may_be_said_again_and_another_thing_of_the_same_id_is_refused(house) -> None:
    id, part = house.open(), Part(format="nii", size=4)
    digest, other = (tuple(hashlib.sha256(content).hexdigest() for content in [text]) for text in (b"1234", b"4321"))
    opened, commit = Open(job=id, model="liver", parts=(part,)), Commit(job=id, sha256=digest)

    def is_conflict(message: Message) -> bool:
        answer = house.ask("A", message)
        return isinstance(answer, Err) and (answer.problem.code, answer.retryable) == ("E_CONFLICT", False)

    assert house.ask("A", opened).received == (0,)
    house.ask("A", Chunk(job=id, offset=0), b"1234")
    for state in ("queued", "queued"):
        assert house.ask("A", commit).state == state
    house.finish(house.take())
    assert house.ask("A", opened).state == house.ask("A", commit).state == "done"
    assert house.ask("A", Chunk(job=id, offset=0), b"1234").state == "done"
    assert is_conflict(Commit(job=id, sha256=other))
    assert is_conflict(Open(job=id, model="liver", parts=(part, part)))
    assert is_conflict(Open(job=id, model="liver", parts=(part,), options=Options(mirrored=True)))
    for _ in range(2):
        assert house.ask("A", Ack(job=id)) == Ack(job=id)
    assert house.ask("A", opened).state == "done"
    assert house.engine.counts["running"] == 1


def test_what_arrived_otherwise_than_it_was_sent_is_refused_and_sent_again_from_the_beginning(house) -> None:
    id = house.open()
    commit = Commit(job=id, sha256=(hashlib.sha256(b"1234").hexdigest(),))
    assert house.ask("A", commit).problem.code == "E_TRUNCATED"
    house.ask("A", Chunk(job=id, offset=0), b"12x4")
    assert house.ask("A", replace(commit, sha256=commit.sha256 * 2)).problem.code == "E_PROTOCOL"
    assert house.ask("A", commit).problem.code == "E_CONFLICT"
    assert house.ask("A", Chunk(job=id, offset=0), b"1234").received == (4,)
    assert house.ask("A", commit).state == "queued"


# Turns


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["A", "B", "C", "D", ""]), max_size=30))
def test_an_owners_oldest_job_waits_for_one_job_of_each_other_owner_at_most(history) -> None:
    """Letters: somebody sends a job. Nothing: a worker takes one."""
    folder = Path(tempfile.mkdtemp(dir=IN_MEMORY))
    house = House(folder, Limits(disk_share=1.0, queue=1000))
    house.hire()
    passed: dict[str, dict[str, int]] = {}
    """For each owner who waits: how many jobs of each other were begun meanwhile."""
    waiting: dict[str, list[str]] = {}
    for owner in [*history, *[""] * len(history)]:
        if owner:
            waiting.setdefault(owner, []).append(house.commit(owner))
            passed.setdefault(owner, {})
        elif any(waiting.values()):
            job = house.take().job
            [given] = [owner for owner, jobs in waiting.items() if job in jobs]
            assert waiting[given].pop(0) == job
            passed[given] = {}
            for owner, jobs in waiting.items():
                if jobs and owner != given:
                    passed[owner][given] = passed[owner].get(given, 0) + 1
                    assert passed[owner][given] <= 1
    assert not any(waiting.values())
    house.close()
    shutil.rmtree(folder)


def test_places_in_the_queue_are_those_in_which_jobs_are_given_out(house) -> None:
    jobs = [house.commit(owner) for owner in "AAABAB"]
    owner_of = dict(zip(jobs, "AAABAB", strict=True))
    places = {house.ask(owner_of[job], Status(job=job)).position: job for job in jobs}
    assert sorted(places) == [1, 2, 3, 4, 5, 6]
    assert [house.take().job for _ in jobs] == [places[number] for number in range(1, 7)]


def test_small_jobs_pass_large_ones_only_where_a_worker_asks_for_small_ones(make) -> None:
    house = make(small_bytes=10)
    large, small = house.commit(size=20), house.commit(size=5)
    assert house.take("small").job == small
    assert house.take("small") is None
    assert house.take("any").job == large


def test_what_is_small_is_learned_from_what_was_done(make) -> None:
    house = make(small_bytes=10, small_s=5)
    house.commit(size=100)
    work = house.take()
    assert not work.small
    house.now += 2
    house.say(WORKER, Report(lease=work.lease, stage="segment"))
    house.finish(work)
    assert house.commit(size=100)
    assert house.take("small").small
    told = house.ask("A", Status(job=house.commit(size=1000)))
    assert 15 < told.eta_s < 30  # 2 s for 100 bytes; and the rest of the one that runs


def test_a_job_waits_for_a_worker_that_has_its_model(house) -> None:
    id = house.commit()
    far = Peer(b"far", "far", frozenset({"worker"}))
    house.hire(far, models=("2" * 64,))
    assert house.take(peer=far) is None
    near = Peer(b"near", "far", frozenset({"worker"}))
    house.hire(near, models=("2" * 64, "1" * 64))
    assert house.take(peer=near).job == id


def test_who_sends_a_scan_before_any_model_is_on_offer_is_told_to_try_again(house) -> None:
    offer, house.engine.models = house.engine.models, {}
    refused = house.open()
    assert (refused.problem.code, refused.retryable) == ("E_BUSY", True)
    house.engine.models = offer
    assert house.state(house.open()) == "receiving"


def test_a_model_that_is_replaced_is_that_of_the_jobs_that_come_after(house) -> None:
    before = house.open()
    house.engine.models = {"liver": Model(name="liver", sha256="3" * 64, channels=("T1",), targets=("liver",))}
    after = house.open()
    again = house.ask("A", Open(job=before, model="liver", parts=(Part(format="nii", size=4),)))
    assert (again.state, again.received) == ("receiving", (0,))
    for id in (before, after):
        house.ask("A", Chunk(job=id, offset=0), bytes(4))
        house.ask("A", Commit(job=id, sha256=(hashlib.sha256(bytes(4)).hexdigest(),)))
    assert [house.take().model.sha256[0] for _ in range(2)] == ["1", "3"]
    wrong = Open(job="0" * 8 + "-0000-4000-8000-" + "9" * 12, model="liver", parts=(Part(format="nii", size=4),),
                 model_sha256="1" * 64)  # fmt: skip
    assert house.ask("A", wrong).problem.code == "E_UNKNOWN_MODEL"


# Workers


def test_a_job_goes_back_when_its_worker_says_nothing_and_is_quarantined_the_second_time(house) -> None:
    id = house.commit()
    for _ in range(2):
        work = house.take()
        house.say(WORKER, Report(lease=work.lease, stage="segment"))
        for _ in range(20):  # pings do not count: it may have forgotten the job
            house.tick(1)
            house.say(WORKER, Ping())
    told = house.ask("A", Status(job=id))
    assert (told.state, told.problem.code) == ("failed", "E_QUARANTINED")
    assert "segment" in told.problem.message
    assert not list((house.folder / "spool").iterdir())


def test_a_job_stays_with_its_worker_as_long_as_it_reports_and_over_a_restart(house) -> None:
    house.commit()
    work = house.take()
    for number in range(30):
        house.tick(10)
        house.say(WORKER, Report(lease=work.lease, stage="segment"))
        if number == 15:
            house.restart()
            house.hire(leases=(work.lease,))
    house.finish(work)


def test_a_front_door_that_was_held_up_itself_blames_no_worker(house) -> None:
    """Stopped and continued, or kept waiting by its disk: it has heard nobody meanwhile."""
    id = house.commit()
    work = house.take()
    for _ in range(3):
        house.now += 60
        house.tick(1)
        house.say(WORKER, Report(lease=work.lease, stage="segment"))
        assert house.state(id) == "running"
    house.now += 60
    house.tick(18)
    assert house.state(id) == "queued", "after that, silence counts"


def test_a_job_is_lost_at_once_when_another_process_comes_under_its_workers_name(house) -> None:
    id = house.commit()
    for state in ("queued", "failed"):
        house.take()
        house.hire(Peer(b"worker", "local", frozenset({"worker"}), local=True))
        assert house.state(id) == state
    assert house.ask("A", Status(job=id)).problem.code == "E_QUARANTINED"


def test_nothing_is_left_of_an_attempt_that_failed(house) -> None:
    house.commit()
    for again in (lambda work: house.say(WORKER, Fail(lease=work.lease, released=True)), lambda work: house.tick(20)):
        work = house.take()
        (Path(work.folder) / "decoded").mkdir()
        again(work)
        assert not Path(work.folder).exists()
    work = house.take()
    stray = Path(work.folder).with_name("0123456789abcdef")
    stray.mkdir()
    house.restart()
    assert not stray.exists()
    assert Path(work.folder).exists()


def test_nothing_but_results_is_left_of_jobs_that_are_over_whenever_the_server_was_killed(house) -> None:
    """It may have been killed after it wrote down an end, and before it removed the files."""
    done, failed, fetched, cancelled = (house.commit() for _ in range(4))
    works = [house.take() for _ in range(3)]
    spool, before = house.folder / "spool", house.folder / "before"
    shutil.copytree(spool, before)
    for work in (works[0], works[2]):
        house.finish(work)
    house.say(WORKER, Fail(lease=works[1].lease, problem=Problem("E_FORMAT", "no")))
    house.ask("A", Ack(job=fetched))
    house.ask("A", Cancel(job=cancelled))
    house.close()
    shutil.copytree(before, spool, dirs_exist_ok=True)
    house.start()
    assert [path for path in spool.rglob("*") if path.is_file()] == [Path(works[0].folder) / "out" / "label.vtk"]
    assert isinstance(house.ask("A", Fetch(job=done, output="label.vtk")), Data)
    assert house.state(failed) == "failed"


def test_a_job_that_never_reached_its_worker_goes_back_and_nobody_is_to_blame(house) -> None:
    id = house.commit()
    for _ in range(3):
        work = house.take()
        house.engine.unsent(WORKER.id, work, house.now)
        assert house.state(id) == "queued"
    house.finish(house.take())
    assert house.state(id) == "done"


def test_a_job_whose_scan_is_gone_fails_and_the_next_one_is_done(house) -> None:
    """The jobs were restored from a copy, and the spool was not."""
    lost, other = house.commit("A"), house.commit("B")
    shutil.rmtree(house.engine.spool.folder(job_key("A", lost)))
    assert house.take().job == other
    told = house.ask("A", Status(job=lost))
    assert (told.state, told.problem.code) == ("failed", "E_TRUNCATED")


def test_a_job_that_cannot_be_lent_stays_queued_and_the_next_one_is_done(house) -> None:
    stuck, other = house.commit("A"), house.commit("B")
    folder, aside = house.engine.spool.folder(job_key("A", stuck)), house.folder / "aside"
    folder.rename(aside)
    folder.touch()
    assert house.take().job == other
    assert house.state(stuck) == "queued"
    folder.unlink()
    aside.rename(folder)
    assert house.take().job == stuck


def test_no_job_is_given_to_a_worker_that_has_not_been_heard_of(house) -> None:
    assert house.take() is None
    house.now += 10
    id = house.commit()
    assert house.state(id) == "queued"
    house.say(WORKER, Ping())
    house.tick(1)
    assert house.state(id) == "running"


def test_a_lease_is_of_no_use_to_another_worker(house) -> None:
    house.commit()
    work = house.take()
    other = Peer(b"other", "far", frozenset({"worker"}))
    house.hire(other)
    [answer] = house.say(other, Fetch(lease=work.lease))
    assert isinstance(answer, Cancel)
    house.say(other, Fail(lease=work.lease, problem=Problem("E_FORMAT", "no")))
    house.finish(work)


def test_a_worker_whose_results_are_not_there_counts_as_lost(house) -> None:
    id = house.commit()
    for _ in range(2):
        work = house.take()
        [answer] = house.say(WORKER, Done(lease=work.lease, outputs=(Output("label.vtk", 6, "0" * 64),)))
        assert isinstance(answer, Ack)
    assert house.ask("A", Status(job=id)).problem.code == "E_QUARANTINED"


def test_results_from_another_machine_are_checked_by_their_digests(house) -> None:
    far = Peer(b"far", "far", frozenset({"worker"}))
    id = house.commit()
    work = house.take(peer=far)
    assert work.folder == ""
    assert house.say(far, Fetch(lease=work.lease))[0].size == 4
    house.say(far, Chunk(lease=work.lease, output="label.vtk", offset=0), b"result")
    house.say(far, Done(lease=work.lease, outputs=(Output("label.vtk", 6, "0" * 64),)))
    assert house.state(id) == "queued"


def test_cancelling_reaches_a_worker_that_was_away_and_one_that_does_not_listen_is_given_up(house) -> None:
    id = house.commit()
    work = house.take()
    house.engine.gone(WORKER.id)
    house.ask("A", Cancel(job=id))
    house.ask("A", Cancel(job=id))
    assert any(isinstance(one, Cancel) for one in house.say(WORKER, Hello(
        versions=(1,), client="worker", role="worker", leases=(work.lease,))))  # fmt: skip
    for _ in range(11):
        house.now += 1
        assert isinstance(house.say(WORKER, Report(lease=work.lease, stage="segment"))[0], Cancel)
        house.tick(0)
    assert house.state(id) == "cancelled"


# Time


def test_results_are_kept_for_a_day_and_what_is_known_of_jobs_too(make) -> None:
    house = make(keep_s=100)
    done, failed = house.commit(), house.commit()
    house.finish(house.take())
    house.say(WORKER, Fail(lease=house.take().lease, problem=Problem("E_FORMAT", "no")))
    house.tick(99)
    assert (house.state(done), house.state(failed)) == ("done", "failed")
    house.tick(2)
    assert {house.ask("A", Status(job=id)).problem.code for id in (done, failed)} == {"E_UNKNOWN_JOB"}
    assert not list((house.folder / "spool").iterdir())
    assert not house.store.keys()


def test_every_job_ends_whatever_does_not_come(make) -> None:
    """An upload that nobody ends, a job that nobody takes, and one that runs for ever."""
    house = make(keep_s=100, job_s=50)
    upload = house.open()
    runs = house.commit()
    work = house.take()
    waits = house.commit()
    for _ in range(12):
        house.tick(5)
        house.say(WORKER, Report(lease=work.lease, stage="segment"))
    assert house.ask("A", Status(job=runs)).problem.code == "E_DEADLINE"
    house.tick(50)
    assert house.ask("A", Status(job=waits)).problem.code == "E_DEADLINE"
    house.tick(60)
    assert house.ask("A", Status(job=upload)).problem.code == "E_UNKNOWN_JOB"


def test_a_clock_that_is_put_right_between_two_starts_ends_no_job_early(make) -> None:
    house = make(keep_s=100, job_s=50)
    runs = house.commit()
    work = house.take()
    waits = house.commit()
    house.now += 1e6
    house.restart()
    house.hire(leases=(work.lease,))
    house.tick(1)
    assert (house.state(runs), house.state(waits)) == ("running", "queued")
    house.tick(101)
    assert house.ask("A", Status(job=waits)).problem.code == "E_DEADLINE"


def test_a_results_bytes_that_are_gone_are_an_error_with_a_code(house) -> None:
    id = house.commit()
    house.finish(house.take())
    [path] = (house.folder / "spool").rglob("label.vtk")
    path.write_bytes(b"res")
    fetch = Fetch(job=id, output="label.vtk", offset=3)
    assert house.ask("A", fetch).problem.code == "E_TRUNCATED"
    path.unlink()
    assert house.ask("A", fetch).problem.code == "E_TRUNCATED"


def test_watchers_hear_of_every_step_and_once_of_the_end(house) -> None:
    id = house.commit()
    told = [house.ask("A", Status(job=id, watch=True, id=9))]
    peer = Peer(b"A", "A")

    def hear(answers) -> None:
        told.extend(one.message for one in answers if one.to == peer.id and isinstance(one.message, Progress))

    house.hire()
    hear(house.engine.handle(WORKER, Take(), b"", house.now))
    [work] = house.engine._leases
    hear(house.engine.handle(WORKER, Report(lease=work, stage="segment", fraction=0.5), b"", house.now))
    hear(house.engine.handle(WORKER, Report(lease=work, stage="segment", fraction=0.505), b"", house.now))
    hear(house.engine.handle(WORKER, Fail(lease=work, problem=Problem("E_FORMAT", "no")), b"", house.now))
    hear(house.engine.tick(house.now + 1))
    assert [(one.state, one.stage, one.re) for one in told] == [
        ("queued", "", 9), ("running", "", 9), ("running", "segment", 9), ("failed", "segment", 9),
    ]  # fmt: skip


def test_a_list_of_jobs_fits_into_a_message_however_much_there_is_to_say(make) -> None:
    house = make(queue=1000)
    for _ in range(60):
        house.commit()
        problem = Problem("E_FORMAT", "\u0001" * 2000, "x" * 2000)
        house.say(WORKER, Fail(lease=house.take().lease, problem=problem))
    listed = house.ask("A", Jobs(most=100))
    assert isinstance(listed, JobList)
    assert 3 <= len(listed.jobs) < 60
    assert listed.jobs[0].created == max(job.created for job in listed.jobs)


# The disk


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of no size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40k", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only who may mount a file system can fill one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_nothing_changes_and_the_same_message_succeeds_when_there_is_room(disk) -> None:
    """The disk grows by a page after each refusal, so that every write of a job's life meets a full one."""
    pages, refused = 10, []

    def grow() -> None:
        nonlocal pages
        pages += 1
        subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", str(disk)], check=True)

    house = None
    while house is None:
        try:
            house = House(disk, Limits(disk_share=1e9))
        except OutputError:
            grow()
    scan = bytes(range(256)) * 40
    id, digest = f"00000000-0000-4000-8000-{1:012d}", (hashlib.sha256(scan).hexdigest(),)

    def insist(peer: Peer, message: Message, payload: bytes = b"") -> Message:
        while isinstance(answer := house.say(peer, message, payload)[0], Err):
            assert (answer.problem.code, answer.retryable) == ("E_OUTPUT", True)
            assert "No space left" in answer.problem.message or "full" in answer.problem.message
            refused.append(type(message).__name__)
            house.tick(0.01)
            kept = {job.key: job for job in house.store.unfinished()}
            assert house.engine._jobs == kept
            seen = Spool(disk / "spool")  # as a front door would that starts now
            for job in kept.values():
                assert seen.received(job) == house.engine.spool.received(job)
            assert seen.total_bytes == house.engine.spool.total_bytes
            grow()
        return answer

    anna = Peer(b"A", "A")
    house.say(anna, Hello(versions=(1,)))
    house.hire()
    insist(anna, Open(job=id, model="liver", parts=(Part(format="nii", size=len(scan)),)))
    for offset in range(0, len(scan), 2000):
        insist(anna, Chunk(job=id, offset=offset), scan[offset : offset + 2000])
    assert insist(anna, Commit(job=id, sha256=digest)).state == "queued"
    while not (works := [one for one in house.say(WORKER, Take()) if isinstance(one, Work)]):
        refused.append("Take")  # the worker waits
        grow()
    [work] = works
    assert (Path(work.folder) / "in0").read_bytes() == scan
    out, written = Path(work.folder) / "out", 0
    while not written:
        with suppress(OSError):  # what a worker does on a full disk is its own affair
            out.mkdir(exist_ok=True)
            written = (out / "label.vtk").write_bytes(b"result")
        grow()
    output = Output("label.vtk", 6, hashlib.sha256(b"result").hexdigest())
    insist(WORKER, Done(lease=work.lease, outputs=(output,)))
    assert isinstance(insist(anna, Fetch(job=id, output="label.vtk")), Data)
    assert house.payloads == [b"result"]
    assert isinstance(insist(anna, Ack(job=id)), Ack)
    house.close()
    assert set(refused) == {"Open", "Chunk", "Commit", "Take", "Done"}


def test_results_can_be_acknowledged_on_a_full_disk_which_makes_room(disk) -> None:
    subprocess.run(["mount", "-o", "remount,size=400k", str(disk)], check=True)
    house = House(disk, Limits(disk_share=1e9))
    id = house.commit()
    house.finish(house.take(), result=bytes(40_000))
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert isinstance(house.open(), Err)
    assert isinstance(house.ask("A", Ack(job=id)), Ack)
    assert not list((disk / "spool").iterdir())
    house.close()


def test_a_job_that_filled_the_disk_fails_and_makes_room(disk) -> None:
    subprocess.run(["mount", "-o", "remount,size=400k", str(disk)], check=True)
    house = House(disk, Limits(disk_share=1e9))
    id = house.commit()
    work = house.take()
    with (Path(work.folder) / "scan.npy").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    [answer] = house.say(WORKER, Fail(lease=work.lease, problem=Problem("E_OUTPUT", "the disk is full")))
    assert isinstance(answer, Ack)
    assert house.state(id) == "failed"
    assert not list((disk / "spool").iterdir())
    house.close()


# Thousands of jobs, dozens of clients


def everything_held(house: House) -> dict[str, int]:
    """How many things the engine and the spool remember."""
    return {
        f"{type(one).__name__}.{name}": len(value)
        for one in (house.engine, house.engine.spool)
        for name, value in vars(one).items()
        if isinstance(value, dict | list | set)
    }


def test_nothing_is_remembered_of_jobs_that_are_over(make) -> None:
    house = make(keep_s=1000)
    held = None
    for number in range(60):
        owner = "AB"[number % 2]
        done, failed, cancelled = (house.commit(owner) for _ in range(3))
        upload = house.open(owner)
        house.ask(owner, Chunk(job=upload, offset=0), b"12")
        for id in (done, failed, cancelled, upload):
            house.ask(owner, Status(job=id, watch=True))
            house.ask(owner, Open(job=id, model="liver", parts=(Part(format="nii", size=4),)))
        house.ask(owner, Cancel(job=cancelled))
        house.ask(owner, Cancel(job=upload))
        house.finish(house.take())
        house.say(WORKER, Fail(lease=house.take().lease, problem=Problem("E_FORMAT", "no")))
        house.ask(owner, Ack(job=done))
        house.ask(owner, Open(job=done, model="liver", parts=(Part(format="nii", size=4),)))
        house.tick(1)
        if number == 5:
            held = everything_held(house)
    assert everything_held(house) == held
    assert held["Engine._jobs"] == 0
    assert not any(connection.watched for connection in house.engine._connections.values())
    house.tick(2000)
    for _ in range(10):
        house.tick(1)
    assert not house.store.keys()


def test_whoever_opens_and_cancels_without_end_fills_no_disk(house, monkeypatch) -> None:
    monkeypatch.setattr("delineate.serving.engine._MOST_CANCELLED", 10)
    done, others = house.commit("A"), house.open("B")
    house.finish(house.take())
    house.ask("B", Cancel(job=others))
    for _ in range(50):
        last = house.open("A")
        house.ask("A", Cancel(job=last))
    assert len(house.store.keys()) == 10 + 2
    assert house.ask("A", Cancel(job=last)).state == house.state(last) == "cancelled"
    assert (house.state(done), house.state(others, "B")) == ("done", "cancelled")


def test_a_chunk_costs_the_same_however_many_clients_and_jobs_there_are(make) -> None:
    """50 clients, 32 jobs each of which everybody watches: the engine's own share of a chunk is far below a ms."""
    quiet, crowded = make(queue=100), make(queue=100)
    crowded_jobs = [crowded.commit() for _ in range(31)]
    for number in range(50):
        peer = Peer(f"A{number}".encode(), "A")
        crowded.say(peer, Hello(versions=(1,)))
        for id in crowded_jobs:
            crowded.say(peer, Status(job=id, watch=True))
    costs = {}
    for house in (quiet, crowded):
        id, took = house.open(size=1000), []
        peer = Peer(b"A", "A")
        for offset in range(300):
            began = time.perf_counter()
            house.engine.handle(peer, Chunk(job=id, offset=offset), b"x", house.now)
            took.append(time.perf_counter() - began)
        costs[house] = median(took)
    assert costs[crowded] < 3 * costs[quiet]
    assert costs[crowded] < 1e-3
    began = time.perf_counter()
    crowded.engine.tick(crowded.now)
    assert time.perf_counter() - began < 0.1
