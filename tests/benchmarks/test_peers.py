"""The runner of ``benchmarks/peers``: its own logic, without an environment of a peer."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from delineate.datasets.layouts import open_dataset
from delineate.datasets.phantoms.writing import write_phantoms
from delineate.datasets.splits import load_split

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture(scope="module", autouse=True)
def runner(scripts):
    return scripts(PEERS, "cases", "raw", "run", "tables", "watching")


def case(runner, tool: str, part: str = "steps", what: str = "a"):
    return runner.cases.Case(part, what, tool, (tool,))


def test_tools_take_turns_and_what_is_done_stays(runner) -> None:
    tools = [case(runner, tool) for tool in "ABC"]
    order = [(number, one.tool) for number, one in runner.run.turns(tools, 2, set())]
    assert order == [(1, "A"), (1, "B"), (1, "C"), (2, "A"), (2, "B"), (2, "C")]
    done = {(tools[0].key, 1), (tools[2].key, 1)}
    assert [(n, one.tool) for n, one in runner.run.turns(tools, 2, done)] == [(1, "B"), *order[3:]]


def test_hours_come_last_and_memory_runs_only_what_never_ran(runner) -> None:
    chosen = {
        "steps": [case(runner, "A")],
        "memory": [case(runner, "A"), case(runner, "B", "evaluation"), case(runner, "C", "evaluation")],
        "dice": [case(runner, "A", "dice")],
    }
    done = {("evaluation: a: C", 1)}
    runs = [(number, one.part, one.tool) for number, one in runner.run.planned(chosen, 2, done)]
    assert runs == [
        (1, "steps", "A"), (2, "steps", "A"), (1, "evaluation", "B"), (1, "dice", "A"), (2, "dice", "A"),
    ]  # fmt: skip


def test_words_are_taken_in_their_own_order(runner) -> None:
    read = runner.run.some_of(runner.run.PARTS)
    assert read("prediction,steps") == ["steps", "prediction"]
    with pytest.raises(argparse.ArgumentTypeError, match="'speed' is none of preparation, steps"):
        read("speed")


def test_results_of_another_machine_or_version_are_not_mixed(runner, tmp_path) -> None:
    results = runner.run.Results(tmp_path / "results.json")
    results.begin({"cores": 2}, {"torch": "2.13"})
    results.add({"key": "steps: a: A", "round": 1})
    again = runner.run.Results(tmp_path / "results.json")
    again.begin({"cores": 2}, {"torch": "2.13"})
    assert again.done() == {("steps: a: A", 1)}
    with pytest.raises(SystemExit, match=r"torch 2\.13, now 2\.14"):
        again.begin({"cores": 2}, {"torch": "2.14"})


def test_the_rate_leaves_out_the_steps_that_warm_up(runner) -> None:
    assert runner.cases.rate([0, 60, 61, 63, 65])["steps_per_second"] == pytest.approx(0.5)
    with pytest.raises(runner.cases.CaseFailed, match="only 3 steps"):
        runner.cases.rate([0, 60, 61])


def test_steps_are_timed_by_what_training_logs(runner, tmp_path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    logged = [(1.0, "loss"), (2.5, "loss"), (2.75, "validation_loss"), (4.0, "loss")]
    with (tmp_path / "events.out.tfevents.1.host.2").open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=0.5, file_version="brain.Event:2").SerializeToString())
        for time, tag in logged:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=0.5)])
            writer.write(Event(wall_time=time, summary=summary).SerializeToString())
    assert runner.cases.logged_steps(tmp_path) == [1.0, 2.5, 4.0]


def test_memory_counts_the_children(runner) -> None:
    held = "held = b'x' * 200_000_000; print(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 0.2e9 < runner.watching.memory_of_tree(process.pid) < 0.4e9
        process.communicate(b"\n")
    assert runner.watching.memory_of_tree(process.pid) == 0


def test_a_command_that_takes_too_long_is_stopped(runner, tmp_path) -> None:
    log = tmp_path / "logs" / "log.txt"
    watched = runner.watching.watch([sys.executable, "-c", "print('said'); exit(3)"], log, {}, 60)
    assert (watched.status, log.read_text(encoding="utf-8")) == (3, "said\n")
    assert runner.watching.watch([sys.executable, "-c", "import time; time.sleep(600)"], log, {}, 0.2).status is None


def test_all_tools_read_the_same_scans_and_fold(runner, tmp_path) -> None:
    source = write_phantoms(tmp_path / "scans", 6, coarse=4.0).root
    raw = tmp_path / "raw" / "Dataset004_hippocampus"
    runner.raw.write_raw(source, raw, few=False)
    before, after = open_dataset(source), open_dataset(raw)
    assert [subject.id for subject in after.subjects] == [subject.id for subject in before.subjects]
    assert after.targets.names == before.targets.names
    fold = json.loads((raw / "fold_0.json").read_text(encoding="utf-8"))
    assert fold["held_out"] == list(load_split(raw / "split.json").held_out(0))
    assert sorted(fold["training"] + fold["held_out"]) == sorted(subject.id for subject in after.subjects)
    runner.raw.link_scans(raw, fold["held_out"], tmp_path / "held")
    assert {file.name for file in (tmp_path / "held").iterdir()} == {f"{n}_0000.nii.gz" for n in fold["held_out"]}
    runner.raw.write_moved(raw, tmp_path / "moved")
    for file in (raw / "labelsTr").iterdir():
        moved = np.asarray(nibabel.load(tmp_path / "moved" / file.name).dataobj)
        reference = np.asarray(nibabel.load(file).dataobj)
        assert 0.3 < 2 * ((moved > 0) & (reference > 0)).sum() / ((moved > 0).sum() + (reference > 0).sum()) < 1


def measured(tool: str, round: int, seconds: float, part: str = "preparation", **values: float) -> dict[str, object]:
    return {
        **{"key": f"{part}: a: {tool}", "part": part, "what": ["a"], "tool": tool, "round": round, "values": values},
        **{"started": "2026-01-02T03:04:05+00:00", "seconds": seconds, "peak_gb": 1.0, "others_percent": 2.5},
        **{"command": f"{tool} --run", "log": "log", "commit": "abc1234"},
    }


def results_of(*runs: dict[str, object]) -> dict[str, object]:
    about = {"processor": "P", "cores": 2, "memory, GiB": 8, "system": "Linux"}
    return {"machine": about, "versions": {"torch": "2.13"}, "runs": list(runs)}


def test_medians_and_what_is_lost_come_from_the_runs(runner) -> None:
    ours = [measured("Delineate", i, seconds) for i, seconds in enumerate((4.0, 9.0, 5.0), start=1)]
    theirs = [measured("nnU-Net", i, seconds) for i, seconds in enumerate((10.0, 12.0, 11.0), start=1)]
    faster = [measured("MONAI", 1, 2.5)]
    page = runner.tables.markdown(results_of(*ours, *theirs, *faster))
    first, second = page.index("- Preparation, a, seconds: Delineate 5.0, MONAI 2.5"), page.index("## Preparation")
    assert first < second
    assert "| a | Delineate | 5.0 (4.0 – 9.0) | 1.00 |  | 3 |" in page
    assert "|  | nnU-Net | 11.0 (10.0 – 12.0) | 1.00 | 2.2 × | 3 |" in page
    assert "|  | MONAI | 2.5 | 1.00 | 0.5 × | 1 |" in page
    assert "took at most 2.5 % of the cores' time" in page
    assert "# nnU-Net\nnnU-Net --run" in page


def test_more_steps_and_a_higher_dice_are_better(runner) -> None:
    runs = [
        measured("Delineate", 1, 1.0, "steps", steps_per_second=2.0),
        measured("MONAI", 1, 1.0, "steps", steps_per_second=0.5),
        measured("Delineate, auto", 1, 600.0, "dice", dice=0.7),
        measured("nnU-Net", 1, 600.0, "dice", dice=0.8),
    ]
    assert runner.tables.losses(runner.tables.rows_of(results_of(*runs))) == [
        "Dice after minutes of wall time, a, Dice: Delineate, auto 0.700, nnU-Net 0.800"
    ]
    assert "| MONAI | 0.500 | 1.00 | 4.0 × | 1 |" in runner.tables.markdown(results_of(*runs))


def test_a_run_that_stands_for_two_rows_is_in_both(runner) -> None:
    shared = {**measured("nnU-Net", 1, 8.0, "prediction"), "what": ["mirrored", "defaults"]}
    own = {**measured("Delineate", 1, 2.0, "prediction"), "what": ["defaults"]}
    rows = [(row.what, row.tool) for row in runner.tables.rows_of(results_of(shared, own))]
    assert rows == [("mirrored", "nnU-Net"), ("defaults", "nnU-Net"), ("defaults", "Delineate")]


def test_tables_replace_those_before_and_nothing_else(runner, tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{runner.tables.BEGIN}\n{runner.tables.END}\nafter\n", encoding="utf-8")
    empty = page.read_text(encoding="utf-8")
    runner.tables.write(page, results_of(measured("Delineate", 1, 3.0)))
    once = page.read_text(encoding="utf-8")
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "3.0" in once
    runner.tables.write(page, results_of(measured("Delineate", 1, 3.0)))
    assert page.read_text(encoding="utf-8") == once
    runner.tables.write(page, results_of())
    assert page.read_text(encoding="utf-8") == empty
    page.write_text("no place", encoding="utf-8")
    with pytest.raises(SystemExit, match="no place for tables"):
        runner.tables.write(page, results_of())


def test_the_page_has_a_place_for_the_tables(runner) -> None:
    page = (PEERS.parents[1] / "docs/peers.md").read_text(encoding="utf-8")
    assert page.count(runner.tables.BEGIN) == page.count(runner.tables.END) == 1
