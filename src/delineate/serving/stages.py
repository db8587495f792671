"""What is done to a job: decoded and exported by processes of little memory, segmented in between.

Stages leave files to each other, so that a queue holds paths and not arrays::

    FOLDER/in0, …                     what was sent
    FOLDER/decoded/0/part0.nii.gz, …  the same, by names that say their format
    FOLDER/decoded/scan.npy           voxels (C, Z, Y, X)
    FOLDER/decoded/affine.npy
    FOLDER/decoded/quantity.npy       the map (Z, Y, X) of a quantity, if one is measured
    FOLDER/decoded/label.npy          voxels (X, Y, Z)
    FOLDER/decoded/stl.zip/liver.stl  surfaces, before they are packed
    FOLDER/out/label.…                results
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import resource
import signal
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.core.legend import Legend
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import check_shows_something, load_map, load_scan
from delineate.errors import BadFormat, DelineateError, MissingFile, OutputError, TooLarge, Truncated, WorkerFailed
from delineate.io.exports import check_label_format, export_label, sidecar_of
from delineate.io.files import Limits
from delineate.io.formats import is_series
from delineate.io.surfaces import WRITERS, check_surface_format, surface_files, write_surfaces
from delineate.metrics.quantities import QuantityMap, quantity_map
from delineate.serving.formats import written
from delineate.serving.processes import end_with_parent
from delineate.serving.protocol import Options, Output, Part, Problem

if TYPE_CHECKING:
    from delineate.inference.predictor import Predictor

NOTICE = "Not for diagnosis."


@dataclass(frozen=True)
class Applied:
    """What stages have to know of a bundle: its channels and targets, and how its scans are read."""

    channels: tuple[str, ...]
    targets: Targets
    resample: bool = False
    legend: Legend = field(default_factory=Legend)


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a helper says of a stage: what it wrote, or what is wrong."""

    outputs: tuple[Output, ...] = ()
    problem: Problem | None = None


# The processes that decode and export


def help_with_stages(calls: Connection, memory_bytes: int) -> None:
    """Do one stage after another, with no more memory than this, saying nothing, until the parent ends.

    What a helper decodes came from outside: libraries warn by quoting it, and it may hold a patient's name. Answers
    are JSON and not pickled, so that a helper that was taken over could not take over its parent.
    """

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            calls.send_bytes(msgspec.json.encode(answered(*calls.recv())))
        except (EOFError, OSError):  # the parent has gone
            return


def answered(stage: Callable[..., tuple[Output, ...] | None], folder: Path, *arguments: Any) -> Answer:
    """What a stage wrote, or why it could not: without the server's paths, nor any text of a library's error."""
    try:
        return Answer(stage(folder, *arguments) or ())
    except DelineateError as caught:
        error = caught
    except MemoryError:
        error = TooLarge("the scan needs more memory than one may take", fix="send a smaller part of it")
    except Exception as caught:
        error = unexpected(caught)
    ours = re.compile(rf"{re.escape(str(folder / 'decoded'))}/(\d+/)?")
    return Answer(problem=problem_of(type(error)(ours.sub("", error.message), ours.sub("", error.fix))))


def problem_of(error: DelineateError) -> Problem:
    """An error as it travels."""
    return Problem(error.code, error.message[:2000], error.fix[:2000])


def unexpected(error: Exception) -> WorkerFailed:
    """An error of the program itself, with where it happened, but not its text: that may quote the scan."""
    places = [f"{Path(at.filename).name}:{at.lineno}" for at in traceback.extract_tb(error.__traceback__)]
    return WorkerFailed(
        f"the worker failed: {type(error).__name__} at {' '.join(places[-6:])}",
        fix="report this to whoever runs the server",
    )


# The stages


def quantity_of(options: Options) -> QuantityMap | None:
    """The quantity that a job measures."""
    return quantity_map(options.quantity or None, options.margin_mm, options.threshold, None)


def decode(folder: Path, parts: tuple[Part, ...], options: Options, bundle: Applied) -> None:
    """Read the scan, and the map of the quantity, from the parts of a job. Raises what is wrong with them."""
    with _writing():
        (folder / "decoded").mkdir(mode=0o700)
    for index, part in enumerate(parts):
        _unpack(folder / f"in{index}", _named(folder, index, part), part)
    quantity = quantity_of(options)
    subject = _subject(folder, parts, bundle, quantity)
    _check_outputs(options, bundle, _source(subject))
    scan = load_scan(subject, bundle.channels)
    check_shows_something("the scan", scan)
    _save(folder / "decoded" / "scan.npy", scan.voxels.transpose(0, 3, 2, 1))
    _save(folder / "decoded" / "affine.npy", scan.grid.affine)
    if quantity is not None:
        values = load_map(subject, quantity.channel, "the scan", scan.grid)
        quantity.check(values, "the scan")
        _save(folder / "decoded" / "quantity.npy", values.T)


