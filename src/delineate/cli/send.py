"""``delineate send``: scans to a server, segmentations back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from delineate.cli.options import Json, MarginMm, Overwrite
from delineate.cli.servers import Key, ServerAddress, connected, serving
from delineate.cli.terminal import Terminal, print_json, print_table
from delineate.core.text import near, printable
from delineate.errors import (
    DeadlinePassed,
    DelineateError,
    Denied,
    OutputError,
    UnknownModel,
    Unreachable,
    VersionError,
)
from delineate.serving.formats import OUTPUTS, SUFFIXES, suffix_of, written

if TYPE_CHECKING:
    from delineate.serving.client import Client, OnProgress, Result
    from delineate.serving.protocol import Progress

_SCANS = (".nii.gz", ".nii", ".mha", ".nrrd", ".zip")
_AT_ONCE = 4
"""Scans that are on the server at once: one is sent while others are computed and fetched."""
_MEETING_S = 15.0
STAGES = {
    "": "starting",
    "receive": "starting",
    "decode": "reading",
    "wait": "waiting for the device",
    "infer": "segmenting",
    "write": "writing",
    "send": "writing",
}
"""What a worker does, in a person's words."""


def send(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help=f"Write the segmentation to this file, in the format of its suffix: .{', .'.join(OUTPUTS)}. For "
            "several scans, name a folder.",
        ),
    ],
    scans: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SCAN",
            help="Scans to segment: .nii.gz, .nii, .mha or .nrrd files, and folders or zips of one DICOM series each.",
        ),
    ] = None,
    key: Key = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Use this of the server's models (default: the only one).")
    ] = None,
    address: ServerAddress = "",
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            help="Write another of these formats, too, such as vtk or stl.zip, under the same name. Can be repeated.",
        ),
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option("--channel", help="Send a file for each channel, such as T1=t1.nii.gz. Can be repeated."),
    ] = None,
    quantity: Annotated[
        str | None,
        typer.Option(
            "--quantity",
            help="Measure this channel within each target, such as fat_fraction; --channel sends its map.",
        ),
    ] = None,
    margin_mm: MarginMm = 0.0,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Measure the share of a target at or above this value of the quantity (default: 5.56 for a fat "
            "fraction).",
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option("--overlap", min=0, max=0.9, help="Overlap tiles by this fraction (default: the recipe's)."),
    ] = None,
    flips: Annotated[
        str | None,
        typer.Option(
            "--flips",
            help="Average over mirror images along these axes, such as xyz; '': none (default: the recipe's).",
        ),
    ] = None,
    mirrored: Annotated[
        bool,
        typer.Option(
            "--mirrored", help="Predict the mirror image too, if training mirrored, and report how both agree."
        ),
    ] = False,
    job: Annotated[
        str | None, typer.Option("--job", help="Resume the job of this id, or give a new one this UUID.")
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print how to fetch the results later, once the scans are sent.")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Wait at most this many seconds for each scan.")
    ] = 3600.0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Segment scans on a server, each on its own grid. Not for diagnosis.

    A .json of the same name says the volumes in ml, the expected Dice, and anything unusual about the scan. A .vtk
    comes with a .nii.gz, since it cannot hold directions, and a .dcm with a report of what was measured, .sr.dcm. If
    the connection is lost, sending resumes where it stopped.
    """
    with serving():
        from delineate.serving.places import find_key
    from delineate.io.overwriting import check_outputs

    if quantity is None and (margin_mm or threshold is not None):
        raise typer.BadParameter("--margin-mm and --threshold need a quantity; name its channel with --quantity")
    how = [f" --key {quote(str(key))}"] * (key is not None) + [f" --address {quote(address)}"] * bool(address)
    planned = _planned(scans or [], _channels(channel or []), out, [job] if job else [], "".join(how))
    formats = _formats(planned[0].out, also or [])
    used = find_key(key)
    inputs = [file for scan in planned for file in scan.files.values()] + ([] if used is None else [used])
    check_outputs([place for scan in planned for place in places_of(scan.out, formats)], inputs, overwrite=overwrite)
    asked: dict[str, Any] = {"model": model, "outputs": formats, "overlap": overlap, "flips": flips}
    asked |= {"mirrored": mirrored, "threshold": threshold, "quantity": quantity or "", "margin_mm": margin_mm}
    with Terminal() as terminal, connected(terminal, key, address, timeout) as client:
        batch = _Batch(client, terminal, asked, timeout, overwrite)
        try:
            _check_model(model, [known.name for known in client.models(_MEETING_S)])
            batch.run(planned, wait=not no_wait)
        except (Denied, Unreachable, VersionError) as error:  # it would be the same for the other scans
            if not (json and (batch.results or batch.failed)):
                raise
            batch.error = error
        finally:
            batch.say_what_stays()
    batch.print(out, as_json=json)
    if batch.failed or batch.error:
        raise typer.Exit(1)


@dataclass
class _Scan:
    """A scan: its files by channel (an empty name: all channels), where its result goes, and the id of its job."""

    name: str
    files: dict[str, Path]
    out: Path
    job: str
    how: str
    """The options by which it is sent, as typed."""
    failed: bool = False
    """Whether the server has said why there is no result."""

    @property
    def fetching(self) -> str:
        """The command that fetches its result."""
        return f"delineate jobs --fetch {self.job} -o {quote(str(self.out))}{self.how}"


class _Batch:
    """Scans on their way to a server and back, a few at once."""

    def __init__(self, client: Client, terminal: Terminal, asked: dict[str, Any], timeout_s: float, overwrite: bool):
        self._client, self._terminal, self._asked = client, terminal, asked
        self._timeout_s, self._overwrite = timeout_s, overwrite
        self._deadlines: dict[str, float] = {}
        self.sent: list[_Scan] = []
        """Scans that the server has, and whose results are not here yet."""
        self.results: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.error: DelineateError | None = None
        """What keeps all scans from being sent."""
        self._waited = False

    def run(self, scans: Sequence[_Scan], *, wait: bool) -> None:
        """Send the scans and, if wanted, fetch their results."""
        for scan in scans:
            while wait and len(self.sent) >= _AT_ONCE:
                self._fetch(self.sent[0])
            self._send(scan)
        while wait and self.sent:
            self._fetch(self.sent[0])
        self._waited = True

    def say_what_stays(self) -> None:
        """After Ctrl-C, or if the server is out of reach, say how to get what has been sent."""
        for scan in [] if self._waited else self.sent:
            self._terminal.say_failure(f"{printable(scan.name)} is on the server; fetch it later: {scan.fetching}")

    def print(self, out: Path, *, as_json: bool) -> None:
        """Print the results, or how to fetch them."""
        if as_json:
            sent = [{"scan": scan.name, "job": scan.job, "out": str(scan.out)} for scan in self.sent]
            stopped = {} if self.error is None else {"error": _as_dict(self.error)}
            print_json({"results": self.results, "sent": sent, "failed": self.failed} | stopped)
            return
        if self.sent:
            for scan in self.sent:
                typer.echo(f"{printable(scan.name)} is sent; fetch its segmentation with\n    {scan.fetching}")
            return
        print_results(self.results)
        done = "1 segmentation" if len(self.results) == 1 else f"{len(self.results)} segmentations"
        counts = [f"{done} in {printable(str(out))}"] + [f"{len(self.failed)} failed"] * bool(self.failed)
        typer.echo(", ".join(counts))

    def _send(self, scan: _Scan) -> None:
        self._terminal.progress(f"{scan.name}: sending", 0, 100)
        self._deadlines[scan.job] = time.monotonic() + self._timeout_s
        files = scan.files[""] if set(scan.files) == {""} else scan.files
        with self._noting(scan):
            shown = shows(self._terminal, scan.name)
            self._client.submit(files, job=scan.job, on_progress=shown, timeout_s=self._timeout_s, **self._asked)
            self.sent.append(scan)

    def _fetch(self, scan: _Scan) -> None:
        show = shows(self._terminal, scan.name)

        def told(progress: Progress) -> None:
            scan.failed = progress.problem is not None
            show(progress)

        with self._noting(scan):
            found = self._client.fetch(
                scan.job,
                scan.out,
                on_progress=told,
                overwrite=self._overwrite,
                timeout_s=max(1.0, self._deadlines[scan.job] - time.monotonic()),
            )
            self.results.append(as_row(scan.name, found))
            for text in found.about.get("unusual", []):
                self._terminal.say(f"{printable(scan.name)}: unlike the scans it is meant for: {printable(str(text))}")
        self.sent.remove(scan)

    @contextmanager
    def _noting(self, scan: _Scan) -> Iterator[None]:
        """Note what is wrong with one scan, and go on with the others."""
        try:
            yield
        except (Denied, Unreachable, VersionError):
            raise
        except DelineateError as error:
            self.failed.append({"scan": scan.name, "job": scan.job, **_as_dict(error)})
            self._terminal.say_failure(f"{printable(scan.name)}: {printable(str(error))}")
            # Time, or the disk, ran out here: the server has both of its own, and the same codes for them.
            if isinstance(error, DeadlinePassed | OutputError) and scan in self.sent and not scan.failed:
                self._terminal.say_failure(f"    its result stays on the server; fetch it: {scan.fetching}")


def shows(terminal: Terminal, name: str) -> OnProgress:
    """Shows where a job stands, in one line: its place in the queue or its stage, the percentage, and the ETA."""

    def show(progress: Progress) -> None:
        if progress.state == "queued":
            place = "next" if progress.position <= 1 else f"number {progress.position}"
            what = f"{name}: {place} in the queue"
        elif progress.state == "running":
            what = f"{name}: {STAGES.get(progress.stage, progress.stage)}"
        else:
            what = f"{name}: {'sending' if progress.state == 'receiving' else 'fetching'}"
        terminal.progress(what, round(100 * progress.fraction), 100, progress.eta_s)

    return show


def as_row(name: str, result: Result) -> dict[str, Any]:
    """A result as JSON."""
    files = [str(file) for file in result.files]
    return {"scan": name, "job": result.job, "files": files, "seconds": result.seconds, "about": result.about}


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """Print volumes in ml and expected Dice, by scan and target."""
    rows = []
    for result in results:
        about = result["about"]
        for target, volume_ml in about.get("volume_ml", {}).items():
            confidence = about.get("confidence", {}).get(target, {})
            numbers = [_number(volume_ml, ".2f"), _number(confidence.get("expected_dice"), ".3f")]
            rows.append([printable(result["scan"]), printable(target), *numbers, "yes" if about.get("unusual") else ""])
    if rows:
        print_table("", ["scan", "target", "volume, ml", "expected Dice", "unusual"], rows)


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else f"{value:{spec}}"


def _as_dict(error: DelineateError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "fix": error.fix}


def _channels(texts: Sequence[str]) -> dict[str, Path]:
    """Files by channel, from ``NAME=FILE``."""
    files: dict[str, Path] = {}
    for text in texts:
        name, _, file = text.partition("=")
        if not (name and file):
            raise typer.BadParameter(f"'{text}' is not NAME=FILE; write, for example, --channel T1=t1.nii.gz")
        if name in files:
            raise typer.BadParameter(f"channel '{name}' is given twice; give each once")
        files[name] = Path(file)
    return files


def _planned(scans: Sequence[Path], channels: dict[str, Path], out: Path, jobs: Sequence[str], how: str) -> list[_Scan]:
    """The scans, and where their results go: to ``out``, or into it if it is a folder."""
    from delineate.serving.client import new_job

    if len(scans) + len(channels) == 0:
        raise typer.BadParameter("there is nothing to send; name a scan, or its --channel files")
    if channels and len(scans) > 1:
        raise typer.BadParameter("--channel belongs to one scan; send the others separately")
    if jobs and len(scans) > 1:
        raise typer.BadParameter("--job belongs to one scan; send the others separately")
    groups = [{"": scan, **channels} for scan in scans] or [channels]
    folder = len(groups) > 1 or out.is_dir()
    if folder and suffix_of(out) and not out.is_dir():
        raise typer.BadParameter(f"several scans do not fit into '{out}'; name a folder with -o")
    if not folder and not suffix_of(out):
        raise unknown_format(out)
    planned: list[_Scan] = []
    for files in groups:
        first = next(iter(files.values()))
        name = stem_of(first)
        place = out / f"{name}.nii.gz" if folder else out
        if same := next((scan for scan in planned if scan.out == place), None):
            raise typer.BadParameter(f"'{same.files['']}' and '{first}' would both be written to '{place}'; rename one")
        planned.append(_Scan(name, files, place, jobs[0] if jobs else new_job(), how))
    return planned


def stem_of(scan: Path) -> str:
    """A scan's name without its suffix, or that of its folder."""
    name = scan.absolute().name
    suffix = next((one for one in _SCANS if name.lower().endswith(one)), "")
    return name if scan.is_dir() else name[: len(name) - len(suffix)]


