"""Many scans in a row: the next is read and the last is written while the network works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from errno import EDQUOT, ENOSPC
from pathlib import Path

import numpy as np

from delineate.bundle import Bundle
from delineate.calibration import Confidence
from delineate.core.subject import Subject
from delineate.core.text import printable
from delineate.core.volume import Volume
from delineate.datasets.dataset import check_shows_something, load_scan
from delineate.errors import Cancelled, DatasetError, DelineateError, MissingFile, OutputError
from delineate.fingerprint import Oddity
from delineate.inference.outputs import Outputs
from delineate.inference.predictor import Prediction, Predictor
from delineate.inference.review import Review, review, write_queue
from delineate.io.exports import export_label
from delineate.io.formats import is_series, name_of, suffix_of, write_volume
from delineate.io.overwriting import check_outputs


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

    ``images`` are patterns as :func:`~delineate.datasets.layouts.open_dataset` takes them. A subject that
    lacks a channel stays as it is: :func:`predict_subjects` says so of it. Raises :class:`MissingFile`
    for an input that is not there, and where every subject lacks a channel.
    """
    from delineate.datasets.layouts import open_dataset

    found: list[Subject] = []
    if labels := _labels_of_others(inputs):
        raise DatasetError(f"'{labels[0]}' looks like the label of another input", fix="leave it out, or give it alone")
    for path in inputs:
        if path.is_dir():
            # A label without its scan is nothing to predict.
            found += [subject for subject in open_dataset(path, images=images).subjects if subject.scans]
        elif path.exists() and (suffix_of(path) or is_series(path)):
            # One file: all channels in it (4D), or the only channel there is.
            found.append(Subject(_name_of(path), dict.fromkeys(channels, path)))
        else:
            raise MissingFile(
                f"no scan or folder at '{path}'", fix="give NIfTI, MetaImage, NRRD or DICOM, or a data set"
            )
    names = [printable(subject.id) for subject in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"several inputs are called {', '.join(twice)}", fix="predict them into separate folders")
    chosen, lacking = [], []
    for subject in found:
        try:
            chosen.append(subject.with_channels(channels))
        except MissingFile as error:
            chosen.append(subject)
            lacking.append(error)
    if lacking and len(lacking) == len(found):
        raise lacking[0]
    return chosen


def _name_of(path: Path) -> str:
    """The same name as if the folder of a file had been given."""
    if not is_series(path):
        return name_of(path)
    from delineate.datasets.dicom_studies import name_of_study

    try:
        return name_of_study(path)
    except DelineateError:
        return name_of(path)  # reading it will say what is wrong


def _labels_of_others(inputs: Sequence[Path]) -> list[Path]:
    """Files that are called labels of other files given: a shell's ``*.nii.gz`` names both."""
    from delineate.datasets.folder import bare_name

    names = {(path.parent, name_of(path)) for path in inputs}
    return [path for path in inputs if bare_name(path) != name_of(path) and (path.parent, bare_name(path)) in names]


