"""What ``recipe: auto`` stands for in a study: a recipe derived from each data set, once for each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from delineate.datasets.dataset import Dataset
from delineate.derivation import AUTO, AutoSpec
from delineate.io.files import writing_beside
from delineate.recipe import Recipe, TrainingSpec, apply_changes, load_recipe, recipe_from, to_yaml
from delineate.training.options import Progress, Reporter, RunOptions
from delineate.training.preparation import Derived, derived_recipe


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

    def __call__(self, name: str, dataset: Dataset, changes: Sequence[str]) -> Recipe:
        budget = TrainingSpec.of_changes(changes)
        auto, others = AutoSpec.of_changes(changes)
        of_budget = budget.model_dump(include={"minutes", "steps", "epochs"}, exclude_defaults=True)
        of_auto = auto.model_dump(exclude_defaults=True)
        key = "-".join([name, *(f"{number:g}-{what}" for what, number in {**of_budget, **of_auto}.items())])
        if key not in self.known:
            decisive = [f"training.{unit}={number}" for unit, number in of_budget.items()]
            decisive += [f"{AUTO}.{what}={multiple}" for what, multiple in of_auto.items()]
            self.known[key] = self._kept(key) or self._keep(key, self._derived(dataset, decisive))
        return recipe_from(apply_changes(self.known[key].as_dict(), others))

    def _kept(self, key: str) -> Recipe | None:
        path = self._path(key)
        return load_recipe(path) if path is not None and path.exists() else None

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / "auto" / f"{key}.yaml"

    def _keep(self, key: str, made: Derived) -> Recipe:
        path = self._path(key)
        if path is None:
            return made.recipe
        with writing_beside(path, first=True) as beside:
            beside.write_text(to_yaml(made.recipe.as_dict(), made.reasons), encoding="utf-8")
        return load_recipe(path)  # perhaps that of another part of the study, which began at the same moment

    def _derived(self, dataset: Dataset, changes: Sequence[str]) -> Derived:
        return derived_recipe(dataset, RunOptions(device=self.device), Reporter(progress=self.progress), changes)
