"""Bundles in use: opened once, applied to any number of scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from delineate import bundle as contents
from delineate.api.prediction import Prediction
from delineate.api.progress import Cancel, Progress, check, counting
from delineate.compute import ComputePlan, Precision, plan_compute, torch_threads
from delineate.core.subject import Subject
from delineate.core.tables import html_table
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.datasets.dataset import Dataset, check_grids, load_scan
from delineate.errors import BadVoxels, BundleError, DatasetError, DelineateError, MissingFile
from delineate.inference.batch import find_subjects, predict_subjects, unseen_by
from delineate.inference.outputs import Outputs
from delineate.inference.predictor import Predictor
from delineate.inference.review import Review, write_queue
from delineate.interop import Image, volume_of
from delineate.io.exports import check_label_format
from delineate.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Bundle", "Predictions", "Scan", "load", "predict"]

Channel = str | Path | Volume | Image
Scan = Channel | Subject | Mapping[str, Channel]
"""A file or DICOM folder, a volume or another library's image, a subject, or a mapping of channels to these."""


def load(folder: str | Path, *more: str | Path, device: str = "auto", precision: Precision = "auto") -> Bundle:
    """Open a bundle, or the one in a run's folder. Several are an ensemble: their probabilities are averaged.

    >>> import delineate
    >>> delineate.load("run/bundle").predict("scan.nii.gz").save("seg.nii.gz")
    [PosixPath('seg.nii.gz')]

    ``device`` is auto, cpu, cuda, cuda:1 or mps; ``precision`` is auto, fp32, bf16 or fp16.

    Raises :class:`~delineate.errors.BundleError` where a bundle is not as it was saved, or an ensemble's differ.
    """
    found = [contents.Bundle.load(contents.bundle_folder(Path(one))) for one in (folder, *more)]
    return Bundle(found, device=device, precision=precision)


