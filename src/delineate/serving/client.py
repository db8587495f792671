"""Send scans to a server and get their segmentations back; needs neither torch nor numpy.

>>> from delineate.serving import Client
>>> with Client("anna.key") as client:                                              # doctest: +SKIP
...     client.segment("scan.nii.gz", "seg.vtk", model="liver").files
[PosixPath('seg.vtk'), PosixPath('seg.nii.gz'), PosixPath('seg.json')]

Everything may be repeated: a job has an id, chosen here, and resumes where it stopped, whatever failed in between.

What is said to a server is written once, as coroutines. :class:`AsyncClient` awaits them; for :class:`Client` they
never pause, since whatever they wait for blocks instead.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypedDict, TypeVar, Unpack

import msgspec

from ..errors import (
    Cancelled,
    Conflict,
    DeadlinePassed,
    DelineateError,
    ServingError,
    UnknownJob,
    UnknownModel,
    error_of,
)
from .calling import ANSWER_S, Caller, Later, Lost, OnWait, Silence
from .formats import OUTPUTS, written
from .keys import KeyFile
from .protocol import (
    CREDIT,
    FINAL,
    MOST_PAYLOAD,
    Ack,
    Cancel,
    Chunk,
    Commit,
    Credit,
    Data,
    Fetch,
    JobList,
    Jobs,
    Message,
    Model,
    Open,
    Options,
    Output,
    Ping,
    Progress,
    Status,
    starting,
)
from .results import ABOUT, NAMES, Arriving, Result, format_of, places, together
from .sending import Codec, Scan, Sending, SentFile

__all__ = ["AsyncClient", "Client", "Result", "Scan"]

_COMMIT_S = 60.0
"""The server writes the whole scan to its disk before it answers."""
_QUIET_S = 60.0
"""A job of which nothing is heard for longer is asked about. A lost connection is noticed much earlier."""
_FAREWELL_S = 1.0

T = TypeVar("T")
P = ParamSpec("P")
OnProgress = Callable[[Progress], object]
"""Told where a job stands: by the server, and in stages ``upload`` and ``download`` while files are on their way."""


class Wanted(TypedDict, total=False):
    """Settings of a prediction and of what is measured, as ``delineate predict`` has them."""

    overlap: float | None
    flips: str | None
    mirrored: bool
    quantity: str
    margin_mm: float
    threshold: float | None


class _Talker(Caller):
    """What is said to a server, for both clients; ``_new_turn`` makes the lock by which their callers take turns."""

    _new_turn: Callable[[], Any]

    def __init__(
        self,
        key: str | os.PathLike | KeyFile | None = None,
        address: str = "",
        *,
        timeout_s: float = 3600.0,
        codec: Codec = "auto",
        on_wait: OnWait | None = None,
    ) -> None:
        super().__init__(key, address, timeout_s=timeout_s, on_wait=on_wait)
        if codec not in ("auto", "raw", "blosc2"):
            raise ServingError(f"there is no codec '{codec}'", fix="choose auto, raw or blosc2")
        self._codec: Codec = codec
        self._turn = self._new_turn()

    # Scans

    async def _send(
        self, scan: Scan, model: str | None, job: str, options: Options, told: OnProgress | None
    ) -> Progress:
        """Send a scan, from where an earlier attempt stopped."""
        with Sending(scan) as sending:
            await self._persistently(partial(self._ask, Ping(), Ping))  # a server says what it can unpack
            await self._stepwise(sending.packing(self._chosen_codec()))
            return await self._persistently(partial(self._upload, job, model, sending.files, options, told))

    def _chosen_codec(self) -> Codec:
        """Packing takes longer than the way to a server on the same machine."""
        assert self._welcome is not None
        if self._codec == "auto" and ("blosc2" not in self._welcome.codecs or is_local(self.address)):
            return "raw"
        return self._codec

    async def _stepwise(self, steps: Iterator[None]) -> None:
        """Do something a step at a time, so that it can be stopped in between."""
        end = object()
        with closing(steps):  # type: ignore[type-var]
            while await self._work(partial(next, steps, end)) is not end:
                pass

    async def _upload(
        self, job: str, model: str | None, files: list[SentFile], options: Options, told: OnProgress | None
    ) -> Progress:
        self._check_offered(options.outputs)
        request = Open(job=job, model=self._model(model), parts=tuple(file.part for file in files), options=options)
        again = False
        while True:
            opened = _wanted_still(await self._ask(request, Credit))
            if again and (opened.state != "receiving" or any(opened.received)):
                raise Conflict(f"job {job} exists, of another content", fix="give each scan a job id of its own")
            if opened.state == "receiving":
                await self._upload_parts(job, files, opened, told)
            for file in files:
                await self._stepwise(file.hashing())
            digests = tuple(file.sha256 for file in files)
            try:
                return await self._ask(Commit(job=job, sha256=digests), Progress, _COMMIT_S)
            except Conflict:
                if again or opened.state != "receiving":
                    raise
                again = True  # an earlier attempt left other bytes, which the server has thrown away now

    async def _upload_parts(self, job: str, files: list[SentFile], opened: Credit, told: OnProgress | None) -> None:
        received, total = list(opened.received), sum(file.part.size for file in files)
        if len(received) != len(files):
            raise ServingError(f"{self.address} has {len(received)} parts of {len(files)}", fix="update the server")
        most = max(1, min(opened.credit, CREDIT))

        def tell_progress() -> None:
            if told is not None:
                told(Progress(job=job, state="receiving", stage="upload", fraction=min(1.0, sum(received) / total)))

        tell_progress()
        for part, file in enumerate(files):
            offset, waiting = received[part], set[int]()
            while offset < file.part.size or waiting:
                if offset < file.part.size and len(waiting) < most:
                    count = min(self._chunk, file.part.size - offset)
                    payload = await self._work(partial(file.read, offset, count))
                    waiting.add(self._tell(Chunk(job=job, part=part, offset=offset), payload))
                    offset += count
                else:
                    answer, _ = await self._hear(*waiting)
                    waiting.discard(answer.re)
                    credit = _wanted_still(self._checked(answer, Credit))
                    received[part] = max(received[part], credit.received[part])
                    tell_progress()

    def _check_offered(self, outputs: Iterable[str]) -> None:
        """Raise :class:`ServingError` for a format that an older server does not know."""
        assert self._welcome is not None
        if unknown := [format for format in outputs if format not in self._welcome.outputs]:
            raise ServingError(
                f"the server writes no .{unknown[0]}", fix=f"it writes {', '.join(self._welcome.outputs)}; or update it"
            )

    def _model(self, wanted: str | None) -> str:
        assert self._welcome is not None
        models = self._welcome.models
        if wanted is None and not models:
            self._welcome = None  # the next one may name them
            raise Later(starting(), 1.0)
        if wanted is None and len(models) != 1:
            names = ", ".join(model.name for model in models)
            raise UnknownModel(f"the server has {len(models)} models: {names}", fix="name one of them")
        return models[0].name if wanted is None else wanted

    # Results

    async def _fetch(self, job: str, out: Path | None, told: OnProgress | None, overwrite: bool) -> Result:
        """Wait for a job, and fetch its outputs; without ``out``, only what is known of the result."""
        if out is not None:
            places(out, (), overwrite=overwrite)
        progress = await self._persistently(partial(self._watch, job, told))
        began = time.monotonic()
        outputs = {output.name: output for output in progress.outputs if output.name in NAMES}
        if not outputs:
            raise UnknownJob(f"the results of job {job} have been fetched already", fix="send the scan again")
        files: list[Path] = []
        if out is None:
            about = await self._download_about(job, outputs, told)
        else:
            if f"label.{(asked := format_of(out))}" not in outputs:
                raise UnknownJob(
                    f"job {job} has no .{asked}, but {', '.join(outputs)}", fix="choose one of these suffixes"
                )
            formats = [name.removeprefix("label.") for name in outputs]
            placed = places(out, formats, overwrite=overwrite)
            about = await self._download(job, outputs, placed, told)
            files = list(placed.values())
        if out is not None or set(outputs) == {ABOUT}:
            # The results are here. If the server does not hear of it, it keeps its copy for a while.
            with self._within(min(self._left(), ANSWER_S)), suppress(DelineateError):
                await self._persistently(partial(self._ask, Ack(job=job), Ack))
        return Result(job, files, about, progress.seconds | {"download": round(time.monotonic() - began, 4)})

    async def _watch(self, job: str, told: OnProgress | None) -> Progress:
        """Wait until a job is done. Raises why it has failed, and :class:`Cancelled`."""
        while True:
            id, heard = self._tell(Status(job=job, watch=True)), False
            try:
                while True:
                    answer, _ = await self._hear(id, seconds=_QUIET_S if heard else ANSWER_S)
                    progress, heard = self._checked(answer, Progress), True
                    if told is not None:
                        told(progress)
                    if progress.problem is not None:
                        raise error_of(progress.problem.code, progress.problem.message, progress.problem.fix)
                    if progress.state == "cancelled":
                        raise Cancelled(f"job {job} was cancelled")
                    if progress.state in FINAL:
                        return progress
            except Silence as silence:
                if isinstance(silence, Lost) or not heard:
                    raise
                if not self._left():
                    raise DeadlinePassed(
                        f"job {job} is not done yet", fix="fetch it later by its id, or allow more time"
                    ) from None

    async def _download(
        self, job: str, outputs: dict[str, Output], placed: dict[str, Path], told: OnProgress | None
    ) -> dict[str, Any]:
        """Outputs to their places, which they reach together; what is known of the result."""
        about: dict[str, Any] = {}
        total, before = sum(outputs[name].size for name in placed), 0
        with together(placed) as files:
            for name, path in files.items():
                with path.open("w+b") as file:
                    arriving = Arriving(outputs[name], file)
                    tell = _share(told, job, before, total)
                    await self._persistently(partial(self._download_one, job, arriving, tell))
                    await self._work(arriving.finish)
                    await self._work(partial(os.fsync, file.fileno()))
                    if name == ABOUT:
                        file.seek(0)
                        about = _parsed(file.read())
                before += outputs[name].size
        return about

    async def _download_about(self, job: str, outputs: dict[str, Output], told: OnProgress | None) -> dict[str, Any]:
        if ABOUT not in outputs:
            return {}
        file = io.BytesIO()
        arriving = Arriving(outputs[ABOUT], file)
        tell = _share(told, job, 0, outputs[ABOUT].size)
        await self._persistently(partial(self._download_one, job, arriving, tell))
        arriving.finish()
        return _parsed(file.getvalue())

    async def _download_one(self, job: str, arriving: Arriving, tell: Callable[[int], None]) -> None:
        """The rest of an output."""
        output = arriving.output
        while (left := output.size - arriving.size) > 0:
            count = min(CREDIT, -(-left // MOST_PAYLOAD))
            id = self._tell(Fetch(job=job, output=output.name, offset=arriving.size, count=count))
            for _ in range(count):
                answer, payload = await self._hear(id)
                data = self._checked(answer, Data)
                if data.offset != arriving.size or not 0 < len(payload) <= output.size - arriving.size:
                    raise Silence  # something is missing in between
                await self._work(partial(arriving.take, payload))
                tell(arriving.size)

    async def _segment(
        self,
        scan: Scan,
        out: str | os.PathLike | None,
        model: str | None,
        job: str | None,
        outputs: Iterable[str],
        told: OnProgress | None,
        overwrite: bool,
        timeout_s: float | None,
        wanted: Wanted,
    ) -> Result:
        place, id = None if out is None else Path(out), job or new_job()
        options = _options(place, outputs, wanted)
        if place is not None:
            places(place, written(options.outputs), overwrite=overwrite)
        with self._within(timeout_s):
            began = time.monotonic()
            try:
                await self._send(scan, model, id, options, told)
                upload_s = round(time.monotonic() - began, 4)
                result = await self._fetch(id, place, told, overwrite)
            except DelineateError:
                raise
            except (Exception, KeyboardInterrupt, asyncio.CancelledError):
                if job is None and self._welcome is not None:  # nobody else knows its id
                    with self._within(_FAREWELL_S), suppress(DelineateError, Silence, Later):
                        await self._ask(Cancel(job=id), Progress)
                raise
            return replace(result, seconds={"upload": upload_s} | result.seconds)

    async def _submit(
        self,
        scan: Scan,
        model: str | None,
        job: str | None,
        outputs: Iterable[str],
        told: OnProgress | None,
        timeout_s: float | None,
        wanted: Wanted,
    ) -> str:
        id, options = job or new_job(), _options(None, outputs, wanted)
        with self._within(timeout_s):
            await self._send(scan, model, id, options, told)
        return id

    async def _collect(
        self, job: str, out: str | os.PathLike | None, told: OnProgress | None, overwrite: bool, timeout_s: float | None
    ) -> Result:
        with self._within(timeout_s):
            return await self._fetch(job, None if out is None else Path(out), told, overwrite)

    # Small things

    async def _once(self, message: Message, kind: type[T], timeout_s: float) -> T:
        with self._within(timeout_s):
            return await self._persistently(partial(self._ask, message, kind))

    async def _meet(self, timeout_s: float) -> tuple[Model, ...]:
        self._welcome = None
        await self._once(Ping(), Ping, timeout_s)
        assert self._welcome is not None
        return self._welcome.models

    async def _there_and_back(self, timeout_s: float) -> float:
        await self._once(Ping(), Ping, timeout_s)
        began = time.perf_counter()
        await self._once(Ping(), Ping, timeout_s)
        return time.perf_counter() - began

    async def _list(self, most: int, timeout_s: float) -> tuple[Progress, ...]:
        return (await self._once(Jobs(most=most), JobList, timeout_s)).jobs


class Client(_Talker):
    """A server's client. ``key`` is the file that ``delineate keys add`` made; ``address`` overrides the one in it.

    ``timeout_s`` is how long anything may take before :class:`~delineate.errors.Unreachable` or
    :class:`~delineate.errors.DeadlinePassed` is raised; until then, whatever fails is tried again, and ``on_wait`` is
    told of each failure and in how many seconds the next attempt comes. ``codec`` says how uncompressed files travel:
    ``raw``, packed with ``blosc2``, or ``auto``, which packs them for other machines if blosc2 is installed.

    Several threads may share one; it serves them one after the other. A function given as ``on_progress`` cannot use
    the client that called it; what it raises ends the call as Ctrl-C does.

    >>> client = Client(address="tcp://127.0.0.1:7420")
    >>> client.segment("scan.nii.gz", "seg.nii.gz").about["volume_ml"]             # doctest: +SKIP
    {'liver': 1512.3}
    >>> client.close()
    """

    _new_turn = staticmethod(threading.RLock)
    _busy = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()

    def models(self, timeout_s: float = 10.0) -> tuple[Model, ...]:
        """What the server can segment.

        >>> [model.name for model in client.models()]                              # doctest: +SKIP
        ['liver', 'prostate']
        """
        return self._run(self._meet(timeout_s))

    def ping(self, timeout_s: float = 10.0) -> float:
        """Seconds for a message there and back, over a connection that is open already."""
        return self._run(self._there_and_back(timeout_s))

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
        **options: Unpack[Wanted],
    ) -> Result:
        """Send a scan, wait, and fetch its segmentation, on the scan's own grid. Not for diagnosis.

        ``scan`` is a file, the folder or zip of a DICOM series, or one of these for each channel. ``out`` ends in the
        format wanted, such as .nii.gz, .vtk, .dcm or .stl.zip; ``outputs`` names more. All that there are is in
        ``delineate.serving.formats.OUTPUTS``. They come with a .json of the same name, a .vtk with a .nii.gz, and a
        .dcm with its report, .sr.dcm, and appear together, once all are whole. Without ``out``, no file is written; the
        result's ``about`` says what is in the .json.

        ``model`` may be left out if the server has only one. ``options`` are those of ``delineate predict``: overlap,
        flips, mirrored, quantity, margin_mm, threshold. ``job`` resumes the job of that id, or gives a new one this
        UUID; without it, Ctrl-C, or cancelling the task, cancels the job on the server, too.

        Raises what is wrong with the scan, :class:`~delineate.errors.OutputError` for files that exist, before anything
        is sent, and :class:`~delineate.errors.ServingError`.

        >>> client.segment({"T1": "t1.nii", "FLAIR": "flair.nii"}, "wmh.nii.gz")   # doctest: +SKIP
        Result(job='8f14…', files=[PosixPath('wmh.nii.gz'), PosixPath('wmh.json')], …)
        """
        return self._run(self._segment(scan, out, model, job, outputs, on_progress, overwrite, timeout_s, options))

    def submit(
        self,
        scan: Scan,
        *,
        model: str | None = None,
        job: str | None = None,
        outputs: Iterable[str] = ("nii.gz",),
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
        **options: Unpack[Wanted],
    ) -> str:
        """Send a scan without waiting for its result, and return the job's id. Takes what :meth:`segment` takes.

        >>> job = client.submit("scan.nii.gz", outputs=["vtk"])                    # doctest: +SKIP
        >>> client.fetch(job, "seg.vtk")                                           # doctest: +SKIP
        """
        return self._run(self._submit(scan, model, job, outputs, on_progress, timeout_s, options))

    def fetch(
        self,
        job: str,
        out: str | os.PathLike | None = None,
        *,
        on_progress: OnProgress | None = None,
        overwrite: bool = False,
        timeout_s: float | None = None,
    ) -> Result:
        """Wait for a job that was submitted, and fetch its results to ``out`` and beside it; the server forgets them.

        Without ``out``, the result only has ``about``, and the server keeps the files.
        """
        return self._run(self._collect(job, out, on_progress, overwrite, timeout_s))

    def status(self, job: str, timeout_s: float = 10.0) -> Progress:
        """Where a job stands.

        >>> client.status(job).position                                            # doctest: +SKIP
        3
        """
        return self._run(self._once(Status(job=job), Progress, timeout_s))

    def jobs(self, most: int = 20, timeout_s: float = 10.0) -> tuple[Progress, ...]:
        """One's own latest jobs, newest first."""
        return self._run(self._list(most, timeout_s))

    def cancel(self, job: str, timeout_s: float = 10.0) -> Progress:
        """Give up a job. If it is running, it stops within seconds."""
        return self._run(self._once(Cancel(job=job), Progress, timeout_s))

    def _run(self, talk: Coroutine[Any, Any, T]) -> T:
        with self._turn, closing(talk):
            if self._busy:
                raise ServingError(
                    "a client cannot be used by its own on_progress",
                    fix="use another client there, or raise an exception to give up",
                )
            self._busy = True
            try:
                talk.send(None)
            except StopIteration as end:
                result: T = end.value
                return result
            except BaseException:
                self._hang_up()  # answers may be on their way that nobody waits for
                raise
            finally:
                self._busy = False
        raise AssertionError("something awaits what only asyncio has")

    async def _wait(self, seconds: float) -> None:
        self._poller.poll(int(1000 * seconds) + 1)

    async def _rest(self, seconds: float) -> None:
        time.sleep(seconds)

    async def _work(self, work: Callable[[], T]) -> T:
        return work()


