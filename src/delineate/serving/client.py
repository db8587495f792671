"""Send scans to a server and get their segmentations back; needs neither torch nor numpy.

>>> from delineate.serving.client import Client
>>> with Client("anna.key") as client:                                              # doctest: +SKIP
...     client.segment("scan.nii.gz", "seg.vtk", model="liver").files
[PosixPath('seg.vtk'), PosixPath('seg.nii.gz'), PosixPath('seg.json')]

Everything may be repeated: a job has an id, chosen here, and goes on where it stopped, whatever failed in between.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import socket
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from ..errors import (
    BadFormat,
    Cancelled,
    Conflict,
    DeadlinePassed,
    DelineateError,
    Denied,
    MissingFile,
    NotIntroduced,
    OutputError,
    ServingError,
    Truncated,
    UnknownModel,
    Unreachable,
    error_of,
)
from .keys import KeyFile, read_key
from .protocol import (
    CREDIT,
    MOST_PAYLOAD,
    VERSION,
    Ack,
    Cancel,
    Chunk,
    Commit,
    Credit,
    Data,
    Err,
    Fetch,
    Hello,
    JobList,
    Jobs,
    Message,
    Model,
    Open,
    Options,
    Output,
    Part,
    Ping,
    Progress,
    Status,
    Welcome,
    decode,
    encode,
)

__all__ = ["AsyncClient", "Client", "Result"]

_ANSWER_S = 5.0
"""An answer that takes longer is not coming: the connection is made anew, and the question asked again."""
_LONGEST_WAIT_S = 10.0
_REFUSALS = 5
"""Failed handshakes in a row after which nobody is let in."""
_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_SUFFIXES = {".nii.gz": "nii.gz", ".nii": "nii", ".mha": "mha", ".nrrd": "nrrd", ".zip": "dicom.zip"}
_RESULTS = (".seg.nrrd", ".nii.gz", ".vtk", ".vti", ".dcm", ".png", ".json")

ABOUT = "label.json"
"""The output that says what is known of a result."""

T = TypeVar("T")
Scan = str | os.PathLike | Mapping[str, str | os.PathLike]
"""A file, a DICOM folder or zip, or one of these for each channel."""
OnProgress = Callable[[Progress], object]


@dataclass(frozen=True)
class Result:
    """What came of a job: its files, the first being the one asked for, what it says of itself, and where time went.

    ``about`` holds volumes in ml, expected Dice with intervals, and what is unusual about the scan.
    """

    job: str
    files: list[Path]
    about: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


# What a conversation asks of the one who holds the socket.


class _Send(NamedTuple):
    message: Message
    payload: bytes = b""


class _Receive(NamedTuple):
    seconds: float


class _Rest(NamedTuple):
    seconds: float


class _Reconnect(NamedTuple):
    pass


_Step = _Send | _Receive | _Rest | _Reconnect
_Talk = Generator[_Step, tuple[Message, bytes] | None, T]
"""A conversation: it yields steps, gets what was received (None: nothing in time), and returns what came of it."""


class _Silence(Exception):
    """No answer in time."""


class _Later(Exception):
    """The server says that it may work later."""

    def __init__(self, error: DelineateError, seconds: float) -> None:
        super().__init__(str(error))
        self.error, self.seconds = error, seconds


class _Talks:
    """The conversations of a client, without a socket."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.welcome: Welcome | None = None
        self._ids = 0

    def persistently(self, talk: Callable[[], _Talk[T]], deadline: float) -> _Talk[T]:
        """A conversation, begun again until it succeeds, with growing rests, until the deadline."""
        rest = 0.1
        while True:
            try:
                if self.welcome is None:
                    yield from self._hello()
                return (yield from talk())
            except _Silence:
                last: DelineateError = Unreachable(
                    f"{self.address} does not answer",
                    fix="check the address and the key; `delineate doctor` on the server checks the rest",
                )
                self.welcome = None
                seconds = 0.0
                yield _Reconnect()
            except NotIntroduced as error:
                last, seconds = error, 0.0
                self.welcome = None
            except _Later as later:
                last, seconds = later.error, later.seconds
            seconds = max(seconds, rest * random.uniform(0.5, 1.5))
            if time.monotonic() + seconds > deadline:
                raise last
            yield _Rest(seconds)
            rest = min(2 * rest, _LONGEST_WAIT_S)

    def _hello(self) -> _Talk[None]:
        answer, _ = yield from self.ask(Hello(versions=(VERSION,), client=self.name))
        if not isinstance(answer, Welcome):
            raise ServingError(f"{self.address} answers HELLO with {type(answer).__name__.upper()}")
        self.welcome = answer

    def ask(self, message: Message, payload: bytes = b"") -> _Talk[tuple[Message, bytes]]:
        """One question, one answer."""
        id = yield from self.tell(message, payload)
        return (yield from self.hear(id))

    def tell(self, message: Message, payload: bytes = b"") -> _Talk[int]:
        """Send without waiting; the id by which answers are known."""
        self._ids += 1
        yield _Send(msgspec.structs.replace(message, id=self._ids), payload)
        return self._ids

    def hear(self, *ids: int, seconds: float = _ANSWER_S) -> _Talk[tuple[Message, bytes]]:
        """The next answer to one of some questions."""
        deadline = time.monotonic() + seconds
        while True:
            received = yield _Receive(max(0.0, deadline - time.monotonic()))
            if received is None:
                raise _Silence
            message, payload = received
            if isinstance(message, Err) and message.re in (0, *ids):
                error = error_of(message.problem.code, message.problem.message, message.problem.fix)
                if message.retryable and not isinstance(error, NotIntroduced):
                    raise _Later(error, message.retry_after)
                raise error
            if message.re in ids:
                return message, payload

    def upload(self, job: str, model: Callable[[], str], files: list[_File], options: Options) -> _Talk[Progress]:
        """Send a scan, from where an earlier attempt stopped."""
        parts = tuple(file.part for file in files)
        answer, _ = yield from self.ask(Open(job=job, model=model(), parts=parts, options=options))
        assert isinstance(answer, Credit)
        if answer.state == "receiving":
            for index, (file, start) in enumerate(zip(files, answer.received, strict=True)):
                yield from self._upload_part(job, index, file, start, answer.credit)
        digests = tuple(file.sha256 for file in files)
        progress, _ = yield from self.ask(Commit(job=job, sha256=digests))
        assert isinstance(progress, Progress)
        return progress

    def _upload_part(self, job: str, index: int, file: _File, start: int, credit: int) -> _Talk[None]:
        waiting: list[int] = []
        for offset in range(start, file.part.size, MOST_PAYLOAD):
            payload = file.read(offset, min(MOST_PAYLOAD, file.part.size - offset))
            waiting.append((yield from self.tell(Chunk(job=job, part=index, offset=offset), payload)))
            if len(waiting) >= credit:
                answer, _ = yield from self.hear(*waiting)
                waiting.remove(answer.re)
        while waiting:
            answer, _ = yield from self.hear(*waiting)
            waiting.remove(answer.re)

    def watch(self, job: str, told: OnProgress | None, deadline: float) -> _Talk[Progress]:
        """Wait until a job is over."""
        id = yield from self.tell(Status(job=job, watch=True))
        while True:
            try:
                progress, _ = yield from self.hear(id, seconds=min(_ANSWER_S, max(0.1, deadline - time.monotonic())))
            except _Silence:
                if time.monotonic() >= deadline:
                    raise DeadlinePassed(
                        f"job {job} is not done yet", fix="ask for it again by its id, or allow more time"
                    ) from None
                id = yield from self.tell(Status(job=job, watch=True))  # it may just take long: one more chance
                progress, _ = yield from self.hear(id)
            assert isinstance(progress, Progress)
            if told is not None:
                told(progress)
            if progress.state in ("done", "failed", "cancelled"):
                return progress

    def download(self, job: str, output: Output, file: IO[bytes]) -> _Talk[None]:
        """An output, into a file that may hold its beginning."""
        file.seek(0, os.SEEK_END)
        offset = file.tell()
        while offset < output.size:
            count = min(CREDIT, -(-(output.size - offset) // MOST_PAYLOAD))
            id = yield from self.tell(Fetch(job=job, output=output.name, offset=offset, count=count))
            for _ in range(count):
                data, payload = yield from self.hear(id)
                if not isinstance(data, Data) or data.offset != offset or not payload:
                    raise _Silence
                file.write(payload)
                offset += len(payload)

    def simple(self, message: Message, kind: type[T]) -> _Talk[T]:
        answer, _ = yield from self.ask(message)
        if not isinstance(answer, kind):
            raise ServingError(f"the server answers with {type(answer).__name__.upper()}")
        return answer


class _Talker:
    """What both clients do, as conversations: the one drives them by waiting, the other by awaiting."""

    def __init__(
        self, key: str | os.PathLike | KeyFile | None = None, address: str = "", *, timeout_s: float = 3600.0
    ) -> None:
        self._key = read_key(Path(key)) if isinstance(key, str | os.PathLike) else key
        self.address = address or (self._key.address if self._key else "")
        if not self.address:
            raise MissingFile("no server is named", fix="give a key file, or the address of a server on this machine")
        self.timeout_s = timeout_s
        self._refusals = 0
        name = f"{self._key.name if self._key else 'local'}@{socket.gethostname()}"
        self._talks = _Talks(name[:100], self.address)

    def _configure(self, dealer: zmq.Socket) -> None:
        dealer.linger = 0
        dealer.sndhwm = dealer.rcvhwm = 4 * CREDIT
        dealer.maxmsgsize = 2 * MOST_PAYLOAD
        dealer.heartbeat_ivl, dealer.heartbeat_timeout = 2000, 6000
        dealer.reconnect_ivl, dealer.reconnect_ivl_max = 100, 5000
        if self._key is not None:
            dealer.curve_serverkey = self._key.server_public.encode()
            dealer.curve_publickey = self._key.public.encode()
            dealer.curve_secretkey = self._key.secret.encode()
        dealer.connect(self.address)

    def _noted(self, frames: list[bytes]) -> None:
        """Take up what the socket says of its connection. Raises :class:`Denied` if the server lets nobody in."""
        event = parse_monitor_message(frames)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._refusals = 0
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise Denied(f"{self.address} does not know this key", fix="ask who runs it to add it: delineate keys add")
        elif event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
            # A server that is being stopped breaks off, too, but not again and again; after an error of the
            # protocol, libzmq does not try again by itself.
            self._refusals += 1
            if self._refusals >= _REFUSALS or event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                have = "the server may have another key than the file says" if self._key else "it may want a key"
                raise Denied(f"{self.address} refuses the connection: {have}", fix="ask who runs it for a key file")

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)

    def _asking(self, message: Message, kind: type[T], timeout_s: float | None) -> _Talk[T]:
        return self._talks.persistently(lambda: self._talks.simple(message, kind), self._deadline(timeout_s))

    def _meeting(self, timeout_s: float) -> _Talk[tuple[Model, ...]]:
        self._talks.welcome = None
        yield from self._asking(Ping(), Ping, timeout_s)
        assert self._talks.welcome is not None
        return self._talks.welcome.models

    def _model(self, wanted: str | None) -> str:
        assert self._talks.welcome is not None
        models = self._talks.welcome.models
        if wanted is None and len(models) != 1:
            names = ", ".join(model.name for model in models) or "none"
            raise UnknownModel(f"the server has {len(models)} models: {names}", fix="name one of them")
        return models[0].name if wanted is None else wanted

    def _submitting(
        self, scan: Scan, model: str | None, job: str, options: Options, deadline: float
    ) -> _Talk[Progress]:
        with _files_of(scan) as files:
            return (
                yield from self._talks.persistently(
                    lambda: self._talks.upload(job, lambda: self._model(model), files, options), deadline
                )
            )

    def _fetching(
        self, job: str, out: Path | None, told: OnProgress | None, deadline: float, overwrite: bool
    ) -> _Talk[Result]:
        """Wait for a job; fetch all outputs beside their places, and put them there once all are whole."""
        talks = self._talks
        progress = yield from talks.persistently(lambda: talks.watch(job, told, deadline), deadline)
        if progress.problem is not None:
            raise error_of(progress.problem.code, progress.problem.message, progress.problem.fix)
        if progress.state == "cancelled":
            raise Cancelled(f"job {job} was cancelled")
        places = _places(progress.outputs, out, overwrite)
        about: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix=".delineate-", dir=_existing_folder(out)) as folder:
            for output in progress.outputs:
                path = Path(folder) / output.name
                with path.open("w+b") as file:
                    yield from talks.persistently(partial(talks.download, job, output, file), deadline)
                    file.flush()
                    os.fsync(file.fileno())
                    file.seek(0)
                    if hashlib.file_digest(file, "sha256").hexdigest() != output.sha256:
                        raise Truncated(f"'{output.name}' is not what the server made", fix="ask for it again")
                if output.name == ABOUT:
                    about = json.loads(path.read_bytes())
            for name, place in places.items():
                try:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    (Path(folder) / name).replace(place)
                except OSError as error:
                    raise OutputError(
                        f"'{place}' cannot be written: {error.strerror}", fix="choose another place"
                    ) from error
        yield from talks.persistently(lambda: talks.simple(Ack(job=job), Ack), deadline)
        return Result(job, list(places.values()), about, dict(progress.seconds))

    def _segmenting(
        self,
        scan: Scan,
        out: Path | None,
        model: str | None,
        job: str,
        options: Options,
        told: OnProgress | None,
        deadline: float,
        overwrite: bool,
    ) -> _Talk[Result]:
        if out is not None and out.exists() and not overwrite:
            raise OutputError(f"'{out}' exists", fix="choose another name, or overwrite it")
        progress = yield from self._submitting(scan, model, job, options, deadline)
        if told is not None:
            told(progress)
        return (yield from self._fetching(job, out, told, deadline, overwrite))


