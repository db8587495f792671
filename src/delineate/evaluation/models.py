"""What is known of installed models: for a list, from their packages, bundles and cards."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from delineate.bundle import Bundle
from delineate.datasets.folder import modality_of
from delineate.evaluation.card_facts import CardFacts, Result
from delineate.installed import Installed
from delineate.metrics.statistics import Estimate

_FIRST = ("test", "held out", "adapted", "calibration", "original")
"""Kinds of results, those that say most about scans that nobody has seen first."""


@dataclass(frozen=True)
class KnownModel:
    """An installed model. ``trained_on`` counts subjects; ``dice`` is of the result of kind ``measured_on``, if any.

    Dice is the mean of the targets. ``modality`` is CT, MR, or empty where the channels' names do not tell.
    """

    name: str
    package: str
    version: str
    licence: str
    modality: str
    channels: tuple[str, ...]
    targets: tuple[str, ...]
    trained_on: int
    dice: Estimate | None
    measured_on: str
    weights_sha256: str

    @classmethod
    def of(cls, installed: Installed) -> KnownModel:
        """What the package, the bundle and its card say. Raises :class:`~delineate.errors.BundleError`."""
        bundle = Bundle.load(installed.folder)
        result = _first(CardFacts.of(bundle).results)
        return cls(
            name=installed.name,
            package=installed.package,
            version=installed.version,
            licence=installed.licence,
            modality=modality_of(bundle.channels),
            channels=bundle.channels,
            targets=bundle.targets.names,
            trained_on=len(bundle.provenance.training),
            dice=None if result is None else _dice(result),
            measured_on="" if result is None else result.kind,
            weights_sha256=bundle.weights_sha256,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _first(results: tuple[Result, ...]) -> Result | None:
    with_dice = [result for result in results if _dice(result) is not None]
    return min(with_dice, key=lambda result: _FIRST.index(result.kind), default=None)


def _dice(result: Result) -> Estimate | None:
    """The mean over targets, which comes last and is a single target's where there is no other; not a site's."""
    found = [figure.estimate for figure in result.figures if figure.metric == "dice" and not figure.site]
    return found[-1] if found else None
