"""When the command began: imported before anything else is."""

from __future__ import annotations

import time

STARTED = time.perf_counter()
"""As :func:`time.perf_counter` counts."""
