"""Delineate: train, compare and deploy networks that delineate organs and lesions in MR and CT.

The names in ``__all__`` are the public ones; everything else may change. Each is imported when it is first used, so
that ``import delineate`` takes no time.
"""

TYPE_CHECKING = False  # as typing's, whose import would take longer than all of this

if TYPE_CHECKING:
    from delineate import errors, interop
    from delineate.api.bundle import Bundle, load, predict
    from delineate.api.data import inspect, open_dataset, read, simulate, write
    from delineate.api.measuring import compare, evaluate
    from delineate.api.training import auto, tiles, train
    from delineate.core.grid import Grid
    from delineate.core.subject import Subject
    from delineate.core.targets import Targets
    from delineate.core.volume import LabelVolume, Volume
    from delineate.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "Grid",
    "LabelVolume",
    "Recipe",
    "Subject",
    "Targets",
    "Volume",
    "__version__",
    "auto",
    "compare",
    "errors",
    "evaluate",
    "inspect",
    "interop",
    "load",
    "open_dataset",
    "predict",
    "read",
    "simulate",
    "tiles",
    "train",
    "write",
]

_HOMES = {
    "Bundle": "delineate.api.bundle",
    "Grid": "delineate.core.grid",
    "LabelVolume": "delineate.core.volume",
    "Recipe": "delineate.recipe",
    "Subject": "delineate.core.subject",
    "Targets": "delineate.core.targets",
    "Volume": "delineate.core.volume",
    "auto": "delineate.api.training",
    "compare": "delineate.api.measuring",
    "evaluate": "delineate.api.measuring",
    "inspect": "delineate.api.data",
    "load": "delineate.api.bundle",
    "open_dataset": "delineate.api.data",
    "predict": "delineate.api.bundle",
    "read": "delineate.api.data",
    "simulate": "delineate.api.data",
    "tiles": "delineate.api.training",
    "train": "delineate.api.training",
    "write": "delineate.api.data",
}
"""The module of each public name that is not a module itself."""

_MODULES = ("errors", "interop")

# A type checker reads the imports above, and would take this for leave to use any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        elif name in _MODULES:
            value = import_module(f"delineate.{name}")
        else:
            raise AttributeError(f"module 'delineate' has no attribute '{name}'; it offers {', '.join(__all__)}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return __all__
