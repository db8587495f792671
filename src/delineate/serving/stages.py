"""What is done to a job, in its folder: decoded and exported by processes of little memory, segmented in between.

Stages leave files to each other, so that a queue holds paths and not arrays::

    KEY/in0, …             what arrived
    KEY/work/0.nii.gz, …   the same, by names that say their format
    KEY/work/scan.npy      voxels (C, X, Y, Z)
    KEY/work/label.npy     voxels (X, Y, Z)
    KEY/out/label.…        results
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import Coding, Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import check_shows_something, load_map, load_scan
from delineate.errors import BadFormat, MissingFile, TooLarge
from delineate.io.exports import export_label, sidecar_of
from delineate.io.files import Limits
from delineate.metrics.quantities import QuantityMap, quantity_map
from delineate.serving.protocol import Options, Output, Part

if TYPE_CHECKING:
    from delineate.inference.predictor import Predictor

NOTICE = "Not for diagnosis."
_SUFFIXES = {"nii.gz": ".nii.gz", "nii": ".nii", "mha": ".mha", "nrrd": ".nrrd", "dicom.zip": ".zip"}


@dataclass(frozen=True)
class Applied:
    """What stages have to know of a bundle: its channels and targets, and how its scans are read."""

    channels: tuple[str, ...]
    targets: Targets
    resample: bool = False
    codes: Mapping[str, Coding] | None = None


def limit_memory(bytes: int) -> None:
    """Let this process have no more memory than this: what it decodes came from outside."""
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (bytes, bytes))


def quantity_of(options: Options) -> QuantityMap | None:
    """The quantity that a job measures."""
    return quantity_map(options.quantity or None, options.margin_mm, options.threshold, None)


def decode(folder: Path, parts: tuple[Part, ...], options: Options, bundle: Applied) -> None:
    """Read the scan, and the map of the quantity, from the parts of a job. Raises what is wrong with them."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=0o700)
    subject = _subject(folder, parts, bundle, quantity_of(options))
    scan = load_scan(subject, bundle.channels)
    check_shows_something("the scan", scan)
    np.save(work / "scan.npy", scan.voxels)
    np.save(work / "affine.npy", scan.grid.affine)
    quantity = quantity_of(options)
    if quantity is not None:
        values = load_map(subject, quantity.channel, "the scan", scan.grid)
        quantity.check(values, "the scan")
        np.save(work / "quantity.npy", values)


def segment(
    folder: Path, predictor: Predictor, on_tile: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Segment a decoded scan; what the prediction says of itself, and the seconds of each stage."""
    from delineate.inference.review import review

    scan = _scan(folder, mapped=False)
    odd = predictor.oddities(scan)
    found = predictor.predict(scan, on_tile)
    np.save(folder / "work" / "label.npy", found.label.voxels)
    calibration = predictor.calibration if len(predictor.bundles) == 1 else None
    reviewed = review("scan", found.confidence, odd, calibration)
    about = {
        "notice": NOTICE,
        "weights_sha256": [bundle.weights_sha256 for bundle in predictor.bundles],
        "confidence": {target: _finite(values) for target, values in reviewed.targets.items()},
        "no_interval": dict(reviewed.no_interval),
        "unusual": list(reviewed.oddities),
    }
    return about, found.seconds


def export(
    folder: Path, parts: tuple[Part, ...], options: Options, bundle: Applied, about: Mapping[str, Any]
) -> tuple[Output, ...]:
    """Write the results in all formats asked for; their names, sizes and digests."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(mode=0o700)
    source = _named(folder, 0, parts[0])
    scan = _scan(folder)
    label = LabelVolume(np.load(folder / "work" / "label.npy"), scan.grid)
    about = dict(about)
    quantity = quantity_of(options)
    if quantity is not None:
        from delineate.inference.measurements import measure_label

        values = np.load(folder / "work" / "quantity.npy", mmap_mode="r")
        measured = measure_label(label, bundle.targets, values, quantity)
        about["quantity"] = quantity.as_dict()
        about["measurements"] = {target: _finite(asdict(found)) for target, found in measured.items()}
    for format in options.outputs:
        path = out / f"label.{format}"
        if format == "json" or path.exists():
            continue
        if format == "png":
            from delineate.reporting.overlays import picture_of_label

            path.write_bytes(picture_of_label(scan, label, bundle.targets))
            continue
        export_label(path, label, bundle.targets, source=source, about=about, codes=bundle.codes or {})
    described = sidecar_of(label, bundle.targets) | about
    (out / "label.json").write_text(json.dumps(described, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return tuple(_described(path) for path in sorted(out.iterdir()))


def _subject(folder: Path, parts: tuple[Part, ...], bundle: Applied, quantity: QuantityMap | None) -> Subject:
    """The parts as one subject: each a channel, or one with all of them."""
    files = {part.channel: _named(folder, index, part) for index, part in enumerate(parts)}
    if len(files) < len(parts):
        raise BadFormat("several files are for the same channel", fix="give each channel's file once, by name")
    maps = {} if quantity is None or quantity.channel in bundle.channels else {quantity.channel: quantity.channel}
    scans = {channel: path for channel, path in files.items() if channel not in maps}
    if set(scans) == {""}:
        scans = dict.fromkeys(bundle.channels, scans[""])
    subject = Subject("scan", scans, resample=bundle.resample).with_channels(bundle.channels)
    if not maps:
        return subject
    [name] = maps
    if name not in files:
        raise MissingFile(f"the scan has no {name}", fix="send a file for it, too")
    return Subject("scan", {**subject.scans, name: files[name]}, resample=bundle.resample)


def _named(folder: Path, index: int, part: Part) -> Path:
    """A part under a name that says its format; unpacked, if it was packed for the way."""
    path, arrived = folder / "work" / f"{index}{_SUFFIXES[part.format]}", folder / f"in{index}"
    if not path.exists():
        if part.codec == "raw":
            os.link(arrived, path)
        else:
            _unpack(arrived, path)
    return path


def _unpack(arrived: Path, path: Path) -> None:
    import blosc2

    most = Limits().max_bytes + 2**20
    try:
        frame = blosc2.open(str(arrived), mode="r")
        if frame.nbytes > most:
            raise TooLarge(f"the scan has {frame.nbytes:,} bytes when unpacked, more than {most:,}")
        with path.open("wb") as file:
            for number in range(frame.nchunks):
                file.write(frame.decompress_chunk(number))
    except (RuntimeError, ValueError, AttributeError, TypeError, OSError) as error:
        raise BadFormat(f"the scan cannot be unpacked: {error}", fix="send it as it is") from error


def _scan(folder: Path, *, mapped: bool = True) -> Volume:
    work = folder / "work"
    voxels = np.load(work / "scan.npy", mmap_mode="r" if mapped else None)
    return Volume(voxels, Grid(voxels.shape[1:], np.load(work / "affine.npy")))


def _described(path: Path) -> Output:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())  # here, so that the front door need not wait for it
    return Output(path.name, path.stat().st_size, digest)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as JSON has them: what is undefined is null."""
    return {name: value if isfinite(value) else None for name, value in values.items()}


class Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as ``stage``."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        self._last = now
