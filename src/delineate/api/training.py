"""Training from Python: a run, a recipe derived from data, and tiles for your own training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

from delineate.api.bundle import Bundle, load
from delineate.api.progress import Cancel, Progress, Say, check
from delineate.compute import Compile, Precision, plan_compute
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset
from delineate.errors import RecipeError
from delineate.evaluation.table import Evaluation
from delineate.recipe import DataSpec, Recipe, apply_changes, change_of, load_recipe, recipe_from

if TYPE_CHECKING:
    from delineate.sampling.batches import BatchSource
    from delineate.training.options import Reporter, RunOptions, Stop
    from delineate.training.run import RunResult

__all__ = ["Run", "Tiles", "auto", "tiles", "train"]

Changes = Mapping[str, Any] | Sequence[str]
"""``{"training.batch_size": 4}``, or ``["training.batch_size=4"]`` as on the command line."""


class InFolder:
    """What the result of a training offers, in whichever folder it is."""

    folder: Path
    stopped: Stop | None

    @property
    def finished(self) -> bool:
        return self.stopped is None

    @property
    def report(self) -> Path:
        """The report page, once it is finished."""
        return self.folder / "report.html"

    @cached_property
    def bundle(self) -> Bundle:
        """The trained bundle, ready to predict."""
        return load(self.folder / "bundle")


@dataclass(frozen=True)
class Run(InFolder):
    """A training run: its ``folder``, the ``steps`` done, and the ``evaluation`` of its held-out subjects.

    ``stopped`` says why it ended early; call :func:`train` again to resume it.
    """

    folder: Path
    steps: int
    evaluation: Evaluation | None = None
    stopped: Stop | None = None


def train(
    recipe: str | Path | Recipe,
    data: str | Path | Dataset,
    out: str | Path,
    *,
    fold: int | None = 0,
    minutes: float | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    changes: Changes = (),
    split: str | Path | None = None,
    cache: str | Path | None = None,
    cache_gb: float | None = None,
    leave_out_broken: bool = False,
    evaluate: bool = True,
    device: str = "auto",
    precision: Precision = "auto",
    compile: Compile = "auto",
    threads: int | None = None,
    memory_gb: float | None = None,
    fit: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
    cancel: Cancel | None = None,
) -> Run:
    """Train on a data set (or its folder), predict and measure the held-out fold, and write it all to ``out``.

    >>> import delineate
    >>> run = delineate.train("tiny.yaml", "scans", "run", steps=2, cache="prepared", device="cpu", compile="off")
    >>> run.steps, run.finished
    (2, True)
    >>> run.evaluation.targets
    ('ball',)
    >>> run.bundle
    Bundle(ball from image)

    ``recipe`` is the name of a packaged recipe, a YAML file, a :class:`Recipe`, or ``"auto"`` to derive it from the
    data. ``fold`` is held out; None trains on every subject. ``minutes``, ``steps`` or ``epochs`` replace the recipe's
    budget, ``changes`` single fields: ``{"training.batch_size": 4}``. ``split`` is a split file to use, or to write
    for later runs; ``cache`` is where prepared subjects are kept. They may take ``cache_gb`` there (default: no
    limit); where that is too little for all, training goes round some of them at a time. ``memory_gb`` is what training
    may take (default: what is free, or the GPU's). If the recipe takes more, ``fit`` trains the variant of it that
    changes least and fits.

    Call it again with the same arguments to resume a stopped run. Setting ``cancel`` stops it after the current
    step without losing anything, which ``stopped`` then says; before training has begun, it raises
    :class:`~delineate.errors.Cancelled`. ``progress`` is called at each stage, ``say`` with each message.

    Raises :class:`~delineate.errors.BrokenSubjects` if inspection finds errors (unless ``leave_out_broken``),
    :class:`~delineate.errors.RecipeError` if a field is wrong or ``out`` holds the run of another recipe,
    :class:`~delineate.errors.OutOfMemory` if the recipe takes too much memory, and
    :class:`~delineate.errors.OutputError` if something cannot be written.
    """
    from delineate.training.options import RunOptions, check_possible
    from delineate.training.preparation import budget_changes

    check(cancel)
    folder = Path(out)
    options = RunOptions(
        fold=fold,
        split_file=None if split is None else Path(split),
        cache=None if cache is None else Path(cache),
        cache_gb=cache_gb,
        leave_out_broken=leave_out_broken,
        evaluate=evaluate,
        device=device,
        precision=precision,
        compile=compile,
        threads=threads,
        memory_gb=memory_gb,
        fit=fit,
    )
    check_possible(options)
    changed = [*budget_changes(minutes, steps, epochs), *as_texts(changes)]
    named = None if recipe == "auto" else _recipe(recipe, changed)
    dataset = _dataset(data, named.data if named else DataSpec.of_changes(changed))
    report = reporter(progress, say, cancel, folder)
    result = train_and_report(named, dataset, folder, options, report, changed)
    return Run(folder, result.steps, result.evaluation, result.stopped)


def train_and_report(
    recipe: Recipe | None,
    dataset: Dataset,
    folder: Path,
    options: RunOptions,
    report: Reporter,
    changes: Sequence[str] = (),
) -> RunResult:
    """Train ``recipe``, or if it is None one derived from ``dataset``; write the report once the run is complete.

    ``changes`` say for which budget it is derived, and apply to it. Raises what :func:`train` raises.
    """
    from delineate.reporting.run import write_run_report
    from delineate.training.folder import check_run_folder
    from delineate.training.lock import holding
    from delineate.training.preparation import auto_recipe
    from delineate.training.run import train as run

    check_run_folder(folder, dataset)
    with holding(folder):
        inspection = None
        if recipe is None:
            recipe, inspection = auto_recipe(dataset, folder, options, report, changes)
        result = run(recipe, dataset, folder, options, report, inspection)
        if result.finished and not result.helper:
            write_run_report(folder, dataset)
    return result


def auto(
    data: str | Path | Dataset,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    changes: Changes = (),
    leave_out_broken: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    say: Say | None = None,
    cancel: Cancel | None = None,
) -> Recipe:
    """A recipe for a data set, this machine and a budget of ``minutes``, ``steps`` or ``epochs`` (default: an hour).

    >>> import delineate
    >>> recipe = delineate.auto("scans", minutes=5, changes={"training.batch_size": 4}, device="cpu")
    >>> recipe.network.kind, recipe.training.minutes, recipe.training.batch_size
    ('unet', 5.0, 4)

    ``say`` is called with the reason for each choice. Raises :class:`~delineate.errors.BrokenSubjects` if inspection
    finds errors, unless ``leave_out_broken``.
    """
    from delineate.training.options import RunOptions
    from delineate.training.preparation import budget_changes, derived_recipe

    check(cancel)
    changed = [*budget_changes(minutes, steps, epochs), *as_texts(changes)]
    options = RunOptions(leave_out_broken=leave_out_broken, device=device, fold=None)
    dataset, report = _dataset(data, DataSpec.of_changes(changed)), reporter(progress, say, cancel)
    return derived_recipe(dataset, options, report, changed).recipe


class Tiles(TorchDataset):
    """Batches of prepared tiles, augmented as the recipe says; returned by :func:`tiles`.

    Item ``i`` is ``(image, target)``: (N, C, *tile) float32 with the context that the network takes, and
    (N, T, *tile) uint8 as encoded by ``targets``, with 255 for ignored voxels. It depends only on the recipe and
    ``i``, not on the order or process in which items are read.
    """

    def __init__(self, source: BatchSource, recipe: Recipe, targets: Targets, channels: int, length: int) -> None:
        self.recipe, self.targets = recipe, targets
        self._source, self._channels, self._length = source, channels, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < self._length:
            raise IndexError(f"batch {i} of {self._length}")
        return self._source.augmented(self._source.batch(i), self.recipe.training.seed)

    def network(self) -> nn.Module:
        """The recipe's network for these tiles, with new weights."""
        from delineate.training.start import initialise

        network = self.recipe.network.build(self._channels * self._source.geometry.slices, self.targets.outputs)
        initialise(network, self.recipe.training)
        return network

    def loss(self) -> Any:
        """The recipe's loss, called as ``loss(logits, target, image)``; it takes all outputs of deep supervision."""
        from delineate.losses.spec import build_loss

        return build_loss(self.recipe.loss, self.targets)


def tiles(
    recipe: str | Path | Recipe,
    data: str | Path | Dataset,
    *,
    part: Literal["training", "validation"] = "training",
    fold: int | None = 0,
    batches: int | None = None,
    changes: Changes = (),
    cache: str | Path | None = None,
    leave_out_broken: bool = False,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Tiles:
    """Prepared tiles of a data set as a ``torch.utils.data.Dataset`` of batches, for your own training loop.

    >>> import delineate
    >>> from torch.utils.data import DataLoader
    >>> batches = delineate.tiles("tiny.yaml", "scans", batches=3, cache="prepared")
    >>> network, loss = batches.network(), batches.loss()
    >>> for image, target in DataLoader(batches, batch_size=None):
    ...     loss(network(image), target, image).backward()
    >>> image.shape, target.shape
    (torch.Size([2, 1, 16, 16, 12]), torch.Size([2, 1, 16, 16, 12]))

    Tiles are drawn from the subjects of ``part`` as :func:`train` draws them; the held-out ``fold`` is in neither
    part. Validation tiles are not augmented. ``batches`` is their number, by default one pass over the data.
    """
    from delineate.sampling.augmentation import AugmentationSpec
    from delineate.sampling.batches import BatchSource
    from delineate.sampling.samplers import Sampler
    from delineate.training.options import RunOptions
    from delineate.training.preparation import assign_roles, inspected, new_split, prepared_bundle, reached

    check(cancel)
    chosen = _recipe(recipe, as_texts(changes))
    whole, report = reached(chosen, _dataset(data, chosen.data)), reporter(progress, None, cancel)
    options = RunOptions(
        fold=fold, cache=None if cache is None else Path(cache), leave_out_broken=leave_out_broken, device="cpu"
    )
    dataset, targets, inspection = inspected(chosen, whole, None, options, report)
    roles = assign_roles(dataset.subjects, new_split(chosen.training, whole, dataset), fold, chosen)
    plan = plan_compute(device="cpu", compile="off")
    bundle, prepared = prepared_bundle(chosen, dataset, targets, inspection, roles, options, plan, report)
    subjects = prepared.training if part == "training" else prepared.validation
    if not len(subjects):
        raise RecipeError(f"no subject is left for {part}", fix="take more subjects, or fewer folds (training.folds)")
    varied = chosen.augmentation if part == "training" else AugmentationSpec(spatial=None, intensity=None)
    sampler = Sampler(chosen.sampler, subjects, bundle.geometry, chosen.training.seed)
    source = BatchSource(sampler, varied, chosen.training.batch_size)
    length = source.steps_an_epoch if batches is None else batches
    return Tiles(source, chosen, targets, len(bundle.channels), length)


def _recipe(recipe: str | Path | Recipe, changes: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe_from(apply_changes(recipe.as_dict(), changes)) if changes else recipe
    return load_recipe(recipe, changes)


def _dataset(data: str | Path | Dataset, spec: DataSpec) -> Dataset:
    return spec.open(Path(data)) if isinstance(data, str | Path) else data


def as_texts(changes: Changes) -> list[str]:
    """Changes as on the command line. Raises :class:`RecipeError` for a value that no recipe can hold."""
    if isinstance(changes, str) or not isinstance(changes, Mapping):
        return [changes] if isinstance(changes, str) else list(changes)
    try:
        return [change_of(path, value) for path, value in changes.items()]
    except TypeError as error:
        raise RecipeError(
            f"a change has a value that no recipe can hold: {error}", fix="give numbers, text or lists"
        ) from error


def reporter(
    progress: Progress | None,
    say: Say | None,
    cancel: Cancel | None,
    folder: Path | None = None,
    *,
    begun: str = "bundle",
) -> Reporter:
    """The callbacks of a run. Once the folder holds ``begun``, setting ``cancel`` makes it stop where it can resume."""
    from delineate.training.lock import stop_file
    from delineate.training.options import Reporter

    def told(what: str, done: int, total: int) -> None:
        if cancel is not None and cancel.is_set():
            if folder is None or not (folder / begun).exists():
                check(cancel)
            else:
                stop_file(folder).touch()
        if progress is not None:
            progress(what, done, total)

    return Reporter(say or (lambda text: None), told)
