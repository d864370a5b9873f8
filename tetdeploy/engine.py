"""An exported model under ONNX Runtime or OpenVINO: run it at any T. Needs numpy and one of these only.

An engine keeps nothing between calls, so that threads may share one; LIF state lives in a `Stream`.
"""

from __future__ import annotations

import base64
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy import native
from tetdeploy.arguments import check_count, check_flag, check_path, check_unmasked
from tetdeploy.early_exit import Exit
from tetdeploy.energy import layers_of
from tetdeploy.engine_stream import Stream
from tetdeploy.runtimes.native_session import zeros_last
from tetdeploy.runtimes.sessions import Sessions, check_runtime, gains_from_native
from tetdeploy.steps import MAX_T
from tetdeploy.storage.model_file import check_outputs, refuse_external
from tetdeploy.wording import first_line

Array = NDArray[Any]
IN_CACHE = 2**22  # spikes of a layer, over images and steps: with more in a call each image takes a CPU longer
LARGEST = 1e30  # input, in absolute value: of a hundred million times as much float32 still has the sum


@dataclass(frozen=True)
class Result:
    """What a run gives.

    Attributes:
        logits: mean of the per-step logits over the T steps, `[N, K]`; its largest entry is the predicted class.
        per_step: `[N, T, K]`. The result for any t < T is `per_step[:, :t].mean(1)`: LIF neurons are causal. With early
            exit the steps that an image did not take are NaN, and its logits are the mean over those it took.
        steps: how many steps each image took, `[N]` int64; T for all without early exit.
    """

    logits: Array
    per_step: Array
    steps: NDArray[np.int64]