def segment(
    folder: Path, predictor: Predictor, on_tile: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Segment a decoded scan; what the prediction says of itself, and the seconds of each stage."""
    from delineate.inference.review import review

    began = time.perf_counter()
    scan = _scan(folder, mapped=False)
    odd = predictor.oddities(scan)
    read = time.perf_counter()
    found = predictor.predict(scan, on_tile)
    predicted = time.perf_counter()
    _save(folder / "decoded" / "label.npy", found.label.voxels)
    calibration = predictor.calibration if len(predictor.bundles) == 1 else None
    reviewed = review("scan", found.confidence, odd, calibration)
    about = {
        "notice": NOTICE,
        "weights_sha256": [bundle.weights_sha256 for bundle in predictor.bundles],
        "computed": {
            "engines": list(found.engines),
            "device": str(predictor.plan.device),
            "precision": predictor.plan.precision,
            "threads": predictor.plan.threads,
        },
        "confidence": {target: _finite(values) for target, values in reviewed.targets.items()},
        "no_interval": dict(reviewed.no_interval),
        "unusual": list(reviewed.oddities),
    }
    seconds = {
        "preprocess": read - began + found.seconds["preprocess"],
        "infer": found.seconds["network"],
        "undo": found.seconds["undo"] + found.seconds["postprocess"],
        "write": time.perf_counter() - predicted,
    }
    return about, seconds


def export(
    folder: Path, parts: tuple[Part, ...], options: Options, bundle: Applied, about: Mapping[str, Any]
) -> tuple[Output, ...]:
    """Write the results in all formats asked for; their names, sizes and digests."""
    from delineate.inference.measurements import by_segment, measure_label, rows_of

    with _writing():
        (folder / "out").mkdir(mode=0o700)
    quantity = quantity_of(options)
    source = _source(_subject(folder, parts, bundle, quantity))
    scan = _scan(folder)
    label = LabelVolume(np.load(folder / "decoded" / "label.npy"), scan.grid)
    about = dict(about)
    maps = {QuantityMap(channel): values for channel, values in zip(bundle.channels, scan.voxels, strict=True)}
    if quantity is not None:
        maps = {one: values for one, values in maps.items() if one.channel != quantity.channel}
        maps[quantity] = np.load(folder / "decoded" / "quantity.npy", mmap_mode="r").T
        about["quantity"] = quantity.as_dict()
    measured = measure_label(label, bundle.targets, {one.as_it_is(values): values for one, values in maps.items()})
    rows = rows_of("scan", measured)
    about["measurements"] = [_finite({name: row[name] for name in row if name != "subject"}) for row in rows]
    formats = written(options.outputs)
    for format in formats:
        path = folder / "out" / f"label.{format}"
        if format in ("json", "sr.dcm") or path.exists():  # these come last, and some come with others
            continue
        if format == "png":
            from delineate.reporting.overlays import picture_of_label

            picture = picture_of_label(scan, label, bundle.targets, bundle.legend)
            with _writing():
                path.write_bytes(picture)
        elif (kind := _kind_of_surfaces(format)) is not None:
            _write_surfaces(path, kind, folder / "decoded" / format, label, bundle)
        else:
            export_label(path, label, bundle.targets, source=source, legend=bundle.legend)
    if "sr.dcm" in formats:
        from delineate.io.dicom_sr import write_report

        out = folder / "out"
        write_report(out / "label.sr.dcm", out / "label.dcm", by_segment(measured, bundle.channels))
    described = sidecar_of(label, bundle.targets) | about
    with _writing():
        text = json.dumps(described, indent=2, allow_nan=False)
        (folder / "out" / "label.json").write_text(text + "\n", encoding="utf-8")
    return tuple(_described(path) for path in sorted((folder / "out").iterdir()))


def _subject(folder: Path, parts: tuple[Part, ...], bundle: Applied, quantity: QuantityMap | None) -> Subject:
    """The parts as one subject: each a channel, or one with all of them."""
    files = {part.channel: _named(folder, index, part) for index, part in enumerate(parts)}
    if len(files) < len(parts):
        raise BadFormat("several files are for the same channel", fix="give each channel's file once, by name")
    maps = set() if quantity is None or quantity.channel in bundle.channels else {quantity.channel}
    if missing := sorted(maps - files.keys()):
        raise MissingFile(f"the scan has no {missing[0]}", fix="send a file for it, too")
    scans = {channel: path for channel, path in files.items() if channel not in maps}
    if set(scans) == {""}:
        scans = dict.fromkeys(bundle.channels, scans[""])
    chosen = Subject("scan", scans).with_channels(bundle.channels)
    return Subject("scan", {**chosen.scans, **{name: files[name] for name in maps}}, resample=bundle.resample)


def _source(subject: Subject) -> Path:
    """The file that results are written like."""
    return next(iter(subject.scans.values()))


def _kind_of_surfaces(format: str) -> str | None:
    """``stl`` of ``stl.zip``, and so on; None for a format that is no surface's."""
    kind = format.removesuffix(".zip")
    return kind if kind in WRITERS else None


def _write_surfaces(path: Path, kind: str, place: Path, label: LabelVolume, bundle: Applied) -> None:
    """Write the targets' surfaces to one file: a zip, where ``delineate predict`` writes a file for each target.

    ``place`` is a folder for those, to be made.
    """
    masks = bundle.targets.masks(label.voxels)
    if path.suffix != ".zip":
        write_surfaces(dict.fromkeys(bundle.targets.names, path), masks, label.grid, bundle.legend)
        return
    files = surface_files(place, bundle.targets.names, kind)
    write_surfaces(files, masks, label.grid, bundle.legend)
    with _writing(), zipfile.ZipFile(path, "w") as packed:
        for file in files.values():
            packed.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)


