"""What is asked over HTTP, and what is answered, errors included."""

from __future__ import annotations

import re
from math import ceil
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from delineate.errors import DelineateError, ProtocolError, TooLarge, Truncated
from delineate.serving.formats import OUTPUTS
from delineate.serving.protocol import FORMATS, Model, Options, Output, Part, Problem, Progress, State

_MOST_SIZE = 2**36

_STATUS = {
    "E_PROTOCOL": 400, "E_TRUNCATED": 400, "E_DENIED": 403, "E_UNKNOWN_JOB": 404, "E_UNKNOWN_MODEL": 404,
    "E_DEADLINE": 408, "E_CONFLICT": 409, "E_TOO_LARGE": 413, "E_BUSY": 429,
}  # fmt: skip
"""HTTP's word for our codes; whatever else the front door says is 503: its trouble, not the asker's."""

T = TypeVar("T")


class JobStatus(Struct, frozen=True, kw_only=True):
    """Where a job stands.

    ``position`` is 1 for the next in the queue, ``eta_s`` the seconds until it is done as far as they can be known,
    ``created`` seconds since 1970, ``seconds`` what each stage took, and ``problem`` why it failed.
    """

    id: str
    state: State
    model: str
    stage: str
    fraction: float
    position: int
    eta_s: float | None = None
    created: float
    outputs: tuple[Output, ...]
    seconds: dict[str, float]
    problem: Problem | None = None


class JobStatuses(Struct, frozen=True):
    """One's own latest jobs, newest first."""

    jobs: tuple[JobStatus, ...]


class Models(Struct, frozen=True):
    """The bundles on offer."""

    models: tuple[Model, ...]


class Health(Struct, frozen=True):
    """That all is well."""

    status: str


class Failure(Struct, frozen=True):
    """Why a request was refused: a stable code, what is wrong, and what to do about it."""

    error: Problem


class Wish(BaseModel):
    """What is to be done to a scan, as it is said in a query."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(None, description="Name of the model; may be left out if there is one.")
    model_sha256: str | None = Field(None, description="The only version of the model that will do.")
    input: list[str] = Field(
        min_length=1,
        max_length=16,
        description="What the body is: [CHANNEL:]FORMAT[:SIZE], once for each file in it, in order. "
        f"Formats are {', '.join(FORMATS)}.",
        examples=[["nii.gz"], ["T1:nii.gz:8123456", "FLAIR:nii.gz:7654321"]],
    )
    outputs: str = Field(
        "nii.gz,json",
        description=f"Formats of the result, separated by commas: {', '.join(OUTPUTS)}. A .json always comes along, "
        "a nii.gz with a vtk, and the report sr.dcm with a dcm.",
    )
    overlap: float | None = Field(None, description="Share by which tiles overlap, 0 to 0.9.")
    flips: str | None = Field(None, description="Axes along which the scan is flipped, too: x, xy, xyz, …")
    mirrored: bool = Field(False, description="Whether the scan is mirrored, too, with left and right exchanged.")
    quantity: str = Field("", description="Name of the map that is measured within the segmentation.")
    margin_mm: float = Field(0.0, description="Width of the margin that is left out of the measurement.")
    threshold: float | None = Field(None, description="Value of the map above which a voxel counts.")

    def options(self) -> Options:
        """As the protocol has it. Raises :class:`ProtocolError`."""
        known = self.model_dump(exclude={"model", "model_sha256", "input", "outputs"})
        outputs = [name for name in self.outputs.split(",") if name]
        return made(Options, {**known, "outputs": list(dict.fromkeys([*outputs, "json"]))})

    def parts(self, length: int | None) -> tuple[Part, ...]:
        """The files in a body of this length. Raises what is wrong with them."""
        files = [_file(text) for text in self.input]
        open_ended = [file for file in files if "size" not in file]
        said = sum(file["size"] for file in files if "size" in file)
        if len(open_ended) > 1:
            raise ProtocolError(
                "the sizes of the files in the body are not known", fix="say them: input=CHANNEL:FORMAT:SIZE"
            )
        if open_ended:
            if length is None:
                raise Refused(
                    ProtocolError(
                        "the request has no Content-Length", fix="send it, or say the size: input=CHANNEL:FORMAT:SIZE"
                    ),
                    411,
                )
            open_ended[0]["size"] = length - said
            if length <= said:
                raise Truncated(f"the body has {length:,} bytes", fix="send the scan as the request's body")
        elif length is not None and length < said:
            raise Truncated(f"the body has {length:,} bytes, and {said:,} were announced", fix="send the whole scan")
        elif length is not None and length > said:
            raise TooLarge(f"the body has {length:,} bytes, and {said:,} were announced", fix="say the right size")
        if (size := sum(file["size"] for file in files)) > _MOST_SIZE:
            raise TooLarge(f"the scan has {size:,} bytes", fix="send fewer or smaller files")
        return tuple(made(Part, file) for file in files)


class Refused(Exception):
    """A request that is not done: why, and how HTTP says so."""

    def __init__(
        self,
        error: DelineateError,
        status: int | None = None,
        *,
        retry_after: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(str(error))
        self.error, self.status = error, status or _STATUS.get(error.code, 503)
        self.headers = dict(headers or {})
        if self.status in (429, 503):
            self.headers["Retry-After"] = str(max(1, ceil(retry_after)))

    def response(self) -> Response:
        error = {"code": self.error.code, "message": self.error.message[:2000], "fix": self.error.fix[:2000]}
        return as_json({"error": error}, self.status, self.headers)


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def made(kind: type[T], fields: dict[str, Any]) -> T:
    """A message, or a part of one, of what came from outside. Raises :class:`ProtocolError`."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"this cannot be asked for: {error}", fix="see /openapi.json") from error


def _file(text: str) -> dict[str, Any]:
    """What ``[CHANNEL:]FORMAT[:SIZE]`` says of a file."""
    words = text.split(":")
    size = {}
    if len(words) > 1 and re.fullmatch(r"[0-9]{1,20}", words[-1]):
        size = {"size": int(words.pop())}
    *channel, format = words
    return {"format": format, "channel": ":".join(channel), **size}


def status_of(progress: Progress) -> JobStatus:
    known = {name: getattr(progress, name) for name in JobStatus.__struct_fields__ if name != "id"}
    return JobStatus(id=progress.job, **known)