class Engine:
    """A model that `tetdeploy export` wrote.

    Args:
        model: path of the `.onnx` file.
        device: `cpu`, `cuda` or `tensorrt`. Another device than the one asked for is never used instead. On a GPU (the
            first that CUDA shows) state and images stay there between the steps of a run or a stream.
        threads: threads of one operation; by default all cores, or those that affinity and a CPU quota leave.
        runtime: `onnxruntime`, or `openvino` on a CPU.
        native: whether this package's own operators in C (`tetdeploy.native`) run what lies between convolutions and,
            where the processor has AVX2 or AMX, the convolutions too. They give the results of ONNX Runtime's own
            operators in less time, except for the last digits of float32 convolutions of spikes: those sums are exact,
            over weights rounded to 24 bits of the largest in their channel (docs/native.md). None: where this is
            possible and the network is large enough for it to matter. True fails where they are missing; in a graph
            that has nothing for them to do, ONNX Runtime's own run, as the attribute `native` says.
        cuda_graphs: on device `cuda`, record the kernels of a call once for each batch size and launch them as one, so
            that small batches do not wait for the CPU. Not for dynamic graphs; counting does not use them. While a
            batch size is run for the first time, nothing else in the process may use the GPU.

    Attributes:
        metadata: what the export wrote into the file: layout, T, class names, normalisation, neurons, layers, versions.
        path, sha256 (of the file), device, runtime, layout (`unrolled`, `dynamic` or `step`), T (steps of a call: 1 of
        a step graph, None of a dynamic one), with_state (whether membranes go in and out, as in any step graph),
        trained_T (of the training), precision (`fp32`, `fp16` or `int8`), encoding (`direct` or `frames`), input_shape
        `(C, H, W)`, input_dtype, class_names, min_batch and max_batch (least and most images in a call, None is any),
        native and cuda_graphs (whether it does), states_last (state inputs `[N, C, H, W]` that it need not copy if
        their channels lie last in memory).

    Raises:
        ValueError: `model` is not a path; the file is not an ONNX model, not one of ours, or not what its metadata say;
            the device is unknown or its provider not available; the runtime is unknown, cannot run on the device, or
            may compute the graph wrongly; threads is not a whole number of at least 1, or too large; native or
            cuda_graphs is not a flag, or True where that is impossible.
        OSError: the file cannot be read.
        MemoryError: the model does not fit into memory.
        MissingExtraError: the runtime is not installed.
    """

    min_batch: int = 1
    max_batch: int | None = None
    native: bool = False
    cuda_graphs: bool = False
    states_last: frozenset[str] = frozenset()

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        runtime: str = "onnxruntime",
        native: bool | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        check_path("model", model, "an .onnx file")
        check_flag("native", native, or_none=True)
        check_flag("cuda_graphs", cuda_graphs)
        self.path, self.device, self.runtime, self.cuda_graphs = Path(model), device, runtime, cuda_graphs
        self._sessions = Sessions(self.path, device=device, runtime=runtime, threads=threads, cuda_graphs=cuda_graphs)
        self._overlaid: tuple[tuple[bytes, bool], tuple[Any, list[str]]] | None = None
        self.sha256 = self._sessions.sha256
        self._session, metadata = self._sessions.first()
        self._take(metadata)
        outputs = self._session.get_outputs()
        check_outputs(outputs, metadata, self.path)
        batch = next(output.shape[0] for output in outputs if output.name == "per_step")
        if isinstance(batch, int):  # free in every export, and fixed afterwards for runtimes that know no free axis
            self.min_batch = self.max_batch = batch
        fused = self._sessions.first_native(native)
        self.native = fused is not None
        self.states_last = fused.states_last if fused is not None else frozenset()
        self._session = fused or self._session

    def _take(self, metadata: dict[str, Any]) -> None:
        """The attributes that the metadata say."""
        if metadata["layout"] == "sequence":
            raise ValueError(
                f"{self.path} is a step graph for Triton, which keeps its state; the engine takes what it was made of"
            )
        self.metadata = metadata
        self.layout: str = self.metadata["layout"]
        self.encoding: str = self.metadata["encoding"]
        self.T: int | None = self.metadata["T"]
        self.trained_T: int = self.metadata["trained_T"]
        self.precision: str = self.metadata["precision"]
        self.with_state: bool = bool(self.metadata["states"])
        self.input_shape: tuple[int, ...] = tuple(self.metadata["input"]["shape"])
        self.input_dtype = np.dtype(self.metadata["input"]["dtype"])
        self.class_names: tuple[str, ...] = tuple(self.metadata["class_names"])

    def __repr__(self) -> str:
        T = "any" if self.T is None else self.T
        return f"Engine({str(self.path)!r}, {self.layout}, T={T}, {self.precision}, device={self.device!r})"

    def run(self, x: Array, T: int | None = None, *, exit: Exit | None = None) -> Result:
        """Run images or frames from u = 0; on a CPU a large batch in parts.

        Args:
            x: images `[N, C, H, W]` (direct encoding) or frames `[N, T, C, H, W]`, in the model's input dtype.
            T: number of steps. By default all steps of the frames, or the T of the export.
            exit: when an image stops before T. Images that stopped leave the batch (on a GPU, once they are half of
                it), which then costs less. Step layout only.

        Raises:
            ValueError: x has another shape or dtype than the model's, is masked, or holds NaN or values beyond LARGEST;
                T is no whole number, below 1, above MAX_T for images, or beyond what an unrolled graph or the frames
                hold; early exit in another layout than step; no image has finite logits.
            TypeError: `exit` is not an `Exit`.
        """
        x = self.check_input(x)
        T = self.check_T(T, x)
        if exit is not None:
            if not isinstance(exit, Exit):
                raise TypeError(f"exit must be an Exit, such as Exit(0.9), or what load_exit gives; got {exit!r}")
            return self._run_until_certain(x, T, exit)
        return self._collect(self._session, x, T, [])[0]

    def run_with(
        self, overlay: bytes, x: Array, T: int | None = None, *, native: bool = False
    ) -> tuple[Result, dict[str, Array]]:
        """`run` on the graph that `overlay` makes of this one; also gives its outputs, `[T, N, ...]` by name.

        Args:
            overlay: of which the session is kept until another one comes: alternating two opens one at each call.
            native: with native operators, if there are such for it; by default ONNX Runtime's own.
        """
        x = self.check_input(x)
        T = self.check_T(T, x)
        session, names = self.overlaid(overlay, native=native)
        return self._collect(session, x, T, names)

    def count(self, x: Array, T: int | None = None) -> tuple[Result, dict[str, Array]]:
        """`run` on the counting graph. Also gives, by name: `active.<layer>`, nonzero inputs summed over channels,
        `[T, N, *spatial]`; `fired.<neurons>`, spikes per step and image, `[T, N]`."""
        result, counts = self.run_with(self.counting_overlay, x, T, native=self.native)
        if lacking := [name for name in self._counters if name not in counts]:
            raise ValueError(
                f"{self.path} has damaged metadata: counting_overlay lacks {', '.join(lacking)}; export the model again"
            )
        return result, counts

    @property
    def lacks_native(self) -> str | None:
        """Why the native operator cannot run where it would save time, and what to do; None if it can, or would not."""
        return native.missing() if gains_from_native(self.metadata, self.device, self.runtime) else None

    @cached_property
    def _counters(self) -> list[str]:
        """What the counting graph has to give."""
        layers = [layer.counter for layer in layers_of(self.metadata) if not layer.from_input]
        return layers + [f"fired.{layer['name']}" for layer in self.metadata["neurons"]]

    @cached_property
    def counting_overlay(self) -> bytes:
        try:
            overlay = base64.b64decode(self.metadata["counting_overlay"])
        except ValueError:
            overlay = b""
        if not overlay:
            raise ValueError(
                f"{self.path} has damaged metadata: counting_overlay holds nothing; export the model again"
            )
        refuse_external(overlay, self.path)
        return overlay

    def stream(self, batch: int = 1) -> Stream:
        """A session that keeps the LIF state of `batch` streams from one `push` to the next.

        Raises:
            ValueError: the graph gives no state out: only the step layout and `--with-state` do; `batch` is no whole
                number, or below 1.
        """
        return Stream(self, batch)

    def call(
        self, feed: Mapping[str, Array], names: Sequence[str], session: Any = None, *, check: bool = True
    ) -> dict[str, Array]:
        """The outputs `names` of one call of the graph, whose inputs are `feed`, which is not checked.

        Args:
            session: of the graph with an overlay (`overlaid`); None is the graph's own.
            check: whether some image must have finite logits.

        Returns:
            By name. On a GPU state outputs lie there, to be fed to the next call; with `cuda_graphs` only until the
            call after that.

        Raises:
            ValueError: the runtime failed, or no image has finite logits.
        """
        try:
            outputs = dict(zip(names, (session or self._session).run(list(names), feed), strict=True))
        except ValueError:  # of a session of TensorRT or OpenVINO, which speaks for itself
            raise
        except Exception as error:  # ONNX Runtime's own exception classes are private
            shape = list(feed["x"].shape)
            raise ValueError(f"ONNX Runtime failed on x of shape {shape}: {first_line(error)}") from error
        if check and "per_step" in outputs:
            self.check_finite(outputs["per_step"])
        return outputs

    def check_finite(self, per_step: Array) -> None:
        """Refuse, with ValueError, logits `[N, t, K]` of which those of no image are finite."""
        # None at all: one image's float32 input may be far out of range, and a server batches it with those of others.
        if not np.isfinite(per_step).all((1, 2)).any():
            raise ValueError(
                f"{self.path} gives NaN or infinite logits: the file is damaged, or the input far out of range; "
                "if it does so for every input, export the model again"
            )

    def put(self, x: Array) -> Any:
        """`x` where the model runs, for calls that show it again and again."""
        return self._session.put(x) if hasattr(self._session, "put") else x

    def zeros(self, state: str, shape: Sequence[int]) -> Any:
        """float32 zeros for an input where the model runs, not to be written: on a GPU none come from the host."""
        if state in self.states_last:
            return zeros_last(shape)
        return self._session.zeros(shape) if hasattr(self._session, "zeros") else np.zeros(shape, np.float32)

    def check_streams(self) -> None:
        """Refuse, with ValueError, a model that cannot stream, as its graph gives no state out."""
        if not self.with_state:
            raise ValueError(
                f"{self.path.name} gives no LIF state out, so it cannot stream; export with --layout step "
                "(a frame at a time) or --with-state (chunks of T frames)"
            )

    def check_early_exit(self) -> None:
        """Refuse a graph whose images cannot stop one by one.

        Raises:
            ValueError: its layout is not step; it does not take every smaller batch.
        """
        if self.layout != "step":
            raise ValueError(
                f"{self.path.name} is {self.layout} and runs its steps in one call, so that no image can stop early; "
                "export with --layout step"
            )
        self.check_small_batches("early exit goes on with those images that are not certain yet")

    def check_small_batches(self, purpose: str) -> None:
        """Refuse, with ValueError, a TensorRT engine that was built for no fewer than so many images, and a graph whose
        batch was fixed above one; `purpose` is what has fewer."""
        least, most = self.min_batch, self.max_batch
        if least == 1:
            return
        takes = f"was built for {least} to {most} images in a call"
        remedy = f"build again with --batch 1:{least}:{most}"
        if least == most:  # as of a graph whose batch was fixed, and of an engine built from one
            takes = f"takes {least} images in a call and no other number"
            again = f"{remedy} from" if self.path.suffix == ".engine" else "take"
            remedy = f"{again} the exported file, whose batch was not fixed yet"
        raise ValueError(f"{self.path.name} {takes}, and {purpose}, which may be one; {remedy}")

    @property
    def runtime_version(self) -> dict[str, str]:
        """The version of the package that runs it, by the package's name."""
        return {self.runtime: str(importlib.import_module(self.runtime).__version__)}

    @property
    def is_fixed(self) -> bool:
        """Whether every call runs the graph's own T steps, and no more can be run: unrolled, without state."""
        return self.layout == "unrolled" and not self.with_state

    @property
    def own_T(self) -> int:
        """The steps that `run` takes for images by default: an unrolled graph's own, else those of the training."""
        return self.T if self.layout == "unrolled" and self.T is not None else self.trained_T

    @property
    def chunk_T(self) -> int:
        """The steps that one call of a graph with state runs: 1 in the step layout, T in the unrolled one.

        Raises:
            ValueError: the graph has no state.
        """
        self.check_streams()
        assert self.T is not None  # a dynamic graph has none
        return self.T

    def check_T(self, T: int | None, x: Array) -> int:
        """The number of steps to run.

        Raises:
            ValueError: see `run`.
        """
        if T is None:
            T = x.shape[1] if self.encoding == "frames" else self.own_T
        T = check_count("T", T)
        if self.encoding == "direct" and T > MAX_T:
            raise ValueError(
                f"T must be at most {MAX_T} for images, got {T}; show one for longer with engine.stream(), which "
                "takes a model of layout step or --with-state and keeps no step"
            )
        if self.encoding == "frames" and x.shape[1] < T:
            raise ValueError(f"T={T} steps need as many frames, got {x.shape[1]}")
        if self.T is not None and not self.with_state and self.T < T:
            raise ValueError(
                f"{self.path.name} is unrolled to T={self.T} and cannot run T={T}; "
                f"export again with --T {T}, or with --layout dynamic for any T"
            )
        return T

    def check_input(self, x: Array) -> Array:
        """`x` as the graph takes it.

        Raises:
            ValueError: see `run`.
        """
        check_unmasked("the input", x)
        x = np.asarray(x)
        time = ("T",) if self.encoding == "frames" else ()
        wanted = f"[{', '.join(map(str, ('N', *time, *self.input_shape)))}]"
        if x.ndim != 1 + len(time) + len(self.input_shape) or x.shape[-len(self.input_shape) :] != self.input_shape:
            raise ValueError(f"{self.path.name} takes input of shape {wanted}, got {list(x.shape)}")
        if 0 in x.shape:
            raise ValueError(
                f"the input is empty: {list(x.shape)}; {self.path.name} takes {wanted} with "
                f"{' and '.join(('N', *time))} of at least 1"
            )
        if x.dtype != self.input_dtype:
            raise ValueError(_wrong_dtype(self.path.name, x.dtype, self.input_dtype))
        if x.dtype.kind == "f" and not -LARGEST <= x.min() <= x.max() <= LARGEST:  # nor NaN, which compares false
            raise ValueError(
                f"the input holds NaN or infinite values, or some beyond +-{LARGEST:g}, where a membrane may overflow; "
                "the answer would be meaningless"
            )
        return np.ascontiguousarray(x)

    def _collect(self, session: Any, x: Array, T: int, names: list[str]) -> tuple[Result, dict[str, Array]]:
        """Run T steps in as many calls as parts and layout need; outputs `names` come back as `[T, N, ...]`.

        They are taken out as they are joined: spikes of all layers are not held twice.
        """
        run = self._step_by_step if self.with_state else self._at_once
        made = [run(session, part, T, names) for part in self._parts(x, T)]
        per_step = np.concatenate([part for part, _ in made])[:, :T]
        self.check_finite(per_step)
        extra = {name: np.concatenate([part.pop(name) for _, part in made], 1)[:T] for name in names}
        return Result(per_step.mean(1), per_step, np.full(len(x), per_step.shape[1])), extra

    def _at_once(self, session: Any, x: Array, T: int, names: list[str]) -> tuple[Array, dict[str, Array]]:
        call = self.call(self._feed(x, T), ["per_step", *names], session, check=False)
        return call["per_step"], {name: self._by_step(name, call) for name in names}

    def _step_by_step(self, session: Any, x: Array, T: int, names: list[str]) -> tuple[Array, dict[str, Array]]:
        stream = Stream(self, len(x), session)
        calls = [stream.call(chunk, names, check=False) for chunk in self._chunks(x, T)]
        per_step = np.concatenate([call["per_step"] for call in calls], 1)
        return per_step, {name: np.concatenate([self._by_step(name, call) for call in calls]) for name in names}

    def _by_step(self, name: str, outputs: dict[str, Array]) -> Array:
        """An output of an overlay, taken out, as `[T, N, ...]`; graphs may have merged its first axes."""
        N, T = outputs["per_step"].shape[:2]
        return outputs.pop(name).reshape(T, N, *self._overlay_axes[name])

    @cached_property
    def _overlay_axes(self) -> dict[str, tuple[int, ...]]:
        """What outputs of overlays have behind step and image."""
        neurons = self.metadata["neurons"]
        axes = {layer.counter: layer.counter_axes for layer in layers_of(self.metadata)}
        axes |= {f"fired.{layer['name']}": () for layer in neurons}
        return axes | {f"spikes.{layer['name']}": tuple(layer["shape"]) for layer in neurons}

    def _parts(self, x: Array, T: int) -> list[Array]:
        """`x` in parts that a CPU's caches hold the layers of; a GPU wants it whole."""
        return np.array_split(x, math.ceil(len(x) / self.most_at_once(len(x), T)))

    def most_at_once(self, N: int, T: int) -> int:
        """Of N images or streams as many as one call should have; T is its steps, where the graph does not say them."""
        if self.device != "cpu":
            return N
        largest: int = max(math.prod(layer["shape"]) for layer in self.metadata["neurons"])
        steps = (self.T or T) + (2 if self.with_state else 0)  # membranes that go in and out take as much as a step
        return min(N, self.max_batch or N, max(1, IN_CACHE // (largest * steps)))

    def _chunks(self, x: Array, T: int) -> list[Array | None]:
        """The input of each call of a graph with state; None is the same image again."""
        size = self.chunk_T
        starts = range(0, T, size)
        if self.encoding == "direct":
            return [x if start == 0 else None for start in starts]
        return [_pad_time(x[:, start : start + size], size) for start in starts]

    def _feed(self, x: Array, T: int) -> dict[str, Array]:
        """The inputs of a graph that runs T steps in one call."""
        if self.encoding == "frames":
            return {"x": _pad_time(x[:, :T], self.T or T)}
        return {"x": x, "steps": np.zeros((len(x), T), np.uint8)} if self.layout == "dynamic" else {"x": x}

    def _run_until_certain(self, x: Array, T: int, exit: Exit) -> Result:
        """Run at most T steps of each image, and no more once it is certain."""
        self.check_early_exit()
        made = [self._part_until_certain(part, T, exit) for part in self._parts(x, T)]
        result = Result(*(np.concatenate([getattr(part, of.name) for part in made]) for of in fields(Result)))
        self.check_finite(result.logits[:, None])
        return result

    def _part_until_certain(self, x: Array, T: int, exit: Exit) -> Result:
        """Run steps; after each the images that are certain leave the batch.

        On a GPU they stay, unheeded, until they are half of it: their state would have to come to the host and go back,
        and each new batch size takes ONNX Runtime time to prepare for.
        """
        stream, batch, running = Stream(self, len(x)), np.arange(len(x)), np.full(len(x), True)
        per_step = np.full((len(x), T, len(self.class_names)), np.nan, np.float32)
        total, steps = np.zeros((len(x), len(self.class_names)), np.float32), np.full(len(x), T)
        for t, chunk in enumerate(self._chunks(x, T), start=1):
            logits = stream.call(None if chunk is None else chunk[batch], [], check=False)["per_step"][:, 0]
            heeded = batch[running[batch]]
            per_step[heeded, t - 1] = logits[running[batch]]
            total[heeded] += per_step[heeded, t - 1]
            if exit.min_T <= t < T and (certain := exit.certain(total[heeded] / np.float32(t))).any():
                steps[heeded[certain]] = t
                running[heeded[certain]] = False
                left = running.sum()
                if not left:
                    break
                if self.device == "cpu" or left <= len(batch) / 2:
                    stream.keep(running[batch])
                    batch = batch[running[batch]]
        return Result(total / steps[:, None].astype(np.float32), per_step, steps)

    def overlaid(self, overlay: bytes, *, native: bool = False) -> tuple[Any, list[str]]:
        """The session of this model with an overlay, and the outputs that it adds. See `run_with`.

        It is kept until another overlay comes: each session has all weights."""
        check_flag("native", native)
        kept, wanted = self._overlaid, (overlay, native)  # another thread may put its own there
        if kept is not None and kept[0] == wanted:
            return kept[1]
        del kept
        self._overlaid = None
        own = {output.name for output in self._session.get_outputs()}
        session = self._sessions.overlaid(overlay, native=native)
        added = [output.name for output in session.get_outputs() if output.name not in own]
        if unknown := [name for name in added if name not in self._overlay_axes]:
            names = ", ".join(unknown)
            raise ValueError(f"{self.path} has damaged metadata: it names no layer of {names}; export the model again")
        self._overlaid = wanted, (session, added)
        return session, added


def open_engine(
    model: str | Path, *, device: str = "cpu", threads: int | None = None, runtime: str = "onnxruntime"
) -> Engine:
    """An `Engine` for an `.onnx` file, a `TensorRTEngine` for what `tetdeploy build` made of one.

    Raises:
        ValueError: the device is not one that the file can run on; otherwise as these two do.
    """
    check_path("model", model, "an .onnx or .engine file")
    if Path(model).suffix != ".engine":
        return Engine(model, device=device, threads=threads, runtime=runtime)
    check_runtime(runtime, device)
    if device != "tensorrt":
        raise ValueError(f"{model} runs on an NVIDIA GPU only, got device {device!r}; choose device tensorrt")
    from tetdeploy.runtimes.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(model)


def _wrong_dtype(name: str, got: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    if wanted == np.uint8:
        return (
            f"{name} takes uint8 pixels 0..255 and normalises them itself, got {got}; "
            "convert the images, or export with --no-normalize for float32 input"
        )
    return f"{name} takes {wanted} input that is normalised already, got {got}; convert it with .astype('{wanted}')"


def _pad_time(frames: Array, T: int) -> Array:
    """Frames `[N, t, ...]` filled up with zeros to T steps: later frames change no earlier answer."""
    missing = T - frames.shape[1]
    return np.pad(frames, [(0, 0), (0, missing), *[(0, 0)] * (frames.ndim - 2)]) if missing else frames
