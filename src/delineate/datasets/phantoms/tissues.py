"""Physical properties of tissues, and the equations that turn them into signals.

Relaxation times at 1.5 T are after Stanisz et al. 2005 (Magnetic Resonance in Medicine 54:507) and de
Bazelaire et al. 2004 (Radiology 230:652), rounded; values missing there are chosen to look right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, exp, radians, sin
from typing import Literal


@dataclass(frozen=True)
class Tissue:
    """T1 and T2 at 1.5 T, proton density relative to water, and attenuation on CT in the portal phase.

    ``contrast_mmol`` is the contrast agent's concentration per litre at the time of the scan, ``fat``
    the fraction of protons that are in fat.
    """

    t1_ms: float
    t2_ms: float
    density: float
    hounsfield: float = 0.0
    contrast_mmol: float = 0.0
    fat: float = 0.0


FAT_T1_MS, FAT_T2_MS = 343.0, 58.0

TISSUES: Mapping[str, Tissue] = {
    "air": Tissue(1000, 1, 0.0, -1000),
    "lung": Tissue(1200, 30, 0.12, -820),
    "bone": Tissue(700, 3, 0.08, 700),
    "marrow": Tissue(549, 75, 0.75, 230, 0.1, fat=0.45),
    "fat": Tissue(FAT_T1_MS, 120, 0.95, -100, fat=0.92),
    "visceral fat": Tissue(350, 110, 0.9, -95, fat=0.85),
    "skin": Tissue(900, 30, 0.7, 20, 0.1),
    "muscle": Tissue(900, 33, 0.78, 60, 0.1, fat=0.03),
    "connective tissue": Tissue(800, 30, 0.7, -30, 0.1, fat=0.4),
    "fluid": Tissue(3000, 600, 1.0, 8),
    "csf": Tissue(4200, 1800, 1.0, 8),
    "blood": Tissue(1441, 25, 0.9, 160, 2.5),
    "veins": Tissue(1441, 180, 0.9, 165, 0.4),
    "liver": Tissue(586, 46, 0.8, 112, 0.25, fat=0.03),
    "liver tumour": Tissue(1050, 80, 0.85, 62, 0.9, fat=0.01),
    "necrosis": Tissue(1600, 130, 0.9, 30, 0.05),
    "cyst": Tissue(3000, 700, 1.0, 8),
    "spleen": Tissue(1057, 79, 0.85, 125, 0.9),
    "kidney": Tissue(966, 87, 0.85, 190, 1.4),
    "gut": Tissue(1000, 60, 0.75, 45, 0.3),
    "full gut": Tissue(1500, 110, 0.85, 20),
    "grey matter": Tissue(1124, 95, 0.84),
    "white matter": Tissue(784, 72, 0.70),
    "deep grey matter": Tissue(1000, 78, 0.79),
    "edema": Tissue(1350, 145, 0.86),
    "brain tumour": Tissue(1250, 105, 0.84, contrast_mmol=0.35),
    "tumour core": Tissue(1900, 170, 0.9),
    "brain lesion": Tissue(1300, 140, 0.84),
    "infarct": Tissue(2400, 420, 0.95),
    "peripheral zone": Tissue(1500, 150, 0.95),
    "central gland": Tissue(1300, 82, 0.85),
    "stromal nodule": Tissue(1200, 62, 0.8),
    "glandular nodule": Tissue(1400, 125, 0.9),
    "prostate capsule": Tissue(1000, 40, 0.75),
    "seminal vesicle": Tissue(1800, 210, 0.95),
    "tendon": Tissue(700, 12, 0.4),
}

_RELAXIVITY = 4.5
"""Relaxivity of a gadolinium agent, per second and mmol per litre."""


@dataclass(frozen=True)
class Sequence:
    """How a channel's signal follows from a tissue: an equation and its times.

    ``water`` and ``fat`` images of a Dixon gradient echo each show one kind of proton only.
    ``contrast``: contrast agent was given. ``fat_suppression`` is the fraction of fat's signal that is lost.
    """

    channel: str
    kind: Literal["gradient echo", "spin echo", "inversion recovery", "water", "fat", "ct"]
    tr_ms: float = 0.0
    te_ms: float = 0.0
    flip_degrees: float = 90.0
    ti_ms: float = 0.0
    contrast: bool = False
    fat_suppression: float = 0.0

    def signal(self, tissue: Tissue, field_tesla: float = 1.5) -> float:
        """Magnitude without noise, relative to the protons of water; Hounsfield units on CT."""
        if self.kind == "ct":
            return tissue.hounsfield
        # T1 grows with the field, but that of fat and of free water hardly does.
        longer = (field_tesla / 1.5) ** (0.35 * (1 - tissue.fat) * (tissue.t1_ms < 2500))
        contrast = tissue.contrast_mmol if self.contrast else 0.0
        water_t1 = 1 / (1 / (tissue.t1_ms * longer) + _RELAXIVITY * contrast / 1000)
        match self.kind:
            case "spin echo":
                share = 1 - exp(-self.tr_ms / water_t1)
            case "inversion recovery":
                share = abs(1 - 2 * exp(-self.ti_ms / water_t1) + exp(-self.tr_ms / water_t1))
            case "gradient echo":
                share = self._spoiled(water_t1)
            case "water":
                share = (1 - tissue.fat) * self._spoiled(water_t1)
            case "fat":
                return tissue.density * tissue.fat * self._spoiled(FAT_T1_MS) * exp(-self.te_ms / FAT_T2_MS)
        seen = tissue.density * (1 - self.fat_suppression * tissue.fat)
        return seen * share * exp(-self.te_ms / tissue.t2_ms)

    def _spoiled(self, t1_ms: float) -> float:
        """The steady state of a spoiled gradient echo (Ernst and Anderson 1966)."""
        left, flip = exp(-self.tr_ms / t1_ms), radians(self.flip_degrees)
        return sin(flip) * (1 - left) / (1 - cos(flip) * left)
