"""Many scans in a row: the next is read and the last is written while the network works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from delineate.bundle import Bundle
from delineate.core.subject import Subject
from delineate.core.volume import Volume
from delineate.datasets.dataset import load_scan
from delineate.errors import DatasetError, DelineateError, MissingFile
from delineate.inference.confidence import Calibration, Confidence
from delineate.inference.fingerprint import Oddity
from delineate.inference.predictor import Prediction, Predictor
from delineate.inference.review import Review, review
from delineate.io.exports import export_label
from delineate.io.formats import is_series, name_of, suffix_of, write_volume


@dataclass(frozen=True)
class Outcome:
    """What became of one subject: the file written, the seconds by stage and how sure it is, or the error."""

    subject: Subject
    path: Path | None
    seconds: dict[str, float]
    error: DelineateError | None = None
    review: Review | None = None
    confidence: Mapping[str, Confidence] = field(default_factory=dict)


def find_subjects(
    inputs: Sequence[Path], channels: Sequence[str], images: str | Mapping[str, str] | None = None
) -> list[Subject]:
    """Subjects in folders (any known layout, or loose scans) and files, with the channels in the bundle's order.

    ``images`` are patterns as :func:`~delineate.datasets.layouts.open_dataset` takes them. Raises
    :class:`MissingFile` for what is not there or lacks a channel.
    """
    from delineate.datasets.layouts import open_dataset

    found: list[Subject] = []
    for path in inputs:
        if path.is_dir():
            found += open_dataset(path, images=images).subjects
        elif path.exists() and (suffix_of(path) or is_series(path)):
            # One file: all channels in it (4D), or the only channel there is.
            found.append(Subject(name_of(path), dict.fromkeys(channels, path)))
        else:
            raise MissingFile(f"no scan or folder at '{path}'; give NIfTI, MetaImage, NRRD or DICOM, or a data set")
    names = [subject.id for subject in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"several inputs are called {', '.join(twice)}; predict them into separate folders")
    return [with_channels(subject, channels) for subject in found]


def with_channels(subject: Subject, channels: Sequence[str]) -> Subject:
    """``subject`` with exactly these channels, by name; a single channel may have any name."""
    if len(channels) == len(subject.scans) == 1:
        return replace(subject, scans=dict(zip(channels, subject.scans.values(), strict=True)))
    missing = [channel for channel in channels if channel not in subject.scans]
    if missing:
        raise MissingFile(
            f"subject '{subject.id}' has channels {list(subject.scans)}, lacks {missing}; "
            "add them, or rename the channels of the data set"
        )
    return replace(subject, scans={channel: subject.scans[channel] for channel in channels})


def unseen_by(bundles: Sequence[Bundle], subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects that none of the bundles was trained on, or its weights chosen by.

    Raises :class:`DatasetError` where none is left, and what :meth:`~delineate.bundle.Bundle.seen` raises
    where it cannot be known.
    """
    left = [subject for subject in subjects if not any(bundle.seen(subject.id) for bundle in bundles)]
    if not left:
        raise DatasetError(f"all {len(subjects)} subjects were seen in training; give others, or drop --unseen")
    return left


def predict_subjects(
    predictor: Predictor,
    subjects: Iterable[Subject],
    folder: Path,
    *,
    suffix: str = ".nii.gz",
    on_tile: Callable[[int, int], None] | None = None,
    on_oddities: Callable[[Subject, Sequence[Oddity]], None] = lambda subject, oddities: None,
    probabilities: Path | None = None,
) -> Iterator[Outcome]:
    """Predict each subject into ``folder/<id><suffix>``; one that cannot be read does not stop the rest.

    ``.dcm`` is a DICOM-SEG that refers to the subject's first channel, which must be a DICOM series.
    ``on_oddities`` is told what is unusual of a scan before it is segmented. ``probabilities`` is a
    folder for those, as ``<id>.nii.gz`` with a channel for each target, of a predictor that keeps them.
    """
    targets, models = predictor.targets, [bundle.weights_sha256 for bundle in predictor.bundles]
    resample = predictor.bundles[0].recipe.data.resample_channels
    # Errors of one bundle do not say how far off an ensemble is.
    calibration = predictor.calibration if len(predictor.bundles) == 1 else None

    def write(subject: Subject, prediction: Prediction) -> list[Path]:
        if probabilities is not None:
            _write_probabilities(probabilities / f"{subject.id}.nii.gz", prediction)
        path, source = folder / f"{subject.id}{suffix}", next(iter(subject.scans.values()))
        return export_label(path, prediction.label, targets, source=source, about={"weights_sha256": models})

    queue = (replace(subject, resample=resample) for subject in subjects)
    with ThreadPoolExecutor(max_workers=1) as reader, ThreadPoolExecutor(max_workers=1) as writer:
        upcoming = _submit_next(reader, queue)
        writing: tuple[Subject, Prediction, list[Oddity], Future[list[Path]]] | None = None
        while upcoming is not None:
            subject, reading = upcoming
            upcoming = _submit_next(reader, queue)
            try:
                volume = reading.result()
                odd = predictor.oddities(volume)
                if odd:
                    on_oddities(subject, odd)
                prediction = predictor.predict(volume, on_tile)
            except DelineateError as error:
                yield Outcome(subject, None, {}, error)
                continue
            if writing is not None:
                yield _written(*writing, calibration)
            writing = subject, prediction, odd, writer.submit(write, subject, prediction)
        if writing is not None:
            yield _written(*writing, calibration)


def _write_probabilities(path: Path, prediction: Prediction) -> None:
    assert prediction.probabilities is not None
    # Three decimals are all that half precision has near 1, and pack well.
    rounded = np.round(prediction.probabilities.astype(np.float32), 3)
    write_volume(path, Volume(rounded, prediction.label.grid))


def _submit_next(pool: ThreadPoolExecutor, queue: Iterator[Subject]) -> tuple[Subject, Future[Volume]] | None:
    subject = next(queue, None)
    return None if subject is None else (subject, pool.submit(load_scan, subject))


def _written(
    subject: Subject,
    prediction: Prediction,
    odd: Sequence[Oddity],
    writing: Future[list[Path]],
    calibration: Calibration | None,
) -> Outcome:
    # A result that cannot be written is no fault of one scan: the error goes to the caller.
    path = writing.result()[0]
    reviewed = review(subject.id, prediction.confidence, odd, calibration)
    return Outcome(subject, path, prediction.seconds, review=reviewed, confidence=prediction.confidence)