def unseen_by(bundles: Sequence[Bundle], subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects that none of the bundles was trained on, or its weights chosen by.

    Raises :class:`DatasetError` where none is left, and what :meth:`~delineate.bundle.Bundle.seen` raises
    where it cannot be known.
    """
    left = [subject for subject in subjects if not any(bundle.seen(subject.id) for bundle in bundles)]
    if not left:
        raise DatasetError(f"all {len(subjects)} subjects were seen in training", fix="give others, or drop --unseen")
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
    outputs: Outputs | None = None,
) -> Iterator[Outcome]:
    """Predict each subject into ``folder/<id><suffix>``; one that cannot be read or written does not stop the rest.

    ``.dcm`` is a DICOM-SEG that refers to the subject's first channel, which must be a DICOM series.
    ``on_oddities`` is told what is unusual about a scan before it is segmented. ``probabilities`` is a
    folder for those, as ``<id>.nii.gz`` with a channel for each target, of a predictor that keeps them.
    With ``outputs``, which then say where everything goes, each subject is entered in its review list
    as it comes, before its label is there. Raises :class:`OutputError` where the disk is full, since
    nothing more can be written.
    """
    where = outputs or Outputs(folder, suffix, probabilities)
    targets, models = predictor.targets, [bundle.weights_sha256 for bundle in predictor.bundles]
    resample = predictor.bundles[0].recipe.data.resample_channels
    codes = predictor.bundles[0].recipe.data.codings()
    # Errors of one bundle do not say how far off an ensemble is.
    calibration = predictor.calibration if len(predictor.bundles) == 1 else None

    def read(subject: Subject) -> tuple[Subject, Volume]:
        chosen = replace(subject.with_channels(predictor.channels), resample=resample)
        where.check(chosen)
        check_outputs(where.files(chosen), chosen.files, overwrite=True)
        scan = load_scan(chosen)
        check_shows_something(subject.id, scan)
        return chosen, scan

    def write(subject: Subject, prediction: Prediction, odd: Sequence[Oddity]) -> tuple[Path, Review]:
        made_by = "" if outputs is None else outputs.made_by(subject)
        reviewed = review(subject.id, prediction.confidence, odd, calibration, made_by)
        path, source = where.label(subject), next(iter(subject.scans.values()))
        with _nothing_left_of(where.files(subject)):
            # Whatever stops this half-way: an entry without its label is predicted again, a label without its
            # entry would be in the way. But no old label may stand under a new entry.
            first = not path.exists()
            if outputs is not None and first:
                write_queue(outputs.review, [reviewed])
            if where.probabilities is not None:
                _write_probabilities(where.probabilities / f"{subject.id}.nii.gz", prediction, source)
            about = {"weights_sha256": models}
            export_label(path, prediction.label, targets, source=source, about=about, codes=codes)
            if outputs is not None and not first:
                write_queue(outputs.review, [reviewed])
        return path, reviewed

    def failed(subject: Subject, error: DelineateError) -> Outcome:
        if _disk_is_full(error):
            raise error
        reviewed = Review.of_failure(subject.id, error)
        if outputs is not None:
            write_queue(outputs.review, [reviewed])
        return Outcome(subject, None, {}, error, reviewed)

    def written(subject: Subject, prediction: Prediction, writing: Future[tuple[Path, Review]]) -> Outcome:
        try:
            path, reviewed = writing.result()
        except DelineateError as error:
            return failed(subject, error)
        return Outcome(subject, path, prediction.seconds, review=reviewed, confidence=prediction.confidence)

    queue = iter(subjects)
    with ThreadPoolExecutor(max_workers=1) as reader, ThreadPoolExecutor(max_workers=1) as writer:
        upcoming = _submit_next(reader, read, queue)
        writing: tuple[Subject, Prediction, Future[tuple[Path, Review]]] | None = None
        while upcoming is not None:
            subject, reading = upcoming
            upcoming = _submit_next(reader, read, queue)
            try:
                subject, volume = reading.result()
                odd = predictor.oddities(volume)
                if odd:
                    on_oddities(subject, odd)
                prediction = predictor.predict(volume, on_tile)
            except Cancelled:  # by ``on_tile``: no failure of this subject, and no next one
                raise
            except DelineateError as error:
                yield failed(subject, error)
                continue
            if writing is not None:
                yield written(*writing)
            writing = subject, prediction, writer.submit(write, subject, prediction, odd)
        if writing is not None:
            yield written(*writing)


@contextmanager
def _nothing_left_of(files: Sequence[Path]) -> Iterator[None]:
    """Remove those of ``files`` that are new where not all of them can be written; any failure as one of ours."""
    new = [file for file in files if not file.exists()]
    try:
        yield
    except BaseException as error:
        for file in new:
            with suppress(OSError, ValueError):
                file.unlink()
        if isinstance(error, OSError | ValueError):
            raise OutputError(
                f"'{printable(str(files[0]))}' cannot be written: {error}", fix="choose another place"
            ) from error
        raise


def _disk_is_full(error: BaseException) -> bool:
    # numpy says only how many bytes were written, without the system's number.
    full, cause = (ENOSPC, EDQUOT, None), error.__cause__
    return isinstance(error, OutputError) and isinstance(cause, OSError) and cause.errno in full


def _write_probabilities(path: Path, prediction: Prediction, source: Path) -> None:
    assert prediction.probabilities is not None
    # Three decimals are all that half precision has near 1, and pack well.
    rounded = np.round(prediction.probabilities.astype(np.float32), 3)
    write_volume(path, Volume(rounded, prediction.label.grid), like=source)


def _submit_next(
    pool: ThreadPoolExecutor, read: Callable[[Subject], tuple[Subject, Volume]], queue: Iterator[Subject]
) -> tuple[Subject, Future[tuple[Subject, Volume]]] | None:
    subject = next(queue, None)
    return None if subject is None else (subject, pool.submit(read, subject))
