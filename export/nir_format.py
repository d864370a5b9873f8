"""A folded network as a graph of the Neuromorphic Intermediate Representation (NIR), for other frameworks and chips.

Pedersen et al., Neuromorphic intermediate representation, Nature Communications 2024. NIR's neurons live in continuous
time, ours in steps. One step of forward Euler over dt, ``v + dt/tau_nir (v_leak - v + R I)``, is our Eq. 1 for

    tau_nir = dt / (1 - tau)        R = 1 / (1 - tau) = tau_nir / dt        v_leak = 0

and without a leak (tau = 1, `nir.IF`: dv/dt = R I) for R = 1 / dt. NIR fires for v > v_threshold, strictly, and resets
to v_reset = 0, as Eqs. 2 and 3 do. Readers that take other steps, or fire at v = v_threshold: docs/nir.md.

NIR has no max pooling. Of spikes it says whether any in the window of k x k fired: whether their mean, 0 or at least
1 / k^2, exceeds 1 / (2 k^2). Average pooling and LIF neurons of that threshold say so. They remember nothing: a mean of
0 leaves v = 0, and any other fires, which resets it to 0.

NIR knows neither a batch nor T: a graph maps one image's input of one step. So in the traced network the two are found
by the batch, which is left open: what stands right of it in a shape is an image's, whatever lies left of it is time.
"""

from __future__ import annotations

import io
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from tetdeploy.arguments import check_choice, check_count
from tetdeploy.data import ENCODINGS, Encoding
from tetdeploy.folding import (
    DROPOUT,
    VIEWS,
    count_batchnorm,
    fold_batchnorm,
    module_path,
    parameter,
    remedy_of_computed,
)
from tetdeploy.networks import Classifier, check_classifier
from tetdeploy.storage.files import atomic_write
from tetdeploy.storage.form import as_json
from tetdeploy.storage.model_file import METADATA_KEY
from tetdeploy.storage.provenance import written
from tetdeploy.system.extras import MissingExtraError, import_extra
from tetdeploy.tracing import callers_autocast_off, quiet
from tetdeploy.wording import first_line

from .causality import check_on_noise, check_reached

aten = torch.ops.aten
DT = 1e-4  # seconds a step: what snnTorch and SpikingJelly assume of a NIR graph, which does not say


@dataclass(frozen=True)
class NirExported:
    """What was written: the file, its nodes by kind, its edges, and how many BN were folded."""

    path: Path
    nodes: dict[str, int]
    num_edges: int
    num_folded: int
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "path": str(self.path)}


def export_nir(
    classifier: Classifier,
    path: Path | str,
    *,
    trained_T: int,
    encoding: Encoding = "direct",
    source: Mapping[str, Any] | None = None,
) -> NirExported:
    """Write a classifier's network as a NIR file, BN folded (Eq. 6).

    Each step the graph takes an image or frame `[C, H, W]` as `classifier.normalize` gives it, and gives that step's
    logits `[K]`; a direct encoding shows the same image at every step. How to normalise, and the class names, are
    metadata.

    Args:
        classifier: put into inference mode here.
        trained_T: kept in the metadata; a NIR graph runs for as many steps as its reader likes.
        encoding: what the data are, images (`direct`) or `frames`.
        source: what the network was made from, kept in the metadata.

    Raises:
        ValueError: NIR has no node for a part of the network, which the message names; `classifier` is none, trained_T
            no whole number of at least 1, or the encoding unknown. Nothing is written then.
        MissingExtraError: the package nir is not installed, or too old.
        OSError: the folder cannot be written.
    """
    nir = _import_nir()
    path = Path(path)
    check_classifier(classifier)
    trained_T = check_count("trained_T", trained_T)
    check_choice("encoding", encoding, ENCODINGS)
    graph, num_folded = nir_graph(classifier.eval(), encoding=encoding)
    graph.metadata = {METADATA_KEY: json.dumps(_describe(classifier, trained_T, encoding, source))}
    file = io.BytesIO()  # HDF5 ends the process where it cannot close a file, as on a full disk
    nir.write(file, graph)
    nir.read(file)  # every shape is checked once more, from what was written
    content = file.getvalue()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    return NirExported(path, {kind: kinds.count(kind) for kind in kinds}, len(graph.edges), num_folded, len(content))