def _awaited(
    method: Callable[Concatenate[Client, P], T],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """A method of :class:`Client` for one whose ``_run`` is to be awaited."""

    async def awaited(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await method(self, *args, **kwargs)  # type: ignore[arg-type, misc]

    update_wrapper(awaited, method)
    return awaited


class AsyncClient(_Talker):
    """:class:`Client` for asyncio: the same methods, to be awaited. Files are read, hashed and packed in threads.

    A task that awaits one can be cancelled, and the client used again. It serves its callers one after the other; have
    several clients to send several scans at once. On Windows, it needs a ``SelectorEventLoop``.

    >>> async def segment_all(paths):
    ...     async with AsyncClient("anna.key") as client:
    ...         return [await client.segment(path, path.with_suffix(".vtk")) for path in paths]
    """

    _new_turn = staticmethod(asyncio.Lock)

    models = _awaited(Client.models)
    ping = _awaited(Client.ping)
    segment = _awaited(Client.segment)
    submit = _awaited(Client.submit)
    fetch = _awaited(Client.fetch)
    status = _awaited(Client.status)
    jobs = _awaited(Client.jobs)
    cancel = _awaited(Client.cancel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *about: object) -> None:
        self.close()

    async def _run(self, talk: Coroutine[Any, Any, T]) -> T:
        with closing(talk):
            async with self._turn:
                try:
                    return await talk
                except BaseException:
                    self._hang_up()
                    raise

    async def _wait(self, seconds: float) -> None:
        dealer, monitor = self._connected(), self._monitor
        assert monitor is not None
        loop, stirred = asyncio.get_running_loop(), asyncio.Event()
        descriptors = (int(dealer.FD), int(monitor.FD))
        for descriptor in descriptors:
            loop.add_reader(descriptor, stirred.set)
        try:
            # libzmq only signals changes: what has come before is to be asked for.
            if not (dealer.poll(0) or monitor.poll(0)):
                with suppress(TimeoutError):
                    await asyncio.wait_for(stirred.wait(), seconds)
        finally:
            for descriptor in descriptors:
                loop.remove_reader(descriptor)

    async def _rest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _work(self, work: Callable[[], T]) -> T:
        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait([working])  # a file is closed only once no thread reads it
            if not working.cancelled():
                working.exception()  # nobody asks for it any more
            raise


def new_job() -> str:
    """An id for a job."""
    return str(uuid.uuid4())


def is_local(address: str) -> bool:
    """Whether a server's address is on this machine by what it says."""
    host = address.removeprefix("tcp://").rpartition(":")[0]
    return not address.startswith("tcp://") or host in ("localhost", "[::1]") or host.startswith("127.")


def _options(out: Path | None, outputs: Iterable[str], wanted: Wanted) -> Options:
    """What is asked for; the format that ``out`` ends in comes first."""
    formats = [] if out is None else [format_of(out)]
    formats += [name.removeprefix(".") for name in outputs]
    if unknown := [name for name in formats if name not in OUTPUTS]:
        raise ServingError(f"there is no output '{unknown[0]}'", fix=f"the outputs are {', '.join(OUTPUTS)}")
    known = Wanted.__annotations__
    if unknown := [name for name in wanted if name not in known]:
        raise ServingError(f"there is no option '{unknown[0]}'", fix=f"the options are {', '.join(known)}")
    try:
        return msgspec.convert({"outputs": list(dict.fromkeys([*formats, "json"])), **wanted}, Options, strict=True)
    except msgspec.ValidationError as error:
        raise ServingError(f"this cannot be asked for: {error}", fix="see the help of Client.segment") from error


def _wanted_still(credit: Credit) -> Credit:
    """Raise :class:`Cancelled` if the job was."""
    if credit.state == "cancelled":
        raise Cancelled(f"job {credit.job} was cancelled")
    return credit


def _share(told: OnProgress | None, job: str, before: int, total: int) -> Callable[[int], None]:
    """Tells how much of all outputs is here, given how much of one is."""

    def tell(size: int) -> None:
        if told is not None:
            told(Progress(job=job, state="done", stage="download", fraction=min(1.0, (before + size) / max(1, total))))

    return tell


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        about = json.loads(content)
    except ValueError as error:
        raise ServingError(f"'{ABOUT}' is not valid JSON: {error}", fix="update the server") from error
    return about if isinstance(about, dict) else {}