def _check_outputs(options: Options, bundle: Applied, source: Path) -> None:
    """Raise :class:`BadFormat` for a result that could not be written in the end."""
    for format in options.outputs:
        if (kind := _kind_of_surfaces(format)) is not None:
            check_surface_format(kind)
        elif format not in ("json", "png"):
            check_label_format("dcm" if format == "sr.dcm" else format)
    if any(format.endswith("dcm") for format in options.outputs) and not is_series(source):
        raise BadFormat("a label in DICOM refers to a DICOM series", fix="send the series, or ask for another format")


def _named(folder: Path, index: int, part: Part) -> Path:
    """A part by a name that says its format; alone in a folder, so that no header can have another file read."""
    return folder / "decoded" / str(index) / f"part{index}.{part.format}"


def _unpack(arrived: Path, path: Path, part: Part) -> None:
    """Give a part its name; unpacked, if it was packed for the way."""
    with _writing():
        path.parent.mkdir(mode=0o700)
        if part.codec == "raw":
            os.link(arrived, path)
            return
        with path.open("wb") as file:
            for chunk in _chunks(arrived):
                file.write(chunk)


def _chunks(arrived: Path) -> Iterator[bytes]:
    """What a frame of Blosc2 unpacks to. Only its chunks are read, none of what frames may say of themselves."""
    import blosc2

    most = Limits().max_bytes + 2**20
    with arrived.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            frame = blosc2.schunk_from_cframe(content)
            size, number = frame.nbytes, frame.nchunks
        except (RuntimeError, ValueError, TypeError) as error:
            raise BadFormat("the scan was not packed with Blosc2, or is damaged", fix="send it as it is") from error
        if size > most:
            raise TooLarge(f"the scan has {size:,} bytes when unpacked, more than {most:,}", fix="send a part of it")
        left = size
        for index in range(number):
            try:
                chunk = frame.decompress_chunk(index)
            except (RuntimeError, ValueError, TypeError) as error:
                raise Truncated("the packed scan is damaged", fix="send it again, or as it is") from error
            left -= len(chunk)
            if left < 0:
                raise BadFormat("the packed scan is larger than it says", fix="send it as it is")
            yield chunk
        del frame  # it points into the file


def _scan(folder: Path, *, mapped: bool = True) -> Volume:
    """The decoded scan, laid out in memory as it was read: sums over it are the same to the last bit."""
    voxels = np.load(folder / "decoded" / "scan.npy", mmap_mode="r" if mapped else None).transpose(0, 3, 2, 1)
    return Volume(voxels, Grid(voxels.shape[1:], np.load(folder / "decoded" / "affine.npy")))


def _save(path: Path, values: NDArray) -> None:
    with _writing():
        np.save(path, values)


@contextmanager
def _writing() -> Iterator[None]:
    """Turn what the system says of a full disk into :class:`OutputError`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or "it is full"  # numpy does not say why
        raise OutputError(f"the server's disk cannot be written: {why}", fix="try again later") from error


def _described(path: Path) -> Output:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())  # here, so that the front door need not wait for it
    return Output(path.name, path.stat().st_size, digest)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: what is undefined is null."""
    undefined = {name for name, value in values.items() if isinstance(value, float) and not isfinite(value)}
    return {name: None if name in undefined else value for name, value in values.items()}
