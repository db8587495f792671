"""Bundles behind a server: any computer on the network sends scans, and gets their segmentations back.

The clients are imported on first use: ``import delineate.serving`` needs nothing that is not installed everywhere.
"""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from .client import AsyncClient, Client, Result

__all__ = ["AsyncClient", "Client", "Result"]

# Hidden from type checkers: they read the imports above, and with a ``__getattr__`` would accept any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'; it offers {', '.join(__all__)}")
        from . import client

        return getattr(client, name)

    def __dir__() -> list[str]:
        return __all__
