"""Heads: a folded brain with ventricles and a tumour or white matter lesions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from delineate.datasets.phantoms.anatomy import (
    Anatomy,
    Ellipsoid,
    Folds,
    Part,
    Point,
    Rough,
    Shape,
    SmoothField,
    moved,
    sized,
)

CRANIAL, BRAIN, WHITE = "inside the skull", "brain", "white matter"
EDEMA, NON_ENHANCING, ENHANCING = "edema", "non_enhancing", "enhancing"
LESION, OTHER = "lesion", "other pathology"


def with_tumour(rng: np.random.Generator) -> Anatomy:
    """One tumour: edema along the white matter, containing an enhancing rim around a core that does not enhance."""
    head = _Head.draw(rng, age=rng.uniform(40, 75))
    radius = float(np.clip(rng.lognormal(np.log(19), 0.25), 11, 30))
    side = rng.choice((-1.0, 1.0))
    centre = moved((0, 0, 0), (side * rng.uniform(26, 38), rng.uniform(-38, 38), rng.uniform(5, 38)))

    def rough(size: float, deviation_mm: float, shift: float = 0.0) -> Rough:
        radii = radius * size * rng.uniform(0.85, 1.15, size=3)
        shape = Ellipsoid(moved(centre, rng.normal(0, shift, size=3)), moved((0, 0, 0), radii))
        return Rough(shape, SmoothField.draw(rng, (12.0, 40.0)), deviation_mm)

    spread = rough(rng.uniform(1.55, 2.0), 0.22 * radius, 3)
    rim, core = rough(0.92, 0.1 * radius), rough(rng.uniform(0.62, 0.8), 0.1 * radius)
    parts = [
        # Edema stays in the white matter; the tumour itself grows through anything.
        Part("edema", (spread,), EDEMA, within=WHITE),
        Part("edema", (rough(1.05, 0.1 * radius),), EDEMA, within=BRAIN),
        Part("brain tumour", (rim,), ENHANCING, within=EDEMA),
        Part("tumour core", (core,), NON_ENHANCING, within=ENHANCING),
    ]
    return head.anatomy(parts)


def with_lesions(rng: np.random.Generator) -> Anatomy:
    """White matter lesions, periventricular and deep, few or many; one brain in eight has an old infarct."""
    age = rng.uniform(55, 85)
    head = _Head.draw(rng, age)
    load = float(np.clip(rng.lognormal(0.0, 0.8), 0.15, 4.0))
    shapes: list[Shape] = []
    for side in (-1, 1):
        for tip, along in (((11, 37, 19), 7.0), ((19, -42, 13), 9.0)):  # caps on the horns
            radii = (along * 0.8 * load**0.3, along * load**0.35, along * 0.9 * load**0.3)
            shapes.append(Ellipsoid(moved((side * tip[0], tip[1], tip[2]), rng.normal(0, 2, size=3)), radii))
        for y in np.arange(-28, 33, 9):  # a band along the body
            thick = rng.uniform(0.6, 2.2) * load**0.5
            shapes.append(
                Ellipsoid((side * 16.0, y + rng.normal(0, 2), 25 + rng.normal(0, 2)), (thick + 2, 6, thick + 1))
            )
    for _ in range(rng.poisson(14 * load)):
        side = rng.choice((-1.0, 1.0))
        place = (side * rng.uniform(18, 40), rng.uniform(-52, 48), rng.uniform(12, 48))
        radius = float(np.clip(rng.lognormal(np.log(2.3), 0.45), 1.2, 8))
        shapes.append(Ellipsoid(moved((0, 0, 0), place), moved((0, 0, 0), radius * rng.uniform(0.7, 1.5, size=3))))
    parts = [
        Part("brain lesion", (Rough(shape, SmoothField.draw(rng, (6.0, 18.0)), 0.6),), LESION, within=WHITE)
        for shape in shapes
    ]
    if rng.random() < 0.125:
        place = (rng.choice((-1.0, 1.0)) * rng.uniform(30, 45), rng.uniform(-40, 40), rng.uniform(10, 35))
        hole = Rough(Ellipsoid(moved((0, 0, 0), place), (11, 15, 12)), SmoothField.draw(rng, (10.0, 25.0)), 2.5)
        parts.append(Part("infarct", (hole,), OTHER, within=BRAIN))
    return head.anatomy(parts)


@dataclass(frozen=True, eq=False)
class _Head:
    """What all heads have: parts painted before those that a disease adds, and parts painted after them."""

    below: tuple[Part, ...]
    over: tuple[Part, ...]
    deformation: SmoothField
    deformation_mm: float

    def anatomy(self, disease: list[Part]) -> Anatomy:
        return Anatomy((*self.below, *disease, *self.over), self.deformation, self.deformation_mm)

    @classmethod
    def draw(cls, rng: np.random.Generator, age: float) -> _Head:
        size = rng.normal(1, 0.04)
        wide = 1 + (age - 55) / 60  # ventricles and sulci widen with age
        cerebrum = Ellipsoid((0, 0, 14), sized((64, 82, 60), size), 2.3)
        sulci = Folds(cerebrum, SmoothField.draw(rng, (13.0, 28.0)), 1.2 + 0.8 * wide, 17, 3.4)
        cortex = Folds(cerebrum, sulci.field, sulci.width_mm + 6.0, 20, 3.4)
        fissure = Ellipsoid((0, 0, 42), (1.2 * wide, 84, 44), 4)
        floor = Ellipsoid((0, 4, -56), (70, 92, 24), 3)
        cerebellum = Ellipsoid((0, -44, -40), sized((48, 30, 24), size), 2.2)
        leaves = Folds(cerebellum, SmoothField.draw(rng, (7.0, 12.0)), 1.6, 16, 2.0)
        stem = Ellipsoid((0, -16, -58), (12, 13, 46), 2, (0, -12))
        below = (
            *_face_and_skull(rng, size),
            Part("grey matter", (cerebrum,), BRAIN, within=CRANIAL, outside=((floor, 0.0),)),
            Part("grey matter", (cerebellum,), BRAIN, within=CRANIAL),
            Part("white matter", (stem,), BRAIN),
            Part(
                "white matter",
                (cerebrum,),
                WHITE,
                within=BRAIN,
                inside=((cerebrum, 3.2),),
                outside=((cortex, 0.0), (floor, 3.2), (fissure, 3.2)),
            ),
            Part("white matter", (Ellipsoid((0, -44, -40), sized((38, 22, 16), size)),), within=BRAIN),
            *_deep_grey(rng, size),
            Part("csf", (sulci,), within=CRANIAL),
            Part("csf", (leaves,), within=CRANIAL),
            Part("csf", (fissure,), within=CRANIAL, inside=((cerebrum, -2.0),)),
        )
        over = tuple(Part("csf", shapes, within=CRANIAL) for shapes in _ventricles(rng, size, wide))
        return cls(below, over, SmoothField.draw(rng, (60.0, 200.0), components=3), rng.uniform(1.5, 2.8))


def _face_and_skull(rng: np.random.Generator, size: float) -> tuple[Part, ...]:
    fat = rng.uniform(3, 6)

    def head(inset_mm: float) -> Ellipsoid:
        radii = sized((76, 95, 78), size)
        return Ellipsoid((0, 0, 6), moved(radii, (-inset_mm, -inset_mm, -inset_mm)), 2.25)

    def neck(inset_mm: float) -> Ellipsoid:
        return Ellipsoid((0, -8, -100), (66 - inset_mm, 78 - inset_mm, 88), 2.6)

    eyes = [side * 31.0 for side in (-1, 1)]
    return (
        Part("skin", (head(0), neck(0))),
        Part("fat", (head(1.8), neck(1.8))),
        Part("muscle", (neck(8),)),
        Part("bone", (head(fat + 1.8),)),
        Part("marrow", (head(fat + 3.6),)),
        Part("bone", (head(fat + 5.2),)),
        Part("air", (Ellipsoid((0, 66, -46), (14, 22, 20), 3),)),
        Part("bone", (Ellipsoid((0, 20, -52), (44, 40, 10), 3),)),
        Part("csf", (head(fat + 6.8),), CRANIAL),
        *(Part("fat", (Ellipsoid((x, 68, -34), (18, 22, 16)),)) for x in eyes),
        *(Part("fluid", (Ellipsoid((x, 76, -34), (12, 12, 12)),)) for x in eyes),
    )


def _deep_grey(rng: np.random.Generator, size: float) -> list[Part]:
    nuclei: list[tuple[Point, Point, tuple[float, float]]] = [
        ((12, -10, 10), (9, 15, 10), (-20, 0)),  # thalamus
        ((25, 6, 8), (5, 16, 11), (-12, 0)),  # putamen
        ((13, 20, 16), (5, 11, 9), (-10, 0)),  # caudate
    ]
    return [
        Part(
            "deep grey matter",
            (
                Ellipsoid(
                    moved((side * x, y, z), rng.normal(0, 0.8, size=3)), sized(radii, size), 2, (side * turn[0], 0)
                ),
            ),
            within=BRAIN,
        )
        for (x, y, z), radii, turn in nuclei
        for side in (-1, 1)
    ]


def _ventricles(rng: np.random.Generator, size: float, wide: float) -> list[tuple[Shape, ...]]:
    third: Shape = Ellipsoid((0, -2, 6), (1.6 * wide, 14, 9))
    fourth: Shape = Ellipsoid((0, -32, -36), (7, 4, 11))
    lateral: list[tuple[Shape, ...]] = []
    for side in (-1, 1):
        pieces = [
            ((9, 24, 20), (4.2, 13, 7.5), -12),  # frontal horn
            ((11, 2, 25), (4.5, 20, 5.5), 8),  # body
            ((17, -26, 18), (5.0, 15, 7.5), 20),  # atrium and occipital horn
            ((28, -12, -8), (3.2, 16, 4.0), 14),  # temporal horn
        ]
        for (x, y, z), radii, turn in pieces:
            grown = sized(radii, size * wide**0.5 * rng.normal(1, 0.06))
            lateral.append((Ellipsoid((side * x, y, z), grown, 2, (side * turn, 0)),))
    return [(third,), (fourth,), *lateral]