@callers_autocast_off()
def nir_graph(classifier: Classifier, *, encoding: Encoding = "direct") -> tuple[Any, int]:
    """The `nir.NIRGraph` of a classifier in inference, and how many BN were folded. Errors: see `export_nir`."""
    nir = _import_nir()
    num_layers = check_on_noise(classifier, encoding)
    with torch.no_grad(), quiet():
        program = _traced(classifier, encoding)
        _refuse_overwritten(program.graph)
        num_folded, folded = count_batchnorm(program.graph), fold_batchnorm(program)
    writer = _Writer(folded, nir)
    graph = writer.write()
    check_reached(num_layers, writer.num_layers)
    return graph, num_folded


def _import_nir() -> Any:
    """The package nir; `pip install sinabs` takes an older one back."""
    nir = import_extra("nir", "nir")
    if "v_reset" not in nir.LIF.__dataclass_fields__:
        raise MissingExtraError(f"nir {nir.version} is too old, its neurons have no v_reset: pip install -U nir")
    return nir


def _traced(classifier: Classifier, encoding: Encoding) -> torch.export.ExportedProgram:
    """The network over three steps, with the batch left open."""
    image = torch.zeros((2, *classifier.image_shape), device=classifier.mean.device)
    batch = torch.export.Dim.AUTO  # a named one is refused for guards that every batch passes
    frames = encoding == "frames"
    inputs: tuple[Any, ...] = (image.expand(3, *image.shape),) if frames else (image, 3)
    try:
        shapes = ({1: batch},) if frames else ({0: batch}, None)
        return torch.export.export(classifier.network, inputs, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many kinds for what a network's code may do
        raise ValueError(f"torch.export cannot trace the network: {first_line(error)}") from error


_SHARED = {*VIEWS, *DROPOUT, aten.add_.Tensor} - {aten.clone.default}  # what may return the memory of its first input


def _refuse_overwritten(graph: fx.Graph) -> None:
    """Refuse `y += x` where the sum takes the place of a value that is read once more, by another name: a NIR graph
    would hand on the value from before."""
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target is aten.add_.Tensor and any(
            order[user] > order[node] for value in _same_memory(node) for user in value.users
        ):
            raise _no_node(node, "a sum written over a value that is read again later; write y = y + x")


def _same_memory(node: fx.Node) -> list[fx.Node]:
    """The traced values, but for its own, that an in-place operation may overwrite: what it reads first, what that is
    a view of, and all views of these."""
    base: Any = node.args[0]
    while base.target in _SHARED:
        base = base.args[0]
    values = [base]
    for value in values:
        others = value.users.keys() - {node}
        values += [user for user in others if user.target in _SHARED and user.args[0] is value]
    return values


def _describe(
    classifier: Classifier, trained_T: int, encoding: Encoding, source: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "format": 1,
        "dt": DT,
        "trained_T": trained_T,
        "encoding": encoding,
        "input": "normalised: (pixel / 255 - mean) / std per channel",
        "normalization": {
            "scale": 255.0,
            "mean": classifier.mean.flatten().tolist(),
            "std": classifier.std.flatten().tolist(),
        },
        "class_names": classifier.class_names,
        "logits": "the mean of the output over the steps",
        "source": as_json(dict(source or {})),
    } | written(nir=_import_nir().version, torch=torch.__version__)


Sources = tuple[str, ...]  # the NIR nodes whose outputs a traced value is the sum of


@dataclass
class _Writer:
    """Walks a folded network and writes NIR nodes.

    A traced value is kept as the NIR nodes that it sums: NIR adds where several edges meet, and has no node for it.
    """

    module: fx.GraphModule
    nir: Any
    nodes: dict[str, Any] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    sources: dict[fx.Node, Sources] = field(default_factory=dict)
    num_layers: int = 0  # of the network's own neurons

    def write(self) -> Any:
        translations: dict[Any, Callable[[fx.Node], Sources]] = {
            aten.conv2d.default: self._conv,
            aten.conv2d.padding: self._conv,
            aten.linear.default: self._linear,
            aten.avg_pool2d.default: self._avg_pool,
            aten.adaptive_avg_pool2d.default: self._adaptive_avg_pool,
            aten.mean.dim: self._mean,
            aten.max_pool2d.default: self._max_pool,
            aten.add.Tensor: self._add,
            aten.add_.Tensor: self._add,
            aten.repeat.default: self._view,
            aten.stack.default: self._stack,
            torch.ops.tetdeploy.lif.default: self._lif,
        }
        translations |= dict.fromkeys(DROPOUT, self._dropout) | dict.fromkeys(VIEWS, self._view)
        for node in self.module.graph.nodes:
            if node.op == "placeholder" and not self.nodes:
                self.nodes["input"] = self.nir.Input({"input": np.array(_shape(node))})
                self.sources[node] = ("input",)
            elif node.op == "call_function" and node.target is operator.getitem and node.args[0] in self.sources:
                self.sources[node] = self._spikes(node)
            elif node.op == "call_function" and any(given in self.sources for given in node.all_input_nodes):
                if isinstance(node.meta.get("val"), torch.SymInt):
                    continue  # a size, the batch's
                if node.target not in translations:
                    raise _no_node(node, str(node.target))
                self.sources[node] = translations[node.target](node)
            elif node.op == "output":
                (logits,) = node.args[0]
                self._output(_shape(logits), self.sources[logits])
        return self.nir.NIRGraph(self.nodes, self.edges)

    def _output(self, shape: tuple[int, ...], sources: Sources) -> None:
        """Readers add where edges meet in any node but the output: a sum goes there by way of a layer that keeps it."""
        if len(sources) > 1:
            sources = self._node("logits", self.nir.Linear(np.eye(*shape, dtype=np.float32)), sources)
        self._node("output", self.nir.Output({"output": np.array(shape)}), sources)

    def _node(self, name: str, node: Any, sources: Sources) -> Sources:
        """Add a node by a name of its own: readers make `a_b` of `a.b`, and HDF5 a folder of what precedes a slash."""
        base, count, taken = name.replace("/", "_"), 1, {other.replace(".", "_") for other in self.nodes}
        name = base
        while name.replace(".", "_") in taken:
            count += 1
            name = f"{base}_{count}"
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return (name,)

    def _layer(self, node: fx.Node, made: Any) -> Sources:
        """Add a node that reads the first argument of the traced one."""
        return self._node(module_path(node), made, self.sources[node.args[0]])  # type: ignore[index]

    def _conv(self, node: fx.Node) -> Sources:
        weight, bias = self._parameters(node)
        stride, padding, dilation, groups = _options(node.args[3:], (1, 1), (0, 0), (1, 1), 1)
        if weight.shape[2] != weight.shape[3]:
            raise _no_node(
                node, f"a kernel of {weight.shape[2]}x{weight.shape[3]}: nir takes every kernel for a square"
            )
        bias = np.zeros(len(weight), weight.dtype) if bias is None else bias
        size = _shape(node.args[0])[1:]
        pads = padding if isinstance(padding, str) else _pair(padding)
        made = self.nir.Conv2d(size, _of_one_group(weight, groups), _pair(stride), pads, _pair(dilation), 1, bias)
        return self._layer(node, made)

    def _linear(self, node: fx.Node) -> Sources:
        weight, bias = self._parameters(node)
        if len(_shape(node.args[0])) != 1:
            raise _no_node(node, f"a linear layer on {list(_shape(node.args[0]))}: NIR's takes a vector")
        return self._layer(node, self.nir.Linear(weight) if bias is None else self.nir.Affine(weight, bias))

    def _avg_pool(self, node: fx.Node) -> Sources:
        kernel, stride, padding, ceil_mode, include_pad, divisor = _options(
            node.args[1:], None, (), 0, False, True, None
        )
        pads = _pair(padding)
        if ceil_mode or divisor or (any(pads) and not include_pad):
            raise _no_node(node, "average pooling with ceil_mode, a divisor, or padding that is left out of the mean")
        return self._pool(node, _pair(kernel), _pair(stride or kernel), pads)

    def _adaptive_avg_pool(self, node: fx.Node) -> Sources:
        size, out = _shape(node.args[0])[1:], _shape(node)[1:]
        if any(a % b for a, b in zip(size, out, strict=True)):
            raise _no_node(
                node, f"adaptive average pooling of {list(size)} to {list(out)}, by windows of several sizes"
            )
        kernel = (size[0] // out[0], size[1] // out[1])
        return self._pool(node, kernel, kernel, (0, 0))

    def _mean(self, node: fx.Node) -> Sources:
        """Over both of an image's axes it is global pooling; where these are dropped, a Flatten node drops them."""
        before, ndim = _shape(node.args[0]), len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
        axes, keepdim = _options(node.args[1:], None, False)
        if len(before) != 3 or {axis % ndim for axis in axes or ()} != {ndim - 2, ndim - 1}:
            raise _no_node(node, f"a mean of {list(before)} over other axes than both of the image")
        height, width = before[1:]
        pooled = self._pool(node, (height, width), (height, width), (0, 0))
        if keepdim:
            return pooled
        made = self.nir.Flatten({"input": np.array((before[0], 1, 1))}, -3, -1)
        return self._node(f"{module_path(node)}.flat", made, pooled)

    def _max_pool(self, node: fx.Node) -> Sources:
        kernel, stride, padding, dilation, ceil_mode = _options(node.args[1:], None, (), 0, 1, False)
        if ceil_mode or _pair(dilation) != (1, 1):
            raise _no_node(node, "max pooling with ceil_mode or dilation")
        read = [self.nodes[source] for source in self.sources[node.args[0]]]  # type: ignore[index]
        if len(read) != 1 or not isinstance(read[0], self.nir.LIF | self.nir.IF):
            raise _no_node(node, "max pooling of values that are not spikes: NIR has none")
        size = _pair(kernel)
        mean = self._pool(node, size, _pair(stride or kernel), _pair(padding))
        tau = 0.5  # any but 1: snnTorch reads no nir.IF, and SpikingJelly no LIF of tau = 0
        return self._node(f"{module_path(node)}.any", self._neurons(_shape(node), tau, 0.5 / (size[0] * size[1])), mean)

    def _pool(self, node: fx.Node, *geometry: tuple[int, int]) -> Sources:
        return self._layer(node, self.nir.AvgPool2d(*(np.array(pair) for pair in geometry)))

    def _add(self, node: fx.Node) -> Sources:
        terms = [term for term in node.args[:2] if term != 0]  # sum([a, b]) is 0 + a + b
        if node.kwargs.get("alpha", 1) != 1 or not all(isinstance(t, fx.Node) and t in self.sources for t in terms):
            raise _no_node(node, "a sum with something that is not computed from the input, or scaled")
        if len({_shape(term) for term in terms}) != 1:
            raise _no_node(node, f"a sum of different shapes, {' and '.join(str(list(_shape(t))) for t in terms)}")
        together = [source for term in terms for source in self.sources[term]]  # type: ignore[index]
        if len(set(together)) < len(together):
            raise _no_node(node, "a value added to itself: two equal edges")
        return tuple(together)

    def _dropout(self, node: fx.Node) -> Sources:
        assert not node.args[2], "traced in inference"
        return self.sources[node.args[0]]  # type: ignore[index]

    def _view(self, node: fx.Node) -> Sources:
        """Time and batch merged or split are none of NIR's business; an image's axes become one by a Flatten node."""
        before, after = _shape(node.args[0]), _shape(node)
        if before == after:
            return self.sources[node.args[0]]  # type: ignore[index]
        if after != (int(np.prod(before)),):
            raise _no_node(node, f"a change of shape from {list(before)} to {list(after)}")
        # From the back, so that it holds with a batch in front as well: readers differ in whether they add one.
        return self._layer(node, self.nir.Flatten({"input": np.array(before)}, -len(before), -1))

    def _stack(self, node: fx.Node) -> Sources:
        """The same image at each step; anything else would be one step's part."""
        first, *others = node.all_input_nodes
        if others or _shape(first) != _shape(node):
            raise _no_node(node, "a stack of other than the same image at each step; use DirectEncoding or expand")
        return self.sources[first]

    def _lif(self, node: fx.Node) -> Sources:
        _, u, tau, v_th, _ = node.args
        if u is not None:
            raise _no_node(node, "neurons that start from a membrane of the network's own")
        self.num_layers += 1
        return self._layer(node, self._neurons(_shape(node.args[0]), float(tau), float(v_th)))  # type: ignore[arg-type]

    def _neurons(self, shape: tuple[int, ...], tau: float, v_th: float) -> Any:
        zero, threshold = np.zeros(shape), np.full(shape, v_th)
        if tau == 1.0:
            return self.nir.IF(np.full(shape, 1 / DT), threshold, v_reset=zero)
        leak = 1.0 - tau
        return self.nir.LIF(np.full(shape, DT / leak), np.full(shape, 1 / leak), zero, threshold, v_reset=zero)

    def _spikes(self, node: fx.Node) -> Sources:
        if node.args[1] != 0 and node.users:
            raise _no_node(node, "a membrane potential that is read: NIR's neurons give spikes only")
        return self.sources[node.args[0]]  # type: ignore[index]

    def _parameters(self, node: fx.Node) -> tuple[NDArray[Any], NDArray[Any] | None]:
        weight, bias = (self._parameter(node, given) for given in (*node.args[1:3], None)[:2])
        assert weight is not None
        return weight, bias

    def _parameter(self, node: fx.Node, given: Any) -> NDArray[Any] | None:
        if given is None:
            return None
        if given.op != "get_attr":
            raise _no_node(node, f"weights that the network computes; {remedy_of_computed(given)}")
        return parameter(self.module, given).cpu().numpy()


def _shape(node: Any) -> tuple[int, ...]:
    """What stands right of the batch in a traced value's shape: an image's own axes."""
    dims = node.meta["val"].shape
    open_dims = [k for k, dim in enumerate(dims) if not isinstance(dim, int)]
    if len(open_dims) != 1:
        raise _no_node(node, f"a value of shape {list(dims)}, which has not one axis for the batch")
    return tuple(int(dim) for dim in dims[open_dims[0] + 1 :])


def _options(given: Sequence[Any], *defaults: Any) -> tuple[Any, ...]:
    """A traced operation's arguments; those that stand at their defaults are left out at its end."""
    return (*given, *defaults[len(given) :])


def _of_one_group(weight: NDArray[Any], groups: int) -> NDArray[Any]:
    """The kernel `[out, in, h, w]` of one in groups, `[out, in / groups, h, w]`: zeros join what no group does. nir's
    shape check takes a kernel's inputs for all there are."""
    outputs, inputs = len(weight) // groups, weight.shape[1]
    joined = np.zeros((len(weight), groups * inputs, *weight.shape[2:]), weight.dtype)
    for g in range(groups):
        joined[g * outputs : (g + 1) * outputs, g * inputs : (g + 1) * inputs] = weight[g * outputs : (g + 1) * outputs]
    return joined


def _pair(value: Any) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    return int(both[0]), int(both[-1])


def _no_node(node: fx.Node, what: str) -> ValueError:
    return ValueError(
        f"NIR cannot hold {module_path(node)!r}: {what}; networks of convolutions, linear layers, average pooling, max "
        "pooling of spikes, sums and neurons can go"
    )
