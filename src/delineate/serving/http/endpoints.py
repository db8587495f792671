"""The endpoints, one function each."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from msgspec.structs import replace
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from delineate.errors import DelineateError, Denied, ProtocolError, ServingError, Truncated, UnknownModel
from delineate.serving.client import new_job
from delineate.serving.http.description import FILE, KINDS, SCAN, UPLOAD, answers, described
from delineate.serving.http.desk import Body, Desk
from delineate.serving.http.figures import FrontDoorFigures
from delineate.serving.http.messages import (
    Health,
    JobStatus,
    JobStatuses,
    Models,
    Refused,
    Wish,
    as_json,
    made,
    status_of,
)
from delineate.serving.protocol import (
    FINAL,
    MOST_PAYLOAD,
    Ack,
    Cancel,
    Chunk,
    Commit,
    Credit,
    Data,
    Fetch,
    Figures,
    JobList,
    Jobs,
    Open,
    Progress,
    Stats,
    Status,
    starting,
)

_COMMIT_S = 120.0
"""Time for an answer that comes when everything is on the disk."""


async def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


_BEARER = HTTPBearer(auto_error=False, description="The token in the key file that `delineate keys add NAME` makes.")


async def _owner(
    desk: Annotated[Desk, Depends(_desk)],
    shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
) -> str:
    """For whom the front door is asked: the owner of the token; on loopback without keys, nobody in particular."""
    if desk.plain:
        return ""
    owner = desk.tokens.owner(shown.credentials) if shown is not None else None
    if owner is None:
        what = "this token is not known" if shown is not None else "a token is wanted"
        fix = "send the token of your key file: Authorization: Bearer TOKEN"
        raise Refused(Denied(what, fix=fix), 401, headers={"WWW-Authenticate": "Bearer"})
    return owner


async def _job_id(
    request: Request,
    job: Annotated[str, Path(description="Id of a job: a UUID.", examples=["8f14e45f-ceea-467f-a0e6-8b3f1c2d4e5f"])],
) -> str:
    request.state.job = made(Status, {"job": job.lower()}).job  # for the log
    return request.state.job


TheDesk = Annotated[Desk, Depends(_desk)]
Owner = Annotated[str, Depends(_owner)]
JobId = Annotated[str, Depends(_job_id)]

_ROUTES = APIRouter()


@_ROUTES.get("/livez", summary="Whether the gateway runs", responses=answers(Health))
async def livez() -> Response:
    """Answers as long as the process does; needs no token."""
    return as_json(Health("alive"))


@_ROUTES.get("/readyz", summary="Whether a scan that comes now would be segmented", responses=answers(Health))
async def readyz(desk: TheDesk) -> Response:
    """503 says why not: while the server stops, without workers or without models. Needs no token."""
    known = await desk.figures()
    if known.ready:
        return as_json(Health("ready"))
    if not known.models:
        raise ServingError("no model is on offer", fix="start the server with a bundle")
    if not known.figures.get("workers"):
        raise ServingError("no worker has said hello yet", fix="wait; the server's log says how it is doing")
    raise ServingError("the server is stopping", fix="send scans to another, or wait until it runs again")


@_ROUTES.get("/metrics", summary="Figures for Prometheus", responses={401: answers(Health, 401)[401]})
async def metrics(desk: TheDesk, owner: Owner) -> Response:
    """Jobs, workers, bytes, what was refused, and the seconds that stages take, in Prometheus' text format."""
    try:
        known = await desk.figures()
    except (DelineateError, Refused):
        known = None
    registry = CollectorRegistry()
    registry.register(FrontDoorFigures(known))
    text = generate_latest(registry) + generate_latest(desk.registry)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


@_ROUTES.get("/v1/models", summary="What the server can segment", responses=answers(Models, 401))
async def models(desk: TheDesk, owner: Owner) -> Response:
    """The bundles on offer, with the channels that they want and the targets that they find."""
    known, _ = await desk.ask(Stats(), Figures)
    return as_json(Models(known.models))


