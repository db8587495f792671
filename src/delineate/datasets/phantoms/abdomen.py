"""Abdomens: a liver with vessels, tumours or cysts, and its surroundings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from delineate.datasets.phantoms.anatomy import (
    BEYOND_MM,
    Anatomy,
    Ellipsoid,
    Part,
    Point,
    Rough,
    Shape,
    SmoothField,
    moved,
    sized,
)
from delineate.datasets.phantoms.tissues import TISSUES

LIVER, TUMOUR, CYST = "liver", "tumour", "cyst"
VISCERAL, SUBCUTANEOUS = "visceral_fat", "subcutaneous_fat"


def with_tumours(rng: np.random.Generator) -> Anatomy:
    """A liver of 1 to 2 l with one to four tumours of 7 to 26 mm radius, some with a necrotic core."""
    anatomy, lobes = _abdomen(rng)
    parts = []
    for _ in range(rng.integers(1, 5)):
        shape = _blob(rng, lobes, float(np.clip(rng.lognormal(np.log(12), 0.4), 7, 26)))
        rough = Rough(shape, SmoothField.draw(rng, (12.0, 40.0)), 0.1 * min(shape.radii_mm))
        parts.append(Part("liver tumour", (rough,), TUMOUR, within=LIVER))
        if min(shape.radii_mm) > 12 and rng.random() < 0.6:
            core = Ellipsoid(shape.centre_mm, sized(shape.radii_mm, rng.uniform(0.35, 0.6)))
            parts.append(Part("necrosis", (Rough(core, SmoothField.draw(rng, (10.0, 25.0)), 1.5),), within=TUMOUR))
    return _with_parts(anatomy, parts)


def with_fat(rng: np.random.Generator) -> Anatomy:
    """A liver with a fat fraction of 1 to 40 % that differs by patient; one in five has cysts."""
    anatomy, lobes = _abdomen(rng)
    share = float(np.clip(rng.lognormal(np.log(0.055), 0.85), 0.01, 0.4))
    parts = []
    if rng.random() < 0.2:
        for _ in range(rng.integers(1, 4)):
            parts.append(Part("cyst", (_blob(rng, lobes, rng.uniform(7, 22)),), CYST, within=LIVER))
    tissues = {"liver": replace(TISSUES["liver"], fat=share)}
    return replace(_with_parts(anatomy, parts), tissues=tissues)


def without_contrast(rng: np.random.Generator) -> Anatomy:
    """A liver without lesions, and fat under the skin and around the organs, as CT sees them before contrast agent."""
    anatomy, _ = _abdomen(rng)
    skin, fat, muscle, cavity, *others = anatomy.parts
    named = (skin, replace(fat, name=SUBCUTANEOUS), muscle, replace(cavity, name=VISCERAL), *others)
    hounsfield = {"blood": 45, "veins": 42, "liver": rng.normal(60, 5), "spleen": 50, "kidney": 32}
    tissues = {name: replace(TISSUES[name], hounsfield=float(value)) for name, value in hounsfield.items()}
    return replace(anatomy, parts=named, tissues=tissues)


def _with_parts(anatomy: Anatomy, parts: list[Part]) -> Anatomy:
    """The anatomy with ``parts`` painted after the liver's vessels and before whatever covers the liver."""
    *before, gallbladder = anatomy.parts
    return replace(anatomy, parts=(*before, *parts, gallbladder))


def _abdomen(rng: np.random.Generator) -> tuple[Anatomy, tuple[Ellipsoid, Ellipsoid]]:
    """An abdomen about 330 × 230 mm across, with the liver on the patient's right, and the liver's lobes."""
    scale = rng.normal(1, 0.05)
    width, depth = scale * rng.normal(165, 8), scale * rng.normal(115, 7)
    fat = rng.uniform(10, 24)
    wall = Ellipsoid((0, 4, 0), (width - fat - 9, depth - fat - 8, BEYOND_MM), 2.4)
    shift = rng.normal(0, (5, 5, 12))
    size = scale * rng.normal(0.91, 0.06)
    turn = (rng.normal(0, 8), rng.normal(0, 8))
    right = Ellipsoid(moved((width - fat - 85, 0, 5), shift), sized((74, 84, 78), size), 2.2, turn)
    left = Ellipsoid(moved((8, 42, 28), shift), sized((rng.normal(68, 9), 34, 42), size), 2, turn)
    fissure = Ellipsoid(moved((22, 34, -8), shift), (3, 22, 30), 2, (25, 0))
    parts = (
        Part("skin", (Ellipsoid((0, 0, 0), (width + 2, depth + 2, BEYOND_MM), 2.4),)),
        Part("fat", (Ellipsoid((0, 0, 0), (width, depth, BEYOND_MM), 2.4),)),
        Part("muscle", (Ellipsoid((0, 2, 0), (width - fat, depth - fat, BEYOND_MM), 2.4),)),
        Part("visceral fat", (wall,)),
        *_spine(rng, depth),
        *_ribs(rng, width - fat, depth - fat),
        *_other_organs(rng, width - fat, scale),
        Part("liver", (right, left), LIVER, inside=((wall, 5.0),), outside=((fissure, 0.0),)),
        *(Part("veins", shapes, within=LIVER) for shapes in _vessels(rng, right, left)),
        Part("fluid", (Ellipsoid(moved((42, 38, -32), shift), (12, 17, 24), 2, (30, 20)),)),  # gallbladder
    )
    deformation = SmoothField.draw(rng, (70.0, 240.0), components=3)
    return Anatomy(parts, deformation, rng.uniform(3.0, 5.0)), (right, left)


