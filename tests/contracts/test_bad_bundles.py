"""Every way of damaging a bundle ends in E_BUNDLE, or in the same bundle where the damage changes nothing.

Raw damage is what disks and people do: digests find it. Forged damage has its digests made to fit, as by
another program: then what the files say is found out to be wrong, or is a sound bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator

from delineate.bundle import Bundle
from delineate.calibration import Calibration
from delineate.core.targets import Targets
from delineate.errors import BundleError
from delineate.evaluation.card import card_of, write_card
from delineate.evaluation.card_facts import Bias, ByRole, CardFacts, Effort, Failures, Figure, Result, Sides
from delineate.io import sealed
from delineate.metrics.conformal import Conformal
from delineate.metrics.statistics import Estimate
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

MUTATIONS = int(os.environ.get("DELINEATE_MUTATIONS", "2000"))
"""Of raw damage, and a fifth as many of forged damage, which takes longer to find; set the variable for more."""

FILES_1 = ("bundle.json", "recipe.yaml", "preprocessing.json", "weights.safetensors", "calibration.json")
FILES = (*FILES_1, "card.json")
FORMAT_1 = Path(__file__).parents[1] / "data/bundle_format_1"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = recipe_from(
        {
            "name": "small",
            "preprocessing": [{"kind": "normalise"}],
            "tiles": {"kind": "patches", "shape": [8, 8, 4], "standardise": True},
            "network": {"kind": "unet", "dimensions": 3, "widths": [2, 2]},
        }
    )
    geometry = TileGeometry((8, 8, 4), standardise=True)
    bundle = Bundle(recipe, recipe.pipeline, Targets({"liver": (1,)}), ("T1",), geometry, (1.0, 1.0, 3.0))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sound")
    bundle.save(folder, bundle.network().state_dict(), {"step": 1})
    Calibration({"liver": Conformal(((0.1,), (0.2,)))}, {"liver": Conformal(((0.3,),))}).save(folder)
    sha256 = Bundle.load(folder).weights_sha256
    figure = Figure("liver", "dice", "Dice", Estimate(0.8, 0.1, (0.7, 0.9), 3, 0, 1, 3), 1)
    bias, failures = Bias("liver", "volume", "ml", 0.5, (-1, 2), (-3, 4), 3), Failures("liver", 3, 1, 1, 0, 1, 0.25)
    result = Result(
        "test", sha256, "2026-01-02", 4, 3, 2, (figure,), (bias,), (failures,),
        name="B", quantity="fat", sides=(Sides("liver", 3, 4),), notes=("x",),
    )  # fmt: skip
    effort = Effort(sha256, 10, 0.5, finished=True)
    write_card(
        folder, CardFacts(effort=effort, sites=(ByRole(3, 1, 4), ByRole(1)), patients=ByRole(3), results=(result,))
    )
    return folder


@contextmanager
def bounded(seconds: float = 2.0, memory_bytes: int = 2**30) -> Iterator[None]:
    """What takes longer, or a gigabyte more than before, raises inside the block."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, limits[1]))
    # Of this process' own time: others' load is no fault of a bundle's.
    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)


def use(folder: Path) -> Bundle:
    """All that reads a bundle's files before a network is built."""
    bundle = Bundle.load(folder)
    Calibration.load(folder)
    card_of(bundle)
    return bundle


def damaged(content: bytes, rng: Generator) -> bytes:
    """Bytes cut, flipped, replaced, taken out, put in or twice there."""
    at, n = int(rng.integers(len(content) + 1)), int(rng.integers(1, 40))
    changed = bytearray(content)
    match rng.integers(7):
        case 0:
            del changed[at:]
        case 1:
            changed[at : at + 1] = bytes([changed[at] ^ 1 << int(rng.integers(8))] if at < len(changed) else [0])
        case 2:
            changed[at : at + 1] = rng.bytes(1)
        case 3:
            del changed[at : at + n]
        case 4:
            changed[at:at] = rng.bytes(n)
        case 5:
            changed[at:at] = changed[at : at + n]
        case 6:
            changed[at : at + n] = struct.pack("<q", int(rng.choice([0, -1, 2**62, 2**31])))
    return bytes(changed)


