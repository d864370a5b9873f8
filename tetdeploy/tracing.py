"""Tracing: a network in inference becomes a graph of PyTorch operations in which every neuron layer is one node.

What T is decides how the trace is taken: a number, or a dimension of the input. The exporter lowers the graph to ONNX;
here it is folded (Eq. 6) and run by PyTorch.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import config as fx_config

from tetdeploy.data import Encoding
from tetdeploy.folding import DROPOUT, FoldingError, fold_batchnorm
from tetdeploy.networks import Classifier
from tetdeploy.wording import first_line


class _Boundary(nn.Module):
    """The network as the outside sees it: batch first, input normalised inside, mean and per-step logits out."""

    def __init__(self, classifier: Classifier, *, T: int | None, encoding: Encoding, step: bool) -> None:
        super().__init__()
        self.classifier, self.T, self.encoding, self.step = classifier, T, encoding, step

    def forward(self, x: Tensor, steps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.encoding == "frames":
            frames = x.unsqueeze(0) if self.step else x.transpose(0, 1)
            logits = self.classifier(frames)
        else:
            logits = self.classifier(x, self.T if steps is None else steps.shape[1])
        per_step = logits.transpose(0, 1)
        return per_step.mean(1), per_step


class Tracer:
    """Traces of a classifier in inference, each taken once: its weights must stay as they are meanwhile.

    Args:
        encoding: `direct` or `frames`.
        uint8: the input is pixels, which are normalised; otherwise float32 that is normalised already.
    """

    def __init__(self, classifier: Classifier, *, encoding: Encoding, uint8: bool) -> None:
        self.classifier, self.encoding, self.uint8 = classifier, encoding, uint8
        self._programs: dict[tuple[int | None, bool], torch.export.ExportedProgram] = {}

    def program(self, T: int | None, *, step: bool = False) -> torch.export.ExportedProgram:
        """The trace at T steps, None for any number; `step` is the step layout.

        Raises:
            ValueError: the network cannot be traced.
        """
        if (T, step) not in self._programs:
            with torch.no_grad(), quiet():
                self._programs[T, step] = self._trace(T, step)
        return self._programs[T, step]

    def folded(self, T: int | None, *, step: bool = False, trainable: bool = False) -> fx.GraphModule:
        """The network with BN folded: `x [N, ...]` to the mean and the per-step logits `[N, T, K]`; another one at each
        call, to run or to change.

        Args:
            trainable: see `fold_batchnorm`.

        Raises:
            ValueError: the network cannot be traced; FoldingError from folding.
        """
        with torch.no_grad(), quiet():
            try:
                return fold_batchnorm(self.program(T, step=step), trainable=trainable)
            except FoldingError as error:  # modules are called as the network does, without our boundary round it
                message = re.sub(r"\S+ \(classifier\)", "the input", str(error))  # normalised
                message = re.sub(r"(?<![\w.])classifier\.network\.", "", message)
                raise FoldingError(re.sub(r"(?<![\w.])classifier\.network\b", "network", message)) from error

    def example(self, T: int | None, step: bool) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Example inputs (a batch of 2) and which of their dimensions are dynamic."""
        batch, time = torch.export.Dim("batch"), torch.export.Dim("T")
        zeros = partial(torch.zeros, dtype=torch.uint8 if self.uint8 else torch.float32)
        device, shape, steps = self.classifier.mean.device, self.classifier.image_shape, T or 3
        if self.encoding == "frames" and not step:
            return (zeros((2, steps, *shape), device=device),), ({0: batch, 1: time} if T is None else {0: batch},)
        x = zeros((2, *shape), device=device)
        if T is not None:
            return (x,), ({0: batch},)
        return (x, torch.zeros((2, steps), dtype=torch.uint8, device=device)), ({0: batch}, {0: batch, 1: time})

    def _trace(self, T: int | None, step: bool) -> torch.export.ExportedProgram:
        boundary = _Boundary(self.classifier, T=T, encoding=self.encoding, step=step).eval()
        inputs, shapes = self.example(T, step)
        try:
            return _without_dropout(torch.export.export(boundary, inputs, dynamic_shapes=shapes))
        except Exception as error:  # torch.export raises many kinds for what a network's code may do
            if T is not None:
                raise ValueError(f"torch.export cannot trace the network: {reason(error)}") from error
            self.program(3)  # if it cannot be traced with so many either, it says why
            raise ValueError(
                "the network cannot be traced with the number of steps left open, which the dynamic layout needs; "
                f"use --layout unrolled. The reason: {reason(error)}"
            ) from error


def _without_dropout(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """In inference it gives the very memory that it reads; torch.onnx would take that for other memory."""
    for node in program.graph.nodes:
        if node.target in DROPOUT and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


_GUARDS = {  # what stands in a guard, and why torch made it
    r"\bmin\(": "it merges axes with that of the batch and splits them again with no operation between, as "
    "flatten(0, 1) and unflatten do round a dropout, which is none in inference; leave them out then, as OverTime does "
    "(SpikingJelly's layer.Flatten does so, too: write nn.Flatten(2), as time is axis 0 and the batch axis 1)"
    + ("; PyTorch 2.13 traces more of these" if torch.__version__ < "2.13" else ""),
    "//": "it cuts an axis with the batch in it into parts, as chunk(2) does; write unflatten(0, (2, ...)) and take "
    "the parts by their index",
}


MAKES_NUMBERS = (
    "its forward makes a Python number of a tensor's values, by float(), .item() or a condition on them; make neurons "
    "once, in __init__, of numbers, and write a condition as torch.where"
)


def reason(error: Exception) -> str:
    """The first line of torch's message, or the second where the first one only announces it; and what led to it, where
    that is known."""
    line = first_line(error)
    if line.endswith(":") or "For more information" in line:
        others = (other.strip() for other in str(error).split(line, 1)[1].splitlines())
        line = next((other.removeprefix("- ") for other in others if other), line)
    if "marked T as dynamic" in line:  # what torch advises is of its own functions
        return "it loops over its steps, as `for step in x` does, or counts them, which fixes T as it is traced"
    if "marked batch as dynamic" in line:
        return "it loops over its images, or counts them by len(x), which fixes their number; x.shape[0] does not"
    if line.startswith("Could not guard on data-dependent expression"):  # in terms of torch's own symbols
        return MAKES_NUMBERS
    known = [why for sign, why in _GUARDS.items() if re.search(f"generated guard .*{sign}", line)]
    return ": ".join([*known, line])


@contextmanager
def callers_autocast_off() -> Iterator[None]:
    """Within it nothing is cast but by autocasts in it. Under a caller's a trace holds casts, and the backward pass of
    linear layers runs in half precision, whatever forward ran in."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.clear_autocast_cache)  # or the caller's would go on with weights cast in here
        yield


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Within it float32 is float32 to cuDNN: in TF32, PyTorch's default, factors have 10 bits of mantissa, which
    changes spikes. Nothing changes on a CPU."""
    cudnn: Any = torch.backends.cudnn
    conv, rnn = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    cudnn.allow_tf32 = False  # where it disagrees with the newer ones, whoever reads it gets an error
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.allow_tf32 = conv == "tf32"
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = conv, rnn


@contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter warns of its own internals and prints graphs; nothing a user can act on. Nor does it note
    where in the code each node is made: nobody reads it, and in a large network it takes seconds."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    without_places = getattr(fx_config, "do_not_emit_stack_traces", False)  # no PyTorch before 2.13 knows it
    fx_config.do_not_emit_stack_traces = True
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        fx_config.do_not_emit_stack_traces = without_places
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