def _spine(rng: np.random.Generator, depth: float) -> tuple[Part, ...]:
    back = 45 - depth  # y of the spine's centre
    start = rng.uniform(0, 32)
    discs = tuple(Ellipsoid((0, back, z + start), (20, 16, 4), 3) for z in range(-288, 289, 32))
    return (
        Part("muscle", (Ellipsoid((34, back - 14, 0), (28, 20, BEYOND_MM), 2.5),)),
        Part("muscle", (Ellipsoid((-34, back - 14, 0), (28, 20, BEYOND_MM), 2.5),)),
        Part("bone", (Ellipsoid((0, back - 28, 0), (9, 22, BEYOND_MM), 2),)),
        Part("bone", (Ellipsoid((0, back, 0), (23, 19, BEYOND_MM), 2.5),)),
        Part("marrow", (Ellipsoid((0, back, 0), (21, 17, BEYOND_MM), 2.5),)),
        *(Part("gut", (disc,)) for disc in discs),
        Part("fat", (Ellipsoid((0, back - 24, 0), (11, 8, BEYOND_MM)),)),
        Part("fluid", (Ellipsoid((0, back - 24, 0), (8, 6.5, BEYOND_MM)),)),
        Part("blood", (Ellipsoid((-9, back + 28, 0), (10, 10, BEYOND_MM)),)),
        Part("veins", (Ellipsoid((16, back + 27, 0), (12, 9, BEYOND_MM)),)),
    )


def _ribs(rng: np.random.Generator, width: float, depth: float) -> list[Part]:
    """Ribs: where an axial plane cuts them, short bars around the chest wall, lower in front."""
    ribs = []
    for angle in np.arange(-165, 196, 26) + rng.uniform(-6, 6):
        radians = np.radians(angle)
        if abs(angle) < 32 or 60 < angle < 120 or angle < -150:
            continue
        for k in range(-6, 7):
            place = (np.cos(radians) * (width - 5), 2 + np.sin(radians) * (depth - 5), 28 * k - 60 * np.sin(radians))
            bar = Ellipsoid(moved((0, 0, 0), place), (12, 4.5, 6), 2, (angle + 90, 0))
            ribs += [Part("bone", (bar,)), Part("marrow", (replace(bar, radii_mm=(10, 2.8, 4.2)),))]
    return ribs


def _other_organs(rng: np.random.Generator, width: float, scale: float) -> list[Part]:
    def near(x: float, y: float, z: float) -> Point:
        return moved((x, y, z), rng.normal(0, 4, size=3))

    def organ(
        tissue: str, centre: Point, radii: Point, turn: tuple[float, float] = (0, 0), rough_mm: float = 0
    ) -> Part:
        shape: Shape = Ellipsoid(centre, radii, 2, turn)
        return Part(tissue, (Rough(shape, SmoothField.draw(rng, (18.0, 50.0)), rough_mm) if rough_mm else shape,))

    loops = [
        organ(
            ("gut", "full gut")[loop % 2],
            (rng.uniform(-105, 85), rng.uniform(-15, 75), rng.uniform(-130, -5)),
            (rng.uniform(18, 36), rng.uniform(12, 18), rng.uniform(12, 24)),
            (rng.uniform(-70, 70), 0),
            2.0,
        )
        for loop in range(24)
    ]
    return [
        *loops,
        organ("lung", near(65, 0, 155), sized((70, 82, 80), scale)),
        organ("lung", near(-70, 0, 145), sized((68, 82, 82), scale)),
        organ("kidney", near(60, -42, -55), sized((27, 24, 52), scale), (25, 8)),
        organ("visceral fat", near(50, -40, -55), (9, 8, 24)),
        organ("kidney", near(-62, -42, -40), sized((27, 24, 52), scale), (-25, 8)),
        organ("visceral fat", near(-52, -40, -40), (9, 8, 24)),
        organ("gut", near(-48, 42, 22), sized((42, 30, 46), scale), (25, 0), 2.0),  # stomach
        organ("full gut", near(-48, 40, 22), sized((36, 24, 40), scale), (25, 0), 2.0),
        organ("air", near(-46, 58, 26), (24, 9, 22)),
        organ("spleen", near(46 - width, -28, 22), sized((28, 46, 48), scale), (-20, 0), 1.5),
        organ("gut", near(-8, 8, -8), (48, 11, 13), (12, 0), 2.5),  # pancreas
    ]


def _vessels(rng: np.random.Generator, *lobes: Ellipsoid) -> list[tuple[Shape, ...]]:
    """Three large vessels and several small ones, long and thin, running outwards from near a lobe's middle."""
    large = [(lobes[0], angle, rng.uniform(36, 52), rng.uniform(3.5, 5.0)) for angle in (10, 70, 130)]
    small = [(lobes[i % 3 == 0], rng.uniform(0, 180), rng.uniform(14, 30), rng.uniform(1.5, 2.6)) for i in range(14)]
    return [
        (
            Ellipsoid(
                moved(lobe.centre_mm, rng.normal(0, 12 if thick > 3 else 24, size=3)),
                (length, thick, thick),
                2,
                (angle + rng.normal(0, 12), rng.normal(0, 25)),
            ),
        )
        for lobe, angle, length, thick in large + small
    ]


def _blob(rng: np.random.Generator, lobes: tuple[Ellipsoid, Ellipsoid], radius_mm: float) -> Ellipsoid:
    """An ellipsoid somewhere in the inner part of a lobe, usually the larger one."""
    lobe = lobes[int(rng.random() > 0.75)]
    direction = rng.normal(size=3)
    place = direction / np.linalg.norm(direction) * 0.65 * rng.random() ** (1 / 3) * lobe.radii_mm
    radii = radius_mm * rng.uniform(0.8, 1.25, size=3)
    return Ellipsoid(moved(lobe.centre_mm, place), moved((0, 0, 0), radii))
