"""What a bundle's model card says that its other files do not: who was measured, and how well (``card.json``).

Subjects, patients, sites and data sets have no names in it, since a bundle is given away: sites are numbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from delineate.bundle import CARD_FACTS, Bundle
from delineate.errors import BundleError, DelineateError
from delineate.evaluation.agreement import crossings
from delineate.evaluation.table import MISSED, RIGHTLY_NOTHING, Evaluation
from delineate.io.documents import Document
from delineate.io.files import parsing
from delineate.io.sealed import AGAIN, read_small
from delineate.metrics.catalogue import METRICS
from delineate.metrics.statistics import Estimate
from delineate.specification import Text

POOR_DICE = 0.5
"""Subjects with a lower Dice are counted as failures."""

_MOST_RESULTS = 64

Count = Annotated[int, Field(ge=0, le=2**53)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["held out", "test", "adapted", "original", "calibration"]
"""Subjects held out by the training, of a later test, those that an adaptation measures, and those of a calibration."""


@dataclass(frozen=True)
class ByRole:
    """How many subjects or patients there are for each purpose."""

    training: Count = 0
    validation: Count = 0
    held_out: Count = 0


@dataclass(frozen=True)
class Effort:
    """What a training took until its weights, or better ones, could no longer be replaced; ``finished`` or not yet."""

    weights_sha256: Digest
    steps: Count
    minutes: float | None
    finished: bool


@dataclass(frozen=True)
class Figure:
    """The estimate of a metric for a target; of :attr:`Evaluation.overall_name` at a ``site`` numbered from 1."""

    target: Text
    metric: Text
    title: Text
    estimate: Estimate
    site: Count = 0


@dataclass(frozen=True)
class Bias:
    """How far predicted volumes or quantities lie from those of the references, on average."""

    target: Text
    of: Text
    unit: Text
    bias: float
    ci95: tuple[float, float]
    limits: tuple[float, float]
    n: Count


@dataclass(frozen=True)
class Sides:
    """How many of ``n`` subjects a prediction puts on the ``right`` side of a quantity's threshold."""

    target: Text
    right: Count
    n: Count


@dataclass(frozen=True)
class Failures:
    """Of ``present`` subjects with the target, those ``missed``; of ``absent`` ones, those with an ``invented`` one.

    ``poor`` counts the ``present`` subjects with a Dice below :data:`POOR_DICE`, the missed ones among them, and
    ``worst`` is the lowest Dice; None if Dice was not measured, or nobody has the target.
    """

    target: Text
    present: Count
    missed: Count
    absent: Count
    invented: Count
    poor: Count | None = None
    worst: float | None = None


@dataclass(frozen=True)
class Result:
    """What was measured of the weights with this digest; ``name`` is what a test's user calls its data.

    ``quantity`` says what was measured within the targets, ``notes`` what else a reader should know, such as settings
    of prediction that are not the recipe's.
    """

    kind: Kind
    weights_sha256: Digest
    measured: Text
    subjects: Count
    patients: Count
    sites: Count
    figures: Annotated[tuple[Figure, ...], Field(max_length=2**14)]
    biases: Annotated[tuple[Bias, ...], Field(max_length=2**12)]
    failures: Annotated[tuple[Failures, ...], Field(max_length=2**10)]
    simulated: bool = False
    name: Text = ""
    quantity: Text = ""
    sides: Annotated[tuple[Sides, ...], Field(max_length=2**10)] = ()
    notes: Annotated[tuple[Text, ...], Field(max_length=64)] = ()

    @classmethod
    def of(
        cls,
        kind: Kind,
        bundle: Bundle,
        evaluation: Evaluation,
        *,
        sites: Sequence[str] = (),
        name: str = "",
        notes: Sequence[str] = (),
    ) -> Result:
        """An evaluation without names; its sites are numbered as in ``sites``, by default in alphabetical order."""
        numbers = {site: i for i, site in enumerate(sites or evaluation.sites, start=1)}
        rows: list[dict[str, Any]] = [row for agreeing in evaluation.agreements for row in agreeing.rows()]
        by_site = {numbers[site]: evaluation.overall(site) for site in evaluation.sites if len(evaluation.sites) > 1}
        return cls(
            kind=kind,
            weights_sha256=bundle.weights_sha256,
            measured=datetime.now(UTC).date().isoformat(),
            subjects=len(evaluation.subjects),
            patients=len(set(evaluation.patients.values())),
            sites=len(evaluation.sites),
            figures=(
                *(
                    Figure(target, metric, evaluation.described_metric(metric).title, estimate)
                    for target, estimates in evaluation.summary().items()
                    if target in (*evaluation.targets, evaluation.overall_name)
                    for metric, estimate in estimates.items()
                    if METRICS[metric].better
                ),
                *(
                    Figure(
                        evaluation.overall_name, metric, evaluation.described_metric(metric).title, estimate, site=site
                    )
                    for site, estimates in by_site.items()
                    for metric, estimate in estimates.items()
                    if METRICS[metric].better
                ),
            ),
            biases=tuple(
                Bias(*(row[name] for name in ("target", "of", "unit", "bias", "bias_ci95", "limits", "n")))
                for row in rows
            ),
            failures=_failures(evaluation),
            simulated=evaluation.simulated,
            name=name,
            quantity="" if evaluation.quantity is None else str(evaluation.quantity),
            sides=_sides(evaluation),
            notes=tuple(notes),
        )


