"""How long an exported model takes on this machine: latency and throughput by batch, threads and T. Needs no torch.

All settings take turns, so that a slow moment of the machine hits them all alike. A turn is one call that does not
count, after which the setting's weights lie in the caches and the threads of the setting before have gone to sleep, and
then a few that do. What spikes plays no part, but where convolutions are additions (docs/native.md): more of them take
longer there.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.arguments import check_count
from tetdeploy.engine import Engine
from tetdeploy.measured import engine_provenance
from tetdeploy.runtimes.nvidia import gpu_name
from tetdeploy.runtimes.sessions import MOST_THREADS, PROVIDERS, RUNTIMES, check_runtime
from tetdeploy.system.extras import import_extra
from tetdeploy.system.machine import cpu_model, load_average, read_cpuinfo, usable_cores

CALLS_PER_TURN = 5
MAX_SIZE = 2**31 - 1  # images, steps: beyond it numpy and runtimes fail without saying of what


@dataclass(frozen=True)
class Setting:
    """`batch` images a call, `threads` of an operation, `T` steps."""

    batch: int
    threads: int
    T: int


class Bench:
    """Times one model; `run` may be interrupted, `rows` has what was timed until then.

    Args:
        model: the `.onnx` file.
        batches, threads, steps: every combination is timed. No steps: the T of the graph, or else of the training.
        device, runtime, cuda_graphs: see `Engine`.

    Attributes:
        engines: one for each number of threads, all alive at once.
        load_ms: what making each of them took.

    Raises:
        ValueError: no batch or no number of threads is given; a number is not whole, below 1 or too large, or a T
            beyond the graph; see also `Engine`.
    """

    def __init__(
        self,
        model: Path,
        *,
        batches: Sequence[int],
        threads: Sequence[int],
        steps: Sequence[int] = (),
        device: str = "cpu",
        runtime: str = "onnxruntime",
        cuda_graphs: bool = False,
    ) -> None:
        bounds = (("batch", batches, MAX_SIZE), ("threads", threads, MOST_THREADS), ("T", steps, MAX_SIZE))
        batches, threads, steps = (_checked(name, numbers, most) for name, numbers, most in bounds)
        self._load = load_average()
        self.engines: dict[int, Engine] = {}
        self.load_ms: dict[int, float] = {}
        check_runtime(runtime, device)
        import_extra(runtime, RUNTIMES[runtime])  # the first engine's loading is not to pay for it
        for count in threads:
            start = time.perf_counter()
            self.engines[count] = Engine(model, device=device, threads=count, runtime=runtime, cuda_graphs=cuda_graphs)
            self.load_ms[count] = (time.perf_counter() - start) * 1e3
        self.engine = self.engines[threads[0]]
        self.settings = [
            Setting(batch, count, T) for T in steps or (self.engine.own_T,) for count in threads for batch in batches
        ]
        self._seconds: dict[Setting, list[float]] = {setting: [] for setting in self.settings}

    def run(
        self,
        x: NDArray[Any],
        *,
        repeats: int | None = None,
        seconds: float = 10.0,
        share_done: Callable[[float], None] | None = None,
    ) -> None:
        """Time every setting on the first images of `x`, which come round again where a batch needs more.

        Args:
            x: images `[N, C, H, W]`, or frames `[N, T, C, H, W]`, as the graph takes them.
            repeats: timed calls of each setting, whatever that takes.
            seconds: without `repeats`, how long all of it goes on; every setting has a turn in any case.
            share_done: called with the fraction that is done.

        Raises:
            ValueError: see `Engine.run`; repeats or seconds are not above 0.
        """
        if (seconds if repeats is None else repeats) <= 0:
            raise ValueError(f"repeats and seconds must be above 0, got {seconds if repeats is None else repeats}")
        x = self.engine.check_input(x)
        inputs = {s.batch: x[np.arange(s.batch) % len(x)] for s in self.settings}
        for setting in self.settings:  # refuse what cannot run before anything is timed
            self.engine.check_T(setting.T, inputs[setting.batch])
        for setting, count in self._turns(repeats, seconds, share_done):
            engine, batch = self.engines[setting.threads], inputs[setting.batch]
            engine.run(batch, setting.T)
            for _ in range(count):
                start = time.perf_counter()
                engine.run(batch, setting.T)
                self._seconds[setting].append(time.perf_counter() - start)

    def _turns(
        self, repeats: int | None, seconds: float, share_done: Callable[[float], None] | None
    ) -> Iterator[tuple[Setting, int]]:
        """Whose turn it is, and for how many timed calls."""
        order = np.random.default_rng(0)  # each round in another order: no setting always follows the same one
        start, done = time.perf_counter(), 0
        while True:
            count = CALLS_PER_TURN if repeats is None else min(CALLS_PER_TURN, repeats - done)
            if count == 0:
                return
            for k, turn in enumerate(order.permutation(len(self.settings))):
                passed = (time.perf_counter() - start) / seconds
                if repeats is None and done and passed >= 1:
                    return
                yield self.settings[turn], count
                if share_done:
                    share = (done + count * (k + 1) / len(self.settings)) / repeats if repeats else passed
                    share_done(min(share, 1.0))
            done += count

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the settings that had a call, as JSON: see `_row`."""
        return [_row(setting, taken) for setting, taken in self._seconds.items() if taken]

    def to_dict(self, data: str) -> dict[str, Any]:
        """The result as JSON. `data`: what the images were."""
        return {
            "kind": "bench",
            "model": str(self.engine.path),
            "data": data,
            "size_bytes": self.engine.path.stat().st_size,
            "load_ms": [{"threads": count, "load_ms": taken} for count, taken in self.load_ms.items()],
            "machine": machine(self.engine) | {"load": self._load},
            "rows": self.rows,
        } | engine_provenance(self.engine)


