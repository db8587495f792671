"""Adapting from Python: a trained bundle, and a few labelled scans of a new scanner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from delineate import bundle as contents
from delineate.api.progress import Cancel, Progress, Say, check
from delineate.api.training import Changes, InFolder, as_texts, reporter
from delineate.compute import Compile, Precision
from delineate.datasets.dataset import Dataset
from delineate.evaluation.change import Change

if TYPE_CHECKING:
    from delineate.training.adapted import Adapted
    from delineate.training.options import Reporter, RunOptions, Stop

__all__ = ["Adaptation", "adapt"]


@dataclass(frozen=True)
class Adaptation(InFolder):
    """An adapted bundle in ``folder``, and what adapting it gained and cost.

    ``share`` is that of the fine-tuned weights in the average with the original ones. ``gain`` compares new scans
    before and after, each predicted by a network that was not trained on its patient; ``forgetting`` compares
    original scans that no training has seen. Where one is None, ``notes`` say why. ``stopped`` says why it ended
    early; call :func:`adapt` again to resume it.
    """

    folder: Path
    share: float | None = None
    gain: Change | None = None
    forgetting: Change | None = None
    notes: tuple[str, ...] = ()
    stopped: Stop | None = None


def adapt(
    bundle: str | Path,
    data: str | Path | Dataset,
    out: str | Path,
    *,
    original: str | Path | Dataset | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    folds: int = 3,
    changes: Changes = (),
    cache: str | Path | None = None,
    cache_gb: float | None = None,
    leave_out_broken: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    compile: Compile = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    cancel: Cancel | None = None,
) -> Adaptation:
    """Adapt a bundle to a new scanner with one to ten labelled scans, and measure what that gained and what it cost.

    >>> import delineate
    >>> quick = {"steps": 2, "folds": 2, "cache": "prepared", "device": "cpu", "compile": "off"}
    >>> found = delineate.adapt("run", "scans", "adapted", **quick)
    >>> found.gain.verdict
    'too few to tell'
    >>> found.bundle
    Bundle(ball from image)

    ``bundle`` is a bundle or a run folder, ``data`` the labelled scans, ``original`` the data that the bundle was
    trained on: some of it is rehearsed, and its subjects that no training has seen show what is forgotten. The new
    scans are divided into at most ``folds`` folds of whole patients. Each fold is predicted after a training without
    it, and a last training takes all. Each training takes ``minutes`` or ``steps`` (200 if neither is given).
    ``changes`` may change the recipe's training, augmentation, sampler and loss.

    Call it again with the same arguments to resume; ``cache``, ``cache_gb``, ``cancel``, ``progress`` and ``say`` are
    those of :func:`train`.

    Raises :class:`~delineate.errors.DatasetError` if the data do not fit the bundle, or ``out`` holds another
    adaptation, :class:`~delineate.errors.UnknownKey` if it cannot be known which original subjects the bundle was
    trained on, and what :func:`train` raises.
    """
    from delineate.recipe import DataSpec
    from delineate.training.adapted import PLAN
    from delineate.training.options import RunOptions, check_possible

    check(cancel)
    folder = Path(out)
    options = RunOptions(
        cache=None if cache is None else Path(cache),
        cache_gb=cache_gb,
        leave_out_broken=leave_out_broken,
        device=device,
        precision=precision,
        compile=compile,
        threads=threads,
    )
    check_possible(options)
    new = DataSpec().open(Path(data)) if isinstance(data, str | Path) else data
    report = reporter(progress, say, cancel, folder, begun=PLAN)
    found = adapt_and_report(
        Path(bundle),
        new,
        Path(original) if isinstance(original, str | Path) else original,
        folder,
        options,
        report,
        minutes=minutes,
        steps=steps,
        folds=folds,
        changes=as_texts(changes),
    )
    return Adaptation(folder, found.share, found.gain, found.forgetting, found.notes, found.stopped)


def adapt_and_report(
    place: Path,
    new: Dataset,
    original: Path | Dataset | None,
    folder: Path,
    options: RunOptions,
    report: Reporter,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    folds: int = 3,
    changes: Sequence[str] = (),
) -> Adapted:
    """Adapt the bundle at ``place``; once that is complete, write the report. Raises what :func:`adapt` raises."""
    from delineate.reporting.adaptation import write_adaptation_report
    from delineate.training.adaptation import adapt
    from delineate.training.adapted import PLAN, WRITTEN
    from delineate.training.fine_tuning import adapted_recipe, parts_of
    from delineate.training.folder import check_own
    from delineate.training.lock import holding

    where = contents.bundle_folder(place)
    origin = contents.Bundle.load(where)
    known = origin.recipe.data.open(original) if isinstance(original, Path) else original
    datasets = [new] if known is None else [new, known]
    files = [file for dataset in datasets for subject in dataset.subjects for file in subject.files]
    check_own(folder, WRITTEN, [*files, *where.iterdir()], [folder / PLAN], what="adaptation")
    parts = parts_of(origin, new, known)
    rehearses = len(parts.dataset.subjects) > len(parts.new)
    recipe = adapted_recipe(origin, where, minutes=minutes, steps=steps, rehearses=rehearses, changes=changes)
    with holding(folder):
        found = adapt(origin, parts, recipe, folder, options, report, folds=folds)
        if found.stopped is None:
            write_adaptation_report(found)
    return found
