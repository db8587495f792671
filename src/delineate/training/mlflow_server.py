"""MLflow's server: its client, and whether it answers; without lightning, which takes seconds to import."""

from __future__ import annotations

import os
import re
from typing import Any

from delineate.errors import RecipeError


def check_mlflow(address: str) -> None:
    """Raise :class:`RecipeError` unless an MLflow server, or a database of MLflow's, answers at ``address``."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow_client(address).search_experiments(max_results=1)
    except MlflowException as error:
        raise RecipeError(
            no_answer(address, error), fix="give the address of a server that runs, or leave out --mlflow"
        ) from error


def mlflow_client(address: str) -> Any:
    """A client that gives up after seconds: MLflow's own patience is minutes, during which no step is trained."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers of its use
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow.tracking import MlflowClient

    return MlflowClient(address)


def no_answer(address: str, error: Exception) -> str:
    """What went wrong at ``address``, in one line and without a password of the address."""
    [reason, *_] = str(error).strip().splitlines() or [type(error).__name__]
    # Messages are kept, passwords are not; removed before the text is cut, which could cut their end off.
    address, reason = (re.sub(r"//[^/@\s]*@", "//", text) for text in (address, reason))
    return f"MLflow at '{address}' does not answer: {reason.rpartition('Caused by ')[2][:200]}"