class Client(_Talker):
    """A server's client. ``key`` is the file that ``delineate keys add`` made; ``address`` overrides the one in it.

    ``timeout_s`` is how long anything may take before :class:`~delineate.errors.Unreachable` or
    :class:`~delineate.errors.DeadlinePassed` is raised. Not for several threads at once: give each its own.
    """

    def __init__(
        self, key: str | os.PathLike | KeyFile | None = None, address: str = "", *, timeout_s: float = 3600.0
    ) -> None:
        super().__init__(key, address, timeout_s=timeout_s)
        self._context = zmq.Context()
        self._socket: zmq.Socket | None = None
        self._monitor: zmq.Socket | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        self._context.term()

    def models(self, timeout_s: float = 10.0) -> tuple[Model, ...]:
        """What the server can segment."""
        return self._run(self._meeting(timeout_s))

    def ping(self, timeout_s: float = 10.0) -> float:
        """Seconds for a message there and back, on a connection that stands."""
        self._run(self._asking(Ping(), Ping, timeout_s))
        began = time.perf_counter()
        self._run(self._asking(Ping(), Ping, timeout_s))
        return time.perf_counter() - began

    def segment(
        self,
        scan: Scan,
        out: str | os.PathLike | None = None,
        *,
        model: str | None = None,
        job: str | None = None,
        outputs: Iterable[str] = (),
        on_progress: OnProgress | None = None,
        overwrite: bool = False,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Result:
        """Send a scan, wait, and fetch its segmentation, on the scan's own grid. Not for diagnosis.

        ``out`` ends in the format wanted: .nii.gz, .vtk, .vti, .seg.nrrd, .dcm, .png or .json; ``outputs`` names more
        of them. A .vtk comes with a .nii.gz and a .json of its name. ``model`` may be left out if the server has one.
        ``options`` are those of ``delineate predict``: overlap, flips, mirrored, quantity, margin_mm, threshold.
        ``job`` goes on with the job of that id.

        Raises what is wrong with the scan, and :class:`~delineate.errors.ServingError`.
        """
        place = None if out is None else Path(out)
        chosen = _options(place, outputs, options)
        deadline = self._deadline(timeout_s)
        return self._run(
            self._segmenting(scan, place, model, job or new_job(), chosen, on_progress, deadline, overwrite)
        )

    def submit(
        self,
        scan: Scan,
        *,
        model: str | None = None,
        job: str | None = None,
        outputs: Iterable[str] = ("nii.gz",),
        timeout_s: float | None = None,
        **options: Any,
    ) -> str:
        """Send a scan without waiting for its result; the job's id. It takes what :meth:`segment` takes."""
        id, chosen = job or new_job(), _options(None, outputs, options)
        self._run(self._submitting(scan, model, id, chosen, self._deadline(timeout_s)))
        return id

    def fetch(
        self,
        job: str,
        out: str | os.PathLike | None = None,
        *,
        on_progress: OnProgress | None = None,
        overwrite: bool = False,
        timeout_s: float | None = None,
    ) -> Result:
        """Wait for a job that was submitted, and fetch its results."""
        place = None if out is None else Path(out)
        return self._run(self._fetching(job, place, on_progress, self._deadline(timeout_s), overwrite))

    def status(self, job: str, timeout_s: float = 10.0) -> Progress:
        """Where a job stands."""
        return self._run(self._asking(Status(job=job), Progress, timeout_s))

    def jobs(self, most: int = 20, timeout_s: float = 10.0) -> tuple[Progress, ...]:
        """One's own latest jobs, newest first."""
        return self._run(self._asking(Jobs(most=most), JobList, timeout_s)).jobs

    def cancel(self, job: str, timeout_s: float = 10.0) -> Progress:
        """Want no result any more."""
        return self._run(self._asking(Cancel(job=job), Progress, timeout_s))

    def _run(self, talk: _Talk[T]) -> T:
        received: tuple[Message, bytes] | None = None
        try:
            while True:
                received = self._do(talk.send(received))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            talk.close()

    def _do(self, step: _Step) -> tuple[Message, bytes] | None:
        match step:
            case _Send():
                self._connected().send_multipart(encode(*step))
            case _Receive():
                return self._receive(step.seconds)
            case _Rest():
                time.sleep(step.seconds)
            case _Reconnect():
                self._disconnect()
        return None

    def _receive(self, seconds: float) -> tuple[Message, bytes] | None:
        dealer, deadline = self._connected(), time.monotonic() + seconds
        assert self._monitor is not None
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        while ready := dict(poller.poll(max(0, int(1000 * (deadline - time.monotonic()))))):
            if dealer in ready:
                return decode(dealer.recv_multipart())
            self._noted(self._monitor.recv_multipart())
        return None

    def _connected(self) -> zmq.Socket:
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            self._monitor = self._socket.get_monitor_socket(_HANDSHAKES)
            self._configure(self._socket)
        return self._socket

    def _disconnect(self) -> None:
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)
            self._socket = self._monitor = None


