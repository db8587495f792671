"""The bundle: the folder in which training and inference meet. No pickle in it.

::

    bundle/
        recipe.yaml            everything that made it
        preprocessing.json     the pipeline, fitted on the training subjects
        bundle.json            channels, targets, tiles, fingerprint of the training data, provenance
        weights.safetensors    the network; its metadata holds step and validation score
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from delineate.core.targets import Targets
from delineate.errors import BundleError
from delineate.io.files import writing_beside
from delineate.preprocessing.pipeline import Pipeline
from delineate.recipe import Recipe, TargetsSpec, recipe_from, to_yaml
from delineate.sampling.tiles import Slices, TileGeometry

FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A trained network and all that is needed to apply it.

    ``geometry`` is the tiles' shape as trained; ``spacing_mm`` the prepared spacing. ``fingerprint``
    describes the training data (ranges of shape, spacing, intensity); ``provenance`` versions,
    hashes, seed, subjects.
    """

    recipe: Recipe
    pipeline: Pipeline
    targets: Targets
    channels: tuple[str, ...]
    geometry: TileGeometry
    spacing_mm: tuple[float, float, float]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def network(self) -> nn.Module:
        """The network with its initial weights."""
        return self.recipe.network.build(len(self.channels) * self.geometry.slices, self.targets.outputs)

    def trained_network(self) -> nn.Module:
        """The network with the bundle's weights, in evaluation mode."""
        network = self.network()
        try:
            network.load_state_dict(self._weights)
        except RuntimeError as error:
            raise BundleError(f"weights in {self.folder} do not fit the recipe's network: {error}") from error
        return network.eval()

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What training noted beside the weights, such as step and score."""
        from safetensors import safe_open

        with safe_open(self._weights_file, framework="pt") as file:
            return dict(file.metadata() or {})

    @cached_property
    def weights_sha256(self) -> str:
        """Digest of the weights' file, by which a result names the model that it is of."""
        with self._weights_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def _weights_file(self) -> Path:
        if self.folder is None:
            raise BundleError("this bundle has not been saved; save it before reading weights from it")
        return self.folder / "weights.safetensors"

    @property
    def _weights(self) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._weights_file)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{self._weights_file} cannot be read ({error}); copy the bundle again") from error

    def save(self, folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write the whole bundle; every file is written beside and renamed."""
        self.save_description(folder)
        save_weights(folder, weights, metadata)

    def save_description(self, folder: Path) -> None:
        """Write all but the weights, which training replaces again and again."""
        slice_axis = self.geometry.slice_axis
        contents = {
            "format": FORMAT,
            "channels": list(self.channels),
            "targets": self.targets.as_dict(),
            "tiles": {"shape": self.geometry.shape, "margin": self.geometry.margin, "slice_axis": slice_axis},
            "spacing_mm": self.spacing_mm,
            "fingerprint": dict(self.fingerprint),
            "provenance": dict(self.provenance),
        }
        _write_text(folder / "recipe.yaml", to_yaml(self.recipe.as_dict()))
        _write_text(folder / "preprocessing.json", self.pipeline.model_dump_json(indent=1))
        _write_text(folder / "bundle.json", json.dumps(contents, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read a bundle; the weights only when asked for. Raises :class:`BundleError`."""
        try:
            contents = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
            recipe = recipe_from(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
            pipeline = Pipeline.model_validate_json((folder / "preprocessing.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise BundleError(
                f"{folder} is not a bundle: {Path(error.filename).name} is missing; give a run's folder bundle/"
            ) from error
        except (json.JSONDecodeError, yaml.YAMLError, ValidationError, OSError) as error:
            raise BundleError(f"{folder} is damaged: {error}; copy the bundle again") from error
        if contents.get("format") != FORMAT:
            raise BundleError(
                f"{folder} has format {contents.get('format')}, this version reads {FORMAT}; update delineate"
            )
        tiles = contents["tiles"]
        return cls(
            recipe=recipe,
            pipeline=pipeline,
            targets=TargetsSpec.model_validate(contents["targets"]).targets(),
            channels=tuple(contents["channels"]),
            geometry=TileGeometry(tuple(tiles["shape"]), tuple(tiles["margin"]), tiles["slice_axis"]),
            spacing_mm=tuple(contents["spacing_mm"]),
            fingerprint=contents["fingerprint"],
            provenance=contents["provenance"],
            folder=folder,
        )

    def geometry_of(self, shape: tuple[int, int, int]) -> TileGeometry:
        """Tiles for a prepared volume of ``shape``: as trained, or a whole slice where the recipe says so.

        Convolutional networks take larger inputs than they were trained on; whole slices and
        volumes cost no seams. Sides that the recipe fixes stay as trained.
        """
        from delineate.sampling.tiles import Whole, geometry_for

        spec = self.recipe.tiles
        free = isinstance(spec, Whole) or (isinstance(spec, Slices) and spec.shape == (None, None))
        if not free:
            return self.geometry
        if isinstance(spec, Slices) and self.geometry.slice_axis is not None:
            spec = spec.model_copy(update={"axis": "xyz"[self.geometry.slice_axis]})  # as trained
        return geometry_for(spec, shape, self.spacing_mm, self.recipe.network)


def save_weights(folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Replace a bundle's weights in one rename; everything else in a bundle stays as it is."""
    save_tensors(folder / "weights.safetensors", weights, metadata)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, beside and renamed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with writing_beside(path) as temporary:
        try:
            save_file(plain, temporary, metadata={key: str(value) for key, value in metadata.items()})
        except SafetensorError as error:
            raise OSError(str(error)) from error  # the system's own, which safetensors wraps


def export_weights(folder: Path, path: Path, include: Sequence[str]) -> int:
    """Write the tensors of a bundle whose names fit a pattern, such as ``encoder.*``, as one file.

    Returns their number. Raises :class:`BundleError` where none fits.
    """
    from delineate.networks.transfer import matching

    weights = Bundle.load(folder).trained_network().state_dict()
    chosen = {name: weights[name] for name in matching(weights, include)}
    if not chosen:
        raise BundleError(
            f"no tensor of {folder} fits {', '.join(include)}; they are named like '{next(iter(weights))}'"
        )
    save_tensors(path, chosen, {})
    return len(chosen)


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    import platform
    from importlib.metadata import version

    names = ("delineate", "torch", "lightning", "numpy", "nibabel")
    return {"python": platform.python_version(), **{name: version(name) for name in names}} | {
        "torch_build": torch.__version__
    }


def _write_text(path: Path, text: str) -> None:
    with writing_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
