"""Many scans in a row: the next is read and the previous one written while the network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from errno import EDQUOT, ENOSPC
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.bundle import Bundle
from delineate.calibration import Confidence
from delineate.compute import ran_out_of_memory
from delineate.core.subject import Subject
from delineate.core.text import printable
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import (
    check_grids,
    check_shows_something,
    load_map,
    load_scan,
    named_in,
    read_numbered,
    with_maps,
)
from delineate.datasets.series_rules import Images
from delineate.errors import (
    BadFormat,
    Cancelled,
    DatasetError,
    DelineateError,
    MissingFile,
    OutputError,
    RecipeError,
    TooLarge,
)
from delineate.fingerprint import Oddity
from delineate.inference.measurements import (
    Measured,
    by_segment,
    measure_label,
    rows_of,
    write_measurements,
)
from delineate.inference.outputs import Outputs, Planned
from delineate.inference.predictor import Prediction, Predictor
from delineate.inference.review import Review, review, write_queue
from delineate.io.exports import export_label
from delineate.io.files import writing_beside
from delineate.io.formats import is_series, name_of, suffix_of, write_volume
from delineate.io.legends import write_legends
from delineate.io.overwriting import check_outputs
from delineate.io.suffixes import DICOM_SUFFIXES, SEGMENTATION_SUFFIX
from delineate.io.surfaces import write_surfaces
from delineate.metrics.quantities import QuantityMap


@dataclass(frozen=True)
class Outcome:
    """Result for one subject: the file written, seconds per stage, confidence and measurements, or the error."""

    subject: Subject
    path: Path | None
    seconds: dict[str, float]
    error: DelineateError | None = None
    review: Review | None = None
    confidence: Mapping[str, Confidence] = field(default_factory=dict)
    measured: Sequence[Measured] = ()


def find_subjects(
    inputs: Sequence[Path],
    channels: Sequence[str],
    images: Images | None = None,
    quantity: QuantityMap | None = None,
) -> list[Subject]:
    """Subjects in folders (any known layout, or loose scans) and files, with the channels in the bundle's order.

    ``images`` are patterns or rules as :func:`~delineate.datasets.layouts.open_dataset` takes them. A subject that
    lacks a channel is returned as it is; :func:`predict_subjects` reports it. A ``quantity`` is added as a
    separate channel. Raises :class:`MissingFile` for an input that is not there or cannot be read, or if every
    subject lacks a channel, and :class:`BadPath` for a file of a DICOM series that goes on in other folders.
    """
    from delineate.datasets.dicom_studies import read_studies
    from delineate.datasets.layouts import open_dataset

    found: list[Subject] = []
    if labels := _labels_of_others(inputs):
        raise DatasetError(
            f"'{labels[0]}' looks like the label of another input", fix="leave it out, or predict it alone"
        )
    for path in inputs:
        try:
            is_folder = path.is_dir()
        except OSError as error:
            raise MissingFile(
                f"'{path}' cannot be read ({error.strerror})", fix="check its name and permissions"
            ) from error
        if is_folder:
            # A label without its scan cannot be predicted.
            found += [subject for subject in open_dataset(path, images=images).subjects if subject.scans]
        elif images is not None and path.is_file() and path.suffix.lower() == ".zip":
            studies = read_studies(path, images)
            found += [subject for subject in studies.subjects if subject.scans] if studies is not None else []
        elif path.exists() and (suffix_of(path) or is_series(path)):
            if is_series(path):
                from delineate.io.dicom_series import check_together  # pydicom takes a while to import

                check_together(path)
            # One file: all channels in it (4D), or the only channel there is.
            found.append(Subject(_name_of(path), dict.fromkeys(channels, path)))
        else:
            raise MissingFile(
                f"no scan or folder at '{path}'", fix="give a NIfTI, MetaImage, NRRD or DICOM scan, or a data set"
            )
    names = [printable(subject.id) for subject in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"several inputs are called {', '.join(twice)}", fix="predict them into separate folders")
    try:
        return with_bundle_channels(found, channels, quantity)
    except MissingFile as error:
        if images is not None or quantity is not None:
            raise
        raise MissingFile(
            error.message,
            fix=f"name each channel's files, or its DICOM series by their description: --images {channels[0]}='*…*'",
        ) from error


def with_bundle_channels(
    subjects: Sequence[Subject], channels: Sequence[str], quantity: QuantityMap | None
) -> list[Subject]:
    """Subjects with the channels that a bundle takes, in its order, and with a quantity's maps, kept apart or not.

    A subject that lacks a channel is returned as it is. Raises :class:`MissingFile` if every subject does,
    :class:`RecipeError` if maps would change what the network sees, and whatever
    :func:`~delineate.datasets.dataset.with_maps` raises.
    """
    if quantity is not None and quantity.maps is not None:
        if quantity.channel in channels:
            raise RecipeError(f"the bundle itself uses {quantity.channel} from the scans", fix="name only the channel")
        subjects = with_maps(subjects, quantity.channel, quantity.maps)
    chosen, lacking = [], []
    for subject in subjects:
        try:
            chosen.append(_with_channels(subject, channels, quantity))
        except MissingFile as error:
            chosen.append(subject)
            lacking.append(error)
    if lacking and len(lacking) == len(chosen):
        raise lacking[0]
    return chosen


def _with_channels(subject: Subject, channels: Sequence[str], quantity: QuantityMap | None) -> Subject:
    """The channels that a bundle takes, then the quantity's if it is not among them."""
    if quantity is None or quantity.channel in channels:
        return subject.with_channels(channels)
    kept = {name: path for name, path in subject.scans.items() if name == quantity.channel}
    rest = {name: path for name, path in subject.scans.items() if name not in kept}
    chosen = replace(subject, scans=rest).with_channels(channels)
    if not kept:
        raise MissingFile(
            f"subject '{subject.id}' has channels {list(subject.scans)}, lacks {quantity.channel}",
            fix=f"name its files (--images), or give the folder of maps: {quantity.channel}=FOLDER",
        )
    return replace(chosen, scans={**chosen.scans, **kept})


