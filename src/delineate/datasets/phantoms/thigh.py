"""Thighs: muscles with connective tissue between them, under fat and around the femur."""

from __future__ import annotations

import numpy as np

from delineate.datasets.phantoms.anatomy import BEYOND_MM, Anatomy, Ellipsoid, Folds, Part, SmoothField

FAT, CONNECTIVE, MUSCLE = "fat", "connective_tissue", "muscle"


def with_fat(rng: np.random.Generator) -> Anatomy:
    """Both thighs, with 6 to 24 mm of fat under the skin; the more fat, the wider the septa between the muscles."""
    size, fat_mm = float(np.clip(rng.normal(1, 0.06), 0.85, 1.12)), rng.uniform(6, 24)
    parts = [part for side in (-1, 1) for part in _thigh(rng, side, size, fat_mm)]
    return Anatomy(tuple(parts), SmoothField.draw(rng, (70.0, 240.0), components=3), rng.uniform(2.0, 4.0))


def _thigh(rng: np.random.Generator, side: int, size: float, fat_mm: float) -> tuple[Part, ...]:
    width, depth = 58 * size, 68 * size
    x = side * (width + fat_mm + 6)

    def column(dx: float, y: float, radius_x: float, radius_y: float, power: float = 2.0) -> Ellipsoid:
        """A long part: ``dx`` is towards the other thigh."""
        return Ellipsoid((x - side * dx, y, 0), (radius_x, radius_y, BEYOND_MM), power)

    muscles = column(0, 0, width, depth, 2.2)
    septa = SmoothField.draw(rng, (45.0, 80.0))
    return (
        Part("skin", (column(0, 0, width + fat_mm + 2, depth + fat_mm + 2, 2.2),)),
        Part("fat", (column(0, 0, width + fat_mm, depth + fat_mm, 2.2),), FAT),
        Part("connective tissue", (column(0, 0, width + 2, depth + 2, 2.2),), CONNECTIVE),
        Part("muscle", (muscles,), MUSCLE),
        Part("connective tissue", (Folds(muscles, septa, 4 + 0.2 * fat_mm, 0.9 * width, 9.0),), CONNECTIVE),
        Part("connective tissue", (column(26 * size, 4, 13, 9),), CONNECTIVE),  # around the vessels
        Part("blood", (column(26 * size + 5, 5, 4, 4),)),
        Part("veins", (column(26 * size - 4, 3, 5, 5),)),
        Part("bone", (column(-6, 8, 14.5 * size, 14.5 * size),)),
        Part("marrow", (column(-6, 8, 7 * size, 7 * size),)),
    )