def test_raw_damage_is_found_or_changes_nothing(sound: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    folder = tmp_path / "bundle"
    shutil.copytree(sound, folder)
    before, contents = use(folder), {name: (sound / name).read_bytes() for name in FILES}
    found = 0
    for _ in range(MUTATIONS):
        name = FILES[rng.integers(len(FILES))]
        (folder / name).write_bytes(damaged(contents[name], rng))
        with bounded():
            try:
                assert use(folder) == before
            except BundleError:
                found += 1
        (folder / name).write_bytes(contents[name])
    assert found > 0.95 * MUTATIONS


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, "", "x", "../../etc/passwd", "\ud800",
    "\x1b[2J", [], {}, [[]], [0], [1e9] * 3, {"kind": "x"}, "8" * 10_000,
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def altered(values: Any, rng: Generator) -> Any:
    """Another value, nested deeply, missing, or added somewhere."""
    values = json.loads(json.dumps(values))
    everywhere = list(places(values))
    *parents, last = everywhere[rng.integers(len(everywhere))]
    node = values
    for key in parents:
        node = node[key]
    match rng.integers(8):
        case 0:
            del node[last]
        case 1 if isinstance(node, dict):
            node["unknown"] = node.pop(last)
        case 2:
            for _ in range(int(rng.choice([3, 150, 900]))):
                node[last] = [node[last]] if rng.integers(2) else {"a": node[last]}
        case 3 if isinstance(node[last], list):
            node[last] = node[last] * int(rng.choice([0, 2, 1000]))
        case 4 if isinstance(node[last], int | float):
            node[last] = node[last] * rng.choice([-1.0, 1e3, 1e6, 1e300])
        case _:
            node[last] = VALUES[rng.integers(len(VALUES))]
    return values


def reseal(folder: Path, about: dict[str, Any] | None = None) -> None:
    """Make the digests those of the files as they are now."""
    contents = json.loads((folder / "bundle.json").read_text(encoding="utf-8")) if about is None else dict(about)
    contents.pop("sha256", None)
    if about is None:
        for name in contents["files"]:
            content = (folder / name).read_bytes()
            contents["files"][name] = [{"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}]
    contents["sha256"] = sealed._digest(contents)
    (folder / "bundle.json").write_text(json.dumps(contents), encoding="utf-8")


def with_header(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file whose header is changed."""
    (n,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8 : 8 + n]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + n :]


def forged(folder: Path, contents: dict[str, bytes], rng: Generator) -> None:
    """Damage one file, by its bytes or by its values, and make the digests fit."""
    name = FILES[rng.integers(len(FILES))]
    by_values = rng.integers(4) > 0
    if name == "bundle.json":
        return reseal(folder, altered(json.loads(contents[name]), rng))
    if not by_values:
        (folder / name).write_bytes(damaged(contents[name], rng))
    elif name == "weights.safetensors":
        if rng.integers(2):
            (folder / name).write_bytes(with_header(contents[name], lambda header: altered(header, rng)))
        else:
            value = struct.pack("<f", float(rng.choice([np.nan, np.inf, -np.inf])))
            (folder / name).write_bytes(contents[name][:-4] + value)
    elif name == "recipe.yaml":
        (folder / name).write_text(json.dumps(altered(RECIPE, rng)), encoding="utf-8")  # JSON is YAML
    else:
        (folder / name).write_text(json.dumps(altered(json.loads(contents[name]), rng)), encoding="utf-8")
    reseal(folder)


RECIPE = {
    "name": "small", "description": "", "preprocessing": [{"kind": "normalise"}],
    "tiles": {"kind": "patches", "shape": [8, 8, 4], "standardise": True},
    "network": {"kind": "unet", "dimensions": 3, "widths": [2, 2], "convolutions": 2, "deep_supervision": 0},
    "training": {"steps": 3}, "inference": {"overlap": 0.5}, "metrics": ["standard"],
}  # fmt: skip


def test_forged_damage_is_found_or_is_a_sound_bundle(sound: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    folder = tmp_path / "bundle"
    shutil.copytree(sound, folder)
    contents = {name: (sound / name).read_bytes() for name in FILES}
    found = 0
    for _ in range(MUTATIONS // 5):
        forged(folder, contents, rng)
        with bounded():
            try:
                use(folder)
            except BundleError:
                found += 1
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    assert found > 0.6 * MUTATIONS / 5


def test_damage_to_a_bundle_of_format_1_meets_only_our_errors(tmp_path: Path) -> None:
    """It has no digests: what makes sense is taken as it is."""
    rng = np.random.default_rng(3)
    folder = tmp_path / "bundle"
    shutil.copytree(FORMAT_1, folder)
    contents = {name: (folder / name).read_bytes() for name in FILES_1}
    found = 0
    for _ in range(MUTATIONS // 40):
        name = FILES_1[rng.integers(len(FILES_1))]
        (folder / name).write_bytes(damaged(contents[name], rng))
        with bounded():
            try:
                use(folder)
            except BundleError:
                found += 1
        (folder / name).write_bytes(contents[name])
    assert found > 0.2 * MUTATIONS / 40


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return make


def huge(path: Path) -> None:
    """64 GiB of nothing."""
    os.truncate(path, 2**36)


PLACES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "a FIFO": fifo,
    "a folder": directory,
    "an endless device": link_to("/dev/zero"),
    "a link to itself": link_to("weights.safetensors"),
    "a link to nowhere": link_to("/nowhere/at/all"),
    "64 GiB": huge,
    "empty": lambda path: path.write_bytes(b""),
    "nested deeply": lambda path: path.write_bytes(b"[" * 200_000),
    "UTF-16": lambda path: path.write_bytes('{"é": 1}'.encode("utf-16")),
    "Latin-1": lambda path: path.write_bytes('{"é": 1}'.encode("latin-1")),
    "another type": lambda path: path.write_bytes(b"[1, 2]"),
    "no fields": lambda path: path.write_bytes(b"{}"),
}


@pytest.mark.parametrize(("name", "format"), [*((name, 1) for name in FILES_1), *((name, 2) for name in FILES)])
def test_strange_things_in_place_of_a_file_are_refused(name: str, format: int, sound: Path, tmp_path: Path) -> None:
    for what, put in PLACES.items():
        folder = tmp_path / what
        shutil.copytree(sound if format == 2 else FORMAT_1, folder)
        put(folder / name)
        # Without digests, what is missing may never have been there.
        optional = name in ("calibration.json", "weights.safetensors")
        missing = what in ("deleted", "a link to nowhere", "a link to itself")
        with bounded():
            if format == 1 and optional and missing:
                with suppress(BundleError):
                    use(folder)
                continue
            with pytest.raises(BundleError):
                use(folder)


def test_a_description_from_before_a_field_was_added_still_opens(sound: Path, tmp_path: Path) -> None:
    """What was read beyond a volume was its border, which is what a bundle that does not say it means."""
    shutil.copytree(sound, tmp_path / "bundle")
    about = json.loads((sound / "bundle.json").read_text(encoding="utf-8"))
    assert about["tiles"].pop("outside") == "edge"
    reseal(tmp_path / "bundle", about)
    assert Bundle.load(tmp_path / "bundle").geometry == Bundle.load(sound).geometry


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("huge tiles", lambda about: about["tiles"].update(shape=[4096, 4096, 4096])),
        ("tiles of another shape", lambda about: about["tiles"].update(shape=[16, 8, 4])),
        ("tiles that are not standardised", lambda about: about["tiles"].update(standardise=False)),
        ("tiles without a field", lambda about: about["tiles"].pop("standardise") and None),
        ("more channels", lambda about: about["channels"].append("T2")),
        ("more targets", lambda about: about["targets"]["values"].update(tumour=[2])),
        ("a field that nobody knows", lambda about: about.update(more=1)),
    ],
)
def test_a_forged_description_is_refused(name: str, change: Callable, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "bundle")
    about = json.loads((sound / "bundle.json").read_text(encoding="utf-8"))
    change(about)
    reseal(tmp_path / "bundle", about)
    with bounded(), pytest.raises(BundleError):
        use(tmp_path / "bundle")


def test_a_recipe_of_aliases_or_of_millions_of_layers_is_refused(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "bundle")
    path = tmp_path / "bundle/recipe.yaml"
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    network = RECIPE["network"] | {"convolutions": 10**9}
    for text in ("\n".join(lines), json.dumps(RECIPE | {"network": network})):
        path.write_text(text, encoding="utf-8")
        reseal(tmp_path / "bundle")
        with bounded(), pytest.raises(BundleError):
            use(tmp_path / "bundle")
