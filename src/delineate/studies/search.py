"""Which values a search tries next: Optuna's tree-structured Parzen estimator, replayed from the scores so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from delineate.errors import StudyError
from delineate.studies.specification import Range, Search

_SEED = 0


def drawn_trials(
    design: Search, scores: Sequence[float | None], trials: int, higher_is_better: bool
) -> list[tuple[str, ...]]:
    """The recipe changes of each trial that can be drawn, given the ``scores`` of the first ones (None: failed).

    Trials are drawn in batches of ``at_a_time``; a batch is drawn once every trial before it has a score. The same
    scores always draw the same trials, so a search needs no state of its own. Raises :class:`StudyError` without
    Optuna.
    """
    try:
        import optuna
    except ImportError as error:
        raise StudyError("a search needs Optuna", fix="pip install 'delineate[search]'") from error
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=_SEED), direction="maximize" if higher_is_better else "minimize"
    )
    changes: list[tuple[str, ...]] = []
    while len(changes) < trials:
        batch = [study.ask() for _ in range(min(design.at_a_time, trials - len(changes)))]
        changes += [
            tuple(f"{field}={_value(trial, field, spec)}" for field, spec in design.parameters.items())
            for trial in batch
        ]
        if len(scores) < len(changes):
            break
        for trial in batch:
            score = scores[trial.number]
            study.tell(trial, score, state=None if score is not None else TrialState.FAIL)
    return changes


def _value(trial: Any, field: str, spec: Range | tuple[Any, ...]) -> str:
    """A value for a field, as a change of a recipe writes it."""
    if not isinstance(spec, Range):
        # By number: Optuna's choices must be plain values, ours may be anything that YAML can hold.
        value = spec[trial.suggest_categorical(field, list(range(len(spec))))]
        return value if isinstance(value, str) else json.dumps(value)
    if isinstance(spec.low, int) and isinstance(spec.high, int):
        return str(trial.suggest_int(field, spec.low, spec.high, log=spec.log))
    return repr(trial.suggest_float(field, spec.low, spec.high, log=spec.log))