class AsyncClient(_Talker):
    """:class:`Client` for asyncio: the same methods, to be awaited, one at a time."""

    def __init__(
        self, key: str | os.PathLike | KeyFile | None = None, address: str = "", *, timeout_s: float = 3600.0
    ) -> None:
        super().__init__(key, address, timeout_s=timeout_s)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._monitor: zmq.asyncio.Socket | None = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *about: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        self._context.term()

    async def models(self, timeout_s: float = 10.0) -> tuple[Model, ...]:
        """What the server can segment."""
        return await self._run(self._meeting(timeout_s))

    async def segment(
        self,
        scan: Scan,
        out: str | os.PathLike | None = None,
        *,
        model: str | None = None,
        job: str | None = None,
        outputs: Iterable[str] = (),
        on_progress: OnProgress | None = None,
        overwrite: bool = False,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Result:
        """As :meth:`Client.segment`."""
        place = None if out is None else Path(out)
        chosen = _options(place, outputs, options)
        deadline = self._deadline(timeout_s)
        return await self._run(
            self._segmenting(scan, place, model, job or new_job(), chosen, on_progress, deadline, overwrite)
        )

    async def submit(
        self,
        scan: Scan,
        *,
        model: str | None = None,
        job: str | None = None,
        outputs: Iterable[str] = ("nii.gz",),
        timeout_s: float | None = None,
        **options: Any,
    ) -> str:
        """As :meth:`Client.submit`."""
        id, chosen = job or new_job(), _options(None, outputs, options)
        await self._run(self._submitting(scan, model, id, chosen, self._deadline(timeout_s)))
        return id

    async def fetch(
        self,
        job: str,
        out: str | os.PathLike | None = None,
        *,
        on_progress: OnProgress | None = None,
        overwrite: bool = False,
        timeout_s: float | None = None,
    ) -> Result:
        """As :meth:`Client.fetch`."""
        place = None if out is None else Path(out)
        return await self._run(self._fetching(job, place, on_progress, self._deadline(timeout_s), overwrite))

    async def status(self, job: str, timeout_s: float = 10.0) -> Progress:
        """As :meth:`Client.status`."""
        return await self._run(self._asking(Status(job=job), Progress, timeout_s))

    async def jobs(self, most: int = 20, timeout_s: float = 10.0) -> tuple[Progress, ...]:
        """As :meth:`Client.jobs`."""
        return (await self._run(self._asking(Jobs(most=most), JobList, timeout_s))).jobs

    async def cancel(self, job: str, timeout_s: float = 10.0) -> Progress:
        """As :meth:`Client.cancel`."""
        return await self._run(self._asking(Cancel(job=job), Progress, timeout_s))

    async def _run(self, talk: _Talk[T]) -> T:
        received: tuple[Message, bytes] | None = None
        try:
            while True:
                received = await self._do(talk.send(received))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            talk.close()

    async def _do(self, step: _Step) -> tuple[Message, bytes] | None:
        match step:
            case _Send():
                await self._connected().send_multipart(encode(*step))
            case _Receive():
                return await self._receive(step.seconds)
            case _Rest():
                await asyncio.sleep(step.seconds)
            case _Reconnect():
                self._disconnect()
        return None

    async def _receive(self, seconds: float) -> tuple[Message, bytes] | None:
        dealer, deadline = self._connected(), time.monotonic() + seconds
        assert self._monitor is not None
        poller = zmq.asyncio.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        while ready := dict(await poller.poll(max(0, int(1000 * (deadline - time.monotonic()))))):
            if dealer in ready:
                return decode(await dealer.recv_multipart())
            self._noted(await self._monitor.recv_multipart())
        return None

    def _connected(self) -> zmq.asyncio.Socket:
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            self._monitor = self._socket.get_monitor_socket(_HANDSHAKES)
            self._configure(self._socket)
        return self._socket

    def _disconnect(self) -> None:
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)
            self._socket = self._monitor = None


