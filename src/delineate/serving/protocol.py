"""Protocol ``delineate/1``: the messages that clients, workers and the front door exchange. Pure: no socket, no file.

A message is four frames: ``DLN1``, the verb, JSON of at most 64 KiB, and a payload of at most 1 MiB, empty for most.
Unknown fields of the JSON are ignored, so that later versions may add some; everything else that is wrong raises
:class:`~delineate.errors.ProtocolError`.

A client's conversation::

    HELLO                                → WELCOME      versions, limits, models
    OPEN job, model, parts, options      → CREDIT       from which byte each part goes on, in how many chunks
    CHUNK job, part, offset  + bytes     → CREDIT
    COMMIT job, sha256 of each part      → PROGRESS     after everything is on the disk: from here on it is kept
    STATUS job, watch                    → PROGRESS …   queue position, stage, results, as they change
    FETCH job, output, offset            → DATA + bytes
    ACK job                              → ACK          the results may go
    CANCEL job                           → PROGRESS
    PING                                 → PING

A worker's::

    HELLO role=worker, leases it holds   → WELCOME
    TAKE lane                            → WORK         once there is a job
    FETCH job, part, offset              → DATA + bytes (workers of other machines; local ones read the spool)
    REPORT lease, stage, fraction                       every two seconds at least
    CHUNK lease, output, offset + bytes  → CREDIT       (workers of other machines)
    DONE lease, outputs | FAIL lease, error → ACK
                                         ← CANCEL lease

Anything may be answered by ERR: a code, what is wrong, what to do, and whether it is worth repeating.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from ..errors import Busy, ProtocolError
from .formats import OUTPUTS, OutputFormat

MAGIC = b"DLN1"
VERSION = 1
MOST_JSON = 64 * 1024
MOST_PAYLOAD = 2**20
"""Bytes of a payload: in frames of this size, CURVE costs hardly more than plain TCP."""
CREDIT = 8
"""Chunks that may be on their way at once."""
MOST_BUNDLES = 64
"""A worker names so many of those that it has."""

Format = Literal["nii.gz", "nii", "mha", "nrrd", "dicom.zip"]
"""What a part may be: one file each, and a DICOM series as a zip."""
Codec = Literal["raw", "blosc2"]
FORMATS, CODECS = get_args(Format), get_args(Codec)

# A pattern ends in \Z: before a last line break, $ matches too.
JobId = Annotated[str, Meta(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")]
"""A UUID in lower case, chosen by the client."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Text = Annotated[str, Meta(max_length=4000)]
Label = Annotated[str, Meta(max_length=200)]
Count = Annotated[int, Meta(ge=0, le=2**50)]
Index = Annotated[int, Meta(ge=0, lt=64)]
Lease = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
Seconds = Annotated[float, Meta(ge=0, le=1e11)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Durations = Annotated[dict[Label, Seconds], Meta(max_length=32)]
"""Seconds of each stage."""

State = Literal["receiving", "queued", "running", "done", "failed", "cancelled"]
FINAL: tuple[State, ...] = ("done", "failed", "cancelled")
"""What a job is when nothing more will happen to it."""
Lane = Literal["any", "small"]
Role = Literal["client", "worker", "gateway"]


class _Body(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Fields of a message. ``re`` of an answer is the ``id`` of what it answers; a gateway says for whom it asks."""

    id: Count = 0
    re: Count = 0
    owner: Label = ""


class Problem(Struct, frozen=True, omit_defaults=True):
    """An error as it travels: a stable code, what is wrong, what to do."""

    code: Annotated[str, Meta(pattern=r"^E_[A-Z_]{1,40}\Z")]
    message: Text
    fix: Text = ""


class Part(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One file of a job's input: ``size`` bytes as they are sent, of one channel, or of all if it is empty."""

    format: Format
    size: Annotated[int, Meta(ge=1, le=2**36)]
    channel: Label = ""
    codec: Codec = "raw"


class Options(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is wanted: output formats, and settings of prediction and measurement as in ``delineate predict``."""

    outputs: Annotated[tuple[OutputFormat, ...], Meta(max_length=len(OUTPUTS))] = ("nii.gz", "json")
    overlap: Annotated[float, Meta(ge=0, le=0.9)] | None = None
    flips: Annotated[str, Meta(pattern=r"^x?y?z?\Z")] | None = None
    mirrored: bool = False
    quantity: Label = ""
    margin_mm: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    threshold: Annotated[float, Meta(ge=-1e9, le=1e9)] | None = None


class Model(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A bundle that a server applies; ``sha256`` is that of its manifest."""

    name: Name
    sha256: Sha256
    channels: Annotated[tuple[Label, ...], Meta(max_length=16)]
    targets: Annotated[tuple[Label, ...], Meta(max_length=256)]
    about: Label = ""


class Output(Struct, frozen=True):
    """A file of a job's result."""

    name: Name
    size: Count
    sha256: Sha256


class Hello(_Body, frozen=True, kw_only=True):
    """The first message. A worker names itself, the leases that it still holds, and the bundles that it has.

    A gateway speaks for others; it and workers that read the spool themselves are on the server's own machine.
    """

    versions: Annotated[tuple[Count, ...], Meta(max_length=16)]
    client: Label = ""
    role: Role = "client"
    leases: Annotated[tuple[Lease, ...], Meta(max_length=64)] = ()
    models: Annotated[tuple[Sha256, ...], Meta(max_length=MOST_BUNDLES)] = ()


class Welcome(_Body, frozen=True, kw_only=True):
    version: Count
    server: Label = ""
    models: tuple[Model, ...] = ()
    credit: Annotated[int, Meta(ge=1, le=64)] = CREDIT
    most_payload: Count = MOST_PAYLOAD
    most_bytes: Count = 0
    codecs: tuple[str, ...] = CODECS
    formats: tuple[str, ...] = FORMATS
    outputs: tuple[str, ...] = OUTPUTS


class Open(_Body, frozen=True, kw_only=True):
    """Begin a job, or go on with it. ``model_sha256``, if given, is the only bundle that will do."""

    job: JobId
    model: Name
    parts: Annotated[tuple[Part, ...], Meta(min_length=1, max_length=16)]
    options: Options = Options()
    model_sha256: Sha256 | None = None


class Chunk(_Body, frozen=True, kw_only=True):
    """Bytes of a part at ``offset``; of an output instead, if a worker sends them."""

    job: JobId | None = None
    part: Index = 0
    offset: Count
    lease: Lease | None = None
    output: Name | None = None


class Credit(_Body, frozen=True, kw_only=True):
    """The bytes received of each part, and how many chunks may be on their way."""

    job: JobId | None = None
    received: Annotated[tuple[Count, ...], Meta(max_length=16)]
    credit: Annotated[int, Meta(ge=1, le=64)] = CREDIT
    state: State = "receiving"
    lease: Lease | None = None


class Commit(_Body, frozen=True, kw_only=True):
    """All parts are sent; these are their digests."""

    job: JobId
    sha256: Annotated[tuple[Sha256, ...], Meta(min_length=1, max_length=16)]


class Status(_Body, frozen=True, kw_only=True):
    """Ask for a job's progress, once or as it changes."""

    job: JobId
    watch: bool = False


class Jobs(_Body, frozen=True, kw_only=True):
    """Ask for one's own latest jobs."""

    most: Annotated[int, Meta(ge=1, le=100)] = 20


class Progress(_Body, frozen=True, kw_only=True):
    """Where a job stands. ``position`` is 1 for the next in the queue."""

    job: JobId
    state: State
    model: Label = ""
    stage: Label = ""
    fraction: Fraction = 0.0
    position: Count = 0
    eta_s: Seconds | None = None
    created: Seconds = 0.0
    outputs: Annotated[tuple[Output, ...], Meta(max_length=16)] = ()
    seconds: Durations = {}
    problem: Problem | None = None


class JobList(_Body, frozen=True, kw_only=True):
    jobs: tuple[Progress, ...] = ()


class Fetch(_Body, frozen=True, kw_only=True):
    """Ask for ``count`` chunks of an output from ``offset`` on; a worker asks for a part."""

    job: JobId | None = None
    output: Name | None = None
    offset: Count = 0
    count: Annotated[int, Meta(ge=1, le=CREDIT)] = 1
    lease: Lease | None = None
    part: Index = 0


class Data(_Body, frozen=True, kw_only=True):
    """Bytes at ``offset`` of ``size`` in all."""

    offset: Count
    size: Count
    job: JobId | None = None
    output: Name | None = None
    part: Index = 0
    lease: Lease | None = None


class Ack(_Body, frozen=True, kw_only=True):
    """The client has what it wanted; the server has noted it."""

    job: JobId | None = None
    lease: Lease | None = None


class Cancel(_Body, frozen=True, kw_only=True):
    job: JobId | None = None
    lease: Lease | None = None


class Ping(_Body, frozen=True, kw_only=True):
    pass


class Stats(_Body, frozen=True, kw_only=True):
    """A gateway asks how the server is."""


class Figures(_Body, frozen=True, kw_only=True):
    figures: dict[str, float]
    ready: bool
    models: tuple[Model, ...] = ()


class Take(_Body, frozen=True, kw_only=True):
    """A worker is free for a job; in the ``small`` lane for one that does not keep a large one waiting for long."""

    lane: Lane = "any"


class Work(_Body, frozen=True, kw_only=True):
    """A job for a worker; a ``small`` one may be done while a large one waits.

    ``folder`` is where a local worker finds the parts and writes the outputs.
    """

    lease: Lease
    model: Model
    parts: Annotated[tuple[Part, ...], Meta(max_length=16)]
    options: Options
    job: JobId
    small: bool = False
    folder: Text = ""


class Report(_Body, frozen=True, kw_only=True):
    lease: Lease
    stage: Label
    fraction: Fraction = 0.0


class Done(_Body, frozen=True, kw_only=True):
    """What a worker wrote. The digests are those of what it gave."""

    lease: Lease
    outputs: Annotated[tuple[Output, ...], Meta(max_length=16)]
    seconds: Durations = {}


class Fail(_Body, frozen=True, kw_only=True):
    """A worker could not do it. ``released``: it only stops; another may do it."""

    lease: Lease
    problem: Problem | None = None
    released: bool = False


class Err(_Body, frozen=True, kw_only=True):
    """``retryable``: the same message may succeed later, not before ``retry_after`` seconds."""

    problem: Problem
    retryable: bool = False
    retry_after: Seconds = 0.0
    job: JobId | None = None
    lease: Lease | None = None


Message = _Body

VERBS: dict[bytes, type[_Body]] = {
    kind.__name__.upper().encode(): kind
    for kind in (
        Hello, Welcome, Open, Chunk, Credit, Commit, Status, Jobs, Progress, JobList, Fetch, Data, Ack, Cancel, Ping,
        Stats, Figures, Take, Work, Report, Done, Fail, Err,
    )
}  # fmt: skip
FROM_CLIENTS = (Hello, Open, Chunk, Commit, Status, Jobs, Fetch, Ack, Cancel, Ping, Stats)
FROM_WORKERS = (Hello, Take, Fetch, Report, Chunk, Done, Fail, Ping)

_WITH_PAYLOAD = (Chunk, Data)
_NAMES = {kind: verb for verb, kind in VERBS.items()}
_ENCODER = msgspec.json.Encoder()
_DECODERS: dict[bytes, Any] = {verb: msgspec.json.Decoder(kind) for verb, kind in VERBS.items()}


def encode(message: _Body, payload: bytes | memoryview = b"") -> list[bytes | memoryview]:
    """The four frames of a message. Raises :class:`ProtocolError` for more than :func:`decode` would take."""
    body = _ENCODER.encode(message)
    _check_size(len(body), len(payload))
    return [MAGIC, _NAMES[type(message)], body, payload]


def decode(frames: list[bytes]) -> tuple[_Body, bytes]:
    """A message and its payload. Raises :class:`ProtocolError` for anything that :func:`encode` would not write."""
    if len(frames) != 4:
        raise ProtocolError(f"a message has 4 frames, not {len(frames)}")
    magic, verb, body, payload = frames
    if magic != MAGIC:
        raise ProtocolError(f"a message begins with {MAGIC!r}, not {bytes(magic[:8])!r}", fix="speak delineate/1")
    if verb not in VERBS:
        raise ProtocolError(f"there is no verb {bytes(verb[:20])!r}", fix=f"known are {b', '.join(VERBS).decode()}")
    _check_size(len(body), len(payload))
    if payload and not issubclass(VERBS[verb], _WITH_PAYLOAD):
        raise ProtocolError(f"{verb.decode()} has no payload, and this has {len(payload):,} bytes")
    try:
        return _DECODERS[verb].decode(body), payload
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"{verb.decode()} is not valid: {str(error)[:300]}", fix="see docs/serving.md") from error


def _check_size(body: int, payload: int) -> None:
    if body > MOST_JSON or payload > MOST_PAYLOAD:
        raise ProtocolError(
            f"a message has {body:,} bytes of JSON and {payload:,} of payload",
            fix=f"send at most {MOST_JSON:,} and {MOST_PAYLOAD:,}",
        )


def starting() -> Busy:
    """What is said to who sends a scan before any model is on offer."""
    return Busy("the server has just been started, and is reading its models", fix="try again in some seconds")


def to_json(value: Any) -> bytes:
    """A message, or a part of one, as JSON."""
    return _ENCODER.encode(value)
