"""Kinds of simulated scans: an anatomy, the scanners that image it, and what is delineated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from delineate.core.text import near
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.phantoms import abdomen, brain, pelvis
from delineate.datasets.phantoms.anatomy import Anatomy
from delineate.datasets.phantoms.scanner import Scanner
from delineate.datasets.phantoms.tissues import Sequence
from delineate.errors import RecipeError


@dataclass(frozen=True, eq=False)
class Kind:
    """``values`` are label values by the anatomy's names, later ones on top; ``layout`` is the usual one.

    Patients take turns on the scanners, which are the sites. ``modality`` is "MR" or "CT".
    """

    name: str
    description: str
    draw: Callable[[np.random.Generator], Anatomy]
    scanners: tuple[Scanner, ...]
    values: Mapping[str, int]
    layout: str
    modality: str = "MR"
    ignored: tuple[str, ...] = ()

    @property
    def channels(self) -> tuple[str, ...]:
        return self.scanners[0].channels

    def scanner_of(self, patient: int) -> Scanner:
        return self.scanners[patient % len(self.scanners)]

    def simulate(self, seed: int, patient: int) -> tuple[Volume, LabelVolume, Anatomy]:
        """A patient's scan (C, X, Y, Z), label and anatomy: a function of kind, seed and number."""
        rng = np.random.default_rng((seed, patient))
        anatomy = self.draw(rng)
        return *self.scanner_of(patient).acquire(anatomy, self.values, rng), anatomy


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
            (Scanner("north", (320, 260, 72), (1.2, 1.2, 2.5), (_ARTERIAL,), noise=0.08, bias=0.15),),
            {abdomen.LIVER: 1, abdomen.TUMOUR: 2},
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
            (
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
            ),
            {abdomen.LIVER: 1},
            "msd",
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
