"""What fine-tuning a bundle trains with, and on whom: its recipe, the new subjects, the original ones rehearsed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from delineate.bundle import Bundle
from delineate.datasets.dataset import Dataset
from delineate.datasets.splits import drawn_over_sites
from delineate.errors import BundleError, DatasetError, DuplicateSubject, RecipeError, UnknownKey
from delineate.recipe import Recipe, ScheduleSpec, apply_changes, recipe_from
from delineate.training.preparation import without_descriptions

STEPS = 200
"""Steps of each training, unless a budget is given: some minutes on two cores."""

SLOWER = 0.1
"""Learning rate of fine-tuning as a multiple of the recipe's."""

MOST_REHEARSED = 40
"""The most original subjects to rehearse on: all of them have to be prepared first."""

CHANGEABLE = ("training", "augmentation", "sampler", "loss")
"""What ``--set`` may change in an adaptation."""


@dataclass(frozen=True)
class Parts:
    """The data of an adaptation.

    ``dataset`` holds the ``new`` subjects and the original ones that are rehearsed. ``unseen`` original subjects
    measure what is forgotten; None if there are none.
    """

    dataset: Dataset
    new: tuple[str, ...]
    unseen: Dataset | None
    notes: tuple[str, ...] = ()


def adapted_recipe(
    origin: Bundle,
    where: Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    rehearses: bool = False,
    changes: Sequence[str] = (),
) -> Recipe:
    """The recipe that fine-tunes ``origin``, which is in the folder ``where``.

    Preprocessing and tiles are as the original training fitted them, so that the adapted network sees scans as the
    original one did. ``changes`` may change training, augmentation, sampler and loss; any other raises
    :class:`RecipeError`.
    """
    before = origin.recipe
    if minutes is None and steps is None:
        steps = STEPS
    values = before.as_dict()
    values |= {
        "name": f"{before.name} adapted",
        "data": {
            "channels": origin.channels,
            "resample_channels": before.data.resample_channels,
            "targets": origin.targets.as_dict(),
            "codes": values["data"]["codes"],
            "colours": values["data"]["colours"],
        },
        "preprocessing": origin.pipeline.model_dump(mode="json")["steps"],
        "tiles": origin.tiles.model_dump(mode="json"),
        "start": {"weights": str(where), "channels": None},
    }
    values["training"] |= {
        "minutes": minutes,
        "steps": steps,
        "epochs": None,
        "schedule": ScheduleSpec().model_dump(mode="json"),
        "keep": "last",
        "always_train_share": 0.5 if rehearses else None,
    }
    values["training"]["optimiser"]["learning_rate"] *= SLOWER
    # Too few scans to spend any on choosing weights.
    values["training"]["validation"] |= {"subjects": 0, "patience": None, "held_out": False}
    recipe = recipe_from(apply_changes(values, changes))
    kept, now = recipe_from(values), recipe
    other = [
        name for name in Recipe.model_fields if name not in CHANGEABLE and getattr(kept, name) != getattr(now, name)
    ]
    if other:
        raise RecipeError(
            f"an adaptation cannot change the bundle's {', '.join(other)}",
            fix=f"change only {', '.join(CHANGEABLE)}, or train a new network with start.weights",
        )
    return recipe


def parts_of(origin: Bundle, new: Dataset, original: Dataset | None) -> Parts:
    """Who is trained on, and who measures what is forgotten.

    Raises :class:`DatasetError` if a data set's labels do not mean what the bundle's do, :class:`MissingFile` for a
    missing channel, :class:`DuplicateSubject` if both data sets have a subject of the same name, and what
    :meth:`Bundle.seen` raises if it cannot be known which original subjects the bundle was trained on.
    """
    new = _fitting(origin, new)
    names, patients = sorted(s.id for s in new.subjects), {s.patient for s in new.subjects}
    if not names:
        raise DatasetError(f"'{new.name}' has no subjects", fix="give a folder of labelled scans")
    notes = []
    with suppress(UnknownKey, BundleError):
        if known := [name for name in names if origin.seen(name)]:
            notes.append(
                f"The bundle was trained on subjects called {_some(known)}. If they are the same scans, the gain on "
                "them looks smaller than it is."
            )
    whole = Parts(replace(new, targets=origin.targets), tuple(names), None, tuple(notes))
    if original is None:
        return whole
    original = _fitting(origin, original)
    if twice := sorted({s.id for s in original.subjects}.intersection(names)):
        raise DuplicateSubject(
            f"'{new.name}' and '{original.name}' both have {_some(twice)}",
            fix="rename one, or leave the new subjects out of --original",
        )
    usable = [s for s in original.subjects if s.label is not None and s.patient not in patients]
    if not usable:
        raise DatasetError(
            f"'{original.name}' has no labelled scans of other patients than the new ones",
            fix="give the data that the bundle was trained on",
        )
    seen = [s for s in usable if origin.seen(s.id)]
    unseen = tuple(s for s in usable if s not in seen)
    chosen = drawn_over_sites(seen, MOST_REHEARSED, np.random.default_rng((origin.recipe.training.seed, 6)))
    rehearsed = tuple(s for s in seen if s.id in chosen)
    return replace(
        whole,
        dataset=replace(
            whole.dataset, subjects=(*new.subjects, *rehearsed), simulated=new.simulated or original.simulated
        ),
        unseen=replace(original, subjects=unseen) if unseen else None,
    )


def _fitting(origin: Bundle, dataset: Dataset) -> Dataset:
    """``dataset`` with the bundle's channels, provided that its labels mean what the bundle's do."""
    if dataset.targets is not None:
        stated = dataset.targets.values
        for name, values in origin.targets.values.items():
            if name not in stated:
                raise DatasetError(
                    f"'{dataset.name}' labels {_some(list(stated))}, but not '{name}', which the bundle segments",
                    fix=f"label it, too, or name the label values as the bundle does: --targets {_values(origin)}",
                )
            if not dataset.by_name and set(stated[name]) != set(values):
                ours, theirs = (" and ".join(map(str, numbers)) for numbers in (values, stated[name]))
                raise DatasetError(
                    f"'{name}' is label value {ours} in the bundle, but {theirs} in '{dataset.name}'",
                    fix="save the labels with the bundle's values",
                )
    described = without_descriptions(dataset)
    return replace(described, subjects=tuple(s.with_channels(origin.channels) for s in described.subjects))


def _values(origin: Bundle) -> str:
    return ",".join(f"{name}={'+'.join(map(str, values))}" for name, values in origin.targets.values.items())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more
