"""What ``recipe: auto`` stands for in a study: a recipe derived from each data set, once for each budget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from delineate.datasets.dataset import Dataset
from delineate.datasets.inspection import Inspection
from delineate.derivation import AUTO, AutoSpec
from delineate.io.files import writing_beside
from delineate.recipe import (
    DataSpec,
    Recipe,
    TrainingSpec,
    apply_changes,
    change_of,
    load_recipe,
    recipe_from,
    to_yaml,
)
from delineate.training.options import Progress, Reporter, RunOptions
from delineate.training.preparation import derived_recipe


class Derive(Protocol):
    """Derives recipes.

    The same for the same name of a data set, read in the same way, the same budget and the same ``auto`` settings.
    """

    def __call__(self, name: str, dataset: Dataset, changes: Sequence[str]) -> Recipe:
        """The recipe that ``auto`` derives from ``dataset`` for the budget that ``changes`` name, with ``changes``."""


@dataclass
class AutoRecipes:
    """Derives recipes for ``device`` of this machine.

    With a study's ``folder``, what is derived is kept there with its reasons, so that a study that is resumed, perhaps
    elsewhere, goes on with the same recipes. ``progress(stage, done, total)`` is told how far inspection is.
    """

    folder: Path | None = None
    device: str = "auto"
    progress: Progress = lambda stage, done, total: None
    known: dict[str, Recipe] = field(default_factory=dict)
    inspected: dict[str, Inspection] = field(default_factory=dict)

    def __call__(self, name: str, dataset: Dataset, changes: Sequence[str]) -> Recipe:
        data, budget = DataSpec.of_changes(changes), TrainingSpec.of_changes(changes)
        auto, others = AutoSpec.of_changes(changes)
        of_data = data.model_dump(include={"channels", "resample_channels"}, exclude_defaults=True)
        of_budget = budget.model_dump(include={"minutes", "steps", "epochs"}, exclude_defaults=True)
        of_auto = auto.model_dump(exclude_defaults=True)
        read = f"{name}-read-{_digest(of_data)}" if of_data else name
        key = "-".join([read, *(f"{number:g}-{what}" for what, number in {**of_budget, **of_auto}.items())])
        if key not in self.known:
            decisive = [
                change_of(f"{group}.{what}", value)
                for group, own in (("data", of_data), ("training", of_budget), (AUTO, of_auto))
                for what, value in own.items()
            ]
            self.known[key] = self._derived(key, read, dataset, decisive)
        return recipe_from(apply_changes(self.known[key].as_dict(), others))

    def _derived(self, key: str, read: str, dataset: Dataset, changes: Sequence[str]) -> Recipe:
        path = None if self.folder is None else self.folder / "auto" / f"{key}.yaml"
        if path is None or not path.exists():
            report = Reporter(progress=self.progress)
            options = RunOptions(device=self.device, fold=None)  # one recipe for all folds
            made = derived_recipe(dataset, options, report, changes, self.inspected.get(read))
            self.inspected[read] = made.inspection
            if path is None:
                return made.recipe
            with writing_beside(path, first=True) as beside:
                beside.write_text(to_yaml(made.recipe.as_dict(), made.reasons), encoding="utf-8")
        return load_recipe(path)  # perhaps that of another part of the study, which began at the same moment


def _digest(values: Mapping[str, object]) -> str:
    """What stands for values in the name of a file: names of channels may be anything."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
