"""Male pelves: a prostate with its zones between bladder and rectum."""

from __future__ import annotations

import numpy as np

from delineate.datasets.phantoms.anatomy import (
    BEYOND_MM,
    Anatomy,
    Ellipsoid,
    Part,
    Rough,
    SmoothField,
    moved,
    sized,
)

PROSTATE = "prostate"


def with_prostate(rng: np.random.Generator) -> Anatomy:
    """A gland of 20 to 110 ml; the larger it is, the more nodules its centre has."""
    size = float(np.clip(rng.lognormal(0.0, 0.16), 0.75, 1.45))
    gland = Ellipsoid((0, 0, 0), sized((24, 16.5, 21), size), 2.3)
    centre = Ellipsoid((0, 3.2 * size, 2.5), sized((17, 11.5, 17), size * rng.uniform(0.95, 1.05)), 2.3)
    back = -17 * size
    bladder_mm = rng.uniform(24, 42)
    rectum = Ellipsoid((rng.normal(0, 3), back - 15, 0), (17, 13, BEYOND_MM), 2.2)
    filled = rng.random()
    parts = [
        *_walls(rng),
        Part("muscle", (Ellipsoid((0, -8, -20), (40, 34, 34), 2.6),)),  # levator
        Part("visceral fat", (Ellipsoid((0, -8, -10), (36, 31, 34), 2.6),)),
        Part("visceral fat", (Ellipsoid((0, 22 * size, 12), (34, 16, 30)),)),
        Part("gut", (Rough(rectum, SmoothField.draw(rng, (14.0, 30.0)), 1.2),)),
        Part(
            "air" if filled < 0.45 else "full gut",
            (Rough(Ellipsoid(rectum.centre_mm, (11.5, 8, BEYOND_MM)), SmoothField.draw(rng, (14.0, 30.0)), 1.5),),
        ),
        Part("muscle", (Ellipsoid((0, 12, 20 * size + bladder_mm - 4), sized((1.35, 1.05, 1.0), bladder_mm + 3)),)),
        Part("fluid", (Ellipsoid((0, 12, 20 * size + bladder_mm - 4), sized((1.35, 1.05, 1.0), bladder_mm)),)),
        *(
            Part(
                "seminal vesicle",
                (
                    Rough(
                        Ellipsoid((side * 16, back + 6, 21 * size), (17, 6, 7), 2, (side * 12, 0)),
                        SmoothField.draw(rng, (7.0, 14.0)),
                        1.6,
                    ),
                ),
            )
            for side in (-1, 1)
        ),
        Part("prostate capsule", (gland,), PROSTATE),
        Part("peripheral zone", (gland,), within=PROSTATE, inside=((gland, 1.0),)),
        Part("prostate capsule", (centre,), within=PROSTATE),
        Part("central gland", (centre,), within=PROSTATE, inside=((centre, 0.9),)),
        *_nodules(rng, centre, size),
        Part("muscle", (Ellipsoid((0, 15.5 * size, 2), (11 * size, 4.5, 17 * size)),), within=PROSTATE),
        Part("glandular nodule", (Ellipsoid((0, 4, 0), (1.3, 1.8, 15 * size)),), within=PROSTATE),  # urethra
    ]
    return Anatomy(tuple(parts), SmoothField.draw(rng, (35.0, 110.0), components=3), rng.uniform(1.2, 2.2))


def _nodules(rng: np.random.Generator, centre: Ellipsoid, size: float) -> list[Part]:
    parts = []
    for _ in range(rng.poisson(7 * size**3) + 2):
        place = rng.uniform(-0.75, 0.75, size=3) * centre.radii_mm
        radius = float(np.clip(rng.lognormal(np.log(3.4), 0.4), 1.6, 8))
        shape = Ellipsoid(moved(centre.centre_mm, place), moved((0, 0, 0), radius * rng.uniform(0.8, 1.25, size=3)))
        kind = ("stromal nodule", "glandular nodule")[int(rng.random() < 0.5)]
        parts += [
            Part(
                "prostate capsule",
                (Ellipsoid(shape.centre_mm, moved(shape.radii_mm, (0.7, 0.7, 0.7))),),
                within=PROSTATE,
            ),
            Part(kind, (Rough(shape, SmoothField.draw(rng, (5.0, 12.0)), 0.5),), within=PROSTATE),
        ]
    return parts


def _walls(rng: np.random.Generator) -> list[Part]:
    fat = rng.uniform(14, 34)
    parts = [
        Part("skin", (Ellipsoid((0, -8, 0), (182, 117, BEYOND_MM), 2.5),)),
        Part("fat", (Ellipsoid((0, -8, 0), (180, 115, BEYOND_MM), 2.5),)),
        Part("muscle", (Ellipsoid((0, -14, 0), (178 - fat, 111 - fat, BEYOND_MM), 2.6),)),
        Part("visceral fat", (Ellipsoid((0, -2, 30), (62, 62, 60), 2.4),)),
        Part("bone", (Ellipsoid((0, 56, -14), (22, 12, 20), 2.5),)),  # pubic symphysis
        Part("marrow", (Ellipsoid((0, 56, -14), (19, 9.5, 18), 2.5),)),
        Part("tendon", (Ellipsoid((0, 55, -14), (2.2, 10, 18), 2.5),)),
        Part("bone", (Ellipsoid((0, -86, 20), (20, 9, 44), 2),)),  # sacrum and coccyx
        Part("marrow", (Ellipsoid((0, -86, 20), (18, 7, 42), 2),)),
    ]
    for side in (-1, 1):
        parts += [
            Part("muscle", (Ellipsoid((side * 58, 4, 0), (12, 42, BEYOND_MM), 2.4, (side * 14, 0)),)),  # obturator
            Part("bone", (Ellipsoid((side * 76, 2, 0), (10, 40, 60), 2.4, (side * 14, 0)),)),
            Part("marrow", (Ellipsoid((side * 76, 2, 0), (7.5, 37, 57), 2.4, (side * 14, 0)),)),
            Part("bone", (Ellipsoid((side * 104, 4, 8), (25, 25, 25)),)),  # femoral heads
            Part("marrow", (Ellipsoid((side * 104, 4, 8), (22.5, 22.5, 22.5)),)),
            Part("bone", (Ellipsoid((side * 34, 52, -24), (32, 7, 9), 2, (side * 35, 0)),)),  # pubic rami
            Part("marrow", (Ellipsoid((side * 34, 52, -24), (30, 5, 7), 2, (side * 35, 0)),)),
            Part("fat", (Ellipsoid((side * 48, -52, 0), (24, 16, BEYOND_MM), 2.2, (side * 30, 0)),)),  # ischiorectal
            Part("veins", (Ellipsoid((side * 62, 46, 10), (6, 6, BEYOND_MM)),)),
            Part("blood", (Ellipsoid((side * 70, 52, 10), (5, 5, BEYOND_MM)),)),
        ]
    return parts
