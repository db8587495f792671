"""``delineate jobs``: what has become of scans that were sent."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from delineate.cli.options import Json, Overwrite
from delineate.cli.send import STAGES, as_row, places_of, print_results, shows, unknown_format
from delineate.cli.servers import Key, ServerAddress, connected, serving
from delineate.cli.terminal import Terminal, duration, print_json, print_table
from delineate.core.text import printable
from delineate.serving.formats import suffix_of

if TYPE_CHECKING:
    from delineate.serving.protocol import Progress

_ANSWER_S = 15.0


def jobs(
    cancel: Annotated[str | None, typer.Option("--cancel", help="Cancel the job of this id.")] = None,
    fetch: Annotated[
        str | None, typer.Option("--fetch", help="Wait for the job of this id, and write its results to -o.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the segmentation of --fetch to this file.")
    ] = None,
    key: Key = None,
    address: ServerAddress = "",
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Wait at most this many seconds for --fetch.")
    ] = 3600.0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """List your latest jobs on a server; fetch or cancel one."""
    if (fetch is None) != (out is None) or (fetch is not None and cancel is not None):
        raise typer.BadParameter("--fetch ID and -o OUT belong together, and not with --cancel")
    with serving():
        from delineate.serving.places import find_key

    from delineate.io.overwriting import check_outputs

    if fetch is not None and out is not None:
        if not suffix_of(out):
            raise unknown_format(out)
        used = find_key(key)
        check_outputs(places_of(out, [suffix_of(out)[1:]]), [] if used is None else [used], overwrite=overwrite)
    with Terminal() as terminal, connected(terminal, key, address, _ANSWER_S) as client:
        if fetch is not None and out is not None:
            found = client.fetch(fetch, out, on_progress=shows(terminal, "job"), overwrite=overwrite, timeout_s=timeout)
        elif cancel is not None:
            shown = [client.cancel(cancel, _ANSWER_S)]
        else:
            shown = list(client.jobs(timeout_s=_ANSWER_S))
    if fetch is not None:
        row = as_row(fetch, found)
        if json:
            print_json({"results": [row]})
        else:
            print_results([row])
            typer.echo(f"1 segmentation in {printable(str(out))}")
    elif json:
        print_json({"jobs": [_as_dict(job) for job in shown]})
    else:
        print_table("", ["job", "sent", "model", "state", ""], [_row(job) for job in shown])


def _row(job: Progress) -> list[str]:
    sent = datetime.fromtimestamp(job.created).strftime("%Y-%m-%d %H:%M:%S")
    return [job.job, sent, job.model, job.state, _where(job)]


def _where(job: Progress) -> str:
    """A few words on where a job stands."""
    left = "" if job.eta_s is None else f", {duration(job.eta_s)} left"
    if job.problem is not None:
        return f"{job.problem.code}: {job.problem.message}; {job.problem.fix}".rstrip("; ")
    if job.state == "queued":
        return f"number {job.position} in the queue{left}"
    if job.state == "running":
        return f"{STAGES.get(job.stage, job.stage)}, {100 * job.fraction:.0f} %{left}"
    if job.state == "done":
        return ", ".join(output.name.partition(".")[2] for output in job.outputs) or "fetched"
    return ""


def _as_dict(job: Progress) -> dict[str, Any]:
    import msgspec

    described: dict[str, Any] = msgspec.to_builtins(job)
    return {name: described[name] for name in described if name not in ("id", "re", "owner")}