def _name_of(path: Path) -> str:
    """The name that the scan would have if its folder had been given."""
    if not is_series(path):
        return name_of(path)
    from delineate.datasets.dicom_studies import name_of_study

    try:
        return name_of_study(path)
    except DelineateError:
        return name_of(path)  # reading it will say what is wrong


def _labels_of_others(inputs: Sequence[Path]) -> list[Path]:
    """Files named as labels of other files given: a shell's ``*.nii.gz`` matches both."""
    from delineate.datasets.folder import bare_name

    names = {(path.parent, name_of(path)) for path in inputs}
    return [path for path in inputs if bare_name(path) != name_of(path) and (path.parent, bare_name(path)) in names]


def unseen_by(bundles: Sequence[Bundle], subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects that none of the bundles used for training or for selecting weights.

    Raises :class:`DatasetError` if none is left, and whatever :meth:`~delineate.bundle.Bundle.seen` raises
    if that cannot be known.
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
    """Predict each subject to ``folder/<id><suffix>``; one that cannot be read or written, or is too large for the
    memory, does not stop the rest.

    ``.dcm`` is a DICOM-SEG that refers to the subject's first channel, which must be a DICOM series.
    ``on_oddities`` is called with anything unusual about a scan before it is segmented. ``probabilities`` is a
    folder for ``<id>.nii.gz`` files with a channel for each target; the predictor must keep probabilities.
    With ``outputs``, which then decides all paths, each subject is entered in the review list before its label is
    written, and the outputs' quantities are measured within its targets. Raises :class:`OutputError` if the disk is
    full, since nothing more can be written.
    """
    where = outputs or Outputs(folder, suffix, probabilities)
    targets, models = predictor.targets, [bundle.weights_sha256 for bundle in predictor.bundles]
    resample = predictor.bundles[0].recipe.data.resample_channels
    legend = predictor.bundles[0].recipe.data.legend
    # The errors of one bundle do not tell how far off an ensemble is.
    calibration = predictor.calibration if len(predictor.bundles) == 1 else None

    def read(subject: Subject) -> _Read:
        chosen = replace(_with_channels(subject, predictor.channels, where.quantity), resample=resample)
        where.check(chosen)
        check_outputs(where.files(chosen), chosen.files, overwrite=True)
        scan = load_scan(chosen, predictor.channels)
        check_shows_something(subject.id, scan)
        return _Read(chosen, scan, _maps_of(chosen, scan, where))

    def write(read: _Read, prediction: Prediction, odd: Sequence[Oddity]) -> _Written:
        subject, measured = read.subject, list[Measured]()
        made_by = "" if outputs is None else outputs.made_by(subject)
        reviewed = review(subject.id, prediction.confidence, odd, calibration, made_by)
        path, source = where.label(subject), next(iter(subject.scans.values()))
        with _nothing_left_of([*where.files(subject), *where.drawn(subject)]):
            # If this is interrupted, an entry without its label is predicted again, whereas a label without its
            # entry would block the next run. But a new entry must never stand next to an old label.
            first = not path.exists()
            if outputs is not None and first:
                write_queue(outputs.review, [reviewed])
            if where.probabilities is not None:
                _write_probabilities(where.probabilities / f"{subject.id}.nii.gz", prediction, source)
            about = {"weights_sha256": models}
            export_label(path, prediction.label, targets, source=source, about=about, legend=legend)
            if outputs is not None and not first:
                write_queue(outputs.review, [reviewed])
            _draw(where, subject, prediction.label, read.scan)
            if read.maps:
                measured = measure_label(prediction.label, targets, read.maps)
                _record(where, subject, measured)
        return _Written(path, reviewed, measured)

    def failed(subject: Subject, error: Exception) -> Outcome:
        failure = _failure_of_one(error)
        reviewed = Review.of_failure(subject.id, failure)
        if outputs is not None:
            write_queue(outputs.review, [reviewed])
        return Outcome(subject, None, {}, failure, reviewed)

    def written(subject: Subject, prediction: Prediction, writing: Future[_Written]) -> Outcome:
        try:
            done = writing.result()
        except Exception as error:
            return failed(subject, error)
        return Outcome(
            subject,
            done.path,
            prediction.seconds,
            review=done.review,
            confidence=prediction.confidence,
            measured=done.measured,
        )

    queue = iter(subjects)
    with ThreadPoolExecutor(max_workers=1) as reader, ThreadPoolExecutor(max_workers=1) as writer:
        upcoming = _submit_next(reader, read, queue)
        writing: tuple[Subject, Prediction, Future[_Written]] | None = None
        while upcoming is not None:
            subject, reading = upcoming
            upcoming = _submit_next(reader, read, queue)
            failure: Outcome | None = None
            try:
                read_now = reading.result()
                subject = read_now.subject
                odd = predictor.oddities(read_now.scan)
                if odd:
                    on_oddities(subject, odd)
                prediction = predictor.predict(read_now.scan, on_tile)
            except Exception as error:
                failure = failed(subject, error)
            if failure is not None:
                yield failure
                continue
            if writing is not None:
                yield written(*writing)
            writing = subject, prediction, writer.submit(write, read_now, prediction, odd)
        if writing is not None:
            yield written(*writing)


def carry_out(
    planned: Planned,
    outputs: Outputs,
    predictor: Callable[[], Predictor],
    *,
    on_oddities: Callable[[Subject, Sequence[Oddity]], None] = lambda subject, oddities: None,
    on_tile: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Outcome]:
    """The outcome of every subject in a plan that was not done yet: first those that cannot be predicted, then labels
    to measure and to draw, which have no review, then predictions as they are made.

    ``predictor`` is called once, if there is anything to predict. Raises what :func:`predict_subjects` raises.
    """
    write_queue(outputs.review, [Review.of_failure(subject.id, error) for subject, error in planned.failed])
    for subject, error in planned.failed:
        yield Outcome(subject, None, {}, error)
    yield from _measure_predicted(outputs, planned.unmeasured)
    yield from _draw_predicted(outputs, planned.undrawn)
    if planned.ahead:
        made = predictor()
        made.expect(len(planned.ahead))
        # These formats hold names and colours themselves.
        if not outputs.suffix.endswith((*DICOM_SUFFIXES, SEGMENTATION_SUFFIX)):
            write_legends(outputs.folder, made.targets, made.bundles[0].recipe.data.legend)
        yield from predict_subjects(
            made, planned.ahead, outputs.folder, on_oddities=on_oddities, on_tile=on_tile, outputs=outputs
        )


def _measure_predicted(outputs: Outputs, subjects: Sequence[Subject]) -> Iterator[Outcome]:
    """Measure the quantities of ``outputs`` in existing labels, which somebody may have corrected."""
    for subject in subjects:
        first = outputs.bundles[0]
        chosen = replace(subject, resample=first.recipe.data.resample_channels)
        try:
            scan, label = _read_back(outputs, chosen, "measure")
            measured = measure_label(label, first.targets, _maps_of(chosen, scan, outputs))
            _record(outputs, chosen, measured)
            outcome = Outcome(subject, outputs.label(chosen), {}, measured=measured)
        except Exception as error:
            outcome = Outcome(subject, None, {}, _failure_of_one(error))
        yield outcome


def _draw_predicted(outputs: Outputs, subjects: Sequence[Subject]) -> Iterator[Outcome]:
    """Write the surfaces and pictures of ``outputs`` for existing labels, which somebody may have corrected."""
    for subject in subjects:
        chosen = replace(subject, resample=outputs.bundles[0].recipe.data.resample_channels)
        try:
            scan, label = _read_back(outputs, chosen, "draw")
            _draw(outputs, subject, label, scan)
            outcome = Outcome(subject, outputs.label(subject), {})
        except Exception as error:
            outcome = Outcome(subject, None, {}, _failure_of_one(error))
        yield outcome


def _read_back(outputs: Outputs, subject: Subject, to: str) -> tuple[Volume, LabelVolume]:
    """A scan, and its existing label, which must lie on the scan's grid."""
    first, path = outputs.bundles[0], outputs.label(subject)
    if not suffix_of(path) and not outputs.suffix.endswith(DICOM_SUFFIXES):
        raise BadFormat(
            f"'{subject.id}' has a label already, and {outputs.suffix} cannot be read back to {to} it",
            fix="predict it again with --overwrite, or select another --format",
        )
    names = named_in(path)
    if names and (missing := [name for name in first.targets.names if name not in names]):
        # A label of somebody else's segments would be read by its values; a prediction says what it holds.
        raise BadFormat(
            f"'{path}' has no segment {', '.join(missing)}: it holds {', '.join(names)}",
            fix="name its segments after the targets",
        )
    scan = load_scan(subject, first.channels)
    label = read_numbered(path, first.targets, subject.id, scan.grid)
    first.targets.check(label.voxels, subject.id)
    check_grids(subject.id, "label", label.grid, "the scan", scan.grid)
    return scan, label


def _draw(outputs: Outputs, subject: Subject, label: LabelVolume, scan: Volume) -> None:
    """Write the surfaces and the picture of a label on its scan, as far as ``outputs`` has them."""
    if not outputs.drawn(subject):
        return
    targets, legend = outputs.bundles[0].targets, outputs.bundles[0].recipe.data.legend
    write_surfaces(outputs.surface_files(subject), targets.masks(label.voxels), label.grid, legend)
    preview = outputs.preview(subject)
    if outputs.picture is not None and preview is not None:
        picture = outputs.picture(scan, label, targets, legend)
        with writing_beside(preview) as beside:
            beside.write_bytes(picture)


@dataclass(frozen=True)
class _Read:
    """A subject with its scan, and the maps (X, Y, Z) of quantities that are measured on its grid."""

    subject: Subject
    scan: Volume
    maps: Mapping[QuantityMap, NDArray]


@dataclass(frozen=True)
class _Written:
    path: Path
    review: Review
    measured: Sequence[Measured]


def _maps_of(subject: Subject, scan: Volume, outputs: Outputs) -> dict[QuantityMap, NDArray]:
    """The maps (X, Y, Z) of all quantities of ``outputs``, on the grid of the scan with the bundles' channels."""
    values = dict(zip(outputs.channels, scan.voxels, strict=False))
    if (asked := outputs.quantity) is not None:
        if asked.channel not in values:
            values[asked.channel] = load_map(subject, asked.channel, "the scan", scan.grid)
        asked.check(values[asked.channel], subject.id)
    return {one.as_it_is(values[one.channel]): values[one.channel] for one in outputs.quantities}


def _record(outputs: Outputs, subject: Subject, measured: Sequence[Measured]) -> None:
    """Write what was measured in a label that has been written: for archives of DICOM, and into the table."""
    if (report := outputs.report(subject)) is not None:
        from delineate.io.dicom_sr import write_report

        write_report(report, outputs.label(subject), by_segment(measured, outputs.channels))
    write_measurements(outputs.measurements, rows_of(subject.id, measured, outputs.made_from(subject)))


@contextmanager
def _nothing_left_of(files: Sequence[Path]) -> Iterator[None]:
    """If not all of ``files`` can be written, remove the new ones and raise an :class:`OutputError`."""
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


def _failure_of_one(error: Exception) -> DelineateError:
    """What an error says of its subject alone. One that ends the batch is raised: a full disk, a wish, a defect."""
    if ran_out_of_memory(error):
        # Without the error as its cause, which would keep what had been allocated.
        return TooLarge(
            "the scan needs more memory than there is",
            fix="end other programs, use a machine with more memory or another --device, or predict a part of it",
        )
    if not isinstance(error, DelineateError) or isinstance(error, Cancelled) or _disk_is_full(error):
        raise error
    return error


def _disk_is_full(error: BaseException) -> bool:
    # numpy reports only how many bytes were written, not the system's error number.
    full, cause = (ENOSPC, EDQUOT, None), error.__cause__
    return isinstance(error, OutputError) and isinstance(cause, OSError) and cause.errno in full


def _write_probabilities(path: Path, prediction: Prediction, source: Path) -> None:
    assert prediction.probabilities is not None
    # Half precision has three decimals near 1; rounding to them compresses well.
    rounded = np.round(prediction.probabilities.astype(np.float32), 3)
    write_volume(path, Volume(rounded, prediction.label.grid), like=source)


def _submit_next(
    pool: ThreadPoolExecutor, read: Callable[[Subject], _Read], queue: Iterator[Subject]
) -> tuple[Subject, Future[_Read]] | None:
    subject = next(queue, None)
    return None if subject is None else (subject, pool.submit(read, subject))
