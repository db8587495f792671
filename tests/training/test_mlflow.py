"""A run in MLflow: its numbers arrive, and no server that fails ends a training."""

from __future__ import annotations

import socket

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from delineate.errors import RecipeError
from delineate.training.logs import MlflowLogger
from delineate.training.options import Reporter, RunOptions, check_possible
from delineate.training.run import train

# MLflow's own tables, with the newest SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def nobody(monkeypatch) -> str:
    """An address, with a password, where nothing answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    return f"http://me:secret@127.0.0.1:{port}"


def test_the_numbers_of_the_curves_arrive(recipe, balls, tmp_path) -> None:
    address = f"sqlite:///{tmp_path}/mlflow.db"
    options = RunOptions(device="cpu", precision="fp32", evaluate=False, mlflow=address)
    check_possible(options)
    train(recipe, balls, tmp_path / "run of today", options=options, report=Reporter())
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("run of today")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    curve = pd.read_csv(tmp_path / "run of today/logs/training.csv")
    sent = {number.step: number.value for number in client.get_metric_history(found.info.run_id, "loss")}
    assert sent == pytest.approx(dict(zip(curve["step"], curve["loss"], strict=True)), rel=1e-5)


def test_what_cannot_be_reached_is_refused_before_any_work(nobody) -> None:
    with pytest.raises(RecipeError, match="does not answer") as refused:
        check_possible(RunOptions(mlflow=nobody))
    assert "secret" not in str(refused.value)
    with pytest.raises(RecipeError, match="does not answer"):
        check_possible(RunOptions(mlflow="nonsense://here"))


def test_a_server_that_is_lost_is_said_once_and_nothing_ends(nobody) -> None:
    said: list[str] = []
    logger = MlflowLogger(nobody, "run", said.append)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    logger.finalize("success")
    [message] = said
    assert "does not answer" in message
    assert "secret" not in message


def test_what_waited_arrives_when_the_server_is_back(nobody, tmp_path) -> None:
    """A database whose folder comes later, as that of a server that starts again."""
    address = f"sqlite:///{tmp_path}/later/mlflow.db"
    (tmp_path / "later").write_text("no folder", encoding="utf-8")
    said: list[str] = []
    logger = MlflowLogger(address, "run", said.append)
    logger.log_metrics({"dice of liver (whole)": 0.5}, 3)
    assert len(said) == 1
    (tmp_path / "later").unlink()
    (tmp_path / "later").mkdir()
    logger.log_metrics({"dice of liver (whole)": 0.75}, 4)
    logger.finalize("failed")
    client = MlflowClient(address)
    [found] = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    assert found.info.status == "FAILED"
    history = client.get_metric_history(found.info.run_id, "dice of liver _whole_")
    assert [(number.step, number.value) for number in history] == [(3, 0.5), (4, 0.75)]
