"""The networks of bundles, ready on a worker's device; the last few are kept, with what was tried of their engines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from delineate.bundle import Bundle
from delineate.compute import Choice, ComputePlan, ran_out_of_memory
from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.errors import DelineateError
from delineate.inference.predictor import Predictor, ready_network
from delineate.inference.sliding import Network
from delineate.serving.models import bundle_of
from delineate.serving.protocol import Options

_LOG = logging.getLogger("delineate.serving")

_WARM = 4
"""Networks that are kept ready."""


class _Ready(NamedTuple):
    bundle: Bundle
    network: Network


class Networks:
    """Networks by the digests of their bundles, which are in the folder ``models``.

    Where the plan leaves the engine to a trial, it comes before the first answer: until a network is let go, the same
    scan gets the same answer.
    """

    def __init__(self, models: Path, plan: ComputePlan) -> None:
        self._models, self._plan = models, plan
        self._ready: dict[str, _Ready] = {}
        """The one used last comes last."""

    def predictor(self, sha256: str, options: Options) -> Predictor:
        """What segments scans as a job wants it. Raises what is wrong with the bundle."""
        bundle, network = self._get(sha256)
        return Predictor(
            [bundle],
            self._plan,
            networks=[network],
            overlap=options.overlap,
            flips=options.flips,
            mirrored=options.mirrored,
        )

    def warm_up(self, digests: Sequence[str]) -> None:
        """Get networks ready before the first scan comes, as many as are kept."""
        for sha256 in digests[:_WARM]:
            try:
                self._get(sha256)
            except Exception as error:
                if not isinstance(error, DelineateError) and not ran_out_of_memory(error):
                    raise
                _LOG.warning("bundle %s cannot be used: %s", sha256[:12], error)

    def _get(self, sha256: str) -> _Ready:
        found = self._ready.pop(sha256, None)
        if found is None:
            bundle = bundle_of(self._models, sha256)

            def told(choice: Choice) -> None:
                _LOG.info("bundle %s: %s: %s (%s)", sha256[:12], choice.what, choice.choice, choice.why)

            found = _Ready(bundle, ready_network(bundle.trained_network(), bundle, self._plan, told, at_once=True))
            while len(self._ready) >= _WARM:
                del self._ready[next(iter(self._ready))]
            if self._plan.device.type != "cpu":
                self._apply_to_noise(found)
        self._ready[sha256] = found
        return found

    def _apply_to_noise(self, ready: _Ready) -> None:
        """The first time, a device takes seconds to choose how to compute."""
        bundle, network = ready
        shape = bundle.geometry.shape
        noise = np.random.default_rng(0).standard_normal((len(bundle.channels), *shape), dtype=np.float32)
        with suppress(DelineateError):
            Predictor([bundle], self._plan, networks=[network]).predict(
                Volume(noise, Grid.of_spacing(shape, bundle.spacing_mm))
            )