def new_job() -> str:
    """An id for a job."""
    return str(uuid.uuid4())


class _File:
    """A file to send: what is said of it, its bytes, and their digest."""

    def __init__(self, file: IO[bytes], format: str, channel: str) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise Truncated(f"'{file.name}' is empty", fix="copy it again")
        self.part = Part(format=format, size=size, channel=channel)  # type: ignore[arg-type]

    def read(self, offset: int, count: int) -> bytes:
        self._file.seek(offset)
        content = self._file.read(count)
        if len(content) != count:
            raise Conflict(f"'{self._file.name}' has changed while it was sent", fix="send it again when it is whole")
        return content

    @cached_property
    def sha256(self) -> str:
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()


@contextmanager
def _files_of(scan: Scan) -> Iterator[list[_File]]:
    """The files of a scan, opened. A DICOM folder becomes a zip, without compression."""
    channels = dict(scan) if isinstance(scan, Mapping) else {"": scan}
    with ExitStack() as stack:
        files = []
        for channel, given in channels.items():
            path = Path(given)
            if path.is_dir():
                packed = stack.enter_context(tempfile.TemporaryFile())
                _pack(path, packed)
                files.append(_File(packed, "dicom.zip", channel))
                continue
            suffix = next((one for one in _SUFFIXES if path.name.lower().endswith(one)), "")
            if not suffix:
                raise BadFormat(
                    f"'{path}' cannot be sent", fix=f"give {', '.join(_SUFFIXES)}, or a folder of a DICOM series"
                )
            try:
                files.append(_File(stack.enter_context(path.open("rb")), _SUFFIXES[suffix], channel))
            except FileNotFoundError as error:
                raise MissingFile(f"'{path}' is not there", fix="check the name") from error
            except OSError as error:
                raise BadFormat(f"'{path}' cannot be read: {error.strerror}", fix="check its permissions") from error
        yield files


