"""A worker: takes jobs from the front door, and segments them on one device.

Two threads. The one talks: it keeps the worker in touch with the front door whatever the other does, and hands jobs on
from stage to stage. The other is the main thread and computes. Decoding and exporting are done by helpers, processes
of their own with little memory, so that the network never waits for them, and what they decode cannot do harm.

While a large job is computed, small ones that arrive are done between its tiles, for no more than half of the time.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch
import zmq
from msgspec.structs import replace

from delineate.compute import ComputePlan, plan_compute, ran_out_of_memory, torch_threads
from delineate.errors import Cancelled, DelineateError, OutputError, TooLarge, error_of
from delineate.serving import stages
from delineate.serving.calling import connect, new_socket
from delineate.serving.keys import KeyFile
from delineate.serving.models import bundle_of, changed, kept, offered
from delineate.serving.networks import Networks
from delineate.serving.protocol import (
    CREDIT,
    MOST_BUNDLES,
    MOST_PAYLOAD,
    VERSION,
    Ack,
    Cancel,
    Chunk,
    Credit,
    Data,
    Done,
    Err,
    Fail,
    Fetch,
    Hello,
    Lane,
    Message,
    Output,
    Ping,
    Problem,
    Report,
    Take,
    Welcome,
    Work,
    decode,
    encode,
)
from delineate.serving.stages import problem_of

_LOG = logging.getLogger("delineate.serving")

HELPER_BYTES = 3 * 2**30
"""Memory that decoding, and exporting, may take."""
_HELPER_S = 120.0
_PING_S = 2.0
_AGAIN_S = 5.0
_LONGEST_AGAIN_S = 60.0
_AHEAD_S = 10.0
"""Before a job has less than this to go, the next is not fetched: another worker may be free for it sooner."""
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


@dataclass(eq=False)
class _Task:
    """A job that this worker has. ``others_s``: how long it has waited for small jobs between its tiles."""

    work: Work
    folder: Path
    stage: str = "receive"
    since: float = field(default_factory=time.monotonic)
    """When the stage began."""
    fraction: float = 0.0
    others_s: float = 0.0
    cancelled: float = 0.0
    """When it was cancelled; 0: it was not."""
    applied: stages.Applied | None = None
    about: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[Output, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    index: int = 0
    """The part that is being fetched, or the output that is being sent."""
    here: int = 0
    """Its bytes that have come, or gone."""
    wanted: int = 0
    """Up to which byte it has been asked for."""
    question: int = 0
    first: int = 0
    """The first question of the output that is being sent."""
    moved: float = 0.0
    """When it last went on."""
    patience_s: float = field(default_factory=lambda: _AGAIN_S)
    """What has not gone on for so long is asked for, or sent, again: after an ever longer time, on a narrow link."""

    @property
    def lease(self) -> str:
        return self.work.lease

    @property
    def remote(self) -> bool:
        """Whether its files lie on another machine."""
        return not self.work.folder

    def enter(self, stage: str) -> None:
        """Go on to another stage. The seconds of ``infer`` are counted by those who do it."""
        now = time.monotonic()
        if self.stage != "infer":
            self.count("write" if self.stage == "send" else self.stage, now - self.since)
        self.stage, self.since = stage, now

    def count(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 4)

    def remaining_s(self) -> float:
        """Seconds until its tiles are done, as far as known."""
        done = max(self.fraction, 1e-6)
        return (time.monotonic() - self.since - self.others_s) * (1 - done) / done


class Worker:
    """Takes jobs from the front door at ``address``. ``models`` is the folder of bundles.

    Of a server on another machine, with a ``key``, it does only jobs for its own bundles; the folder ``scratch`` holds
    them meanwhile, and nothing else.

    With ``permits``, it takes so many jobs; :meth:`permit` allows one more. ``on_end`` is called after each job, by the
    thread that talks.
    """

    def __init__(
        self,
        address: str,
        name: str,
        models: Path,
        *,
        key: KeyFile | None = None,
        plan: ComputePlan | None = None,
        scratch: Path | None = None,
        cancel_s: float = 5.0,
        permits: int | None = None,
        on_welcome: Callable[[], object] = lambda: None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.address, self.name, self.models, self._key = address, name, models, key
        self._plan = plan or plan_compute(device="auto", precision="auto", compile="off")
        self._scratch = scratch
        self._cancel_s, self._on_welcome, self._on_end = cancel_s, on_welcome, on_end
        self._stopping = False
        # The main thread's
        self._networks = Networks(models, self._plan)
        self._offer = -1
        # The talking thread's
        self._tasks: dict[str, _Task] = {}
        self._applied: dict[str, stages.Applied] = {}
        self._unacknowledged: dict[str, tuple[Message, float]] = {}
        self._greeted = False
        self._permits: float = inf if permits is None else permits
        """So many jobs more it may take."""
        self._asked: dict[Lane, int] = {}
        """The lanes in which it has asked for a job, with the ids of its questions."""
        self._ids = 0
        # Both threads'
        self._ready: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._running: list[_Task] = []
        self._own: tuple[str, ...] = ()
        self._events: deque[Callable[[], object]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)

    # The main thread: computing

    def run(self) -> None:
        """Work until SIGTERM or :meth:`stop`; then give back what is not done."""
        if threading.current_thread() is threading.main_thread():

            def terminate(number: int, frame: FrameType | None) -> None:
                self.stop()

            signal.signal(signal.SIGTERM, terminate)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        while not self._stopping and not changed(self.models):
            time.sleep(0.1)
        self._refresh()
        talking = threading.Thread(target=self._talk, name="talk", daemon=True)
        talking.start()
        try:
            with torch_threads(self._plan.threads):
                while not self._stopping:
                    if (task := self._next()) is not None:
                        self._compute(task)
                    self._refresh()
        finally:
            self.stop()
            talking.join()
            self._wake.close()
            self._woken.close()

    def stop(self) -> None:
        """End :meth:`run` soon."""
        self._stopping = True
        with suppress(OSError):
            self._wake.send(b"x")

    def permit(self) -> None:
        """Take one more job."""
        self._post(lambda: self._count_permits(1))

    def withdraw(self) -> Future[bool]:
        """Take one job less, after all. The future says whether that was possible, or all permits are used."""
        possible: Future[bool] = Future()
        self._post(lambda: possible.set_result(self._count_permits(-1)))
        return possible

    def _count_permits(self, more: int) -> bool:
        possible = self._permits + more >= 0
        self._permits += more if possible else 0
        return possible

    def _next(self) -> _Task | None:
        with self._changed:
            if not self._ready:
                self._changed.wait(0.5)
            return self._ready.popleft() if self._ready else None

    def _next_small(self) -> _Task | None:
        with self._changed:
            found = next((task for task in self._ready if task.work.small), None)
            if found is not None:
                self._ready.remove(found)
            return found

    def _compute(self, task: _Task) -> None:
        """Segment a job; while it is large, small ones between its tiles."""
        task.enter("infer")
        self._running.append(task)
        self._post(lambda: self._report(task))

        def on_tile(done: int, total: int) -> None:
            task.fraction = done / max(total, 1)
            if task.cancelled or self._stopping:
                raise Cancelled("the job was cancelled")
            while not task.work.small and time.monotonic() - task.since >= 2 * task.others_s:
                small = self._next_small()
                if small is None:
                    return
                began = time.monotonic()
                self._compute(small)
                task.others_s += time.monotonic() - began

        try:
            predictor = self._networks.predictor(task.work.model.sha256, task.work.options)
            about, seconds = stages.segment(task.folder, predictor, on_tile)
        except DelineateError as caught:
            failure = caught
        except Exception as caught:
            failure = self._failure(task, caught)
        else:
            task.about = {"model": {"name": task.work.model.name, "sha256": task.work.model.sha256}, **about}
            seconds["infer"] -= task.others_s
            for stage, spent in [*seconds.items(), ("wait", task.others_s)]:
                task.count(stage, spent)
            self._post(lambda: self._segmented(task))
            return
        finally:
            self._running.remove(task)
        self._post(lambda: self._failed(task, failure))

    def _failure(self, task: _Task, error: Exception) -> DelineateError:
        """What an error that is not one of ours means for a job, and for the worker."""
        if ran_out_of_memory(error):
            error.__traceback__ = None  # its frames hold what had been allocated
            if self._plan.device.type == "cuda":
                torch.cuda.empty_cache()
            return TooLarge("the scan needs more memory than the server has", fix="send a smaller part of it")
        failure = stages.unexpected(error)
        _LOG.error("job %s: %s", task.work.job, failure.message)
        if self._plan.device.type != "cpu":
            _LOG.error("the worker ends, since its device may be unusable now")
            self.stop()
        return failure

    def _refresh(self) -> None:
        """Get the networks of a changed offer ready before the first scan comes."""
        now = changed(self.models)
        if now == self._offer or self._stopping:
            return
        newest = {model.sha256: None for model in offered(self.models).values()}
        # Jobs that were accepted for a bundle that was replaced are done with that bundle.
        self._offer, self._own = now, tuple(newest | dict.fromkeys(kept(self.models)))[:MOST_BUNDLES]
        self._networks.warm_up(tuple(newest))
        if self._key is not None:
            self._post(self._introduce)

    # The other thread: talking

    def _post(self, event: Callable[[], object]) -> None:
        """Let the talking thread do something."""
        self._events.append(event)
        with suppress(OSError):  # it will look anyway, or has ended
            self._wake.send(b"x")

    def _talk(self) -> None:
        try:
            self._context = zmq.Context()
            self._socket = new_socket(self._context, self.address, self._key)
            self._monitor = self._socket.get_monitor_socket(_REFUSED)
            connect(self._socket, self.address)
            self._helpers = {"decode": _Helper(), "write": _Helper()}
            self._introduced = self._heard = self._pinged = self._warned = 0.0
            while not self._stopping:
                self._wait()
                self._happened()
                self._keep_in_touch(time.monotonic())
                self._take()
            self._happened()
            self._leave()
        except Exception as error:
            _LOG.error("%s", error if isinstance(error, DelineateError) else stages.unexpected(error).message)
            os._exit(70)

    def _leave(self) -> None:
        """Give back all jobs and say no more."""
        for task in self._tasks.values():
            self._send(Fail(lease=task.lease, released=True))
        for helper in self._helpers.values():
            helper.close()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(1000)
        self._context.term()

    def _wait(self) -> None:
        """Wait until something has happened, for half a second at most."""
        poller = zmq.Poller()
        for one in (self._socket, self._monitor, self._woken, *(h.answers for h in self._helpers.values())):
            poller.register(one, zmq.POLLIN)
        poller.poll(500)
        with suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass

    def _happened(self) -> None:
        """Do what other threads, helpers and the front door want."""
        while self._events:
            self._events.popleft()()
        for helper in self._helpers.values():
            if (came := helper.came()) is not None:
                self._came(*came)
        while self._monitor.poll(0):
            self._monitor.recv_multipart()
            self._warn(f"{self.address} refuses the connection: it may not know this key")
        while self._socket.poll(0):
            self._heard = time.monotonic()
            self._received(*decode(self._socket.recv_multipart()))

    def _keep_in_touch(self, now: float) -> None:
        if not self._greeted and now - self._introduced > _PING_S:
            self._introduce()
        if self._greeted and now - self._pinged > _PING_S:
            self._pinged = now
            self._send(Ping())
            for task in self._tasks.values():
                self._report(task)
        if self._greeted and now - self._heard > 5 * _PING_S:
            self._greeted = False  # nobody has answered for long
        for helper in self._helpers.values():
            helper.look(now)
        for task in list(self._tasks.values()):
            if task.stage == "infer" and task.cancelled and now - task.cancelled > self._cancel_s:
                _LOG.error("job %s does not stop: the worker ends", task.work.job)
                self._leave()
                os._exit(71)
            if task.stage in ("receive", "send") and now - task.moved > task.patience_s:  # lost, or slow
                task.patience_s = min(2 * task.patience_s, _LONGEST_AGAIN_S)
                self._fetch(task) if task.stage == "receive" else self._send_on(task)
        for lease, (answer, since) in list(self._unacknowledged.items()):
            if self._greeted and now - since > _AGAIN_S:
                self._unacknowledged[lease] = answer, now
                self._send(answer)

    def _send(self, message: Message, payload: bytes = b"") -> int:
        """Send a message; its id. What matters is sent again if the front door does not answer."""
        self._ids += 1
        try:
            self._socket.send_multipart(encode(replace(message, id=self._ids), payload), zmq.NOBLOCK)
        except zmq.Again:  # the front door is away
            self._greeted = False
        return self._ids

    def _introduce(self) -> None:
        self._introduced, self._greeted = time.monotonic(), False
        self._asked.clear()
        held, models = tuple({*self._tasks, *self._unacknowledged}), () if self._key is None else self._own
        self._send(Hello(versions=(VERSION,), client=self.name, role="worker", leases=held, models=models))

    def _take(self) -> None:
        """Ask for jobs: one ahead, but a small one only while a large one is computed for long."""
        if not self._greeted or self._stopping:
            return
        large = next((task for task in self._running[:1] if not task.work.small), None)
        ahead = [task for task in self._tasks.values() if task.stage in ("receive", "decode", "wait")]
        if self._permits <= len(self._asked):
            return
        if "any" not in self._asked and not ahead and (large is None or large.remaining_s() < _AHEAD_S):
            self._asked["any"] = self._send(Take(lane="any"))
        if "small" not in self._asked and large is not None and not any(task.work.small for task in ahead):
            self._asked["small"] = self._send(Take(lane="small"))

    def _received(self, message: Message, payload: bytes) -> None:
        match message:
            case Welcome():
                self._greeted = True
                self._on_welcome()
                for lease, (answer, _) in list(self._unacknowledged.items()):
                    self._unacknowledged[lease] = answer, time.monotonic()
                    self._send(answer)
            case Work():
                self._asked = {lane: id for lane, id in self._asked.items() if id != message.re}
                if self._count_permits(-1):
                    self._begin(message)
                else:  # what has been asked for cannot be unasked
                    self._say_until_heard(Fail(lease=message.lease, released=True))
            case Data(lease=str(lease)) if lease in self._tasks:
                self._take_in(self._tasks[lease], message, payload)
            case Credit(lease=str(lease)) if lease in self._tasks:
                self._arrived(self._tasks[lease], message)
            case Ack(lease=str(lease)):
                self._unacknowledged.pop(lease, None)
            case Cancel(lease=str(lease)):
                self._unacknowledged.pop(lease, None)
                self._cancel(lease)
            case Err(problem=Problem(code="E_HELLO")):
                self._introduce()
            case Err():
                self._refused(message)
            case _:
                pass

    def _refused(self, message: Err) -> None:
        """The front door could not do what was asked; what may succeed later is asked again in a while."""
        problem, lease, task = message.problem, message.lease or "", self._tasks.get(message.lease or "")
        self._warn(f"the front door says {problem.code}: {problem.message}")
        if message.retryable:
            return
        if lease in self._unacknowledged:
            if isinstance(self._unacknowledged.pop(lease)[0], Done):
                self._say_until_heard(Fail(lease=lease, problem=problem))
        elif task is not None and task.stage in ("receive", "send") and message.re == task.question:
            if task.stage == "send" and problem.code == "E_CONFLICT":
                self._send_output(task)
            else:
                self._failed(task, error_of(problem.code, problem.message, problem.fix))

    def _warn(self, text: str) -> None:
        """Log what would be said again and again, once a minute."""
        if time.monotonic() - self._warned > 60:
            self._warned = time.monotonic()
            _LOG.warning("%s", text)

    # A job, from stage to stage

    def _begin(self, work: Work) -> None:
        assert work.folder or self._scratch is not None
        folder = Path(work.folder) if self._scratch is None else self._scratch / work.lease
        task = self._tasks[work.lease] = _Task(work, folder)
        if not task.remote:
            self._decode(task)
            return
        with self._writing(task):
            folder.mkdir(mode=0o700, parents=True)
            self._fetch(task)

    def _fetch(self, task: _Task) -> None:
        """Ask for the next bytes of a job's input."""
        left = task.work.parts[task.index].size - task.here
        count = max(1, min(CREDIT, -(-left // MOST_PAYLOAD)))
        task.wanted, task.moved = task.here + count * MOST_PAYLOAD, time.monotonic()
        task.question = self._send(Fetch(lease=task.lease, part=task.index, offset=task.here, count=count))

    def _take_in(self, task: _Task, message: Data, payload: bytes) -> None:
        if task.stage != "receive" or (message.part, message.offset) != (task.index, task.here):
            return  # sent twice
        with self._writing(task):
            with (task.folder / f"in{task.index}").open("ab") as file:
                file.write(payload)
            task.here, task.moved = task.here + len(payload), time.monotonic()
            if task.here >= task.work.parts[task.index].size:
                task.index, task.here = task.index + 1, 0
                if task.index == len(task.work.parts):
                    self._decode(task)
                else:
                    self._fetch(task)
            elif task.here >= task.wanted:
                self._fetch(task)

    def _writing(self, task: _Task) -> _Writing:
        return _Writing(lambda error: self._failed(task, error))

    def _decode(self, task: _Task) -> None:
        task.enter("decode")
        try:
            task.applied = self._applied_of(task.work.model.sha256)
        except DelineateError as error:
            self._failed(task, error)
            return
        self._report(task)
        self._helpers["decode"].submit(
            task, self._decoded, stages.decode, task.folder, task.work.parts, task.work.options, task.applied
        )

    def _applied_of(self, sha256: str) -> stages.Applied:
        if sha256 not in self._applied:
            bundle = bundle_of(self.models, sha256)
            data = bundle.recipe.data
            self._applied[sha256] = stages.Applied(bundle.channels, bundle.targets, data.resample_channels, data.legend)
        return self._applied[sha256]

    def _came(self, task: _Task, then: _Then, answer: stages.Answer) -> None:
        """A helper has done something for a task."""
        if task.lease not in self._tasks:
            return
        if (problem := answer.problem) is None:
            then(task, answer.outputs)
            return
        if problem.code == "E_WORKER":
            _LOG.error("job %s: %s", task.work.job, problem.message)
        self._failed(task, error_of(problem.code, problem.message, problem.fix))

    def _decoded(self, task: _Task, _: tuple[Output, ...]) -> None:
        task.enter("wait")
        with self._changed:
            self._ready.append(task)
            self._changed.notify_all()

    def _segmented(self, task: _Task) -> None:
        if task.lease not in self._tasks:
            return
        task.enter("write")
        task.fraction = 1.0
        self._report(task)
        self._helpers["write"].submit(
            task,
            self._exported,
            stages.export,
            task.folder,
            task.work.parts,
            task.work.options,
            task.applied,
            task.about,
        )

    def _exported(self, task: _Task, outputs: tuple[Output, ...]) -> None:
        task.outputs = outputs
        if not task.remote:
            self._finish(task)
            return
        task.enter("send")
        task.index = 0
        self._send_output(task)

    def _send_output(self, task: _Task) -> None:
        """Send an output from its beginning."""
        task.here, task.first = 0, self._ids + 1
        self._send_on(task)

    def _arrived(self, task: _Task, credit: Credit) -> None:
        """The front door has more of an output. On a narrow link, it may say so after the same was sent again."""
        if task.stage != "send" or credit.re < task.first or credit.received[0] <= task.here:
            return  # of an output before, or said twice
        task.here = credit.received[0]
        if task.here < task.outputs[task.index].size:
            self._send_on(task)
            return
        task.index += 1
        if task.index < len(task.outputs):
            self._send_output(task)
        else:
            self._finish(task)

    def _send_on(self, task: _Task) -> None:
        """Send the next bytes of an output, one chunk at a time: labels are small."""
        output, task.moved = task.outputs[task.index], time.monotonic()
        with (task.folder / "out" / output.name).open("rb") as file:
            file.seek(task.here)
            payload = file.read(MOST_PAYLOAD)
        task.question = self._send(Chunk(lease=task.lease, output=output.name, offset=task.here), payload)

    def _finish(self, task: _Task) -> None:
        task.enter("")
        self._end(task, Done(lease=task.lease, outputs=task.outputs, seconds=task.seconds))

    def _failed(self, task: _Task, error: DelineateError) -> None:
        if task.lease not in self._tasks:
            return
        if isinstance(error, Cancelled) and not task.cancelled:  # the worker stops
            self._end(task, Fail(lease=task.lease, released=True))
        else:
            self._end(task, Fail(lease=task.lease, problem=problem_of(error)))

    def _end(self, task: _Task, answer: Done | Fail) -> None:
        del self._tasks[task.lease]
        if task.remote or isinstance(answer, Fail):  # a full disk has room then to write down that it failed
            shutil.rmtree(task.folder, ignore_errors=True)
        self._say_until_heard(answer)
        self._on_end()

    def _say_until_heard(self, answer: Done | Fail) -> None:
        self._unacknowledged[answer.lease] = answer, time.monotonic()
        self._send(answer)

    def _cancel(self, lease: str) -> None:
        task = self._tasks.get(lease)
        if task is None or task.cancelled:
            return
        task.cancelled = time.monotonic()
        if task.stage == "infer":
            return  # it stops between two tiles
        with self._changed:
            if task in self._ready:
                self._ready.remove(task)
        for helper in self._helpers.values():
            helper.forget(task)
        self._failed(task, Cancelled("the job was cancelled"))

    def _report(self, task: _Task) -> None:
        if task.lease in self._tasks:
            self._send(Report(lease=task.lease, stage=task.stage, fraction=task.fraction))


_Then = Callable[[_Task, tuple[Output, ...]], None]


class _Helper:
    """A process of little memory that does one stage after another; a new one, once it has ended or was ended."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[_Task, _Then, tuple[Any, ...]]] = deque()
        self._current: tuple[_Task, _Then] | None = None
        self._since = 0.0
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self.answers, theirs = context.Pipe()
        self._process = context.Process(target=stages.help_with_stages, args=(theirs, HELPER_BYTES), daemon=True)
        # Each thread of a numerical library would take memory that counts, and there is little to compute.
        before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        os.environ.update(dict.fromkeys(before, "1"))
        self._process.start()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        theirs.close()

    def submit(self, task: _Task, then: _Then, *call: Any) -> None:
        """Do a stage of a task; :meth:`came` says when it is done, and ``then`` is what comes next."""
        self._waiting.append((task, then, call))
        self._go_on()

    def came(self) -> tuple[_Task, _Then, stages.Answer] | None:
        """The task whose stage is done, what comes next, and the answer."""
        answer: stages.Answer | None = None
        try:
            if not self.answers.poll():
                return None
            answer = msgspec.json.decode(self.answers.recv_bytes(2**20), type=stages.Answer)
        except (EOFError, OSError, msgspec.MsgspecError):
            self._end()
            self._start()
        current, self._current = self._current, None
        self._go_on()
        if current is None:
            return None
        what = "could not be processed in the memory and time that it may take"
        lost = stages.Answer(problem=problem_of(TooLarge(f"the scan {what}", fix="send a smaller part of it")))
        return *current, answer or lost

    def look(self, now: float) -> None:
        """End what takes too long."""
        if self._current is not None and now - self._since > _HELPER_S:
            self._process.kill()  # it will be noticed

    def forget(self, task: _Task) -> None:
        """Nobody wants a task's result any more."""
        self._waiting = deque(one for one in self._waiting if one[0] is not task)
        if self._current is not None and self._current[0] is task:
            self._process.kill()

    def close(self) -> None:
        """End the process."""
        self._end()

    def _end(self) -> None:
        self.answers.close()
        self._process.kill()
        self._process.join()
        self._process.close()

    def _go_on(self) -> None:
        if self._current is None and self._waiting:
            task, then, call = self._waiting.popleft()
            self._current, self._since = (task, then), time.monotonic()
            with suppress(OSError):  # it has ended, which will be noticed
                self.answers.send(call)


class _Writing:
    """Fails a task where its files cannot be written."""

    def __init__(self, failed: Callable[[DelineateError], None]) -> None:
        self._failed = failed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, OSError):
            return False
        self._failed(OutputError(f"the worker's disk cannot be written: {error.strerror}", fix="try again later"))
        return True
