"""Kinds of simulated scans: an anatomy, the scanners that image it, and what is delineated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np

from delineate.core.text import near
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.phantoms import abdomen, brain, pelvis, thigh
from delineate.datasets.phantoms.anatomy import Anatomy
from delineate.datasets.phantoms.scanner import Scanner
from delineate.datasets.phantoms.tissues import Sequence
from delineate.errors import RecipeError


@dataclass(frozen=True, eq=False)
class Kind:
    """``values`` are label values by the anatomy's names, later ones on top; ``layout`` is the usual one.

    Patients take turns on the scanners, which are the sites. ``modality`` is "MR" or "CT". References keep
    ``margin_mm`` to their border, as a reader does who avoids voxels that are only partly inside.
    """

    name: str
    description: str
    draw: Callable[[np.random.Generator], Anatomy]
    scanners: tuple[Scanner, ...]
    values: Mapping[str, int]
    layout: str
    modality: str = "MR"
    ignored: tuple[str, ...] = ()
    margin_mm: float = 0.0

    @property
    def channels(self) -> tuple[str, ...]:
        return self.scanners[0].channels

    def scanner_of(self, patient: int) -> Scanner:
        return self.scanners[patient % len(self.scanners)]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(scanner.name for scanner in self.scanners)

    def patients(self, n: int, sites: Collection[str] | None = None) -> list[int]:
        """Numbers of the first ``n`` patients who are imaged at one of ``sites``, by default at any.

        Raises :class:`RecipeError`, listing all, for a site that there is not.
        """
        chosen = self.sites if sites is None else sites
        known = f"its sites are {', '.join(self.sites)}"
        if not chosen:
            raise RecipeError(f"no site of kind '{self.name}' is chosen", fix=known)
        for site in chosen:
            if site not in self.sites:
                raise RecipeError(f"kind '{self.name}' has no site '{site}'", fix=f"{known}{near(site, self.sites)}")
        return list(islice((i for i in count() if self.scanner_of(i).name in chosen), n))

    def coarser(self, factor: float) -> Kind:
        """The kind with ``factor`` times fewer voxels along each axis, over the same fields of view."""
        return replace(
            self, scanners=tuple(replace(scanner, coarse=factor * scanner.coarse) for scanner in self.scanners)
        )

    def simulate(self, seed: int, patient: int) -> tuple[Volume, LabelVolume, Anatomy]:
        """A patient's scan (C, X, Y, Z), label and anatomy: a function of kind, seed and number."""
        rng = np.random.default_rng((seed, patient))
        anatomy = self.draw(rng)
        scan, label = self.scanner_of(patient).acquire(anatomy, self.values, rng)
        if self.margin_mm:
            from scipy.ndimage import distance_transform_edt  # slow to import, seldom needed

            depth_mm = distance_transform_edt(label.voxels, sampling=label.grid.spacing_mm)
            label = LabelVolume(label.voxels * (depth_mm > self.margin_mm), label.grid)
        return scan, label, anatomy


def kind_named(name: str) -> Kind:
    """The kind of this name. Raises :class:`RecipeError`, listing all, if there is none."""
    if name not in KINDS:
        known = ", ".join(KINDS)
        raise RecipeError(f"there is no kind '{name}' of simulated scan", fix=f"known are {known}{near(name, KINDS)}")
    return KINDS[name]


_ARTERIAL = Sequence(
    "artery", "gradient echo", tr_ms=4.2, te_ms=2.0, flip_degrees=12, contrast=True, fat_suppression=0.9
)


def _dixon(tr_ms: float, te_ms: float, flip_degrees: float) -> tuple[Sequence, ...]:
    return tuple(Sequence(kind, kind, tr_ms, te_ms, flip_degrees) for kind in ("water", "fat"))


def _flair(tr_ms: float, te_ms: float, ti_ms: float) -> tuple[Sequence, ...]:
    return (Sequence("FLAIR", "inversion recovery", tr_ms, te_ms, ti_ms=ti_ms),)