@_ROUTES.post(
    "/v1/jobs",
    status_code=201,
    summary="Send a scan",
    openapi_extra=SCAN,
    responses=answers(JobStatus, *UPLOAD, status=201),
)
async def send(request: Request, desk: TheDesk, owner: Owner, wish: Annotated[Wish, Query()]) -> Response:
    """The scan is the request's body. The answer comes when all of it is on the server's disk; Location is its job.

    To be able to repeat it without a second job, choose the id yourself, and PUT.
    """
    request.state.job = new_job()
    answer = await _received(request, desk, owner, request.state.job, wish, again=False)
    answer.headers["Location"] = f"jobs/{request.state.job}"  # relative: a proxy may serve all of this under a prefix
    return answer


@_ROUTES.put(
    "/v1/jobs/{job}",
    status_code=201,
    summary="Send a scan, under an id of one's own",
    openapi_extra=SCAN,
    responses=answers(JobStatus, *UPLOAD, status=201),
)
async def put(request: Request, desk: TheDesk, owner: Owner, job: JobId, wish: Annotated[Wish, Query()]) -> Response:
    """As POST, but it may be repeated, whatever failed: the same scan under the same id is the same job."""
    answer = await _received(request, desk, owner, job, wish, again=True)
    answer.headers["Location"] = job
    return answer


async def _received(request: Request, desk: Desk, owner: str, job: str, wish: Wish, *, again: bool) -> Response:
    """Hand a body on to the front door and commit it. What came of one that breaks off is kept if it may come again."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise Refused(ProtocolError("the body is a form", fix="send the file itself, as `curl -T` does"), 415)
    length = request.headers.get("content-length")
    parts, options = wish.parts(int(length) if length is not None else None), wish.options()
    with desk.upload():
        model = wish.model if wish.model is not None else await _only_model(desk)
        fields = {"job": job, "model": model, "model_sha256": wish.model_sha256, "owner": owner}
        asked = made(Open, {**fields, "parts": parts, "options": options})
        credit, _ = await desk.ask(asked, Credit)
        try:
            digests = await _sent_on(Body(request, desk.limits.patience_s), desk, asked, credit.received)
        except Exception:
            if not again:
                with suppress(DelineateError, Refused):
                    await desk.ask(Cancel(job=job, owner=owner), Progress)
            raise
        commit = Commit(job=job, sha256=digests, owner=owner)
        progress, _ = await desk.ask(commit, Progress, seconds=_COMMIT_S)
    return as_json(status_of(progress), 201)


async def _sent_on(body: Body, desk: Desk, asked: Open, received: tuple[int, ...]) -> tuple[str, ...]:
    """Send the bytes of a body that are not there yet, chunk by chunk; the digest of each of its files."""
    digests = []
    on_its_way: asyncio.Task[tuple[Credit, bytes]] | None = None  # one chunk, while the next one comes
    try:
        for index, part in enumerate(asked.parts):
            digest = hashlib.sha256()
            for offset in range(0, part.size, MOST_PAYLOAD):
                payload = await body.read(min(MOST_PAYLOAD, part.size - offset))
                digest.update(payload)
                if on_its_way is not None:
                    received = (await on_its_way)[0].received
                if offset + len(payload) > received[index]:
                    chunk = Chunk(job=asked.job, part=index, offset=offset, owner=asked.owner)
                    on_its_way = asyncio.create_task(desk.ask(chunk, Credit, payload))
            digests.append(digest.hexdigest())
        await body.end()
        if on_its_way is not None:
            await on_its_way
    finally:
        if on_its_way is not None:
            on_its_way.cancel()
            await asyncio.gather(on_its_way, return_exceptions=True)
    return tuple(digests)


async def _only_model(desk: Desk) -> str:
    known, _ = await desk.ask(Stats(), Figures)
    names = [model.name for model in known.models]
    if not names:
        raise starting()
    if len(names) != 1:
        raise UnknownModel(f"the server has {len(names)} models: {', '.join(names)}", fix="name one: model=")
    return names[0]


@_ROUTES.get("/v1/jobs", summary="One's own latest jobs", responses=answers(JobStatuses, 400, 401))
async def jobs(
    desk: TheDesk, owner: Owner, most: Annotated[int, Query(ge=1, le=100, description="How many of them.")] = 20
) -> Response:
    """Newest first: those of one's key, however they were sent."""
    listed, _ = await desk.ask(Jobs(most=most, owner=owner), JobList)
    return as_json(JobStatuses(tuple(status_of(progress) for progress in listed.jobs)))