def _checked(name: str, numbers: Sequence[int], most: int) -> tuple[int, ...]:
    """Numbers of a setting as those of Python, which JSON holds; of T there may be none."""
    checked = tuple(check_count(name, number, most) for number in numbers)
    if not checked and name != "T":
        raise ValueError(f"{name}: there is nothing to time; give one number or more")
    return checked


def _row(setting: Setting, seconds: Sequence[float]) -> dict[str, Any]:
    """A setting, milliseconds of one call of `Engine.run`, images over time of all calls, how many were timed."""
    percentiles = np.percentile(np.array(seconds) * 1e3, (50, 95, 99)).tolist()
    times = dict(zip(("median_ms", "p95_ms", "p99_ms"), percentiles, strict=True))
    rate = setting.batch * len(seconds) / sum(seconds)
    return asdict(setting) | times | {"images_per_s": rate, "calls": len(seconds)}


def random_input(engine: Engine, T: int) -> NDArray[Any]:
    """An image of noise, or frames, as the graph takes it: `[1, C, H, W]` or `[1, T, C, H, W]`."""
    shape = (1, *((T,) if engine.encoding == "frames" else ()), *engine.input_shape)
    noise = np.random.default_rng(0)
    if engine.input_dtype == np.uint8:
        return noise.integers(0, 256, shape, np.uint8)
    return noise.normal(size=shape).astype(engine.input_dtype)


def machine(engine: Engine) -> dict[str, Any]:
    """What the timings are of: processor, cores, GPU, system, execution provider, and whether native operators or CUDA
    graphs run.

    `gpu` is null on a CPU, and where nothing says which it is.
    """
    provider = "OpenVINO" if engine.runtime == "openvino" else PROVIDERS.get(engine.device, engine.device)
    return {
        "cpu": cpu_model(read_cpuinfo()),
        "cores": usable_cores(),
        "gpu": None if engine.device == "cpu" else gpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "provider": provider + ", native operators" * engine.native + ", CUDA graphs" * engine.cuda_graphs,
    }