def _pack(folder: Path, file: IO[bytes]) -> None:
    """The files of a DICOM folder by number: their own names may hold a patient's, and nobody needs them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise MissingFile(f"'{folder}' holds no files", fix="give the folder of a DICOM series")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for number, path in enumerate(paths):
            packed.write(path, f"{number:06d}.dcm")
    file.flush()


def _options(out: Path | None, outputs: Iterable[str], options: Mapping[str, Any]) -> Options:
    """What is asked for; the format that ``out`` ends in comes first."""
    wanted = [*([_suffix(out)[1:]] if out is not None else []), *(name.removeprefix(".") for name in outputs), "json"]
    try:
        return msgspec.convert({"outputs": list(dict.fromkeys(wanted)), **options}, Options, strict=True)
    except msgspec.ValidationError as error:
        raise ServingError(f"this cannot be asked for: {error}", fix="see `delineate send --help`") from error


def _suffix(path: Path) -> str:
    suffix = next((one for one in _RESULTS if path.name.lower().endswith(one)), "")
    if not suffix:
        raise OutputError(f"'{path}' has no suffix of a result", fix=f"give one of {', '.join(_RESULTS)}")
    return suffix


def _places(outputs: Iterable[Output], out: Path | None, overwrite: bool) -> dict[str, Path]:
    """Where each output goes: ``out`` itself, and others beside it under its name. Without ``out``, nowhere.

    Outputs are called ``label`` and a suffix; nothing that a server says becomes part of another path.
    """
    if out is None:
        return {}
    asked, stem = _suffix(out), out.name[: -len(_suffix(out))]
    places = {}
    for output in outputs:
        suffix = _suffix(Path(output.name))
        places[output.name] = out if suffix == asked else out.with_name(stem + suffix)
    if not overwrite and (there := [place for place in places.values() if place.exists()]):
        raise OutputError(f"'{there[0]}' exists", fix="choose another name, or overwrite it")
    return dict(sorted(places.items(), key=lambda one: one[1] != out))


def _existing_folder(out: Path | None) -> Path | None:
    """A folder on the disk that the outputs go to, so that they only have to be renamed."""
    if out is None:
        return None
    return next(folder for folder in out.absolute().parents if folder.is_dir())
