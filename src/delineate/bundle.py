"""The bundle: the folder that training writes and inference reads. It contains no pickle and no subject names.

::

    bundle/
        recipe.yaml            everything needed to train it again
        preprocessing.json     the pipeline, fitted to the training subjects
        weights.safetensors    the network's weights; the metadata holds step and validation score
        calibration.json       errors on held-out subjects, if there were any
        card.json, card.md     the model card: what was measured, and the text, which may be edited
        bundle.json            channels, targets, tiles, fingerprint of the training data, provenance,
                               and the SHA-256 of every file but card.md

A bundle with a file that differs from what was saved is refused on opening, before any network is built.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from delineate.calibration import CALIBRATION
from delineate.core.grid import AXES
from delineate.core.targets import Targets
from delineate.errors import BundleError, DelineateError, OutputError, RecipeError, UnknownKey
from delineate.fingerprint import PATIENT_AXES, Fingerprint
from delineate.installed import named_models, resolved
from delineate.io.files import writing_beside
from delineate.io.pseudonyms import PATTERN, key_file, key_id, pseudonym
from delineate.io.sealed import AGAIN, MANIFEST, Sealed, Stamp, opened, read_json, read_small, replace_file, seal
from delineate.io.settings import parse_yaml
from delineate.networks.base import Unfilled
from delineate.plugins import missing
from delineate.preprocessing.pipeline import Pipeline
from delineate.recipe import Recipe, TargetsSpec, apply_changes, recipe_from, to_yaml
from delineate.sampling.tiles import Patches, Slices, TileGeometry, TileSpec, Whole, geometry_for
from delineate.specification import Specification, Text, from_json, to_json

FORMAT: Final = 2
RECIPE, PREPROCESSING, WEIGHTS = "recipe.yaml", "preprocessing.json", "weights.safetensors"
CARD, CARD_FACTS = "card.md", "card.json"
FILES: Final = (RECIPE, PREPROCESSING, WEIGHTS, CALIBRATION, CARD, CARD_FACTS, MANIFEST)
"""Every file that a bundle may have."""

_AFTER_TRAINING = ("inference", "postprocessing")
"""The recipe's groups that a trained network does not depend on."""

_MOST_VOXELS = 2**30
"""Largest tile, as the network reads it."""

Pseudonym = Annotated[str, Field(pattern=PATTERN)]
Positive = Annotated[float, Field(gt=0, le=1e4)]


@dataclass(frozen=True)
class Provenance:
    """Where a bundle comes from.

    Subjects are listed by pseudonyms, made with the key that ``key`` identifies; their names stay in
    the run folder. ``left_out`` lists subjects with broken files. ``computed`` is whatever affects results down to the
    last bit: device, threads, precision and so on. ``requires`` lists the packages that provide parts of the recipe, as
    ``package==version``, and the modules of parts that belong to no package.

    For an adapted bundle, ``adapted_from`` is the digest of the weights that it was adapted from, and the subjects
    include those of the bundle that had them. Subjects hidden with other keys are not listed: ``other_keys``
    identifies these keys.
    """

    layout: Text = ""
    simulated: bool = False
    fold: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    started: Text = ""
    key: Pseudonym | None = None
    training: tuple[Pseudonym, ...] = ()
    validation: tuple[Pseudonym, ...] = ()
    held_out: tuple[Pseudonym, ...] = ()
    left_out: tuple[Pseudonym, ...] = ()
    versions: Mapping[Text, Text] = field(default_factory=dict)
    computed: Mapping[Text, Text | int] = field(default_factory=dict)
    requires: tuple[Text, ...] = ()
    adapted_from: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    other_keys: tuple[Pseudonym, ...] = ()


@dataclass(frozen=True)
class Calibrated:
    """Whose errors make a bundle's intervals, where it was calibrated on other subjects than its training held out.

    ``name`` is what the user calls their data. Subjects are listed by pseudonyms made with the key that ``key``
    identifies; ``files`` is a pseudonym, too, of the hashes of their files. ``fingerprint`` is what their scans look
    like: intervals hold for scans like these. ``unseen`` says how it is known that the network was not trained on
    them: from the bundle, or by the word of whoever calibrated it.
    """

    name: Text
    on: Text
    key: Pseudonym
    subjects: Annotated[tuple[Pseudonym, ...], Field(max_length=2**17)]
    patients: Annotated[int, Field(ge=0, le=2**53)]
    sites: Annotated[int, Field(ge=0, le=2**53)]
    files: Pseudonym
    unseen: Literal["recorded", "stated"]
    fingerprint: Fingerprint