def _formats(out: Path, also: Sequence[str]) -> list[str]:
    """The formats to ask for; that of the name first."""
    for format in also:
        if format.removeprefix(".") not in OUTPUTS:
            raise typer.BadParameter(f"'{format}' is not one of {', '.join(OUTPUTS)}{near(format, OUTPUTS)}")
    return list(dict.fromkeys([suffix_of(out)[1:], *(format.removeprefix(".") for format in also)]))


def unknown_format(out: Path) -> typer.BadParameter:
    """The complaint about a name that does not say its format."""
    return typer.BadParameter(f"'{out}' does not say in which format; end it in {', '.join(SUFFIXES)}")


def places_of(out: Path, formats: Sequence[str]) -> list[Path]:
    """The files that a job's results are written to."""
    stem = out.name[: -len(suffix_of(out))]
    return list(dict.fromkeys([out, *(out.with_name(f"{stem}.{format}") for format in written(formats))]))


def _check_model(model: str | None, names: Sequence[str]) -> None:
    """Raise :class:`UnknownModel` for what the server does not offer. It offers nothing while it reads its models."""
    if not names:
        return
    if model is None and len(names) != 1:
        raise UnknownModel(f"the server has {len(names)} models: {', '.join(names)}", fix="choose one with --model")
    if model is not None and model not in names:
        raise UnknownModel(f"the server has no model '{model}'{near(model, names)}", fix=f"it has {', '.join(names)}")
