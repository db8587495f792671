"""How often each interval holds the truth, by simulation with several scans of a patient.

``python benchmarks/coverage.py`` prints a table of coverage in percent, by number of patients × scans of each.
A scan's error is 0.3 + its patient's (SD 1) + its own (SD 0.5). ``1–9`` scans are 1, 2, 4 or 9 by chance;
``1–9*`` too, and patients with more scans are the worse ones.

It also runs on releases whose agreement counts scans: ``git archive REVISION src | tar -x -C OLD``, then
``PYTHONPATH=OLD/src python benchmarks/coverage.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import signature
from math import exp, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delineate.calibration import Calibration, Case, Confidence, check_intervals
from delineate.metrics.agreement import Agreement, agreement, concordance
from delineate.metrics.conformal import Conformal
from delineate.metrics.statistics import estimate_means, paired_difference

BIAS, BETWEEN, WITHIN = 0.3, 1.0, 0.5
SD = sqrt(BETWEEN**2 + WITHIN**2)
TRUE_SD = 2.0
LEVEL = 0.9


@dataclass(frozen=True)
class Design:
    """So many patients, with one of ``scans`` scans each; ``informative``: more of those whose error is larger."""

    patients: int
    scans: tuple[int, ...]
    informative: float = 0.0

    def __str__(self) -> str:
        scans = str(self.scans[0]) if len(self.scans) == 1 else f"{self.scans[0]}–{self.scans[-1]}"
        return f"{self.patients} × {scans}{'*' * bool(self.informative)}"

    def draw(self, rng: np.random.Generator, patients: int = 0) -> tuple[list[str], NDArray[np.float64]]:
        """Whose each scan is, and its error."""
        n = patients or self.patients
        counts = rng.choice(self.scans, n)
        sizes = np.log(self.scans)
        known = (np.log(counts) - sizes.mean()) / (sizes.std() or 1.0)
        own = self.informative * known + sqrt(1 - self.informative**2) * rng.standard_normal(n)
        whose = np.repeat(np.arange(n), counts)
        error = BIAS + BETWEEN * own[whose] + WITHIN * rng.standard_normal(len(whose))
        return [f"p{i}" for i in whose], error

    def truth(self, rng: np.random.Generator, patients: list[str]) -> NDArray[np.float64]:
        """A true value for each patient."""
        values = {patient: TRUE_SD * rng.standard_normal() for patient in dict.fromkeys(patients)}
        return np.array([values[patient] for patient in patients])


Simulation = Callable[[np.random.Generator, Design, int], float]


def by_patient(function: Callable[..., Any], *values: object, patients: list[str]) -> Any:
    """What a function makes of values; older ones know no patients."""
    return function(*values, patients) if "patients" in signature(function).parameters else function(*values)


def mean(rng: np.random.Generator, design: Design, repetitions: int) -> float:
    held = []
    # Columns share their patients' numbers of scans: a call for each twenty of them.
    for _ in range(max(repetitions // 20, 1)):
        state = rng.bit_generator.seed_seq.spawn(1)[0]  # type: ignore[attr-defined]
        patients, _ = design.draw(np.random.default_rng(state))
        counts = np.array([patients.count(p) for p in dict.fromkeys(patients)])
        whose = np.repeat(np.arange(len(counts)), counts)
        sizes = np.log(design.scans)
        known = ((np.log(counts) - sizes.mean()) / (sizes.std() or 1.0))[:, None]
        own = design.informative * known + sqrt(1 - design.informative**2) * rng.standard_normal((len(counts), 20))
        errors = BIAS + BETWEEN * own[whose] + WITHIN * rng.standard_normal((len(whose), 20))
        held += [low <= BIAS <= high for low, high in (e.ci95 for e in estimate_means(errors, patients))]
    return float(np.mean(held))


def difference(rng: np.random.Generator, design: Design, repetitions: int) -> float:
    def once() -> bool:
        patients, error = design.draw(rng)
        low, high = paired_difference(error, np.zeros(len(error)), patients).ci95
        return low <= BIAS <= high

    return float(np.mean([once() for _ in range(repetitions)]))


def agreeing(interval: Callable[[Agreement], tuple[float, float]], true: float) -> Simulation:
    def simulate(rng: np.random.Generator, design: Design, repetitions: int) -> float:
        def once() -> bool:
            patients, error = design.draw(rng)
            low, high = interval(by_patient(agreement, error, np.zeros(len(error)), patients=patients))
            return low <= true <= high

        return float(np.mean([once() for _ in range(repetitions)]))

    return simulate


def concordant(rng: np.random.Generator, design: Design, repetitions: int) -> float:
    true = 2 * TRUE_SD**2 / (2 * TRUE_SD**2 + SD**2 + BIAS**2)

    def once() -> bool:
        patients, error = design.draw(rng)
        value = design.truth(rng, patients)
        low, high = by_patient(concordance, value + error, value, patients=patients).ci95
        return low <= true <= high

    return float(np.mean([once() for _ in range(repetitions)]))


def new_patient(design: Design, rng: np.random.Generator) -> tuple[list[str], list[float], float]:
    """Known patients' errors, and that of one scan of another patient."""
    patients, errors = design.draw(rng)
    return patients, errors.tolist(), float(rng.choice(design.draw(rng, 1)[1]))


