"""What ``recipe: auto`` stands for in a study: a recipe derived from each data set, once for each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from delineate.datasets.dataset import Dataset
from delineate.datasets.inspection import Inspection
from delineate.derivation import AUTO, AutoSpec
from delineate.io.files import writing_beside
from delineate.recipe import Recipe, TrainingSpec, apply_changes, load_recipe, recipe_from, to_yaml
from delineate.training.options import Progress, Reporter, RunOptions
from delineate.training.preparation import derived_recipe


class Derive(Protocol):
    """Derives recipes; the same for the same name of a data set, the same budget and the same ``auto`` settings."""

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
        budget = TrainingSpec.of_changes(changes)
        auto, others = AutoSpec.of_changes(changes)
        of_budget = budget.model_dump(include={"minutes", "steps", "epochs"}, exclude_defaults=True)
        of_auto = auto.model_dump(exclude_defaults=True)
        key = "-".join([name, *(f"{number:g}-{what}" for what, number in {**of_budget, **of_auto}.items())])
        if key not in self.known:
            decisive = [f"training.{unit}={number}" for unit, number in of_budget.items()]
            decisive += [f"{AUTO}.{what}={multiple}" for what, multiple in of_auto.items()]
            self.known[key] = self._derived(key, name, dataset, decisive)
        return recipe_from(apply_changes(self.known[key].as_dict(), others))

    def _derived(self, key: str, name: str, dataset: Dataset, changes: Sequence[str]) -> Recipe:
        path = None if self.folder is None else self.folder / "auto" / f"{key}.yaml"
        if path is None or not path.exists():
            report = Reporter(progress=self.progress)
            options = RunOptions(device=self.device)
            made = derived_recipe(dataset, options, report, changes, self.inspected.get(name))
            self.inspected[name] = made.inspection
            if path is None:
                return made.recipe
            with writing_beside(path, first=True) as beside:
                beside.write_text(to_yaml(made.recipe.as_dict(), made.reasons), encoding="utf-8")
        return load_recipe(path)  # perhaps that of another part of the study, which began at the same moment
