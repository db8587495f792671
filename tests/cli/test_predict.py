"""``delineate predict`` into folders that hold something already, and of scans of which not all can be predicted."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.cli.started import STARTED
from delineate.compute import plan_compute
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.text import printable
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import check_shows_something
from delineate.errors import BadShape, ConstantScan, DelineateError, OutputError, TooLarge
from delineate.inference.batch import find_subjects, predict_subjects
from delineate.inference.outputs import Outputs
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_label, write_label, write_volume
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

GRID = Grid.of_spacing((12, 10, 8), (1, 1, 3))
runner = CliRunner()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network; where things lie does not depend on what it learnt."""
    folder = tmp_path_factory.mktemp("bundle")
    recipe = recipe_from(
        {
            "name": "small",
            "preprocessing": [{"kind": "normalise"}],
            "tiles": {"kind": "patches", "shape": [8, 8, 4]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
        }
    )
    made = Bundle(recipe, recipe.pipeline, Targets({"organ": (1,)}), ("MR",), TileGeometry((8, 8, 4)), (1.0, 1.0, 3.0))
    torch.manual_seed(1)
    made.save(folder, made.network().state_dict(), {})
    return folder


UNUSED = [
    "lightning", "pytorch_lightning", "matplotlib", "pandas", "monai", "tensorboard", "torch._dynamo",
    "torch._inductor",
    "sympy", "scipy.stats", "scipy.ndimage", "scipy.spatial", "cc3d", "SimpleITK", "jinja2", "highdicom", "vtk",
    "delineate.training", "delineate.evaluation", "delineate.reporting",
]  # fmt: skip


def test_predicting_imports_nothing_that_it_does_not_use(bundle: Path, tmp_path: Path) -> None:
    """Importing was nine tenths of the time that one small scan took."""
    arguments = ["predict", bundle, scan(tmp_path / "scan.nii.gz"), "-o", tmp_path / "out", "--device", "cpu"]
    code = (
        f"import sys; sys.argv = {['delineate', *map(str, arguments)]!r}\nfrom delineate.cli import main\n"
        f"try: main()\nexcept SystemExit as end: assert not end.code\n"
        f"print(sorted(set({UNUSED!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "out/scan.nii.gz").exists()


def test_stages_add_up_to_the_time_since_the_command_began(bundle: Path, scans: Path, tmp_path: Path) -> None:
    """They were .5 s of the five that a person waited."""
    before = time.perf_counter()
    done = predict(bundle, scans, "-o", tmp_path / "out", "--json", "-q")
    answer = json.loads(done.stdout)
    assert before <= STARTED + sum(answer["seconds"].values()) <= time.perf_counter()
    assert all(seconds >= 0 for seconds in answer["seconds"].values())
    for stage in ("preprocess", "network", "undo", "postprocess"):
        parts = sum(row["seconds"][stage] for row in answer["predictions"])
        assert answer["seconds"][stage] == pytest.approx(parts)


def test_quiet_leaves_results_and_errors(bundle: Path, scans: Path, tmp_path: Path) -> None:
    loud = predict(bundle, scans, "-o", tmp_path / "loud")
    quiet = predict(bundle, scans, "-o", tmp_path / "quiet", "-q")
    assert "precision:" in loud.stderr
    assert quiet.stderr == ""
    assert "3 predictions" in quiet.stdout
    (scans / "b.nii.gz").write_bytes(b"damaged")
    assert predict(bundle, scans, "-o", tmp_path / "error", "-q", code=1).stderr.startswith("b: E_")


def test_a_run_is_as_good_as_its_bundle(bundle: Path, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/bundle").symlink_to(bundle, target_is_directory=True)
    predict(tmp_path / "run", scans / "a.nii.gz", "-o", tmp_path / "out", "--also", tmp_path / "run")
    assert (tmp_path / "out/a.nii.gz").exists()
    exported = runner.invoke(
        app, ["weights", "export", str(tmp_path / "run"), "-o", str(tmp_path / "some.safetensors")]
    )
    assert exported.exit_code == 0, exported.exception


@pytest.fixture
def predictor(bundle: Path) -> Predictor:
    return Predictor([Bundle.load(bundle)], plan_compute(device="cpu", precision="fp32", compile="off"))


def scan(path: Path, seed: int = 0) -> Path:
    voxels = np.random.default_rng(seed).random((1, *GRID.shape), dtype=np.float32)
    write_volume(path, Volume(voxels, GRID))
    return path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for i, name in enumerate("abc"):
        scan(tmp_path / "scans" / f"{name}.nii.gz", i)
    return tmp_path / "scans"


def predict(bundle: Path, *arguments: object, code: int = 0) -> Result:
    done = runner.invoke(app, ["predict", str(bundle), *map(str, arguments), "--device", "cpu", "--compile", "off"])
    if isinstance(done.exception, DelineateError):
        assert code == 1, done.exception
    else:
        assert done.exit_code == code, done.output
    return done


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "review.csv").open(newline="", encoding="utf-8") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def into_the_folder_itself(scans: Path, out: Path) -> Path:
    return scans


def by_a_relative_path(scans: Path, out: Path) -> Path:
    return scans / ".." / scans.name


def through_a_linked_folder(scans: Path, out: Path) -> Path:
    out.symlink_to(scans, target_is_directory=True)
    return out


def through_linked_files(scans: Path, out: Path) -> Path:
    out.mkdir()
    for path in scans.iterdir():
        (out / path.name).symlink_to(path)
    return out


def through_hard_links(scans: Path, out: Path) -> Path:
    out.mkdir()
    for path in scans.iterdir():
        (out / path.name).hardlink_to(path)
    return out


WAYS = [
    into_the_folder_itself,
    by_a_relative_path,
    through_a_linked_folder,
    through_linked_files,
    through_hard_links,
]


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--overwrite", "--format", "vtk"]], ids=" ".join)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_scans_are_never_written_over(
    bundle: Path, scans: Path, tmp_path: Path, way: Callable[[Path, Path], Path], flags: list[str]
) -> None:
    out = way(scans, tmp_path / "out")
    before = content(tmp_path)
    done = predict(bundle, scans, "-o", out, *flags, code=1)
    assert isinstance(done.exception, OutputError)
    assert "an input" in str(done.exception)
    assert content(tmp_path) == before


@pytest.mark.parametrize("known", [True, False], ids=["of a data set", "beside the scans"])
def test_labels_are_never_written_over(bundle: Path, tmp_path: Path, known: bool) -> None:
    for i in range(2):
        scan(tmp_path / f"imagesTr/c{i}_0000.nii.gz", i)
        write_label(tmp_path / f"labelsTr/c{i}.nii.gz", LabelVolume(np.ones(GRID.shape, np.uint8), GRID))
    if known:
        about = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
        (tmp_path / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    before = content(tmp_path)
    for flags in ([], ["--overwrite"]):
        done = predict(
            bundle, tmp_path if known else tmp_path / "imagesTr", "-o", tmp_path / "labelsTr", *flags, code=1
        )
        assert isinstance(done.exception, OutputError)
        assert content(tmp_path) == before


def test_scans_are_never_written_over_from_python_either(predictor: Predictor, scans: Path) -> None:
    before = content(scans)
    outcomes = list(predict_subjects(predictor, find_subjects([scans], ("MR",)), scans))
    assert all(isinstance(outcome.error, OutputError) for outcome in outcomes)
    assert content(scans) == before


def test_a_file_of_the_bundle_is_never_written_over(bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "copy")
    named = scan(tmp_path / "bundle.nii.gz")  # its sidecar would be bundle.json
    before = content(tmp_path)
    done = predict(copied, named, "-o", copied, "--format", "vti", "--overwrite", code=1)
    assert "an input" in str(done.exception)
    assert content(tmp_path) == before


def test_other_files_are_replaced_only_on_request(bundle: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.nii.gz").write_text("somebody's", encoding="utf-8")
    done = predict(bundle, scans, "-o", out, code=1)
    assert "b.nii.gz' exists already; give --overwrite" in str(done.exception)
    assert content(out) == {"b.nii.gz": b"somebody's"}, "said before anything was written"
    predict(bundle, scans, "-o", out, "--overwrite")
    assert content(out)["b.nii.gz"] != b"somebody's"
    (out / "review.csv").write_text("name,remark\na,fine\n", encoding="utf-8")
    done = predict(bundle, scans, "-o", out, "--overwrite", code=1)
    assert "not a list from predict" in str(done.exception)


def test_the_same_command_resumes_and_another_one_is_refused(bundle: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(bundle, scans / "a.nii.gz", "-o", out)
    label = read_label(out / "a.nii.gz")
    write_label(out / "a.nii.gz", LabelVolume(label.voxels[::-1], label.grid))
    corrected = (out / "a.nii.gz").read_bytes()
    answer = json.loads(predict(bundle, scans, "-o", out, "--json").stdout)
    assert answer["skipped"] == ["a"]
    assert [row["subject"] for row in answer["predictions"]] == ["b", "c"]
    assert (out / "a.nii.gz").read_bytes() == corrected
    assert set(rows(out)) == {"a", "b", "c"}
    assert json.loads(predict(bundle, scans, "-o", out, "--json").stdout)["skipped"] == ["a", "b", "c"]
    for changed in (["--overlap", 0.1], ["--probabilities"], ["--mirrored"]):
        predict(bundle, scans, "-o", out, *changed, code=1)
    scan(scans / "b.nii.gz", 99)
    refused = predict(bundle, scans, "-o", out, code=1)
    assert "b.nii.gz' exists already" in str(refused.exception), "it is a prediction of another scan"
    assert "a.nii.gz" not in str(refused.exception)


def test_a_label_that_can_no_longer_be_measured_is_said(bundle: Path, scans: Path, tmp_path: Path) -> None:
    """What is known of it was measured in another label."""
    out = tmp_path / "out"
    predict(bundle, scans, "-o", out)
    (out / "a.nii.gz").write_text("no label", encoding="utf-8")
    answer = json.loads(predict(bundle, scans, "-o", out, "--json", code=1).stdout)
    assert (answer["skipped"], answer["predictions"], answer["measurements"]) == (["a", "b", "c"], [], [])
    assert [(row["subject"], row["code"]) for row in answer["failed"]] == [("a", "E_FORMAT")]
    assert (out / "a.nii.gz").read_text(encoding="utf-8") == "no label"


def test_rows_stand_in_the_review_as_they_come(predictor: Predictor, scans: Path, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "out", bundles=predictor.bundles)
    subjects = find_subjects([scans], ("MR",))
    known = []
    for outcome in predict_subjects(predictor, subjects, outputs.folder, outputs=outputs):
        known.append(outcome.subject.id)
        assert set(known) <= set(rows(outputs.folder))
    assert len(known) == 3


def test_later_runs_merge_by_subject_and_keep_what_a_person_added(bundle: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(bundle, scans / "a.nii.gz", scans / "b.nii.gz", "-o", out)
    text = (out / "review.csv").read_text(encoding="utf-8")
    head, *lines = text.splitlines()
    (out / "review.csv").write_text(
        "\n".join([head + ",checked", *(line + ",by Ann" for line in lines)]) + "\n", encoding="utf-8"
    )
    broken = scans / "c.nii.gz"
    broken.write_bytes(broken.read_bytes()[:100])
    predict(bundle, scans / "a.nii.gz", broken, "-o", out, "--overwrite", code=1)
    found = rows(out)
    assert next(iter(found)) == "c", "what failed is looked at first"
    assert found["c"]["error"].startswith("E_TRUNCATED")
    assert (found["a"]["checked"], found["b"]["checked"]) == ("", "by Ann")


LONGEST = 255 - len(".nii.gz")
NAMES = {
    "long": ("n" * LONGEST, True),
    "too long": ("n" * (LONGEST + 3), False),  # the input ends in .nii, and is short enough
    "no text": (os.fsdecode(b"caf\xe9"), True),
    "formula": ("=1+cmd|calc", True),
    "escape": ("\x1b[2Jname", True),
    "line break": ("two\nlines", True),
}


@pytest.mark.parametrize(("name", "good"), NAMES.values(), ids=NAMES)
def test_no_name_costs_others_their_rows(bundle: Path, tmp_path: Path, name: str, good: bool) -> None:
    folder, out = tmp_path / "scans", tmp_path / "out"
    scan(folder / "z.nii")
    shutil.copyfile(folder / "z.nii", folder / f"{name}.nii")
    done = predict(bundle, folder, "-o", out, code=0 if good else 1)
    assert "\x1b" not in done.output
    found = rows(out)
    assert len(found) == 2
    assert not found.pop("z")["error"]
    [(written, row)] = found.items()
    assert not written.startswith("=")
    assert (out / f"{printable(name)}.nii.gz").exists() if good else row["error"].startswith("E_OUTPUT")
    assert len(list(out.iterdir())) == (7 if good else 6), "nothing half-written"


def test_a_label_that_cannot_be_written_is_one_failed_row(
    predictor: Predictor, tmp_path: Path, no_file_beyond: Callable[[int], AbstractContextManager[None]]
) -> None:
    scan(tmp_path / "small.nii")
    large = np.random.default_rng(3).random((1, 64, 64, 32), dtype=np.float32)
    write_volume(tmp_path / "large.nii", Volume(large, Grid.of_spacing((64, 64, 32))))
    outputs = Outputs(tmp_path / "out", ".nrrd", tmp_path / "out/probabilities", bundles=predictor.bundles)
    subjects = find_subjects([tmp_path / "large.nii", tmp_path / "small.nii"], ("MR",))
    keeping = Predictor(predictor.bundles, predictor.plan, probabilities=True)
    with no_file_beyond(60_000):
        first, second = predict_subjects(keeping, subjects, outputs.folder, outputs=outputs)
    assert isinstance(first.error, OutputError)
    assert second.error is None
    tables = {"review.csv", "measurements.csv", "measurements.json"}
    assert set(content(outputs.folder)) == {*tables, "small.nrrd", "probabilities/small.nii.gz"}
    found = rows(outputs.folder)
    assert found["large"]["error"].startswith("E_OUTPUT")
    assert not found["small"]["error"]


def beyond_a_gpu() -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: np.empty(2**50), beyond_a_gpu])
def test_a_scan_beyond_the_memory_fails_alone(
    allocate: Callable[[], object], predictor: Predictor, scans: Path, tmp_path: Path
) -> None:
    network, passes = predictor.bundles[0].trained_network(), count()
    greedy = Predictor(
        predictor.bundles, predictor.plan, networks=[lambda x: network(x) if next(passes) else allocate()]
    )
    outputs = Outputs(tmp_path / "out", bundles=predictor.bundles)
    first, *others = predict_subjects(greedy, find_subjects([scans], ("MR",)), outputs.folder, outputs=outputs)
    assert isinstance(first.error, TooLarge)
    assert first.error.__cause__ is first.error.__context__ is first.error.__traceback__ is None, "they hold memory"
    assert [outcome.error for outcome in others] == [None, None]
    assert [row["error"][:11] for row in rows(outputs.folder).values()] == ["E_TOO_LARGE", "", ""]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk can only be mounted as root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_batch_and_the_same_command_resumes(bundle: Path, scans: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    with pytest.raises(OSError, match="space") as full:
        (small_disk / "filler").write_bytes(b"x" * 2**20)
    assert full.value.errno == errno.ENOSPC
    os.truncate(
        small_disk / "filler", 128 * 1024 - 7 * 4096
    )  # room for the targets' names, a label and its rows, not for three
    done = predict(bundle, scans, "-o", out, code=1)
    assert "free some space" in done.output
    there = {path.name.split(".")[0] for path in out.glob("*.nii.gz")}
    assert {"a"} <= there < {"a", "b", "c"}
    assert there <= set(rows(out))
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    (small_disk / "filler").unlink()
    answer = json.loads(predict(bundle, scans, "-o", out, "--json").stdout)
    assert set(answer["skipped"]) == there
    assert set(rows(out)) == {"a", "b", "c"}


def test_a_format_that_does_not_fit_is_said_before_the_network_is_loaded(
    monkeypatch, bundle: Path, scans: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "trained_network", None)
        done = predict(bundle, scans, "-o", scans / "out", "--format", "dcm", code=1)
    assert "E_FORMAT: a label in DICOM must refer to a DICOM series" in str(done.exception)
    assert not (scans / "out").exists()


def test_segments_are_named(bundle: Path, scans: Path, tmp_path: Path) -> None:
    predict(bundle, scans / "a.nii.gz", "-o", tmp_path / "out", "--format", "seg.nrrd")
    assert b"Segment0_Name:=organ" in (tmp_path / "out/a.seg.nrrd").read_bytes()[:2000]


def test_missing_packages_are_said_before_anything_runs(monkeypatch, bundle: Path, scans: Path) -> None:
    monkeypatch.delitem(__import__("sys").modules, "delineate.io.dicom_seg", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    done = predict(bundle, scans, "-o", scans / "out", "--format", "dcm", code=1)
    assert "pip install 'delineate[dicom]'" in str(done.exception)


def test_a_subject_without_a_channel_fails_alone(tmp_path: Path, predictor: Predictor) -> None:
    for name in ("a_t1", "a_t2", "b_t1"):
        scan(tmp_path / f"scans/{name}.nii.gz")
    both = find_subjects([tmp_path / "scans"], ("T1", "T2"), {"T1": "*_t1.nii.gz", "T2": "*_t2.nii.gz"})
    assert [subject.channels for subject in both] == [("T1", "T2"), ("T1",)]
    one = find_subjects([tmp_path / "scans"], ("MR",), {"MR": "*_t1.nii.gz"})
    lacking, whole = predict_subjects(predictor, [both[0], one[1]], tmp_path / "out")
    assert str(lacking.error).startswith("E_MISSING")
    assert whole.error is None
    planned = Outputs(tmp_path / "new", bundles=predictor.bundles).plan([both[0], one[1]], [])
    assert [subject.id for subject, _ in planned.failed] == ["a"], "and it is known before any is predicted"


def test_what_cannot_be_read_is_not_taken_for_predicted(bundle: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.nii.gz").write_text("somebody's", encoding="utf-8")
    (scans / "a.dcm").write_bytes(b"no DICOM")
    assert "exists already" in str(predict(bundle, scans / "a.dcm", "-o", out, code=1).exception)


SEEN = {
    "zeros": (np.zeros((1, 6, 6, 6)), ConstantScan),
    "one value": (np.full((2, 6, 6, 6), 7.5), ConstantScan),
    "one voxel": (np.ones((1, 1, 1, 1)), ConstantScan),
    "a line": (np.arange(8.0).reshape(1, 1, 8, 1), BadShape),
}


@pytest.mark.parametrize(("voxels", "error"), SEEN.values(), ids=SEEN)
def test_where_nothing_can_be_seen_nothing_is_segmented(
    predictor: Predictor, tmp_path: Path, voxels: np.ndarray, error: type[DelineateError]
) -> None:
    from delineate.core.subject import Subject
    from delineate.datasets.dataset import Dataset
    from delineate.datasets.inspection import inspect

    volume = Volume(voxels[:1].astype(np.float32), Grid.of_spacing(voxels.shape[1:]))
    with pytest.raises(error):
        predictor.predict(volume)
    with pytest.raises(error):
        check_shows_something("several channels", Volume(voxels.astype(np.float32), volume.grid))
    write_volume(tmp_path / "scan.nii.gz", volume)
    subject = Subject("scan", {"MR": tmp_path / "scan.nii.gz"})
    found = inspect(Dataset("d", tmp_path, "scans", (subject,)), for_training=False)
    assert [problem.code for problem in found.errors] == [error.code], "training says the same"
    [outcome] = predict_subjects(predictor, [subject], tmp_path / "out")
    assert outcome.error is not None
    assert outcome.error.code == error.code