@_ROUTES.get("/v1/jobs/{job}", summary="Where a job stands", responses=answers(JobStatus, 400, 401, 404))
async def job(desk: TheDesk, owner: Owner, job: JobId) -> Response:
    """A job that failed says why in ``problem``; one that is done names its outputs."""
    return as_json(status_of((await desk.ask(Status(job=job, owner=owner), Progress))[0]))


@_ROUTES.delete(
    "/v1/jobs/{job}", summary="Cancel a job, or let its results go", responses=answers(JobStatus, 400, 401, 404)
)
async def delete(desk: TheDesk, owner: Owner, job: JobId) -> Response:
    """Cancels a job that is not over; a running one stops soon after. Deletes the results of one that is over."""
    progress, _ = await desk.ask(Cancel(job=job, owner=owner), Progress)
    if progress.state in FINAL:
        await desk.ask(Ack(job=job, owner=owner), Ack)
        progress, _ = await desk.ask(Status(job=job, owner=owner), Progress)
    return as_json(status_of(progress))


@_ROUTES.get(
    "/v1/jobs/{job}/outputs/{name}",
    summary="Fetch a result",
    response_class=StreamingResponse,
    responses={**answers(JobStatus, 400, 401, 404), **FILE},
)
async def output(
    request: Request,
    desk: TheDesk,
    owner: Owner,
    job: JobId,
    name: Annotated[str, Path(description="As the job's outputs have it.", examples=["label.nii.gz"])],
) -> Response:
    """A file, as it is. Its digest is among the job's outputs."""
    asked = made(Fetch, {"job": job, "output": name, "owner": owner})
    first, payload = await desk.ask(asked, Data)

    async def content() -> AsyncIterator[bytes]:
        here, offset = payload, 0
        while here:
            yield here
            offset += len(here)
            if offset >= first.size or hasattr(request.state, "head"):
                return
            _, here = await desk.ask(replace(asked, offset=offset), Data)

    headers = {"Content-Length": str(first.size), "Content-Disposition": f'attachment; filename="{name}"'}
    kind = KINDS.get(name.rpartition(".")[2], "application/octet-stream")
    return StreamingResponse(content(), headers=headers, media_type=kind)


def application(desk: Desk) -> FastAPI:
    app = FastAPI(
        title="Delineate",
        version=version("delineate"),
        description="Send a scan, get its segmentation back on its own grid. Not for diagnosis.",
        docs_url=None,  # its page would come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=desk.opened,
    )
    app.state.desk = desk
    app.include_router(_ROUTES)
    app.openapi = lambda: described(app)  # type: ignore[method-assign]
    app.add_exception_handler(Refused, _say_refused)
    app.add_exception_handler(DelineateError, _say_error)
    app.add_exception_handler(RequestValidationError, _say_invalid)
    app.add_exception_handler(HTTPException, _say_other)
    app.add_exception_handler(ClientDisconnect, _say_gone)
    app.add_exception_handler(Exception, _say_failed)
    return app


async def _say_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _say_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DelineateError)
    return Refused(error).response()


async def _say_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(one) for one in first["loc"][1:])[:80]
    return Refused(ProtocolError(f"'{place}': {first['msg']}", fix="see /openapi.json")).response()


async def _say_other(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    wrong = ProtocolError(f"there is nothing here for {request.method[:20]}: {error.detail}", fix="see /openapi.json")
    return Refused(wrong, error.status_code, headers=dict(error.headers or {})).response()


async def _say_gone(request: Request, error: Exception) -> Response:
    return Refused(Truncated("the request broke off", fix="send it again")).response()  # for the log


async def _say_failed(request: Request, error: Exception) -> Response:
    return Refused(ServingError("the gateway failed at this request", fix="see the server's log"), 500).response()