def hidden(subjects: Sequence[str]) -> tuple[str, ...]:
    """The pseudonyms by which a bundle knows subjects."""
    return tuple(pseudonym("subject", name) for name in subjects)


@dataclass(frozen=True)
class Bundle:
    """A trained network and everything needed to apply it.

    ``geometry`` is the tile geometry used in training; ``spacing_mm`` is the spacing after preprocessing. ``weights``
    is the size and digest that the weights file must have; None before weights are first saved.
    """

    recipe: Recipe
    pipeline: Pipeline
    targets: Targets
    channels: tuple[str, ...]
    geometry: TileGeometry
    spacing_mm: tuple[float, float, float]
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    provenance: Provenance = Provenance()
    calibrated: Calibrated | None = None
    folder: Path | None = None
    weights: Stamp | None = field(default=None, compare=False)

    def network(self) -> nn.Module:
        """The network with its initial weights."""
        return self.recipe.network.build(len(self.channels) * self.geometry.slices, self.targets.outputs)

    def trained_network(self) -> nn.Module:
        """The network with the bundle's weights, in evaluation mode."""
        weights = self._read_weights()
        with Unfilled():
            network = self.network()
        network.load_state_dict(weights)
        return network.eval()

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What training recorded with the weights, such as step and score."""
        with _safetensors(self._weights_file) as file:
            return dict(file.metadata() or {})

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights file, by which a result names the model that produced it."""
        if self.weights is None:
            raise BundleError(self._no_weights)
        return self.weights.sha256

    def seen(self, subject: str) -> bool:
        """Whether the subject of this name was used to train or to select the weights.

        Raises :class:`UnknownKey` if the names were hidden with a key other than the user's,
        and :class:`BundleError` if the bundle does not say what it was trained on.
        """
        known = self.provenance
        if not known.training:
            raise BundleError(
                f"'{self.folder}' does not say which subjects it was trained on", fix="choose subjects by hand"
            )
        if known.key != key_id():
            raise UnknownKey(
                f"cannot tell which subjects '{self.folder}' was trained on: their names were hidden with "
                f"a key other than '{key_file()}'",
                fix="set DELINEATE_KEY to the key of whoever trained it, ask them, or choose subjects by hand",
            )
        found = pseudonym("subject", subject) in {*known.training, *known.validation}
        if known.other_keys and not found:
            raise UnknownKey(
                f"cannot tell all subjects that '{self.folder}' was trained on: it was adapted from a bundle whose "
                "subjects were hidden with another key",
                fix="ask whoever trained that bundle, or choose subjects by hand",
            )
        return found

    @property
    def familiar(self) -> Fingerprint:
        """What scans look like for which the intervals hold: those it was calibrated on, else the training's."""
        return self.fingerprint if self.calibrated is None else self.calibrated.fingerprint

    def with_settings(self, changes: Iterable[str]) -> Bundle:
        """This bundle with other ``inference`` and ``postprocessing`` settings, as ``path.to.field=value``.

        Raises :class:`RecipeError` for any other setting, on which the trained network depends.
        """
        changes = list(changes)
        for change in changes:
            if change.partition("=")[0].partition(".")[0].strip() not in _AFTER_TRAINING:
                raise RecipeError(
                    f"'{change[:100]}' would be another network",
                    fix=f"change only {' and '.join(f'{group}.*' for group in _AFTER_TRAINING)} of a trained bundle",
                )
        recipe = recipe_from(apply_changes(self.recipe.as_dict(), changes))
        recipe.postprocessing.check(self.targets)
        return replace(self, recipe=recipe)

    def differing_settings(self, other: Bundle) -> dict[str, tuple[Any, Any]]:
        """The ``inference`` and ``postprocessing`` settings in which two bundles differ, by name: here, and there."""
        here, there = self.recipe.as_dict(), other.recipe.as_dict()
        return {
            f"{group}.{name}": (value, there[group][name])
            for group in _AFTER_TRAINING
            for name, value in here[group].items()
            if value != there[group][name]
        }

    @property
    def _no_weights(self) -> str:
        return (
            "this bundle has not been saved; save it before reading weights from it"
            if self.folder is None
            else f"'{self.folder}' has no weights yet, since its training has not reached the first validation; "
            "wait, or run `delineate train` again to resume it"
        )

    @property
    def _weights_file(self) -> Path:
        if self.folder is None or self.weights is None:
            raise BundleError(self._no_weights)
        return self.folder / WEIGHTS

    def _read_weights(self) -> dict[str, Tensor]:
        """The tensors, after checking that they are still those the bundle was opened with."""
        path = self._weights_file
        with _safetensors(path) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if Stamp.of(path) != self.weights:
            raise BundleError(f"'{path}' was replaced after the bundle was opened", fix="open it again")
        return weights

    def save(self, folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write the whole bundle. A killed process leaves the previous bundle, this one, or one marked incomplete.

        What an author has written into ``card.md`` stays, since training writes the same bundle again and again.
        """
        self._seal(folder, {WEIGHTS: _writer(weights, metadata)}, without=(CALIBRATION, CARD_FACTS))

    def save_anew(self, folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write the whole bundle in place of any other model's: nothing of that is left, its author's text included."""
        self._seal(folder, {WEIGHTS: _writer(weights, metadata)}, without=(CALIBRATION, CARD_FACTS, CARD))

    def save_copy(self, folder: Path) -> Bundle:
        """Write this bundle, as it is now, to another folder; the file of weights stays the same to the byte.

        Calibration and card are not part of the copy; what an author has written into ``card.md`` of an earlier copy
        stays. Raises :class:`BundleError` where the weights were replaced.
        """
        source, there = self._weights_file, folder / WEIGHTS
        other = not there.exists() or Stamp.of(there) != self.weights
        without = (CALIBRATION, CARD_FACTS, *[CARD] * other)
        self._seal(folder, {WEIGHTS: lambda path: shutil.copyfile(source, path)}, without)
        copy = Bundle.load(folder)
        if copy.weights != self.weights:
            raise BundleError(f"'{source}' was replaced after the bundle was opened", fix="run the command again")
        return copy

    def begin(self, folder: Path) -> None:
        """Write everything but the weights, which training replaces repeatedly, unless a complete bundle is there.

        A bundle of an earlier format is converted. Raises :class:`BundleError` for a damaged bundle.
        """
        if not (folder / MANIFEST).exists() or Sealed.unfinished(folder):
            self._seal(folder, {})
            return
        found = Bundle.load(folder)
        if read_json(_manifest_of(folder), folder / MANIFEST)["format"] != FORMAT:
            seal(folder, found._described(), {}, keep=(RECIPE, PREPROCESSING, WEIGHTS, CALIBRATION))

    def _seal(self, folder: Path, more: Mapping[str, Callable[[Path], object]], without: tuple[str, ...] = ()) -> None:
        """Write the whole bundle, with ``more`` files; those in ``without``, left over from another bundle, go."""
        about = self._described()
        texts = {RECIPE: to_yaml(self.recipe.as_dict()), PREPROCESSING: to_json(self.pipeline)}
        with _refusing(folder):  # write nothing that could not be read back
            recipe, pipeline = _recipe(texts[RECIPE].encode()), from_json(Pipeline, texts[PREPROCESSING])
            again = from_json(_Description, json.dumps(about)).bundle(folder, recipe, pipeline)
            _check_consistent(self)
        if replace(again, folder=self.folder) != self:
            raise BundleError("the bundle would not read back unchanged", fix="report this bug, with the recipe")
        seal(folder, about, {**{name: _text_writer(text) for name, text in texts.items()}, **more}, without=without)

    def _described(self) -> dict[str, Any]:
        with _refusing(self.folder or Path(MANIFEST)):
            described: dict[str, Any] = json.loads(to_json(_Description.of(self)))
        return described

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read a bundle after checking that every file is as it was saved; the weights stay on disk.

        Raises :class:`BundleError` if any file is not, before a network is built.
        """
        with suppress(OSError):  # where it may not be looked for, opening its manifest says why
            if not folder.exists():
                raise BundleError(
                    f"'{folder}' is not a bundle: the folder is missing, and no installed model has that name",
                    fix=f"give a run's bundle/ folder, or a model's name ({named_models()})",
                )
        while True:
            before = _manifest_of(folder)
            try:
                return _load(folder)
            except BundleError:
                # Training may have replaced the weights between two reads.
                if _manifest_of(folder) == before:
                    raise

    def geometry_of(self, shape: tuple[int, int, int]) -> TileGeometry:
        """Tiles for a prepared volume of ``shape``: as in training, or whole slices or volumes if the recipe says so.

        Convolutional networks accept larger inputs than they were trained on, and whole slices and
        volumes have no seams. Sides that the recipe fixes stay as in training.
        """
        spec = self.recipe.tiles
        free = isinstance(spec, Whole) or (isinstance(spec, Slices) and spec.shape == (None, None))
        if not free:
            return self.geometry
        return geometry_for(_as_trained(spec, self.geometry), shape, self.spacing_mm, self.recipe.network)

    @property
    def tiles(self) -> TileSpec:
        """The recipe's tiles, with the sides and the axis that training read from its scans written out.

        Whole slices and volumes stay as large as each scan.
        """
        spec, shape = _as_trained(self.recipe.tiles, self.geometry), self.geometry.shape
        if isinstance(spec, Patches):
            return spec.model_copy(update={"shape": shape})
        if isinstance(spec, Slices) and spec.shape != (None, None):
            in_plane = tuple(side for axis, side in enumerate(shape) if axis != self.geometry.slice_axis)
            return spec.model_copy(update={"shape": in_plane})
        return spec


class _Description(Specification):
    """What ``bundle.json`` holds besides the digests: the only way it is written and read."""

    model_config = ConfigDict(strict=True)

    format: Literal[2] = 2
    channels: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)]
    targets: TargetsSpec
    tiles: TileGeometry
    spacing_mm: tuple[Positive, Positive, Positive]
    fingerprint: Fingerprint
    provenance: Provenance
    calibrated: Calibrated | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> _Description:
        return cls(
            channels=bundle.channels,
            targets=TargetsSpec.of(bundle.targets),
            tiles=bundle.geometry,
            spacing_mm=bundle.spacing_mm,
            fingerprint=bundle.fingerprint,
            provenance=bundle.provenance,
            calibrated=bundle.calibrated,
        )

    def bundle(self, folder: Path, recipe: Recipe, pipeline: Pipeline) -> Bundle:
        return Bundle(
            recipe=recipe,
            pipeline=pipeline,
            targets=self.targets.targets(),
            channels=self.channels,
            geometry=self.tiles,
            spacing_mm=self.spacing_mm,
            fingerprint=self.fingerprint,
            provenance=self.provenance,
            calibrated=self.calibrated,
            folder=folder,
        )


def save_weights(folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Replace a bundle's weights; the bundle is complete at every moment.

    Errors of the old weights make no intervals for others, so a calibration goes. All else stays as it is.
    """
    replace_file(folder, WEIGHTS, _writer(weights, metadata), without=(CALIBRATION,))


def replace_recipe(folder: Path, recipe: Recipe) -> None:
    """Replace a bundle's recipe, by one of another budget; the bundle is complete at every moment."""
    replace_file(folder, RECIPE, _text_writer(to_yaml(recipe.as_dict())))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, to a temporary file that is then renamed."""
    with writing_beside(path) as temporary:
        _writer(tensors, metadata)(temporary)


def export_weights(folder: Path, path: Path, include: Sequence[str]) -> int:
    """Write the tensors of a bundle whose names match a pattern, such as ``encoder.*``, to one file.

    Returns how many there are. Raises :class:`BundleError` if none matches.
    """
    from delineate.networks.transfer import matching

    weights = Bundle.load(folder).trained_network().state_dict()
    chosen = {name: weights[name] for name in matching(weights, include)}
    if not chosen:
        raise BundleError(
            f"no tensor of {folder} matches {', '.join(include)}", fix=f"use names such as '{next(iter(weights))}'"
        )
    save_tensors(path, chosen, {})
    return len(chosen)


def bundle_folder(path: Path) -> Path:
    """The bundle that ``path`` refers to: the folder itself, ``bundle`` inside a run folder, or an installed model's.

    A model is referred to by its name, where there is no such path. Raises as :func:`~delineate.installed.resolved`.
    """
    path = resolved(path)
    inside = path / "bundle"
    # Where these may not be looked for, pathlib raises an error: that is for whoever opens the bundle.
    return inside if os.path.isdir(inside) and not os.path.exists(path / MANIFEST) else path


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a usable bundle, weights included."""
    try:
        return Bundle.load(folder).weights is not None
    except BundleError:
        return False


def versions() -> dict[str, str]:
    """Versions of the software that affects results."""
    import platform
    from importlib.metadata import version

    names = ("delineate", "torch", "lightning", "numpy", "nibabel")
    return {"python": platform.python_version(), **{name: version(name) for name in names}} | {
        "torch_build": torch.__version__
    }


def _load(folder: Path) -> Bundle:
    contents = read_json(_manifest_of(folder), folder / MANIFEST)
    if contents.get("format") == 1:
        return _load_format_1(folder, contents)
    if contents.get("format") != FORMAT:
        raise BundleError(
            f"'{folder}' has format {contents.get('format')!r:.40}; this version reads formats 1 and {FORMAT}",
            fix="update delineate",
        )
    sealed = Sealed.open(folder)
    # Check every file before parsing any.
    stamps = {name: sealed.stamp(name) for name in (RECIPE, PREPROCESSING, CALIBRATION, CARD_FACTS, WEIGHTS)}
    with _refusing(folder / MANIFEST):
        about = from_json(_Description, json.dumps(sealed.about))
    requires = about.provenance.requires
    if steps := missing(requires):
        raise BundleError(f"'{folder}' uses parts of {', '.join(requires)}", fix="; ".join(steps))
    parts = f" (it was made with {', '.join(requires)})" if requires else ""
    with _refusing(folder / PREPROCESSING, parts):
        pipeline = from_json(Pipeline, sealed.read(PREPROCESSING))
    with _refusing(folder / RECIPE, parts):
        recipe = _recipe(sealed.read(RECIPE))
    with _refusing(folder, parts):
        bundle = about.bundle(folder, recipe, pipeline)
        _check_consistent(bundle)
    stamp = stamps[WEIGHTS]
    return bundle if stamp is None else _with_weights(bundle, stamp)


def _load_format_1(folder: Path, contents: dict[str, Any]) -> Bundle:
    """A bundle without digests. It does not record whether tiles are standardised; that comes from its recipe."""
    with _refusing(folder / RECIPE):
        recipe = _recipe(read_small(folder / RECIPE))
    with _refusing(folder / PREPROCESSING):
        pipeline = from_json(Pipeline, read_small(folder / PREPROCESSING))
    with _refusing(folder / MANIFEST):
        said, measured = contents["provenance"], contents["fingerprint"]
        roles = ("training", "validation", "held_out", "left_out")
        provenance = {k: said[k] for k in ("layout", "simulated", "fold", "seed", "started", "versions") if k in said}
        ranges = [
            {"quantity": known[0], "of": known[1], **{k: v[k] for k in ("min", "median", "max")}}
            for name, v in measured.items()
            if (known := _quantity_of_format_1(name)) is not None
        ]
        values = {
            "channels": contents["channels"],
            "targets": contents["targets"],
            "tiles": {**contents["tiles"], "standardise": getattr(recipe.tiles, "standardise", False)},
            "spacing_mm": contents["spacing_mm"],
            "fingerprint": {"subjects": measured.get("subjects", 0), "ranges": ranges},
            "provenance": {**provenance, "key": key_id(), **{r: hidden(said.get(r, ())) for r in roles}},
        }
        bundle = from_json(_Description, json.dumps(values)).bundle(folder, recipe, pipeline)
        _check_consistent(bundle)
    if not (folder / WEIGHTS).exists():
        return bundle
    with _refusing(folder / WEIGHTS):
        _check_fits(bundle, folder / WEIGHTS)  # before reading the whole file, which may be of any size
    return _with_weights(bundle, Stamp.of(folder / WEIGHTS))


def _quantity_of_format_1(name: str) -> tuple[str, str] | None:
    """The quantity, and its axis, channel or target, which format 1 stored as a phrase such as "contrast of T1"."""
    for phrase, quantity in (("spacing from ", "spacing"), ("field of view from ", "field_of_view")):
        for axis, words in PATIENT_AXES.items():
            if name == phrase + words:
                return quantity, axis
    for phrase, quantity in (("contrast of ", "contrast"), ("volume of ", "volume")):
        if name.startswith(phrase):
            return quantity, name.removeprefix(phrase)
    return None


def _with_weights(bundle: Bundle, stamp: Stamp) -> Bundle:
    assert bundle.folder is not None
    path = bundle.folder / WEIGHTS
    with _refusing(path):
        _check_fits(bundle, path)
        with _safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                _check_finite(name, file.get_tensor(name))
    return replace(bundle, weights=stamp)


def _manifest_of(folder: Path) -> bytes:
    return read_small(folder / MANIFEST)


@contextmanager
def _refusing(path: Path, about: str = "") -> Iterator[None]:
    """Turn any exception that malformed content causes into a :class:`BundleError`."""
    try:
        yield
    except (BundleError, UnknownKey, OutputError):
        raise
    except Exception as error:
        reason = error.text if isinstance(error, DelineateError) else str(error) or type(error).__name__
        raise BundleError(f"'{path}' is not valid{about}: {reason:.600}", fix=AGAIN) from error


@lru_cache(maxsize=16)
def _recipe(content: bytes) -> Recipe:
    return recipe_from(parse_yaml(content.decode("utf-8"), RECIPE, BundleError))


def _as_trained(tiles: TileSpec, geometry: TileGeometry) -> TileSpec:
    """``tiles`` with the axis that was the thickest in training written out."""
    if not isinstance(tiles, Slices) or tiles.axis != "thickest" or geometry.slice_axis is None:
        return tiles
    return tiles.model_copy(update={"axis": AXES[geometry.slice_axis]})


def _check_consistent(bundle: Bundle) -> None:
    """Raise :class:`BundleError` if tiles or preprocessing do not follow from the recipe."""
    geometry, recipe = bundle.geometry, bundle.recipe
    if prod(geometry.input_shape) > _MOST_VOXELS:
        raise BundleError(f"tiles of {geometry.input_shape} voxels are too large", fix=AGAIN)
    tiles = _as_trained(recipe.tiles, geometry)
    expected = geometry_for(tiles, geometry.shape, bundle.spacing_mm, recipe.network)
    if geometry != expected:
        raise BundleError(f"the tiles are {geometry}, but the recipe makes them {expected}", fix=AGAIN)
    steps, fitted = recipe.preprocessing, bundle.pipeline.steps
    if [step.kind for step in steps] != [step.kind for step in fitted]:
        kinds = ([step.kind for step in some] for some in (fitted, steps))
        raise BundleError("the preprocessing has the steps {}, but the recipe has {}".format(*kinds), fix=AGAIN)
    for step, after in zip(steps, fitted, strict=True):
        before, now = step.model_dump(exclude_none=True), after.model_dump()
        if differing := [name for name in before if now[name] != before[name]]:
            raise BundleError(
                f"preprocessing step {step.kind} differs from the recipe in {', '.join(differing)}", fix=AGAIN
            )


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _check_fits(bundle: Bundle, path: Path) -> None:
    """Raise :class:`BundleError` if the names, shapes or types of the file's tensors are not the network's.

    Reads only the file's header, and builds the network without allocating memory.
    """
    with _safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        found = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    with _at_most(len(found)), torch.device("meta"), Unfilled():
        state = bundle.network().state_dict()
    wanted = {name: (tuple(tensor.shape), _DTYPES.get(tensor.dtype, "")) for name, tensor in state.items()}
    wrong = [
        f"{name} is {_tensor(found.get(name))}, not {_tensor(wanted.get(name))}"
        for name in (*wanted, *(name for name in found if name not in wanted))
        if found.get(name) != wanted.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BundleError(
            f"the weights in '{path}' do not fit the recipe's network: {'; '.join(wrong[:3])}{more}", fix=AGAIN
        )


def _tensor(known: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if known is None else f"{'×'.join(map(str, known[0])) or 'one number'} of {known[1]}"


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stop building a network as soon as it has more than ``parameters`` tensors."""
    count, here = 0, threading.get_ident()

    def counted(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        if threading.get_ident() != here:  # torch calls this for the networks of all threads
            return
        count += parameter is not None
        if count > parameters:
            raise BundleError(
                f"the weights do not fit the recipe's network, which has more tensors than the file's {parameters}",
                fix=AGAIN,
            )

    handle = nn.modules.module.register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise BundleError(
            f"weight '{name}' is not finite: the training has diverged",
            fix="train with a lower learning rate (training.optimiser.learning_rate), or with --precision fp32",
        )


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    opened(path).close()  # refuses a pipe, on which safetensors would block
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise BundleError(f"'{path}' cannot be read ({error})", fix=AGAIN) from error


def _writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Callable[[Path], None]:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(path: Path) -> None:
        for name, tensor in tensors.items():
            _check_finite(name, tensor)
        plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        path.touch()
        mode = path.stat().st_mode  # as this user's files are: safetensors would let nobody else read them
        try:
            save_file(plain, path, metadata={key: str(value) for key, value in metadata.items()})
            path.chmod(mode)
        except SafetensorError as error:
            raise OSError(str(error)) from error  # unwrap the system's own error

    return write


def _text_writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, encoding="utf-8")
