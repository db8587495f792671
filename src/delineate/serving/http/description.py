"""What /openapi.json says of the endpoints."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from delineate.serving.http.messages import Failure, Health, JobStatus, JobStatuses, Models
from delineate.serving.protocol import Model, Output, Problem

KINDS = {
    "gz": "application/gzip", "json": "application/json", "png": "image/png", "dcm": "application/dicom",
    "zip": "application/zip", "glb": "model/gltf-binary",
}  # fmt: skip
"""Content types of outputs, by the last part of their names."""

_SAMPLE = JobStatus(
    id="8f14e45f-ceea-467f-a0e6-8b3f1c2d4e5f", state="done", model="liver", stage="", fraction=1.0, position=0,
    created=1767225600.0, outputs=(Output("label.vtk", 52429139, 64 * "0"),),
    seconds={"decode": 0.4, "infer": 11.2, "write": 0.3},
)  # fmt: skip
_SAMPLES: dict[type, Any] = {
    JobStatus: _SAMPLE,
    JobStatuses: JobStatuses((_SAMPLE,)),
    Models: Models((Model(name="liver", sha256=64 * "0", channels=("CT",), targets=("liver", "tumour")),)),
    Health: Health("ready"),
    Failure: Failure(Problem("E_BUSY", "32 jobs are waiting", "try again in 12 s")),
}
_REASONS = {
    400: "E_PROTOCOL: it cannot be asked for like this. E_TRUNCATED: the body is shorter than announced.",
    401: "E_DENIED: no token, or one that is not known.",
    403: "E_DENIED: a browser was made to send this by a page of another origin.",
    404: "E_UNKNOWN_JOB, E_UNKNOWN_MODEL: there is none of this name, or it is somebody else's.",
    408: "E_DEADLINE: the body comes too slowly.",
    409: "E_CONFLICT: a job of this id has another content.",
    411: "E_PROTOCOL: neither the query nor a Content-Length says how large the scan is.",
    413: "E_TOO_LARGE: the body is longer than announced, or than the server accepts.",
    415: "E_PROTOCOL: the body is a form and not a scan.",
    429: "E_BUSY: the queue, the spool or the disk is full. Retry-After says when to try again.",
    503: "E_UNREACHABLE, E_OUTPUT, E_SERVING: the server cannot do this now. Retry-After says when to try again.",
}


def answers(kind: type, *errors: int, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """The answers of an endpoint: one of ``kind``, and the errors besides those that any may give."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": str(kind.__doc__).split("\n")[0], **_content(kind)}
    }
    for error in sorted({403, 503, *errors}):
        found[error] = {"description": _REASONS[error], **_content(Failure)}
    return found


def _content(kind: type) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"content": {"application/json": {"schema": schema, "example": msgspec.to_builtins(_SAMPLES[kind])}}}


def described(app: FastAPI) -> dict[str, Any]:
    """The description of the gateway, with the schemas of what it answers."""
    if app.openapi_schema is None:
        described = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            servers=[{"url": "."}],  # beside the description itself, wherever a proxy serves it
        )
        _, schemas = msgspec.json.schema_components(list(_SAMPLES), ref_template="#/components/schemas/{name}")
        described["components"]["schemas"] = schemas
        for methods in described["paths"].values():
            for endpoint in methods.values():
                endpoint["responses"].pop("422", None)  # FastAPI's own, which is 400 here
        app.openapi_schema = described
    return app.openapi_schema


SCAN = {
    "requestBody": {
        "required": True,
        "description": "The scan as it is in its file; several files one after another.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
UPLOAD = (400, 401, 404, 408, 409, 411, 413, 415, 429)
FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file, with its Content-Length.",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("application/octet-stream", *sorted(KINDS.values()))
        },
    }
}
