"""A run's events: typed, kept over a resumption, and what the report reads."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest

from delineate.errors import BadFormat, OutputError
from delineate.reporting.run import write_run_report
from delineate.training.events import (
    EVENTS,
    Collapsed,
    Finished,
    Planned,
    Resumed,
    Started,
    Stopped,
    Trained,
    Validated,
    Warned,
    append_event,
    read_events,
    to_line,
    without_undone,
)
from delineate.training.folder import check_run_folder
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train


def test_a_run_notes_what_happens_and_a_resumed_one_continues(recipe, balls, tmp_path) -> None:
    folder = tmp_path / "run"
    options = RunOptions(cache=tmp_path / "cache", device="cpu", precision="fp32", compile="off", threads=1)

    def stop_at_second_validation(text: str) -> None:
        if text.startswith("step 8"):
            (folder / "stop").touch()

    reporter = Reporter(stop_at_second_validation)
    given = deepcopy((recipe, balls, options)), (reporter.say, reporter.progress, reporter.logs, reporter.silent)
    assert not train(recipe, balls, folder, options, reporter).finished
    before = read_events(folder / "logs")
    assert [type(event) for event in before] == [Started, Planned, Validated, Validated, Stopped]
    assert before[-1].cause == "the stop file"

    result = train(recipe, balls, folder, options, reporter)
    events = read_events(folder / "logs")
    assert events[: len(before)] == before
    assert [type(event) for event in events[len(before) :]] == [
        Started, Planned, Resumed, Validated, Trained, Finished,
    ]  # fmt: skip
    assert [event.step for event in events if isinstance(event, Validated)] == [4, 8, 12]
    assert before[2].targets.keys() == {"ball"}
    assert (events[-1].step, events[-1].measured) == (12, len(result.evaluation.subjects))
    assert list(events) == sorted(events, key=lambda event: event.at)
    # Nothing of the caller's is changed: each run has messages of its own.
    assert given == ((recipe, balls, options), (reporter.say, reporter.progress, reporter.logs, reporter.silent))
    assert before[2].text in reporter.messages
    assert before[2].text not in result.messages

    said = "the network predicts background alone. Likely fixes: one; two"
    append_event(folder / "logs", Collapsed(step=12, predicts="background alone", fixes=("one", "two")))
    assert said in write_run_report(folder, balls).read_text(encoding="utf-8")


def test_a_resumed_run_undoes_what_came_after_its_step() -> None:
    collapsed = Collapsed(step=30, predicts="background alone", fixes=())
    started = Started(training=3, validation=1, held_out=1)
    events = [started, collapsed, Resumed(step=20), Trained(step=40, minutes=1)]
    assert [type(event) for event in without_undone(events)] == [Started, Resumed, Trained]
    assert collapsed in without_undone([started, collapsed, Resumed(step=30)])


def test_a_line_cut_short_by_a_crash_is_left_out_and_the_next_run_adds_after_it(tmp_path) -> None:
    append_event(tmp_path, Warned(message="first"))
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(to_line(Warned(message="torn"))[:-9])
    assert [event.text for event in read_events(tmp_path)] == ["first"]
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (tmp_path / EVENTS).rename(run / "logs" / EVENTS)
    Reporter().of_run(run, first=True).event(Warned(message="second"))
    assert [event.text for event in read_events(run / "logs")] == ["first", "second"]


@pytest.mark.parametrize(
    "line", [b"{}\n", b'{"kind": "warned"}\n', b'{"kind": "never", "step": 1}\n', b"\xff\n", b"\n"]
)
def test_what_no_run_wrote_is_refused(line: bytes, tmp_path) -> None:
    (tmp_path / EVENTS).write_bytes(line)
    with pytest.raises(BadFormat, match=r"events\.jsonl"):
        read_events(tmp_path)


def test_only_the_first_process_says_and_writes(tmp_path) -> None:
    reporter = Reporter()
    reporter.of_run(tmp_path, first=False).event(Warned(message="twice"))
    assert reporter.messages == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("log", ["events.jsonl", "messages.txt"])
def test_a_run_is_known_by_what_it_says(log: str, balls, tmp_path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(OutputError, match="but no run wrote it"):
        check_run_folder(tmp_path, balls)
    (tmp_path / "logs").mkdir()
    Path(tmp_path / "logs" / log).touch()
    check_run_folder(tmp_path, balls)
