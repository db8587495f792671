"""Images from and to other libraries: voxels and world coordinates stay exactly as they are.

A library is imported only when one of its images is made, so none has to be installed for the others.
:func:`volume_of` takes any of their images, as :func:`delineate.predict` and :func:`delineate.write` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from delineate.core.volume import LabelVolume, Volume
from delineate.errors import BadFormat, BadGeometry, BadLabelValue, BadShape, BadVoxels
from delineate.io.voxels import LPS_TO_RAS, check_grid

__all__ = [
    "Image",
    "NibabelImage",
    "SimpleITKImage",
    "TorchIOImage",
    "as_label",
    "from_nibabel",
    "from_numpy",
    "from_simpleitk",
    "from_torchio",
    "to_nibabel",
    "to_numpy",
    "to_simpleitk",
    "to_torchio",
    "volume_of",
]

_WHERE = Path("the image")


@runtime_checkable
class NibabelImage(Protocol):
    """The part of nibabel's spatial images that is used here."""

    @property
    def dataobj(self) -> Any: ...

    @property
    def affine(self) -> Any: ...


@runtime_checkable
class SimpleITKImage(Protocol):
    """The part of a ``SimpleITK.Image`` that is used here."""

    def GetDirection(self) -> Any: ...  # noqa: N802

    def GetSpacing(self) -> Any: ...  # noqa: N802

    def GetOrigin(self) -> Any: ...  # noqa: N802

    def GetDimension(self) -> int: ...  # noqa: N802


@runtime_checkable
class TorchIOImage(Protocol):
    """The part of TorchIO's ``ScalarImage`` and ``LabelMap`` that is used here: ``data`` (C, X, Y, Z), RAS."""

    @property
    def data(self) -> Any: ...

    @property
    def affine(self) -> Any: ...


Image = NibabelImage | SimpleITKImage | TorchIOImage


def from_numpy(voxels: ArrayLike, affine: ArrayLike) -> Volume:
    """A scan from an array (X, Y, Z) or (C, X, Y, Z) and its affine (4, 4) to RAS+ millimetres.

    >>> import numpy as np
    >>> from_numpy(np.zeros((4, 5, 6)), np.diag([1, 1, 3, 1])).grid
    4 × 5 × 6 voxels of 1 × 1 × 3 mm, RAS

    Raises :class:`~delineate.errors.BadShape`, :class:`~delineate.errors.BadGeometry` and
    :class:`~delineate.errors.BadVoxels` for what no scan can have.
    """
    array, to_world = np.asarray(voxels), np.asarray(affine, np.float64)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or 0 in array.shape:
        raise BadShape(f"the image has voxels {array.shape}", fix="give (X, Y, Z), or channels first (C, X, Y, Z)")
    if array.dtype.kind not in "biuf":
        raise BadVoxels(f"the image has voxels of type {array.dtype}", fix="give integers or real numbers")
    if to_world.shape != (4, 4) or not np.array_equal(to_world[3], (0, 0, 0, 1)):
        raise BadShape(
            f"the affine has shape {to_world.shape}, or its last row is not 0 0 0 1",
            fix="give (4, 4), ending in 0 0 0 1",
        )
    x, y, z = array.shape[1:]
    return Volume(array, check_grid(_WHERE, (x, y, z), to_world))


def to_numpy(volume: Volume | LabelVolume) -> tuple[NDArray, NDArray[np.float64]]:
    """The voxels, (C, X, Y, Z) for a scan or (X, Y, Z) for a label, and the affine to RAS+ millimetres."""
    return volume.voxels, np.array(volume.grid.affine)


def from_nibabel(image: NibabelImage) -> Volume:
    """A scan from a nibabel image; a fourth axis is channels.

    Raises what :func:`from_numpy` raises, and :class:`~delineate.errors.BadShape` for more axes.
    """
    voxels = np.asanyarray(image.dataobj)
    if voxels.ndim == 4:
        voxels = np.moveaxis(voxels, 3, 0)
    elif voxels.ndim != 3:
        raise BadShape(f"the image has {voxels.ndim} axes", fix="choose one volume (x, y, z), or (x, y, z, channel)")
    if image.affine is None:
        raise BadFormat("the image has no affine", fix="pass its voxels to from_numpy, with the affine")
    units = getattr(getattr(image, "header", None), "get_xyzt_units", lambda: ("mm",))
    if (unit := units()[0]) in ("meter", "micron"):
        raise BadGeometry(f"the image measures in {unit}s", fix="convert it to millimetres")
    return from_numpy(voxels, image.affine)


def to_nibabel(volume: Volume | LabelVolume) -> Any:
    """A ``nibabel.Nifti1Image``; several channels become its fourth axis.

    The image in memory has the affine to the last bit; a NIfTI file keeps it to 32 bits.
    """
    import nibabel

    voxels, affine = to_numpy(volume)
    if isinstance(volume, Volume):
        voxels = voxels[0] if volume.channels == 1 else np.moveaxis(voxels, 0, 3)
    return nibabel.Nifti1Image(_storable(voxels), affine, dtype=_storable(voxels).dtype)


