"""When the command began; imported before anything else."""

from __future__ import annotations

import time

STARTED = time.perf_counter()
"""In seconds of :func:`time.perf_counter`."""
