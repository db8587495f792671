"""Bundles ready to predict: opened once, applied to any number of scans."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from delineate import bundle as contents
from delineate.api.prediction import Prediction
from delineate.api.progress import Cancel, Progress, check, counting
from delineate.compute import ComputePlan, Engine, Precision, plan_compute, torch_threads
from delineate.core.subject import Subject
from delineate.core.tables import html_table
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.datasets.dataset import SAME_GRID_MM, Dataset, check_grids, load_scan, resampled
from delineate.datasets.series_rules import Images
from delineate.errors import BundleError, DatasetError, DelineateError, MissingFile, RecipeError
from delineate.evaluation.card import card_of
from delineate.inference.batch import carry_out, find_subjects, unseen_by, with_bundle_channels
from delineate.inference.outputs import Outputs, Picture
from delineate.inference.predictor import Predictor
from delineate.inference.review import Review
from delineate.interop import Image, TorchIOImage, volume_of
from delineate.io.exports import check_label_format
from delineate.io.surfaces import check_surface_format
from delineate.io.voxels import check_finite
from delineate.metrics.quantities import Measurement, QuantityMap, quantity_map
from delineate.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Bundle", "Predictions", "Scan", "load", "predict"]

Channel = str | Path | Volume | Image
Scan = Channel | Subject | Mapping[str, Channel]
"""A file or DICOM folder, a volume or another library's image, a subject, or a mapping from channels to scans."""


def load(
    folder: str | Path,
    *more: str | Path,
    device: str = "auto",
    precision: Precision = "auto",
    engine: Engine = "auto",
) -> Bundle:
    """Open a bundle, or the one in a run folder. Several form an ensemble, whose probabilities are averaged.

    >>> import delineate
    >>> delineate.load("run/bundle").predict("scan.nii.gz").save("seg.nii.gz")
    [PosixPath('seg.nii.gz')]

    ``device`` is auto, cpu, cuda, cuda:1 or mps; ``precision`` is auto, fp32, bf16 or fp16; ``engine`` is torch,
    openvino, or auto, which uses OpenVINO on a CPU once a trial has shown that it is faster.

    Raises :class:`~delineate.errors.BundleError` if a bundle is not as it was saved, or if the bundles of an ensemble
    differ in targets or channels.
    """
    found = [contents.Bundle.load(contents.bundle_folder(Path(one))) for one in (folder, *more)]
    return Bundle(found, device=device, precision=precision, engine=engine)