def conformal(rng: np.random.Generator, design: Design, repetitions: int) -> float:
    def once() -> bool:
        patients, errors, new = new_patient(design, rng)
        known = Conformal.of(errors, patients) if hasattr(Conformal, "of") else Conformal(tuple(errors))  # type: ignore[arg-type]
        low, high = known.interval(LEVEL)
        return low <= new <= high

    return float(np.mean([once() for _ in range(repetitions)]))


def case(error: float, patient: str, site: str = "") -> Case:
    """A scan whose Dice and logarithm of the volume are off by a hundredth of ``error``."""
    confidence = Confidence(100.0, 0.5)
    more = {"patient": patient} if "patient" in {f.name for f in fields(Case)} else {}
    return Case("t", site, confidence=confidence, dice=0.5 + error / 100, reference_ml=100 * exp(error / 100), **more)  # type: ignore[arg-type]


def calibrated(which: str) -> Simulation:
    def simulate(rng: np.random.Generator, design: Design, repetitions: int) -> float:
        def once() -> bool:
            patients, errors, new = new_patient(design, rng)
            made = Calibration.of([case(e, p) for e, p in zip(errors, patients, strict=True)])
            judged = case(new, "new")
            low, high = getattr(made, which)("t", judged.confidence, LEVEL)
            return low <= (judged.dice if which == "dice_interval" else judged.reference_ml) <= high

        return float(np.mean([once() for _ in range(repetitions)]))

    return simulate


def checked(rng: np.random.Generator, design: Design, repetitions: int) -> float:
    """The mean share that is said to be held on a site alike."""

    def once() -> list[float]:
        drawn = {site: design.draw(rng) for site in "AB"}
        cases = [case(e, s + p, s) for s, d in drawn.items() for p, e in zip(*d, strict=True)]
        return [held for row in check_intervals(cases, LEVEL)[1:] for held in (row.dice_held, row.volume_held)]

    return float(np.mean([share for _ in range(repetitions // 20 + 1) for share in once()]))


INTERVALS: dict[str, tuple[Simulation, float]] = {
    "Estimate.ci95": (mean, 0.95),
    "Difference.ci95": (difference, 0.95),
    "Agreement.bias_ci95": (agreeing(lambda found: found.bias_ci95, BIAS), 0.95),
    "Agreement.low_ci95": (agreeing(lambda found: found.low_ci95, BIAS - 1.96 * SD), 0.95),
    "Agreement.high_ci95": (agreeing(lambda found: found.high_ci95, BIAS + 1.96 * SD), 0.95),
    "Concordance.ci95": (concordant, 0.95),
    "Conformal.interval": (conformal, LEVEL),
    "Calibration.dice_interval": (calibrated("dice_interval"), LEVEL),
    "Calibration.volume_interval": (calibrated("volume_interval"), LEVEL),
    "check_intervals": (checked, LEVEL),
}
"""Everything in the product that makes an interval, with its level."""

SCANS: tuple[tuple[tuple[int, ...], float], ...] = (((1,), 0.0), ((4,), 0.0), ((1, 2, 4, 9), 0.0), ((1, 2, 4, 9), 0.6))


def patients_for(level: float) -> tuple[int, ...]:
    """Numbers of patients: intervals for new scans need 19."""
    return (8, 15, 40) if level == 0.95 else (20, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2000)
    repetitions = parser.parse_args().repetitions
    for level in (0.95, LEVEL):
        names = [name for name, (_, its) in INTERVALS.items() if its == level]
        designs = [Design(n, *scans) for n in patients_for(level) for scans in SCANS]
        print(f"| {100 * level:.0f} % | " + " | ".join(map(str, designs)) + " |")
        print("|---" * (len(designs) + 1) + "|")
        for name in names:
            shares = [INTERVALS[name][0](np.random.default_rng(0), design, repetitions) for design in designs]
            print(f"| {name} | " + " | ".join(f"{100 * share:.0f}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