def _sides(evaluation: Evaluation) -> tuple[Sides, ...]:
    quantity = evaluation.quantity
    if quantity is None or quantity.threshold is None:
        return ()
    found = crossings(evaluation.table, quantity.threshold)
    return tuple(Sides(target, side["right"], side["n"]) for target, side in found.items())


def _failures(evaluation: Evaluation) -> tuple[Failures, ...]:
    found = []
    for target, rows in evaluation.table.groupby("target", sort=False):
        empty = rows["case"].isin(["reference empty", RIGHTLY_NOTHING])
        dice = rows["dice"][~empty].astype(float) if "dice" in rows else None
        found.append(
            Failures(
                target=str(target),
                present=int((~empty).sum()),
                missed=int((rows["case"] == MISSED).sum()),
                absent=int(empty.sum()),
                invented=int((rows["case"] == "reference empty").sum()),
                poor=None if dice is None else int((dice < POOR_DICE).sum()),
                worst=None if dice is None or dice.empty else float(dice.min()),
            )
        )
    return tuple(found)


class CardFacts(Document):
    """A bundle's ``card.json``: what its other files do not say. Subjects by site in the order of the sites' numbers.

    Results of weights that were replaced since are not shown.
    """

    error: ClassVar[type[DelineateError]] = BundleError
    fix: ClassVar[str] = AGAIN

    effort: Effort | None = None
    sites: Annotated[tuple[ByRole, ...], Field(max_length=2**12)] = ()
    patients: ByRole | None = None
    results: Annotated[tuple[Result, ...], Field(max_length=_MOST_RESULTS)]

    @classmethod
    def of(cls, bundle: Bundle) -> CardFacts:
        """What a bundle's card says of its weights; empty where it says nothing. Raises :class:`BundleError`."""
        path = None if bundle.folder is None else bundle.folder / CARD_FACTS
        if path is None or not path.exists() or bundle.weights is None:
            return cls(results=())
        with parsing(path, BundleError, fix=AGAIN):
            found = cls.of_bytes(read_small(path), path)
        sha256 = bundle.weights.sha256
        return found.model_copy(
            update={
                "effort": found.effort if found.effort and found.effort.weights_sha256 == sha256 else None,
                "results": tuple(result for result in found.results if result.weights_sha256 == sha256),
            }
        )

    def with_result(self, result: Result) -> CardFacts:
        """With another result, which takes the place of one of the same kind and name."""
        others = [one for one in self.results if (one.kind, one.name) != (result.kind, result.name)]
        if len(others) >= _MOST_RESULTS:
            raise BundleError(
                f"the card has {len(others)} results already", fix="record this one under the name of another"
            )
        return self.model_copy(update={"results": (*others, result)})
