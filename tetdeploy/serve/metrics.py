"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from tetdeploy.serve.models import ServedModel

COUNTS = tuple(2**k for k in range(11))
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


class Metrics:
    """The metrics of all models of a server, by the label `model`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._names: set[str] = set()  # a client must not make up labels
        histogram = partial(Histogram, labelnames=["model"], registry=registry)
        span = "From a whole request, still to be parsed, to its answer, still to be sent"
        self.seconds = histogram("tetdeploy_request_seconds", span, buckets=SECONDS)
        self.batch = histogram("tetdeploy_batch_images", "Images that ran together", buckets=COUNTS)
        self.steps = histogram("tetdeploy_image_steps", "Time steps that an image took", buckets=COUNTS)
        self.refused = Counter(
            "tetdeploy_refused", "Requests without an answer, by HTTP status", ["model", "status"], registry=registry
        )
        self.queue = Gauge("tetdeploy_queue_requests", "Requests that wait", ["model"], registry=registry)
        self.sequences = Gauge("tetdeploy_open_sequences", "Sequences that are open", ["model"], registry=registry)
        self.energy = Counter(
            "tetdeploy_estimated_energy_joules",
            "Steps taken, times the mean of a step over the model's reference images, by the convention 'paper': "
            "an estimate, nothing is measured",
            ["model"],
            registry=registry,
        )

    def on_call(self, name: str, step_pj: float | None) -> Callable[[NDArray[np.int64]], None]:
        """What a model is to call after every call of its engine. Without `step_pj` it has no energy, rather than 0."""
        batch, steps = self.batch.labels(name), self.steps.labels(name)
        energy = None if step_pj is None else self.energy.labels(name)

        def observe(taken: NDArray[np.int64]) -> None:
            batch.observe(len(taken))
            for count in taken.tolist():
                steps.observe(count)
            if step_pj is not None and energy is not None:
                energy.inc(float(taken.sum()) * step_pj * 1e-12)

        return observe

    def refuse(self, name: str, status: int) -> None:
        """Count a request that got no answer."""
        self.refused.labels(name if name in self._names else "unknown", str(status)).inc()

    def watch(self, model: ServedModel) -> None:
        """Show the length of a model's queue and its number of open sequences, and that it has answered nothing yet."""
        self._names.add(model.name)
        self.seconds.labels(model.name)
        self.queue.labels(model.name).set_function(lambda: model.scheduler.waiting)
        if (sequences := model.sequences) is not None:
            self.sequences.labels(model.name).set_function(lambda: len(sequences))