class Bundle:
    """A trained network or an ensemble, with everything needed to apply it; opened by :func:`load`.

    >>> import delineate
    >>> bundle = delineate.load("run")
    >>> bundle
    Bundle(ball from image)
    >>> prediction = bundle.predict(delineate.read("scan.nii.gz"))
    >>> prediction.label.voxels.shape
    (16, 16, 12)
    >>> type(bundle.network).__module__.split(".")[0]
    'delineate'

    The network is built for the first prediction and kept for later ones. Several threads may use one bundle: it
    segments one scan at a time.
    """

    def __init__(
        self,
        opened: Sequence[contents.Bundle],
        *,
        device: str = "auto",
        precision: Precision = "auto",
        engine: Engine = "auto",
    ) -> None:
        self._opened = tuple(opened)
        self._device, self._precision, self._engine = device, precision, engine
        self._last: tuple[dict[str, Any], Predictor] | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    @property
    def folders(self) -> tuple[Path, ...]:
        """The bundle's folder, or one for each bundle of an ensemble."""
        return tuple(one.folder for one in self._opened if one.folder is not None)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the training; for an ensemble, the first bundle's."""
        return self._opened[0].recipe

    @property
    def targets(self) -> Targets:
        """What the bundle segments."""
        return self._opened[0].targets

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that a scan must have, in order."""
        return self._opened[0].channels

    @cached_property
    def networks(self) -> tuple[nn.Module, ...]:
        """Each network with its weights, in evaluation mode, on the CPU.

        They are yours to change: :meth:`predict` always uses the saved weights.
        """
        return tuple(one.trained_network() for one in self._opened)

    @property
    def network(self) -> nn.Module:
        """The trained network, a plain ``torch.nn.Module``; for an ensemble, use :attr:`networks`."""
        if len(self._opened) > 1:
            raise BundleError(f"an ensemble has {len(self._opened)} networks", fix="choose one of .networks")
        return self.networks[0]

    @property
    def card(self) -> str:
        """The model card as Markdown: what the author wrote in ``card.md``, with the facts as they are now.

        For an ensemble, the cards of its bundles one after another. Raises :class:`~delineate.errors.BundleError` if
        a ``card.md`` cannot be read.
        """
        return "\n\n".join(card_of(one) for one in self._opened)

    def seen(self, subject: str) -> bool:
        """Whether the subject of this name was used to train or to select the weights.

        Raises :class:`~delineate.errors.UnknownKey` if the names were hidden with a key other than the user's.
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
        that are mirrored at test time, default to the recipe's. ``mirrored`` measures how well the predictions
        for the scan and its mirror image agree; ``probabilities`` keeps the probabilities.

        ``progress`` counts tiles. ``cancel`` is checked between tiles; once it is set,
        :class:`~delineate.errors.Cancelled` is raised. Also raises :class:`~delineate.errors.MissingFile` for a
        missing channel, and any error of reading the scan.
        """
        check(cancel)
        volume, files = _as_volume(scan, self.channels, resample=self.recipe.data.resample_channels)
        with self._lock, torch_threads(self._plan.threads):
            predictor = self._predictor(overlap=overlap, flips=flips, mirrored=mirrored, probabilities=probabilities)
            odd = predictor.oddities(volume)
            found = predictor.predict(volume, counting("tiles", progress, cancel))
        return Prediction(
            **vars(found),
            scan=volume,
            targets=self.targets,
            channels=self.channels,
            unusual=tuple(oddity.text for oddity in odd),
            files=files,
            legend=self.recipe.data.legend,
            about={"weights_sha256": [one.weights_sha256 for one in self._opened]},
        )

    def __repr__(self) -> str:
        ensemble = f"ensemble of {len(self._opened)}: " if len(self._opened) > 1 else ""
        return f"Bundle({ensemble}{', '.join(self.targets.names)} from {', '.join(self.channels)})"

    @cached_property
    def _plan(self) -> ComputePlan:
        # Compiling takes longer than predicting some hundreds of scans.
        return plan_compute(device=self._device, precision=self._precision, compile="off", engine=self._engine)

    def _check_opened_for(self, **asked: str) -> None:
        """Raise :class:`RecipeError` for a device, precision or engine other than the one that it was opened for."""
        own = {"device": self._device, "precision": self._precision, "engine": self._engine}
        if other := [name for name, value in asked.items() if value not in ("auto", own[name])]:
            raise RecipeError(
                f"the bundle is open, with {', '.join(f'{name} {own[name]}' for name in other)}",
                fix=f"open it with {', '.join(f'{name}={asked[name]!r}' for name in other)}, or give its folder",
            )

    def _predictor(self, **settings: Any) -> Predictor:
        """The last predictor, if the settings are the same: building the networks takes longer than a small scan."""
        if self._last is None or self._last[0] != settings:
            self._last = settings, Predictor(self._opened, self._plan, **settings)
        return self._last[1]


@dataclass(frozen=True)
class Predictions:
    """Results for many scans by subject: ``made`` now, ``kept`` from before, or ``failed`` with the error."""

    folder: Path
    made: Mapping[str, Path] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    failed: Mapping[str, DelineateError] = field(default_factory=dict)
    reviews: tuple[Review, ...] = ()
    """The review of each prediction, most urgent first."""
    measured: Mapping[str, Mapping[str, Mapping[str, Measurement]]] = field(default_factory=dict)
    """What was measured this time, by subject, target, and channel or quantity."""

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
    engine: Engine = "auto",
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
    images: Images | None = None,
    unseen: bool = False,
    quantity: str | None = None,
    margin_mm: float = 0.0,
    threshold: float | None = None,
    maps: str | Path | None = None,
    overwrite: bool = False,
    overlap: float | None = None,
    flips: str | None = None,
    mirrored: bool = False,
    probabilities: bool = False,
    surfaces: str | None = None,
    preview: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    engine: Engine = "auto",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Predictions: ...
def predict(
    bundle: str | Path | Bundle | Sequence[str | Path],
    inputs: Any,
    out: str | Path | None = None,
    *,
    format: str = "nii.gz",
    images: Images | None = None,
    unseen: bool = False,
    quantity: str | None = None,
    margin_mm: float = 0.0,
    threshold: float | None = None,
    maps: str | Path | None = None,
    overwrite: bool = False,
    overlap: float | None = None,
    flips: str | None = None,
    mirrored: bool = False,
    probabilities: bool = False,
    surfaces: str | None = None,
    preview: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    engine: Engine = "auto",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Prediction | Predictions:
    """Segment one scan or, with ``out``, all scans in folders and files into that folder. Not for diagnosis.

    >>> import delineate
    >>> delineate.predict("run", "scan.nii.gz").label.voxels.shape
    (16, 16, 12)
    >>> sorted(delineate.predict("run", "scans", out="segmentations").made)
    ['case0', 'case1', 'case2', 'case3']

    ``bundle`` is an open bundle, the folder of a bundle or a run, or several of these as an ensemble. One scan is
    anything that :meth:`Bundle.predict` takes; the shared settings are explained there.

    With ``out``, existing predictions by the same bundle are kept, unless ``overwrite`` is set; a scan that cannot
    be read does not stop the rest; ``review.csv`` in the folder lists what to look at first. ``format`` is nii.gz,
    mha, nrrd, seg.nrrd, vtk, vti, dcm, rtstruct.dcm, or a plugin's format; ``images`` are file patterns of the
    channels, or rules for DICOM series; ``unseen`` leaves out subjects that were used to train the bundle or to select
    its weights; ``probabilities`` go to a folder of that name, and so do ``surfaces``, which are stl, obj, vtp or glb.
    ``preview`` writes a picture of each scan with its targets, ``<subject>.preview.png``. Both are written for existing
    labels too.

    The targets of every label, existing ones too, are measured into ``measurements.csv`` and ``.json`` in the folder:
    volume, bounding box, and each channel within them. With ``quantity``, such as ``fat_fraction``, so is that, as
    :meth:`Prediction.measure` measures it: a channel of the scans, or what is read from ``maps``, a folder with a
    file for each subject. A ``.dcm`` comes with a DICOM report of the measurements.

    Once ``cancel`` is set, :class:`~delineate.errors.Cancelled` is raised; labels finished by then are kept,
    and the next call resumes from there. What has no meaning, such as ``overwrite`` without ``out`` or another
    ``device`` for an open bundle, raises :class:`~delineate.errors.RecipeError`.
    """
    if isinstance(bundle, Bundle):
        bundle._check_opened_for(device=device, precision=precision, engine=engine)
    else:
        folders = [bundle] if isinstance(bundle, str | Path) else list(bundle)
        bundle = load(*folders, device=device, precision=precision, engine=engine)
    settings: dict[str, Any] = {"overlap": overlap, "flips": flips, "mirrored": mirrored}
    if out is None:
        if isinstance(inputs, Dataset):
            raise DatasetError("a data set holds many scans", fix="give the folder for the labels as out=")
        if quantity is not None or maps is not None or threshold is not None or margin_mm:
            raise RecipeError("a quantity is measured in a prediction", fix="call its .measure, or give out=")
        if surfaces is not None or preview:
            raise RecipeError("surfaces and pictures are files", fix="save the prediction as .stl, or give out=")
        asked = {"format": format != "nii.gz", "images": images is not None, "unseen": unseen, "overwrite": overwrite}
        if lost := [name for name, given in asked.items() if given]:
            raise RecipeError(f"{', '.join(lost)} would not be heeded", fix="give the folder for the labels as out=")
        return bundle.predict(inputs, **settings, probabilities=probabilities, progress=progress, cancel=cancel)
    check_label_format(format)
    if surfaces is not None:
        check_surface_format(surfaces)
    picture: Picture | None = None
    if preview:
        from delineate.reporting.overlays import picture_of_label  # draws with matplotlib, slow to import

        picture = picture_of_label
    check(cancel)
    read_within = quantity_map(quantity, margin_mm, threshold, maps)
    subjects = _subjects(inputs, bundle.channels, images, read_within)
    parts, folder = bundle._opened, Path(out)
    kept_in = folder / "probabilities" if probabilities else None
    outputs = Outputs(folder, f".{format}", kept_in, parts, settings, read_within, surfaces or "", picture)
    kept = [path for subject in subjects for path in subject.files]
    kept += [path for place in bundle.folders for path in place.iterdir()]
    chosen = unseen_by(parts, subjects) if unseen else subjects
    planned = outputs.plan(chosen, kept, overwrite=overwrite)
    failed: dict[str, DelineateError] = {}
    made: dict[str, Path] = {}
    reviews: list[Review] = []
    measured: dict[str, dict[str, dict[str, Measurement]]] = {}
    said = counting("scans", progress, cancel)

    def predictor() -> Predictor:
        return bundle._predictor(**settings, probabilities=probabilities)

    with bundle._lock, torch_threads(bundle._plan.threads):
        outcomes = carry_out(planned, outputs, predictor, on_tile=counting("tiles", None, cancel))
        for done, outcome in enumerate(outcomes, start=1):
            if outcome.error is not None:
                failed[outcome.subject.id] = outcome.error
            for target, read, measurement in outcome.measured:
                by_target = measured.setdefault(outcome.subject.id, {})
                by_target.setdefault(target, {})[read.channel] = measurement
            if outcome.path is not None and outcome.review is not None:
                made[outcome.subject.id] = outcome.path
                reviews.append(outcome.review)
            said(done, planned.total)
    urgent = tuple(sorted(reviews, key=lambda one: -one.need))
    return Predictions(folder, made, tuple(subject.id for subject in planned.done), failed, urgent, measured)


def _subjects(
    inputs: str | Path | Sequence[str | Path] | Dataset,
    channels: Sequence[str],
    images: Images | None,
    quantity: QuantityMap | None,
) -> list[Subject]:
    if isinstance(inputs, Dataset):
        if images is not None:
            raise RecipeError("images are patterns for a folder's files", fix="give them to delineate.open_dataset")
        return with_bundle_channels(inputs.subjects, channels, quantity)
    paths = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    return find_subjects([Path(path) for path in paths], channels, images, quantity)


def _as_volume(scan: Any, channels: Sequence[str], *, resample: bool) -> tuple[Volume, tuple[Path, ...]]:
    """One scan with these channels, and the files it was read from."""
    if isinstance(scan, str | Path):
        found = find_subjects([Path(scan)], channels)
        if len(found) != 1:
            raise DatasetError(
                f"'{scan}' holds {len(found)} scans", fix="give one scan, or a folder for the labels as out="
            )
        scan = found[0]
    elif (
        isinstance(scan, Mapping)
        and scan
        and not isinstance(scan, TorchIOImage)
        and all(isinstance(one, str | Path) for one in scan.values())
    ):
        scan = Subject("scan", {name: Path(file) for name, file in scan.items()})
    if isinstance(scan, Subject):
        chosen = replace(scan.with_channels(channels), resample=resample)
        return load_scan(chosen), chosen.files[: len(dict.fromkeys(chosen.scans.values()))]
    if not isinstance(scan, Mapping) or isinstance(scan, TorchIOImage):
        return _checked(volume_of(scan)), ()
    volumes = [_checked(_volume_of_channel(scan[name])) for name in _chosen(scan, channels)]
    grid = volumes[0].grid
    for i, name in enumerate(channels):
        if resample and not volumes[i].grid.matches(grid, SAME_GRID_MM):
            volumes[i] = resampled(volumes[i], grid)
        else:
            check_grids("the scan", name, volumes[i].grid, channels[0], grid)
    return Volume(np.concatenate([volume.voxels for volume in volumes]), grid), ()


def _volume_of_channel(channel: Channel) -> Volume:
    from delineate.io.formats import read_volume

    return read_volume(Path(channel)) if isinstance(channel, str | Path) else volume_of(channel)


def _chosen(scan: Mapping[str, Any], channels: Sequence[str]) -> list[str]:
    """Names of the channels in a mapping; a single scan may have any name."""
    images = [name for name, one in scan.items() if getattr(one, "type", "") != "label"]  # as TorchIO's subjects have
    if len(channels) == len(images) == 1:
        return images
    if missing := [name for name in channels if name not in scan]:
        raise MissingFile(
            f"the scan has channels {list(scan)} but lacks {missing}", fix="add them, or rename its channels"
        )
    return list(channels)


def _checked(volume: Volume) -> Volume:
    """A volume from memory, which has not been checked yet. Raises :class:`BadVoxels`."""
    check_finite("the scan", volume.voxels)
    return volume
