"""Refusing a network in which more than neurons carries something from one step to the next, or which mixes the images
of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.module_tracker import ModuleTracker

from tetdeploy.data import Encoding
from tetdeploy.networks import Classifier, run_network
from tetdeploy.networks.smooth_spike import steepness
from tetdeploy.networks.twins import computes_other
from tetdeploy.neurons import LIF
from tetdeploy.storage.files import lacks_temporary_folder
from tetdeploy.tracing import MAKES_NUMBERS
from tetdeploy.wording import counted, shorten

from .recorder import NeuronRecorder


class InFloat64(TorchDispatchMode):
    """Within it, what a network asks for in float32, as `x.float()` does, is float64; so is what it makes in the
    default dtype, as `torch.zeros(x.shape)` does, and what it reads of float32 that it keeps beside its parameters. The
    default dtype itself stays as it is: all threads share it.

    `makes_numbers` says whether a Python number was made of a tensor's values, as a condition does."""

    makes_numbers = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.makes_numbers |= func is torch.ops.aten._local_scalar_dense.default
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        shared = {a.name: a.alias_info.is_write for a in func._schema.arguments if a.alias_info}
        if not shared or func is torch.ops.aten.lift_fresh.default:
            args, kwargs = tree_map(_doubled, (args, kwargs))
            return tree_map(_doubled, func(*args, **kwargs))
        # A view, or written over: a copy would be other memory. What is read takes the type of what is written.
        names = [a.name for a in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        written = [given[name] for name, is_written in shared.items() if is_written and name in given]
        if written and isinstance(written[0], Tensor) and written[0].dtype in _REAL:
            as_it = partial(_as_real, dtype=written[0].dtype)
            given = {name: value if name in shared else tree_map(as_it, value) for name, value in given.items()}
        return func(*(given[name] for name in names[: len(args)]), **{name: given[name] for name in kwargs})


_REAL = (torch.float32, torch.float64)


def _as_real(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in _REAL else value


_doubled = partial(_as_real, dtype=torch.float64)


class _NamedNeurons(NeuronRecorder):
    """Keeps the currents as well, spikes as bool (in float64 they would be half of all that is kept), and the names of
    the modules that fire; of neurons in a forward of the network itself "lif".

    Args:
        others: spikes that the next layers read in place of the network's own, in the same order.
    """

    def __init__(self, state: Sequence[Tensor] | None = None, others: Sequence[Tensor] = ()) -> None:
        super().__init__(state)
        self.others = others
        self.in_float64 = InFloat64()  # type: ignore[no-untyped-call]
        self.modules = ModuleTracker()
        self.names: list[str] = []
        self.currents: list[Tensor] = []

    def fired(self, current: Tensor, spikes: Tensor, u_last: Tensor, tau: float, v_th: float) -> Tensor:
        *_, name = max(self.modules.parents, key=len).split(".", 2)  # of Classifier.network.NAME
        self.names.append("lif" if name == "network" else name)
        self.currents.append(current.clone())
        self.spikes.append(spikes > 0)
        self.state.append(u_last.clone())
        other = self.others[self.num_layers] if self.num_layers < len(self.others) else spikes
        return other.to(spikes, copy=True) if other.shape == spikes.shape else spikes


def steps_to_check(trained_T: int, T: int = 0) -> int:
    """At how many steps `check_steps` runs a network that is exported for T: at more than it was trained at, since what
    holds one thing for each of those, such as a BN, fails only there."""
    return max(4, T, trained_T + 2)


def check_on_noise(classifier: Classifier, encoding: Encoding, *, T: int = 4) -> int:
    """`check_steps` of a classifier in inference for want of images: no value matters, only whether two ways of running
    the steps agree."""
    shape = (2, 4, *classifier.image_shape) if encoding == "frames" else (2, *classifier.image_shape)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return check_steps(classifier, torch.from_numpy(pixels).to(classifier.mean.device), encoding, T=T)


def check_reached(num_layers: int, num_reached: int) -> None:
    """Refuse, with ValueError, a network of which not all `num_layers` that run are in the graph."""
    if num_reached != num_layers:
        raise ValueError(
            f"the network runs {num_layers} neuron layers, but only {num_reached} of them reach its logits; take out "
            "those whose spikes are not used"
        )


@torch.no_grad()
def check_steps(classifier: Classifier, x: Tensor, encoding: Encoding, *, T: int = 4) -> int:
    """Refuse a network in which more than neurons carries something from one step to the next, or which mixes the
    images of a batch.

    In float64, T steps at once are compared with T single steps between which only membranes are handed on; and two
    images, of which the second is made paler lest both have the same extremes, with each by itself at the last step.
    If a layer of neurons fires too little for that, then the same where layers read random spikes in place of each
    other's, which reach what stands behind it. And once more the last step where image and spikes are large numbers.

    Args:
        x: images `[N, C, H, W]`, or frames `[N, T, C, H, W]`, of which the first two are taken, or twice the only one;
            where frames hold fewer steps they come round again.

    Returns:
        The number of neuron layers that run, 1 or more.

    Raises:
        ValueError: the classifier is not in float32; a weight is NaN or infinite; either pair differs; the network
            fails or does not return finite `[T, N, K]`; it has no neurons, or they get other than `[T, N, ...]`; it is
            an ANN twin, or one with smooth spikes.
    """
    _refuse_without_spikes(classifier)
    _refuse_other_floats(classifier)
    _refuse_broken_weights(classifier)
    # without gradients: a module called on a view of a parameter, as of positions, fails where modules are tracked
    double = copy.deepcopy(classifier).double().requires_grad_(False)
    x = x if x.dtype == torch.uint8 else x.double()
    if encoding == "frames":
        x = x[:, [t % x.shape[1] for t in range(T)]]
    x = torch.stack([x[0], _paler(x[:2][-1])])
    whole, logits = _recorded(double, x, T)
    if not whole.spikes:
        raise ValueError(
            "the network has no LIF or IF of tetdeploy.neurons, so there is nothing that spikes to export; put them in "
            "place of its own neurons: docs/training.md, Porting a network, says which compute the same"
        )
    if not logits.isfinite().all():
        raise ValueError(
            "the network gives NaN or infinite logits, though its weights are finite: does it divide by 0, or take a "
            "root or logarithm of numbers below 0?"
        )
    state: list[Tensor] | None = None
    for t in range(T):
        before, shown = state, _shown(x, encoding, t)
        single, step = _recorded(double, shown, 1, before)
        state = single.state
        if len(single.spikes) != len(whole.spikes):
            raise ValueError(
                f"the network runs its neurons {counted(len(whole.spikes), 'time')} for T={T} and "
                f"{counted(len(single.spikes), 'time')} for one step; give each layer of neurons its whole sequence "
                "[T, ...] in one call; where its current takes spikes of the step before, as in a recurrent layer, the "
                "network cannot be exported"
            )
        _check_axes(single, 1, "one step of 2 images", 2)
        _check_axes(whole, T, f"T={T} and 2 images", 2)
        same = all(torch.equal(a[0], b[t]) for a, b in zip(single.spikes, whole.spikes, strict=True))
        if not same or not _same_step(single, step, whole, logits, t):
            raise _mixed_time(double, x, t, T)
    _check_alone(double, shown, before, single.spikes, single, step)
    tells, shapes = all(map(_tells, whole.spikes)), [layer.shape for layer in whole.spikes]
    del whole, single, state, before  # each may take as much memory as a run that follows
    if not tells:
        _check_random(double, x, encoding, shapes, T)
    _check_loud(double, x, encoding, shapes, T)
    return len(shapes)


def _shown(x: Tensor, encoding: Encoding, t: int) -> Tensor:
    """What step t of x is run on by itself."""
    return x[:, t : t + 1] if encoding == "frames" else x


def _tells(spikes: Tensor) -> bool:
    """Whether spikes `[T, N, ...]` show what stands behind their layer: some before the last step, what is carried on;
    some of each image at the last step, what goes from one to another."""
    return bool(spikes[:-1].any() and spikes[-1].reshape(spikes.shape[1], -1).any(1).all())


def _check_random(double: Classifier, x: Tensor, encoding: Encoding, shapes: Sequence[torch.Size], T: int) -> None:
    """Compare the first and the last step, and at the last each image by itself, where layers read random spikes of
    these shapes, `[T, N, ...]`. Currents do not depend on membranes then."""
    generator = torch.Generator().manual_seed(0)
    spikes = [torch.randint(2, shape, generator=generator).to(x.device, torch.bool) for shape in shapes]
    whole, logits = _recorded(double, x, T, others=spikes)
    for t in (0, T - 1):
        shown, read = _shown(x, encoding, t), [layer[t : t + 1] for layer in spikes]
        single, step = _recorded(double, shown, 1, others=read)
        if not _same_step(single, step, whole, logits, t):
            raise _mixed_time(double, x, t, T, spikes)
    _check_alone(double, shown, None, read, single, step)


# Times what spikes and normalised pixels are: as many steps reach a threshold at once. The smaller one where a network
# refuses the larger, or gives what is not finite.
_LOUD = (1000.0, 30.0)


def _check_loud(double: Classifier, x: Tensor, encoding: Encoding, shapes: Sequence[torch.Size], T: int) -> None:
    """Compare the last step where the image and the spikes of each layer, of these shapes, are large random numbers.
    Neurons that are not ours may keep membranes that take more than these T steps to reach their threshold, and show
    nothing till then.

    On a CPU alone: where such numbers are an index out of range, a GPU is of no use to the process any more."""
    if x.device.type != "cpu":
        return
    for times in _LOUD:
        generator = torch.Generator().manual_seed(1)
        x, *spikes = (
            times * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (x.shape, *shapes)
        )
        shown, read = _shown(x, encoding, T - 1), [layer[T - 1 :] for layer in spikes]
        try:
            whole, logits = _recorded(double, x, T, others=spikes)
            single, step = _recorded(double, shown, 1, others=read)
        except ValueError:  # a network may refuse such numbers, which tells nothing of those that it takes
            continue
        if not all(value.isfinite().all() for value in (*whole.currents, logits)):
            continue
        if not _same_step(single, step, whole, logits, T - 1, close=_close_for_its_size):
            raise _mixed_time(double, x, T - 1, T, spikes)
        return


def _close(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):  # as a rule, and sooner told
        return True
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def _close_for_its_size(a: Tensor, b: Tensor) -> bool:
    """The same of what was computed from large values, whose rounding may be large beside it, as in a sine of them."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))


def _same_step(
    single: _NamedNeurons,
    step: Tensor,
    whole: _NamedNeurons,
    logits: Tensor,
    t: int,
    close: Callable[[Tensor, Tensor], bool] = _close,
) -> bool:
    """Whether the currents and logits of a single step are those of step t of a whole run."""
    pairs = [*zip(single.currents, whole.currents, strict=True), (step, logits)]
    return all(close(a[0], b[t]) for a, b in pairs)


def _mixed_time(double: Classifier, x: Tensor, t: int, T: int, others: Sequence[Tensor] = ()) -> ValueError:
    """Why step t of T differs from a single step: random numbers, statistics of the batch, which has the steps, or what
    is carried from step to step."""
    try:
        draws, numbers, changed = _traces(double, x, T, others)
    except Exception:  # what a network keeps may be none that can be copied or compared
        draws, numbers, changed = False, "", []
    if draws:
        return ValueError(
            "the network draws random numbers in inference, and an exported graph draws none; encode images without "
            "them, as DirectEncoding does, and pass training=self.training to F.dropout"
        )
    if batch := [name for name, layer in double.network.named_modules() if _takes_batch_statistics(layer)]:
        return ValueError(
            f"the network mixes the images of a batch, and the steps: BN without running statistics ({shorten(batch)}) "
            "takes those of the batch in inference, too; keep its track_running_stats on"
        )
    own = [
        f"{name} ({type(layer).__name__})"
        for name, layer in double.network.named_modules()
        if isinstance(layer, LIF) and computes_other(layer)
    ]
    what_own = f"; neurons that compute something of their own may, as by a soft reset: {shorten(own)}" if own else ""
    what_changed = f"; this run changed what is kept in {shorten(changed)}" if changed else ""
    return ValueError(
        f"the network mixes time outside its neurons: its answer at step {t + 1} of T={T} differs from that of a "
        "single step that starts from the same membranes; every step must be computed alike, by the same weights, and "
        "only LIF and IF of tetdeploy.neurons may carry anything from one step to the next"
        f"{what_own}{what_changed}{numbers}"
    )


def _takes_batch_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None


def _traces(double: Classifier, x: Tensor, T: int, others: Sequence[Tensor]) -> tuple[bool, str, list[str]]:
    """What a run leaves behind: whether it drew random numbers, what is to be said of Python numbers that it made, and
    which modules keep something else than before."""
    earlier, later = copy.deepcopy(double), copy.deepcopy(double)
    generator = torch.cuda.get_rng_state if x.is_cuda else torch.get_rng_state
    numbers = generator()
    run, _ = _recorded(later, x, T, others=others)
    changed = [
        f"{name.removeprefix('network.')} ({type(module).__name__} of {type(module).__module__.partition('.')[0]})"
        for (name, module), before in zip(later.named_modules(), earlier.modules(), strict=True)
        if not _same_state(module, before)
    ]
    return not torch.equal(numbers, generator()), _of_numbers(run), changed


def _of_numbers(run: _NamedNeurons) -> str:
    """Numbers that depend on the step or the image may be why these differ."""
    return f"; perhaps because {MAKES_NUMBERS}" if run.in_float64.makes_numbers else ""


def _same_state(module: nn.Module, other: nn.Module) -> bool:
    """Whether the numbers that two modules keep themselves are the same."""
    kept = [
        [value for value in tree_leaves(vars(m)) if isinstance(value, int | float | Tensor)] for m in (module, other)
    ]
    return len(kept[0]) == len(kept[1]) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(*kept, strict=True)
    )


def _paler(x: Tensor) -> Tensor:
    """The image with half its contrast: other extremes than before, but for a darkest value of 0 in floating point."""
    return x // 2 + 64 if x.dtype == torch.uint8 else x / 2


def _check_axes(run: _NamedNeurons, steps: int, what: str, count: int) -> None:
    for name, spikes in zip(run.names, run.spikes, strict=True):
        if spikes.shape[:2] != (steps, count):
            raise ValueError(f"for {what} {misplaced(name, spikes.shape)}")


def misplaced(name: str, shape: Iterable[object]) -> str:
    """Why neurons that get currents of such a shape cannot be exported, and what to do."""
    return (
        f"neurons {name!r} get currents [{', '.join(map(str, shape))}], but axis 0 must be the T steps and axis 1 the "
        "batch alone, as in [T, N, tokens, C]; give tokens or windows an axis of their own there, and merge them again "
        "after the neurons"
    )


def _check_alone(
    double: Classifier,
    x: Tensor,
    state: Sequence[Tensor] | None,
    spikes: Sequence[Tensor],
    together: _NamedNeurons,
    logits: Tensor,
) -> None:
    """Compare each image by itself with what it was in the batch, over one step from the same membranes: the currents
    of each layer, which reads the spikes that were read there, so that a current at the threshold, which rounding may
    take to either side, makes no difference."""
    for n in range(len(x)):
        of_n = slice(n, n + 1)
        membranes = None if state is None else [u[of_n] for u in state]
        alone, own = _recorded(double, x[of_n], 1, membranes, others=[layer[:, of_n] for layer in spikes])
        _check_axes(alone, 1, "one step of 1 image", 1)
        pairs = [
            (f"the currents of neurons {name!r}", a, b)
            for name, a, b in zip(alone.names, alone.currents, together.currents, strict=False)  # logits say the rest
        ]
        for what, a, b in [*pairs, ("the logits", own, logits)]:
            if not _close(a, b[:, of_n]):
                raise ValueError(
                    f"the network mixes the images of a batch: {what} for an image by itself differ from those for "
                    "the same image beside another, so that answers would depend on what is served together; compute "
                    "nothing across the batch, axis 1 of [T, N, ...], as BN without running statistics and x / x.max() "
                    f"do{_of_numbers(together)}"
                )


def _refuse_other_floats(classifier: Classifier) -> None:
    """Of a classifier, or its network, that was turned into another type as a whole; the check of an ONNX graph's form
    refuses one in several."""
    for types in ({classifier.mean.dtype}, float_types(classifier)):
        if types and torch.float32 not in types:
            raise ValueError(
                f"classifier must be in float32, as a graph's neurons are, got {', '.join(map(str, types))}; call "
                "classifier.float(); what an ONNX graph computes in is its own precision"
            )


def float_types(classifier: Classifier) -> set[torch.dtype]:
    """In which a classifier has parameters."""
    return {parameter.dtype for parameter in classifier.parameters() if parameter.is_floating_point()}


def _refuse_broken_weights(classifier: Classifier) -> None:
    # A mask may be infinite: a buffer, or a parameter that is not trained. BN's statistics may not.
    network = classifier.network
    finite = {name for name, value in network.named_parameters() if value.requires_grad}
    finite |= {name for name, _ in network.named_buffers() if name.endswith(("running_mean", "running_var"))}
    held = dict(network.named_parameters()) | dict(network.named_buffers())
    broken = [name for name, value in held.items() if value.isnan().any() or (name in finite and value.isinf().any())]
    if broken:
        raise ValueError(
            f"NaN or infinite values in {shorten(broken)}: the training diverged, or the file is damaged; take an "
            "earlier checkpoint, or train again with a lower --lr or --clip 1"
        )


def _refuse_without_spikes(classifier: Classifier) -> None:
    if classifier.config.ann:
        raise ValueError(
            "the network is an ANN twin: it has no neurons and no time, and is there to be compared with and learned "
            "from (train --distill); train without --ann to export"
        )
    if k := max(steepness(classifier), default=0.0):
        raise ValueError(
            f"the network was trained with smooth spikes, Sigmoid({k:g} x): it neither fires nor saves operations, and "
            "is there for Table 2 only; train without --smooth-spike to export"
        )


def _recorded(
    classifier: Classifier, x: Tensor, T: int, state: Sequence[Tensor] | None = None, others: Sequence[Tensor] = ()
) -> tuple[_NamedNeurons, Tensor]:
    """One run in float64, with its neurons' spikes and membranes; a network's own errors become ValueErrors,
    but for a temporary folder that is lacking."""
    recorder = _NamedNeurons(state, others)
    try:
        with recorder.in_float64, recorder.modules, recorder:
            logits = run_network(classifier, x.clone(), T)
    except Exception as error:  # whatever the user's network may raise
        if isinstance(error, OSError) and lacks_temporary_folder(error):
            raise
        instead = ", with random spikes in place of its neurons'" if others else ""
        raise ValueError(
            f"the network fails at T={T} on input {list(x.shape)}{instead}, and must run at any T, as its steps do one "
            f"by one, and on any number of images: {str(error) or type(error).__name__}"
        ) from error
    return recorder, logits