class Bundle:
    """A trained network, or an ensemble, with all that is needed to apply it; :func:`load` opens it.

    >>> import delineate
    >>> bundle = delineate.load("run")
    >>> bundle
    Bundle(ball from image)
    >>> prediction = bundle.predict(delineate.read("scan.nii.gz"))
    >>> prediction.label.voxels.shape
    (16, 16, 12)
    >>> type(bundle.network).__module__.split(".")[0]
    'delineate'

    The network is built with the first prediction and kept for the next.
    """

    def __init__(self, opened: Sequence[contents.Bundle], *, device: str = "auto", precision: Precision = "auto"):
        self._opened = tuple(opened)
        self._device, self._precision = device, precision
        self._last: tuple[dict[str, Any], Predictor] | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the bundle lies, or each of an ensemble."""
        return tuple(one.folder for one in self._opened if one.folder is not None)

    @property
    def recipe(self) -> Recipe:
        """What it was trained by; the first of an ensemble."""
        return self._opened[0].recipe

    @property
    def targets(self) -> Targets:
        """What it segments."""
        return self._opened[0].targets

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that a scan must have, in their order."""
        return self._opened[0].channels

    @cached_property
    def networks(self) -> tuple[nn.Module, ...]:
        """Each network with its weights, in evaluation mode, on the CPU.

        They are yours: whatever is done to them, :meth:`predict` uses the weights that were saved.
        """
        return tuple(one.trained_network() for one in self._opened)

    @property
    def network(self) -> nn.Module:
        """The trained network, a plain ``torch.nn.Module`` as in :attr:`networks`; an ensemble has several."""
        if len(self._opened) > 1:
            raise BundleError(f"an ensemble has {len(self._opened)} networks", fix="choose one of .networks")
        return self.networks[0]

    def seen(self, subject: str) -> bool:
        """Whether it was trained, or chosen, on a subject of this name.

        Raises :class:`~delineate.errors.UnknownKey` where its names were hidden with another key than the user's.
        """
        return any(one.seen(subject) for one in self._opened)

    def predict(
        self,
        scan: Scan,
        *,
        overlap: float | None = None,
        flips: str | None = None,
        mirrored: bool = False,
        probabilities: bool = False,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Prediction:
        """Segment one scan, on its own grid. Not for diagnosis.

        ``scan`` is a file or a DICOM folder, a volume, an image of nibabel, SimpleITK or TorchIO, a subject, or
        a mapping from each channel's name to one of these. ``overlap`` of tiles and ``flips``, axes such as "xy"
        that are mirrored at test time, are the recipe's where they are not given. ``mirrored`` measures how well
        the scan and its mirror image agree; ``probabilities`` keeps those.

        ``progress`` is told of tiles. ``cancel`` is looked at between them: where it is set,
        :class:`~delineate.errors.Cancelled` is raised. Raises :class:`~delineate.errors.MissingFile` for a missing
        channel, and what reading a scan raises.
        """
        check(cancel)
        volume, files = _as_volume(scan, self.channels, resample=self.recipe.data.resample_channels)
        with torch_threads(self._plan.threads):
            predictor = self._predictor(overlap=overlap, flips=flips, mirrored=mirrored, probabilities=probabilities)
            odd = predictor.oddities(volume)
            found = predictor.predict(volume, counting("tiles", progress, cancel))
        return Prediction(
            **vars(found),
            scan=volume,
            targets=self.targets,
            unusual=tuple(oddity.text for oddity in odd),
            files=files,
            codes=self.recipe.data.codings(),
            about={"weights_sha256": [one.weights_sha256 for one in self._opened]},
        )

    def __repr__(self) -> str:
        ensemble = f"ensemble of {len(self._opened)}: " if len(self._opened) > 1 else ""
        return f"Bundle({ensemble}{', '.join(self.targets.names)} from {', '.join(self.channels)})"

    @cached_property
    def _plan(self) -> ComputePlan:
        # Compiling takes longer than predicting some hundred scans.
        return plan_compute(device=self._device, precision=self._precision, compile="off")

    def _predictor(self, **settings: Any) -> Predictor:
        """The last one, where the settings are the same: building the networks takes longer than a small scan."""
        if self._last is None or self._last[0] != settings:
            self._last = settings, Predictor(self._opened, self._plan, **settings)
        return self._last[1]


@dataclass(frozen=True)
class Predictions:
    """What became of many scans: ``made`` now, ``kept`` from before, ``failed`` with the error, by subject."""

    folder: Path
    made: Mapping[str, Path] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    failed: Mapping[str, DelineateError] = field(default_factory=dict)
    reviews: tuple[Review, ...] = ()
    """What each prediction says of itself, the ones in most need of a look first."""

    def _repr_html_(self) -> str:
        def number(value: float) -> str:
            return "–" if value != value else f"{value:.3f}"

        rows = [
            (
                one.subject,
                target,
                f"{values['volume_ml']:.4g}",
                number(values["expected_dice"]),
                "; ".join(one.oddities),
            )
            for one in self.reviews
            for target, values in one.targets.items()
        ]
        table = html_table("predictions", ("subject", "target", "ml", "expected Dice", "unusual"), rows)
        if not self.failed:
            return table
        return table + html_table("failed", ("subject", "why"), [(name, str(e)) for name, e in self.failed.items()])


@overload
def predict(
    bundle: str | Path | Bundle | Sequence[str | Path],
    inputs: Scan,
    *,
    overlap: float | None = None,
    flips: str | None = None,
    mirrored: bool = False,
    probabilities: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Prediction: ...
@overload
def predict(
    bundle: str | Path | Bundle | Sequence[str | Path],
    inputs: str | Path | Sequence[str | Path] | Dataset,
    out: str | Path,
    *,
    format: str = "nii.gz",
    images: str | Mapping[str, str] | None = None,
    unseen: bool = False,
    overwrite: bool = False,
    overlap: float | None = None,
    flips: str | None = None,
    mirrored: bool = False,
    probabilities: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Predictions: ...
def predict(
    bundle: str | Path | Bundle | Sequence[str | Path],
    inputs: Any,
    out: str | Path | None = None,
    *,
    format: str = "nii.gz",
    images: str | Mapping[str, str] | None = None,
    unseen: bool = False,
    overwrite: bool = False,
    overlap: float | None = None,
    flips: str | None = None,
    mirrored: bool = False,
    probabilities: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Prediction | Predictions:
    """Segment one scan, or with ``out`` every scan of folders and files into that folder. Not for diagnosis.

    >>> import delineate
    >>> delineate.predict("run", "scan.nii.gz").label.voxels.shape
    (16, 16, 12)
    >>> sorted(delineate.predict("run", "scans", out="segmentations").made)
    ['case0', 'case1', 'case2', 'case3']

    ``bundle`` is opened, or a folder of one or of a run, or several: an ensemble. One scan is anything that
    :meth:`Bundle.predict` takes; the settings that both share are explained there.

    With ``out``, scans that the same bundle predicted into it are kept, unless ``overwrite``; one that cannot be
    read does not stop the rest; the list ``review.csv`` in it says what to look at first. ``format`` is nii.gz,
    mha, nrrd, seg.nrrd, vtk, vti, dcm, or the name of another package's; ``images`` are patterns of the channels;
    ``unseen`` leaves out subjects that the bundle was trained or chosen on; ``probabilities`` go to a folder of
    that name.

    Where ``cancel`` is set, :class:`~delineate.errors.Cancelled` is raised; labels that are whole by then stay,
    and the next call resumes from there.
    """
    if not isinstance(bundle, Bundle):
        folders = [bundle] if isinstance(bundle, str | Path) else list(bundle)
        bundle = load(*folders, device=device, precision=precision)
    settings: dict[str, Any] = {"overlap": overlap, "flips": flips, "mirrored": mirrored}
    if out is None:
        if isinstance(inputs, Dataset):
            raise DatasetError("a data set holds many scans", fix="say with out= in which folder the labels go")
        return bundle.predict(inputs, **settings, probabilities=probabilities, progress=progress, cancel=cancel)
    check_label_format(format, bundle.targets)
    check(cancel)
    subjects = _subjects(inputs, bundle.channels, images)
    parts, folder = bundle._opened, Path(out)
    outputs = Outputs(folder, f".{format}", folder / "probabilities" if probabilities else None, parts, settings)
    kept = [path for subject in subjects for path in subject.files]
    kept += [path for place in bundle.folders for path in place.iterdir()]
    chosen = unseen_by(parts, subjects) if unseen else subjects
    planned = outputs.plan(chosen, kept, overwrite=overwrite)
    failed = {subject.id: error for subject, error in planned.failed}
    write_queue(outputs.review, [Review.of_failure(name, error) for name, error in failed.items()])
    made: dict[str, Path] = {}
    reviews: list[Review] = []
    if planned.ahead:
        said = counting("scans", progress, cancel)
        between_tiles = counting("tiles", None, cancel)
        with torch_threads(bundle._plan.threads):
            predictor = bundle._predictor(**settings, probabilities=probabilities)
            outcomes = predict_subjects(predictor, planned.ahead, folder, on_tile=between_tiles, outputs=outputs)
            for done, outcome in enumerate(outcomes, start=1):
                if outcome.error is not None:
                    failed[outcome.subject.id] = outcome.error
                elif outcome.path is not None and outcome.review is not None:
                    made[outcome.subject.id] = outcome.path
                    reviews.append(outcome.review)
                said(done, len(planned.ahead))
    urgent = tuple(sorted(reviews, key=lambda one: -one.need))
    return Predictions(folder, made, tuple(subject.id for subject in planned.done), failed, urgent)


def _subjects(
    inputs: str | Path | Sequence[str | Path] | Dataset,
    channels: Sequence[str],
    images: str | Mapping[str, str] | None,
) -> list[Subject]:
    if isinstance(inputs, Dataset):
        return list(inputs.subjects)
    paths = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    return find_subjects([Path(path) for path in paths], channels, images)


def _as_volume(scan: Any, channels: Sequence[str], *, resample: bool) -> tuple[Volume, tuple[Path, ...]]:
    """One scan with these channels, and the files that it was read from."""
    if isinstance(scan, str | Path):
        found = find_subjects([Path(scan)], channels)
        if len(found) != 1:
            raise DatasetError(f"'{scan}' holds {len(found)} scans", fix="give one, or say with out= where labels go")
        scan = found[0]
    elif isinstance(scan, Mapping) and scan and all(isinstance(one, str | Path) for one in scan.values()):
        scan = Subject("scan", {name: Path(file) for name, file in scan.items()})
    if isinstance(scan, Subject):
        chosen = replace(scan.with_channels(channels), resample=resample)
        return load_scan(chosen), chosen.files[: len(dict.fromkeys(chosen.scans.values()))]
    if not isinstance(scan, Mapping):
        return _checked(volume_of(scan)), ()
    volumes = [_checked(_volume_of_channel(scan[name])) for name in _chosen(scan, channels)]
    for name, volume in zip(channels, volumes, strict=True):
        check_grids("the scan", name, volume.grid, channels[0], volumes[0].grid)
    return Volume(np.concatenate([volume.voxels for volume in volumes]), volumes[0].grid), ()


def _volume_of_channel(channel: Channel) -> Volume:
    from delineate.io.formats import read_volume

    return read_volume(Path(channel)) if isinstance(channel, str | Path) else volume_of(channel)


def _chosen(scan: Mapping[str, Any], channels: Sequence[str]) -> list[str]:
    """Names of the channels in a mapping; the only scan in it may have any name."""
    images = [name for name, one in scan.items() if getattr(one, "type", "") != "label"]  # as TorchIO's subjects have
    if len(channels) == len(images) == 1:
        return images
    if missing := [name for name in channels if name not in scan]:
        raise MissingFile(
            f"the scan has channels {list(scan)}, lacks {missing}", fix="add them, or rename its channels"
        )
    return list(channels)


def _checked(volume: Volume) -> Volume:
    """A volume from memory, which nobody has looked at yet. Raises :class:`BadVoxels`."""
    if volume.voxels.dtype.kind == "f" and not np.isfinite(volume.voxels).all():
        raise BadVoxels("the scan has voxels that are not finite", fix="fill them, or export it again")
    return volume
