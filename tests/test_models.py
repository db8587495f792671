"""Models: found in packages without running their code, packed into one file, and fetched whole or not at all."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import resource
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import delineate
from delineate.bundle import FILES, WEIGHTS, Bundle, Provenance, bundle_folder, hidden
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.errors import BundleError, CannotFetch, DelineateError, OutputError
from delineate.installed import GROUP, installed_models
from delineate.io.formats import read_label, write_volume
from delineate.io.pseudonyms import key_id
from delineate.packing import fetch, pack
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

GRID = Grid.of_spacing((8, 8, 4), (1, 1, 3))
CPU = ("--device", "cpu", "--compile", "off", "--threads", "1")


def run(*words: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, repr(done.exception) + done.output
    return done


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    recipe = recipe_from(
        {
            "name": "small",
            "tiles": {"kind": "patches", "shape": [8, 8, 4]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [2, 4]},
        }
    )
    known = Provenance(key=key_id(), training=hidden(["a", "b"]), validation=hidden(["c"]))
    made = Bundle(
        recipe,
        recipe.pipeline,
        Targets({"organ": (1,)}),
        ("MR",),
        TileGeometry((8, 8, 4)),
        (1.0, 1.0, 3.0),
        provenance=known,
    )
    torch.manual_seed(0)
    made.save(tmp_path / "made", made.network().state_dict(), {"step": 3})
    return tmp_path / "made"


def install(site: Path, name: str, value: str, package: str = "some-models") -> None:
    """A package's metadata, as pip leaves them."""
    about = site / f"{package.replace('-', '_')}-1.2.dist-info"
    about.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.4\nName: {package}\nVersion: 1.2\nLicense-Expression: CC-BY-4.0\n"
    (about / "METADATA").write_text(metadata, encoding="utf-8")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n", encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a package with a model is installed; importing it would end the test."""
    place = tmp_path / "site"
    install(place, "organ", "some_models.organ")
    fetch(str(bundle), place / "some_models/organ")
    for folder in (place / "some_models", place / "some_models/organ"):
        (folder / "__init__.py").write_text("raise SystemExit('code of a model ran')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(place)
    monkeypatch.chdir(tmp_path)
    return place


# Models of packages


def test_an_installed_model_is_named_wherever_a_bundle_is(site: Path, tmp_path: Path) -> None:
    folder = site / "some_models/organ"
    scan = tmp_path / "scan.nii.gz"
    write_volume(scan, Volume(np.random.default_rng(1).random((1, *GRID.shape), np.float32), GRID))
    run("predict", "organ", scan, "-o", "out", *CPU)
    assert read_label(tmp_path / "out/scan.nii.gz").voxels.shape == GRID.shape
    assert run("card", "organ").stdout == run("models", "show", "organ").stdout == run("card", folder).stdout
    run("weights", "export", "organ", "-o", "weights.safetensors")
    assert delineate.load("organ").folders == (folder,)
    from delineate.cli.serve import _named

    assert _named(["organ", "mine=organ"]) == {"organ": folder, "mine": folder}


def test_a_folder_of_that_name_comes_first(site: Path, bundle: Path, tmp_path: Path) -> None:
    assert bundle_folder(Path("organ")) == site / "some_models/organ"
    bundle.rename(tmp_path / "organ")
    assert bundle_folder(Path("organ")) == Path("organ")


def test_a_list_says_what_a_model_is(site: Path) -> None:
    [row] = json.loads(run("models", "list", "--json").stdout)
    assert row["weights_sha256"] == Bundle.load(site / "some_models/organ").weights_sha256
    del row["weights_sha256"]
    assert row == {
        "name": "organ", "package": "some-models", "version": "1.2", "licence": "CC-BY-4.0", "modality": "MR",
        "channels": ["MR"], "targets": ["organ"], "trained_on": 2, "dice": None, "measured_on": "",
    }  # fmt: skip
    shown = run("models", "list").stdout
    assert "not measured" in shown
    assert "CC-BY-4.0" in shown


def test_looking_for_models_imports_neither_torch_nor_the_package(site: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from delineate.installed import resolved
        print(resolved(Path("organ")))
        assert not {"torch", "numpy", "pydantic", "some_models"} & set(sys.modules), sorted(sys.modules)"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8", timeout=60)
    assert done.stdout.strip() == str(site / "some_models/organ"), done.stderr


def test_an_unknown_name_is_answered_with_those_there_are(site: Path) -> None:
    with pytest.raises(BundleError, match="installed models: organ"):
        Bundle.load(bundle_folder(Path("liver")))
    with pytest.raises(CannotFetch, match="installed models: organ"):
        fetch("liver", Path("out"))


@pytest.mark.parametrize(
    ("value", "said"),
    [("some_models.lost", "has no bundle"), ("../..", "names no folder"), ("some_models:organ", "names no folder")],
)
def test_a_package_without_its_bundle_is_named(site: Path, value: str, said: str) -> None:
    install(site, "broken", value, "broken-models")
    with pytest.raises(BundleError, match=f"broken-models.*{said}"):
        bundle_folder(Path("broken"))
    listed = run("models", "list")
    assert said in listed.stderr
    assert "organ" in listed.stdout, "one broken package hides no others"


def test_two_packages_with_one_name_are_both_named(site: Path) -> None:
    install(site, "organ", "some_models.organ", "other-models")
    with pytest.raises(BundleError, match=r"other-models 1\.2 and some-models 1\.2"):
        bundle_folder(Path("organ"))
    assert len(installed_models()["organ"]) == 2
    assert "uninstall" in run("models", "list").stderr


def test_an_installed_model_is_never_written_to(site: Path, tmp_path: Path) -> None:
    from delineate.evaluation.card import check_card

    with pytest.raises(BundleError, match="fetch a copy"):
        check_card(site / "some_models/organ")
    copy = fetch("organ", tmp_path / "copy").folder
    assert copy is not None
    check_card(copy)


# One file


def test_what_is_packed_is_fetched_as_it_was_and_packs_to_the_same_file(bundle: Path, tmp_path: Path) -> None:
    sha256 = pack(bundle, tmp_path / "one.zip")
    assert sha256 == hashlib.sha256((tmp_path / "one.zip").read_bytes()).hexdigest()
    again = fetch(str(tmp_path / "one.zip"), tmp_path / "again", sha256=sha256.upper())
    assert replace(again, folder=bundle) == Bundle.load(bundle)
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {
        p.name: p.read_bytes() for p in bundle.iterdir()
    }
    assert pack(tmp_path / "again", tmp_path / "two.zip") == sha256


def test_what_a_card_that_is_a_link_leads_to_is_never_given_away(bundle: Path, tmp_path: Path) -> None:
    """Its text has no digest, so it could be any file that its owner may read; weights may lie elsewhere."""
    stored = tmp_path / "stored"
    (bundle / WEIGHTS).rename(stored)
    (bundle / WEIGHTS).symlink_to(stored)
    pack(bundle, tmp_path / "linked.zip")
    (tmp_path / "private").write_bytes(b"of nobody else's business")
    (bundle / "card.md").symlink_to(tmp_path / "private")
    with pytest.raises(BundleError, match=r"card.md' is a link"):
        pack(bundle, tmp_path / "one.zip")
    with pytest.raises(BundleError, match=r"card.md' is a link"):
        fetch(str(bundle), tmp_path / "out")
    assert not (tmp_path / "one.zip").exists()
    assert not (tmp_path / "out").exists()


def test_a_run_is_fetched_as_its_bundle(bundle: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    bundle.rename(run_folder / "bundle")
    run("models", "fetch", run_folder, "-o", tmp_path / "out")
    assert replace(Bundle.load(tmp_path / "out"), folder=None) == replace(
        Bundle.load(run_folder / "bundle"), folder=None
    )


def entries(packed: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(packed) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(contents: dict[str, bytes], method: int = zipfile.ZIP_STORED, mode: int = stat.S_IFREG | 0o644) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr, entry.compress_type = mode << 16, method
            archive.writestr(entry, content)
    return out.getvalue()


def lying(content: bytes) -> bytes:
    """The same zip, whose directory promises a file of 3 GiB."""
    place = content.rindex(b"PK\x01\x02")
    return content[: place + 20] + (3 * 2**30).to_bytes(4, "little") * 2 + content[place + 28 :]


HOSTILE: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "above its folder": lambda known: zipped({**known, "../escaped": b"x"}),
    "an absolute path": lambda known: zipped({**known, "/tmp/escaped": b"x"}),
    "a folder": lambda known: zipped({**known, "more/": b""}),
    "another file": lambda known: zipped({**known, "__init__.py": b"x"}),
    "links": lambda known: zipped(known, mode=stat.S_IFLNK | 0o777),
    "a bomb": lambda known: zipped({**known, "card.md": b"\0" * 2**20}, zipfile.ZIP_DEFLATED),
    "sizes that are not true": lambda known: lying(zipped(known)),
    "no manifest": lambda known: zipped({name: c for name, c in known.items() if name != "bundle.json"}),
    "other weights": lambda known: zipped({**known, WEIGHTS: known[WEIGHTS][:-4] + b"abcd"}),
    "no zip": lambda known: b"PK\3\4 and nothing",
    "an empty file": lambda known: b"",
    "cut short": lambda known: zipped(known)[:-30],
}


@pytest.mark.parametrize("made", HOSTILE.values(), ids=HOSTILE)
def test_no_file_but_a_packed_bundle_is_unpacked_and_nothing_is_left(
    made: Callable[[dict[str, bytes]], bytes], bundle: Path, tmp_path: Path
) -> None:
    pack(bundle, tmp_path / "good.zip")
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "bad.zip").write_bytes(made(entries(tmp_path / "good.zip")))
    with pytest.raises(DelineateError) as refused:
        fetch(str(tmp_path / "bad.zip"), place / "out")
    assert refused.value.code in ("E_FETCH", "E_BUNDLE")
    assert refused.value.fix
    assert not list(place.iterdir())
    assert not (tmp_path / "escaped").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_refused(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "twice.zip")
    with zipfile.ZipFile(tmp_path / "twice.zip", "a") as archive:
        archive.writestr("bundle.json", b"{}")
    with pytest.raises(CannotFetch, match="twice"):
        fetch(str(tmp_path / "twice.zip"), tmp_path / "out")


def test_a_file_is_what_was_published_or_is_not_opened(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "good.zip")
    (tmp_path / "other.zip").write_bytes(b"what a reader of zips must never see")
    with pytest.raises(CannotFetch, match=r"SHA-256 is [0-9a-f]{64}, not 0000"):
        fetch(str(tmp_path / "other.zip"), tmp_path / "out", sha256="0" * 64)
    with pytest.raises(CannotFetch, match="64 hexadecimal"):
        fetch(str(tmp_path / "good.zip"), tmp_path / "out", sha256="abc")
    assert not (tmp_path / "out").exists()


def test_only_a_bundle_is_replaced_and_only_when_asked(bundle: Path, tmp_path: Path) -> None:
    packed, out = str(tmp_path / "good.zip"), tmp_path / "out"
    pack(bundle, Path(packed))
    fetch(packed, out)
    (out / "card.md").write_text("Mine.", encoding="utf-8")
    with pytest.raises(OutputError, match="--overwrite"):
        fetch(packed, out)
    (tmp_path / "bad.zip").write_bytes(b"")
    with pytest.raises(DelineateError):
        fetch(str(tmp_path / "bad.zip"), out, overwrite=True)
    assert (out / "card.md").read_text(encoding="utf-8") == "Mine.", "it is as it was"
    fetch(packed, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {path.name for path in bundle.iterdir()} <= set(FILES)
    (out / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"notes\.txt"):
        fetch(packed, out, overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_bundle_that_is_to_be_replaced_outlives_a_stop(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the two renames: both bundles were deleted."""
    out, rename = tmp_path / "out", Path.rename
    fetch(str(bundle), out)
    (out / "card.md").write_text("Mine.", encoding="utf-8")

    def stopped(path: Path, target: Path) -> Path:
        if path.name == "bundle":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch(str(bundle), out, overwrite=True)
    assert (out / "card.md").read_text(encoding="utf-8") == "Mine."
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_no_fault_of_the_file(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "good.zip")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            fetch(str(tmp_path / "good.zip"), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_bundle_needs_a_folder_with_a_name(out: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    with pytest.raises(OutputError, match="no name"):
        fetch(str(bundle), Path(out), overwrite=True)


# Addresses


@pytest.fixture
def published(tmp_path: Path, bundle: Path) -> Iterator[tuple[str, str]]:
    """The address of a packed bundle, and its SHA-256."""
    sha256 = pack(bundle, tmp_path / "served.zip")
    content = (tmp_path / "served.zip").read_bytes()

    class Served(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/lost.zip":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if self.path == "/half.zip" else content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Served) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", sha256
        server.shutdown()
        thread.join()


def test_an_address_is_fetched_with_its_digest_alone(
    published: tuple[str, str], tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server, sha256 = published
    place = tmp_path / "place"
    done = run("models", "fetch", f"{server}/m.zip", "--sha256", sha256, "-o", place / "out", "--json")
    assert json.loads(done.stdout)["weights_sha256"] == Bundle.load(bundle).weights_sha256
    for address, digest, said in (
        (f"{server}/m.zip", None, "--sha256"),
        (f"{server}/m.zip", "0" * 64, "SHA-256 is"),
        (f"{server}/half.zip", sha256, "bytes|incomplete"),
        (f"{server}/lost.zip", sha256, "404"),
        ("file:///etc/hostname", sha256, "no address"),
        ("ftp://127.0.0.1/m.zip", sha256, "no address"),
        ("http://[127.0.0.1/m.zip", sha256, "cannot be read"),
    ):
        with pytest.raises(CannotFetch, match=said):
            fetch(address, place / "refused", sha256=digest)
        assert [path.name for path in place.iterdir()] == ["out"]