def from_simpleitk(image: SimpleITKImage) -> Volume:
    """A scan from a SimpleITK image, whose world is LPS; a voxel's components are channels.

    Raises what :func:`from_numpy` raises, and :class:`~delineate.errors.BadShape` unless it has three axes.
    """
    import SimpleITK

    if image.GetDimension() != 3:
        raise BadShape(f"the image has {image.GetDimension()} axes", fix="choose one volume with three axes")
    voxels = SimpleITK.GetArrayFromImage(cast(Any, image))  # (Z, Y, X) or (Z, Y, X, C)
    voxels = voxels.transpose(2, 1, 0) if voxels.ndim == 3 else voxels.transpose(3, 2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine[:3] *= LPS_TO_RAS[:, None]
    return from_numpy(voxels, affine)


def to_simpleitk(volume: Volume | LabelVolume) -> Any:
    """A ``SimpleITK.Image``, whose world is LPS; several channels become a voxel's components."""
    import SimpleITK

    voxels, affine = to_numpy(volume)
    vector = isinstance(volume, Volume) and volume.channels > 1
    if isinstance(volume, Volume):
        voxels = voxels.transpose(3, 2, 1, 0) if vector else voxels[0].transpose(2, 1, 0)
    else:
        voxels = voxels.transpose(2, 1, 0)
    image: Any = SimpleITK.GetImageFromArray(np.ascontiguousarray(_storable(voxels)), isVector=vector)
    steps = affine[:3, :3] * LPS_TO_RAS[:, None]
    image.SetSpacing(volume.grid.spacing_mm)
    image.SetDirection((steps / volume.grid.spacing_mm).ravel().tolist())
    image.SetOrigin((affine[:3, 3] * LPS_TO_RAS).tolist())
    return image


def from_torchio(image: TorchIOImage) -> Volume:
    """A scan from a TorchIO image. A subject's images are its values; pass several as a mapping by channel."""
    return from_numpy(np.asarray(image.data), image.affine)


def to_torchio(volume: Volume | LabelVolume) -> Any:
    """A ``torchio.ScalarImage``, or for a label a ``LabelMap``. TorchIO has to be installed."""
    try:
        import torchio
    except ModuleNotFoundError as error:
        raise BadFormat(
            "a TorchIO image needs the package torchio, which is missing", fix="pip install torchio"
        ) from error
    import torch

    voxels, affine = to_numpy(volume)
    if isinstance(volume, LabelVolume):
        return torchio.LabelMap(tensor=torch.from_numpy(np.array(_storable(voxels)[None])), affine=affine)
    return torchio.ScalarImage(tensor=torch.from_numpy(np.array(_storable(voxels))), affine=affine)


def volume_of(image: Image | Volume) -> Volume:
    """A scan from any of these libraries' images. Raises :class:`~delineate.errors.BadFormat` for anything else.

    >>> import numpy as np
    >>> scan = from_numpy(np.zeros((4, 5, 6), np.int16), np.diag([1, 1, 3, 1]))
    >>> volume_of(to_simpleitk(scan)).grid.matches(scan.grid)
    True
    """
    if isinstance(image, Volume):
        return image
    if isinstance(image, SimpleITKImage):
        return from_simpleitk(image)
    if isinstance(image, NibabelImage):
        return from_nibabel(image)
    if isinstance(image, TorchIOImage):  # which is a dictionary, too
        return from_torchio(image)
    raise BadFormat(
        f"a {type(image).__name__} is not a scan",
        fix=(
            "give a file, a delineate.Volume, a nibabel, SimpleITK or TorchIO image, "
            "or an array with its affine by delineate.interop.from_numpy"
        ),
    )


def as_label(volume: Volume) -> LabelVolume:
    """A scan of whole numbers as a label.

    >>> import numpy as np
    >>> as_label(from_numpy(np.ones((2, 2, 2)), np.eye(4))).voxels.dtype
    dtype('uint8')

    Raises :class:`~delineate.errors.BadLabelValue` for other numbers, and
    :class:`~delineate.errors.BadShape` for several channels.
    """
    if volume.channels != 1:
        raise BadShape(f"the label has {volume.channels} channels", fix="give one label of values (x, y, z)")
    voxels = volume.voxels[0]
    if voxels.dtype.kind == "b":
        return LabelVolume(voxels.astype(np.uint8), volume.grid)
    if voxels.dtype.kind == "f":
        whole = np.rint(voxels)
        if not np.array_equal(voxels, whole) or float(np.abs(whole).max()) >= 2**31:
            raise BadLabelValue(
                "the label has values that are not whole numbers of 32 bits",
                fix="resample it with nearest neighbours",
            )
        voxels = whole.astype(np.uint8 if whole.min() >= 0 and whole.max() < 256 else np.int32)
    return LabelVolume(voxels, volume.grid)


def _storable(voxels: NDArray) -> NDArray:
    """Voxels in a type that every library supports."""
    if voxels.dtype.kind == "b":
        return voxels.astype(np.uint8)
    return voxels.astype(np.float32) if voxels.dtype == np.float16 else voxels
