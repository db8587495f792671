"""A worker: takes jobs from the front door, and segments them on one device.

Two threads. The one talks: it keeps the worker in touch with the front door whatever the other does, and hands jobs on
from stage to stage. The other is the main thread and computes. Decoding and exporting are done by processes of their
own, with little memory, so that the network never waits for them, and what they decode cannot do harm.

While a large job is computed, small ones that arrive are done between its tiles, for no more than half of the time.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import zmq

from delineate.compute import ComputePlan, plan_compute, torch_threads
from delineate.errors import Cancelled, DelineateError, ServingError, TooLarge, WorkerFailed
from delineate.inference.predictor import Predictor
from delineate.serving import stages
from delineate.serving.keys import KeyFile
from delineate.serving.models import bundle_of
from delineate.serving.protocol import (
    CREDIT,
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

_LOG = logging.getLogger("delineate.serving")

DECODING_BYTES = 3 * 2**30
_DECODING_S = 120.0
_PING_S = 2.0
_AGAIN_S = 5.0
_WARM = 4
"""Networks that are kept ready."""


@dataclass
class _Task:
    """A job that this worker has."""

    work: Work
    folder: Path
    began: float = field(default_factory=time.monotonic)
    stage: str = "receive"
    since: float = field(default_factory=time.monotonic)
    """When the stage began."""
    fraction: float = 0.0
    cancelled: float = 0.0
    """When it was cancelled; 0: it was not."""
    future: Future[Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    applied: stages.Applied | None = None
    outputs: tuple[Output, ...] = ()
    received: int = 0
    part: int = 0
    sent: int = 0

    def enter(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + now - self.since, 4)
        self.stage, self.since = stage, now


class Worker:
    """Takes jobs from the front door at ``address``. ``models`` is the folder of bundles; ``key`` for another machine.

    ``scratch`` holds jobs of other machines while they are done.
    """

    def __init__(
        self,
        address: str,
        name: str,
        models: Path,
        *,
        key: KeyFile | None = None,
        own_models: tuple[str, ...] = (),
        plan: ComputePlan | None = None,
        scratch: Path | None = None,
        cancel_s: float = 5.0,
    ) -> None:
        self.address, self.name, self.models, self._key, self._own = address, name, models, key, own_models
        self._plan = plan or plan_compute(device="auto", precision="auto", compile="off")
        self._scratch = Path(tempfile.mkdtemp(prefix="delineate-worker-", dir=scratch))
        self._cancel_s = cancel_s
        self._tasks: dict[str, _Task] = {}
        self._ready: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._events: deque[Callable[[], None]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._stopping = False
        self._predictors: dict[tuple[object, ...], Predictor] = {}
        self._unacknowledged: dict[str, tuple[Message, float]] = {}
        self._running: list[_Task] = []
        self._greeted = False
        self._asked: dict[Lane, int] = {}
        """The lanes in which it has asked for a job, with the ids of its questions."""
        self._ids = 0
        self._pools = {"decode": _new_pool(), "export": _new_pool()}

    # The main thread: computing

    def run(self) -> None:
        """Work until SIGTERM or :meth:`stop`; then give back what is not done."""
        if threading.current_thread() is threading.main_thread():

            def terminate(number: int, frame: FrameType | None) -> None:
                self.stop()

            signal.signal(signal.SIGTERM, terminate)
        talking = threading.Thread(target=self._talk, name="talk", daemon=True)
        talking.start()
        try:
            with torch_threads(self._plan.threads):
                while (task := self._next()) is not None:
                    self._compute(task)
        finally:
            self._stopping = True
            self._wake.send(b"x")
            talking.join(5)
            for pool in self._pools.values():
                _kill(pool)
            shutil.rmtree(self._scratch, ignore_errors=True)

    def stop(self) -> None:
        """End :meth:`run` soon."""
        self._stopping = True
        with self._changed:
            self._changed.notify_all()

    def _next(self) -> _Task | None:
        with self._changed:
            while not self._ready and not self._stopping:
                self._changed.wait(0.5)
            return None if self._stopping else self._ready.popleft()

    def _next_small(self) -> _Task | None:
        with self._changed:
            found = next((task for task in self._ready if task.work.small), None)
            if found is not None:
                self._ready.remove(found)
            return found

    def _compute(self, task: _Task) -> None:
        """Segment a job; while it is large, small ones between its tiles."""
        own, others = time.monotonic(), 0.0
        task.enter("segment")
        self._running.append(task)

        def on_tile(done: int, total: int) -> None:
            nonlocal others
            task.fraction = done / max(total, 1)
            if task.cancelled or self._stopping:
                raise Cancelled("the job was cancelled")
            while not task.work.small and (time.monotonic() - own) >= 2 * others:
                small = self._next_small()
                if small is None:
                    return
                began = time.monotonic()
                self._compute(small)
                others += time.monotonic() - began

        try:
            about, seconds = stages.segment(task.folder, self._predictor(task.work), on_tile)
            task.about = {"model": {"name": task.work.model.name, "sha256": task.work.model.sha256}, **about}
            task.seconds |= {name: round(value, 4) for name, value in seconds.items()}
            self._post(lambda: self._segmented(task))
        except DelineateError as caught:
            error = caught
            self._post(lambda: self._failed(task, error))
        except Exception as caught:
            _LOG.exception("job %s failed", task.work.lease)
            failure = WorkerFailed(f"the worker failed: {type(caught).__name__}", fix="see the server's log")
            self._post(lambda: self._failed(task, failure))
        finally:
            self._running.remove(task)

    def _predictor(self, work: Work) -> Predictor:
        """The predictor of a bundle with a job's settings; the last few are kept."""
        options = work.options
        known = (work.model.sha256, options.overlap, options.flips, options.mirrored)
        found = self._predictors.pop(known, None)
        if found is None:
            bundle = bundle_of(self.models, work.model.sha256)
            found = Predictor(
                [bundle], self._plan, overlap=options.overlap, flips=options.flips, mirrored=options.mirrored
            )
            while len(self._predictors) >= _WARM:
                del self._predictors[next(iter(self._predictors))]
        self._predictors[known] = found
        return found

    def warm(self, sha256: str) -> None:
        """Get a bundle's network ready before the first scan comes."""
        bundle = bundle_of(self.models, sha256)
        self._predictors.setdefault((sha256, None, None, False), Predictor([bundle], self._plan))

    # The other thread: talking

    def _post(self, event: Callable[[], None]) -> None:
        """Let the talking thread do something."""
        self._events.append(event)
        with suppress(OSError):  # it has ended
            self._wake.send(b"x")

    def _talk(self) -> None:
        context = zmq.Context()
        self._socket = self._connected(context)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        heard = pinged = 0.0
        try:
            while not self._stopping:
                if not self._greeted and time.monotonic() - pinged > _PING_S:
                    self._hello()
                    pinged = time.monotonic()
                ready = dict(poller.poll(500))
                if self._woken.fileno() in ready:
                    self._drained()
                while self._events:
                    self._events.popleft()()
                while self._socket.poll(0):
                    heard = time.monotonic()
                    self._received(*decode(self._socket.recv_multipart()))
                now = time.monotonic()
                if self._greeted and now - pinged > _PING_S:
                    pinged = now
                    self._send(Ping())
                    self._report()
                if self._greeted and heard and now - heard > 5 * _PING_S:
                    self._greeted = False  # nobody has answered for long
                self._look(now)
                self._take()
            for task in list(self._tasks.values()):
                self._send(Fail(lease=task.work.lease, released=True))
            self._socket.close(1000)
            context.term()
        except Exception:
            _LOG.exception("the worker lost its front door")
            os._exit(70)

    def _connected(self, context: zmq.Context) -> zmq.Socket:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.maxmsgsize = 2 * MOST_PAYLOAD
        dealer.heartbeat_ivl, dealer.heartbeat_timeout = 2000, 6000
        dealer.reconnect_ivl, dealer.reconnect_ivl_max = 100, 2000
        if self._key is not None:
            dealer.curve_serverkey = self._key.server_public.encode()
            dealer.curve_publickey = self._key.public.encode()
            dealer.curve_secretkey = self._key.secret.encode()
        dealer.connect(self.address)
        return dealer

    def _drained(self) -> None:
        try:
            while self._woken.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _send(self, message: Message, payload: bytes = b"") -> None:
        try:
            self._socket.send_multipart(encode(message, payload), zmq.NOBLOCK)
        except zmq.Again:  # the front door is away; what matters is sent again
            self._greeted = False

    def _hello(self) -> None:
        self._asked.clear()
        held = tuple({*self._tasks, *self._unacknowledged})
        self._send(Hello(versions=(VERSION,), client=self.name, role="worker", leases=held, models=self._own))

    def _take(self) -> None:
        """Ask for jobs: one ahead, and a small one while a large one is computed."""
        if not self._greeted or self._stopping:
            return
        ahead = [task for task in self._tasks.values() if task.stage in ("receive", "decode", "wait")]
        if "any" not in self._asked and not ahead:
            self._ask_for("any")
        busy = bool(self._running) and not self._running[0].work.small
        small = [task for task in self._tasks.values() if task.work.small and task.stage not in ("export", "send")]
        if busy and "small" not in self._asked and not small:
            self._ask_for("small")

    def _ask_for(self, lane: Lane) -> None:
        self._ids += 1
        self._asked[lane] = self._ids
        self._send(Take(lane=lane, id=self._ids))

    def _received(self, message: Message, payload: bytes) -> None:
        match message:
            case Welcome():
                self._greeted = True
                for lease, (answer, _) in list(self._unacknowledged.items()):
                    self._unacknowledged[lease] = answer, time.monotonic()
                    self._send(answer)
            case Work():
                self._asked = {lane: id for lane, id in self._asked.items() if id != message.re}
                self._begin(message)
            case Data(lease=str(lease)) if lease in self._tasks:
                self._take_in(self._tasks[lease], message, payload)
            case Credit(lease=str(lease)) if lease in self._tasks:
                self._send_on(self._tasks[lease], message.received[0])
            case Ack(lease=str(lease)):
                self._unacknowledged.pop(lease, None)
            case Cancel(lease=str(lease)):
                self._unacknowledged.pop(lease, None)
                self._cancel(lease)
            case Err():
                if message.problem.code == "E_HELLO":
                    self._greeted = False
                elif message.problem.code == "E_DENIED":
                    raise ServingError(message.problem.message)
                else:
                    _LOG.warning("the front door says: %s", message.problem.message)
            case _:
                pass

    def _begin(self, work: Work) -> None:
        local = Path(work.folder) if work.folder else self._scratch / work.lease
        task = self._tasks[work.lease] = _Task(work, local)
        if work.folder:
            self._decode(task)
            return
        local.mkdir(mode=0o700)
        self._ask(task)

    def _ask(self, task: _Task) -> None:
        """Ask for the next bytes of a job's input."""
        left = task.work.parts[task.part].size - task.received
        count = min(CREDIT, -(-left // MOST_PAYLOAD))
        self._send(Fetch(lease=task.work.lease, part=task.part, offset=task.received, count=count))

    def _take_in(self, task: _Task, message: Data, payload: bytes) -> None:
        if message.part != task.part or message.offset != task.received or task.stage != "receive":
            return
        with (task.folder / f"in{task.part}").open("ab") as file:
            file.write(payload)
        task.received += len(payload)
        if task.received >= message.size:
            task.part, task.received = task.part + 1, 0
            if task.part == len(task.work.parts):
                self._decode(task)
                return
        if task.received % (CREDIT * MOST_PAYLOAD) == 0:
            self._ask(task)

    def _decode(self, task: _Task) -> None:
        task.enter("decode")
        try:
            bundle = bundle_of(self.models, task.work.model.sha256)
        except DelineateError as error:
            self._failed(task, error)
            return
        data = bundle.recipe.data
        task.applied = stages.Applied(bundle.channels, bundle.targets, data.resample_channels, data.codings())
        arguments = (task.folder, task.work.parts, task.work.options, task.applied)
        self._submit("decode", task, self._decoded, stages.decode, *arguments)

    def _submit(self, pool: str, task: _Task, then: Callable[[_Task], None], *call: Any) -> None:
        """Let a process do something; go on with the task after it, or fail it."""

        def done(future: Future[Any]) -> None:
            self._post(lambda: self._came(pool, task, then, future))

        try:
            task.future = self._pools[pool].submit(*call)
        except BrokenProcessPool:
            _kill(self._pools[pool])
            self._pools[pool] = _new_pool()
            task.future = self._pools[pool].submit(*call)
        task.future.add_done_callback(done)

    def _came(self, pool: str, task: _Task, then: Callable[[_Task], None], future: Future[Any]) -> None:
        if task.work.lease not in self._tasks:
            return
        error = future.exception()
        if error is None:
            then(task)
        elif isinstance(error, DelineateError):
            self._failed(task, error)
        elif isinstance(error, BrokenProcessPool):
            what = "read" if pool == "decode" else "written"
            self._failed(task, TooLarge(f"the scan could not be {what} in the memory and time that it may take"))
        else:
            _LOG.error("job %s failed", task.work.lease, exc_info=error)
            self._failed(task, WorkerFailed(f"the worker failed: {type(error).__name__}", fix="see the server's log"))

    def _decoded(self, task: _Task) -> None:
        task.enter("wait")
        with self._changed:
            self._ready.append(task)
            self._changed.notify_all()

    def _segmented(self, task: _Task) -> None:
        if task.work.lease not in self._tasks:
            return
        task.enter("export")
        task.fraction = 1.0
        arguments = (task.folder, task.work.parts, task.work.options, task.applied, task.about)
        self._submit("export", task, self._exported, stages.export, *arguments)

    def _exported(self, task: _Task) -> None:
        assert task.future is not None
        task.outputs = task.future.result()
        task.enter("send")
        if task.work.folder:
            self._finish(task)
        else:
            task.part = task.sent = 0
            self._send_on(task, 0)

    def _send_on(self, task: _Task, there: int) -> None:
        """Send the next bytes of the outputs, one chunk at a time: labels are small."""
        output = task.outputs[task.part]
        if there >= output.size:
            task.part += 1
            if task.part == len(task.outputs):
                self._finish(task)
                return
            output, there = task.outputs[task.part], 0
        with (task.folder / "out" / output.name).open("rb") as file:
            file.seek(there)
            payload = file.read(MOST_PAYLOAD)
        self._send(Chunk(lease=task.work.lease, output=output.name, offset=there), payload)

    def _finish(self, task: _Task) -> None:
        task.enter("")
        self._end(task, Done(lease=task.work.lease, outputs=task.outputs, seconds=task.seconds))

    def _failed(self, task: _Task, error: DelineateError) -> None:
        if task.work.lease not in self._tasks:
            return
        if isinstance(error, Cancelled) and not task.cancelled:
            self._end(task, Fail(lease=task.work.lease, released=True))
            return
        problem = Problem(error.code, error.message[:2000], error.fix[:2000])
        self._end(task, Fail(lease=task.work.lease, problem=problem))

    def _end(self, task: _Task, answer: Message) -> None:
        """Tell the front door what came of a job, until it says that it has heard."""
        lease = task.work.lease
        self._tasks.pop(lease, None)
        if task.folder.parent == self._scratch and not isinstance(answer, Done):
            shutil.rmtree(task.folder, ignore_errors=True)
        self._unacknowledged[lease] = answer, time.monotonic()
        self._send(answer)

    def _cancel(self, lease: str) -> None:
        task = self._tasks.get(lease)
        if task is None or task.cancelled:
            return
        task.cancelled = time.monotonic()
        if task.stage == "segment":
            return  # it stops between two tiles
        with self._changed:
            if task in self._ready:
                self._ready.remove(task)
        self._failed(task, Cancelled("the job was cancelled"))

    def _report(self) -> None:
        for task in self._tasks.values():
            self._send(Report(lease=task.work.lease, stage=task.stage, fraction=task.fraction))

    def _look(self, now: float) -> None:
        """End what takes too long, and say again what nobody has acknowledged."""
        for task in list(self._tasks.values()):
            if task.stage == "segment" and task.cancelled and now - task.cancelled > self._cancel_s:
                _LOG.error("job %s does not stop: the worker ends", task.work.lease)
                os._exit(71)
            if task.stage in ("decode", "export") and now - task.since > _DECODING_S:
                _kill(self._pools[task.stage])  # its tasks fail
                self._pools[task.stage] = _new_pool()
        for lease, (answer, since) in list(self._unacknowledged.items()):
            if self._greeted and now - since > _AGAIN_S:
                self._unacknowledged[lease] = answer, now
                self._send(answer)


def _new_pool() -> ProcessPoolExecutor:
    """One process that starts when it is first needed."""
    return ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=stages.limit_memory, initargs=(DECODING_BYTES,)
    )


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