def _t2(tr_ms: float, te_ms: float) -> tuple[Sequence, ...]:
    return (Sequence("T2", "spin echo", tr_ms, te_ms),)


_LIVERS = Scanner("north", (320, 260, 72), (1.2, 1.2, 2.5), (_ARTERIAL,), noise=0.08, bias=0.15)
_VOLUME = (
    Scanner("scanner1", (192, 160, 55), (2.0, 2.0, 5.0), _dixon(10, 4.6, 3), noise=0.012, bias=0.1),
    Scanner(
        "scanner2",
        (256, 192, 28),
        (1.5, 1.5, 5.0),
        _dixon(7.5, 3.2, 4),
        "LAS",
        field_tesla=3.0,
        noise=0.022,
        bias=0.3,
        gain=900,
    ),
)


def _single_slice(
    part: str,
    description: str,
    draw: Callable[[np.random.Generator], Anatomy],
    values: Mapping[str, int],
    height_mm: float,
) -> Kind:
    """A kind with one CT slice for each patient, without contrast agent, about ``height_mm`` above the middle."""
    scanner = Scanner(
        "ct",
        (256, 256, 1),
        (1.5, 1.5, 5.0),
        (Sequence("CT", "ct"),),
        centre_mm=(0.0, 0.0, height_mm),
        noise=13,
        oblique=False,
    )
    return Kind(f"ct-slice-{part}", description, draw, (scanner,), values, "msd", "CT")


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "abdomen",
            "Coarse abdomens on two scanners, for demonstrations: T1 with dark tumours, T2 with bright tumours.",
            abdomen.with_tumours,
            (
                Scanner(
                    "north",
                    (104, 84, 24),
                    (3.6, 3.6, 7.0),
                    (Sequence("MRI", "gradient echo", tr_ms=120, te_ms=4, flip_degrees=75),),
                    noise=0.06,
                ),
                Scanner(
                    "south",
                    (120, 96, 20),
                    (3.1, 3.1, 8.5),
                    (Sequence("MRI", "spin echo", tr_ms=2500, te_ms=80),),
                    "LAS",
                    noise=0.15,
                    bias=0.2,
                    gain=300,
                ),
            ),
            {abdomen.LIVER: 1, abdomen.TUMOUR: 2},
            "msd",
        ),
        Kind(
            "liver",
            "Livers with tumours on arterial-phase T1 gradient echo.",
            abdomen.with_tumours,
            (_LIVERS,),
            {abdomen.LIVER: 1, abdomen.TUMOUR: 2},
            "cases",
        ),
        Kind(
            "liver-tumour",
            "The same livers on arterial-phase MR, with their tumours alone delineated.",
            abdomen.with_tumours,
            (_LIVERS,),
            {abdomen.TUMOUR: 1},
            "cases",
        ),
        Kind(
            "liver-ct",
            "The same livers on portal-phase CT, with varying numbers of slices.",
            abdomen.with_tumours,
            (
                Scanner(
                    "ct",
                    (256, 256, 60),
                    (1.5, 1.5, 3.0),
                    (Sequence("CT", "ct"),),
                    slices=(40, 110),
                    noise=13,
                    oblique=False,
                ),
            ),
            {abdomen.LIVER: 1, abdomen.TUMOUR: 2},
            "lits",
            "CT",
        ),
        Kind(
            "liver-fat",
            "Livers on two scanners: water and fat images and the fat fraction in percent; a few have cysts.",
            abdomen.with_fat,
            _VOLUME,
            {abdomen.LIVER: 1},
            "msd",
        ),
        Kind(
            "liver-fat-fraction",
            "The same livers in a series for the fat fraction: thicker slices, the reference 5 mm inside the surface.",
            abdomen.with_fat,
            (
                replace(_VOLUME[0], shape=(196, 164, 34), spacing_mm=(1.95, 1.95, 6.0)),
                replace(_VOLUME[1], shape=(224, 168, 25), spacing_mm=(1.72, 1.72, 10.0)),
            ),
            {abdomen.LIVER: 1},
            "msd",
            margin_mm=5.0,
        ),
        _single_slice(
            "liver",
            "Single slices of livers on CT without contrast agent.",
            abdomen.without_contrast,
            {abdomen.LIVER: 1},
            5.0,
        ),
        _single_slice(
            "abdomen",
            "Single slices of abdomens below the liver on CT: fat under the skin and around the organs.",
            abdomen.without_contrast,
            {abdomen.VISCERAL: 1, abdomen.SUBCUTANEOUS: 2},
            -95.0,
        ),
        _single_slice(
            "thigh",
            "Single slices of both thighs on CT: fat, connective tissue between the muscles, and muscle.",
            thigh.with_fat,
            {thigh.FAT: 1, thigh.CONNECTIVE: 2, thigh.MUSCLE: 3},
            0.0,
        ),
        Kind(
            "brain-tumour",
            "Skull-stripped brains with a tumour: FLAIR, T1, T1 with contrast and T2.",
            brain.with_tumour,
            (
                Scanner(
                    "north",
                    (240, 240, 155),
                    (1.0, 1.0, 1.0),
                    (
                        Sequence("FLAIR", "inversion recovery", tr_ms=9000, te_ms=120, ti_ms=2440),
                        Sequence("T1", "gradient echo", tr_ms=8, te_ms=3, flip_degrees=18),
                        Sequence("T1c", "gradient echo", tr_ms=8, te_ms=3, flip_degrees=18, contrast=True),
                        Sequence("T2", "spin echo", tr_ms=4500, te_ms=100),
                    ),
                    centre_mm=(0, 0, 8),
                    noise=0.02,
                    bias=0.06,
                    stripped=brain.CRANIAL,
                    oblique=False,
                ),
            ),
            {brain.EDEMA: 1, brain.ENHANCING: 3, brain.NON_ENHANCING: 2},
            "brats",
        ),
        Kind(
            "white-matter",
            "FLAIR with white matter lesions, at three sites and an external one; other pathology in a few.",
            brain.with_lesions,
            (
                Scanner("site1", (240, 240, 48), (0.96, 0.95, 3.0), _flair(11000, 125, 2610), centre_mm=(0, 0, 8)),
                Scanner(
                    "site2",
                    (232, 256, 48),
                    (1.0, 1.0, 3.0),
                    _flair(9000, 82, 2440),
                    centre_mm=(0, 0, 8),
                    field_tesla=3.0,
                    bias=0.2,
                    gain=120,
                ),
                Scanner(
                    "site3",
                    (132, 256, 83),
                    (1.2, 0.98, 2.0),
                    _flair(8000, 126, 2330),
                    "RAS",
                    centre_mm=(0, 0, 0),
                    field_tesla=3.0,
                    noise=0.09,
                    gain=700,
                ),
                Scanner(
                    "external",
                    (256, 256, 22),
                    (0.9, 0.9, 6.5),
                    _flair(8500, 100, 2390),
                    "LAS",
                    centre_mm=(0, 0, 12),
                    noise=0.12,
                    bias=0.25,
                    gain=60,
                ),
            ),
            {brain.LESION: 1, brain.OTHER: 2},
            "wmh2017",
            ignored=(brain.OTHER,),
        ),
        Kind(
            "prostate",
            "T2 of prostates on four scanners that differ in resolution, contrast and coils.",
            pelvis.with_prostate,
            (
                Scanner("site1", (320, 320, 24), (0.625, 0.625, 3.6), _t2(4500, 105), noise=0.15, bias=0.12),
                Scanner("site2", (512, 512, 30), (0.4, 0.4, 3.0), _t2(6000, 120), noise=0.3, bias=0.15, gain=90),
                Scanner("site3", (256, 256, 36), (0.7, 0.7, 2.2), _t2(3500, 90), field_tesla=3.0, noise=0.2, bias=0.2),
                Scanner("site4", (256, 256, 28), (0.55, 0.55, 3.0), _t2(4200, 110), noise=0.35, bias=0.4, gain=400),
            ),
            {pelvis.PROSTATE: 1},
            "promise12",
        ),
    )
}
