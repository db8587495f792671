"""Delineate: train, compare and deploy networks that delineate organs and lesions in MR and CT.

Only the names in ``__all__`` are public; everything else may change. Each is imported on first use, which keeps
``import delineate`` fast.
"""

TYPE_CHECKING = False  # stands in for typing.TYPE_CHECKING: importing typing would take longer than this whole module

if TYPE_CHECKING:
    from delineate import errors, interop
    from delineate.api.adapting import adapt
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
    "adapt",
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
    "adapt": "delineate.api.adapting",
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
"""Where each public name is defined; modules are listed below."""

_MODULES = ("errors", "interop")

# Hidden from type checkers: they read the imports above, and with a ``__getattr__`` would accept any name.
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
