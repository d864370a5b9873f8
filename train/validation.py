"""Loss and accuracy of a classifier on images it is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tetdeploy.arguments import check_count, check_type
from tetdeploy.networks import Classifier, run_network
from tetdeploy.neurons import LIF
from tetdeploy.traced_network import Runnable
from tetdeploy.tracing import float32_convolutions

from .device import autocast
from .losses import total_loss
from .ranks import Ranks

Loss = Callable[[Tensor, Tensor], Tensor]


@float32_convolutions()
def evaluate(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    T: int,
    batch_size: int = 256,
    loss: Loss = total_loss,
) -> tuple[float, float]:
    """Mean loss and accuracy (the mean logits decide) in eval mode; each module's mode is put back afterwards.

    Args:
        classifier, T: see `measure`.
        images: uint8 [N, C, H, W] or frames [N, T, C, H, W], or floating and normalised; on the classifier's device.
        labels: int64 [N].
        batch_size: images at a time.
        loss: of logits [T, N, K] and labels [N], a mean over the batch.

    Raises:
        ValueError: T or batch_size is no whole number of at least 1, images or labels are no tensor, or not as many, or
            there are fewer frames than T.
    """
    T, batch_size = check_count("T", T), check_count("batch_size", batch_size)
    for name, given in (("images", images), ("labels", labels)):
        check_type(name, given, Tensor, f"pass torch.from_numpy({name})")
    if len(images) != len(labels):  # one label would be compared with all images of a batch
        raise ValueError(f"every image needs a label: {len(images)} images, {len(labels)} labels")
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    found = measure(classifier, batches, T=T, losses={"loss": loss})
    assert found is not None
    return found["loss"], found["accuracy"]


def measure(
    classifier: Runnable,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    T: int,
    losses: Mapping[str, Loss],
    precision: str = "fp32",
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks | None = None,
) -> dict[str, float] | None:
    """Several losses and the accuracy of one pass, in eval mode; the classifier's mode is put back afterwards.

    Args:
        classifier: on the device of the batches.
        batches: images and labels, one batch or more, as `evaluate` takes them.
        T: time steps.
        losses: by name, each of logits [T, N, K] and labels [N], a mean over the batch.
        precision: "fp32", or autocast in "bf16" or "fp16".
        stop: asked before each batch; True gives up.
        ranks: each of them has a part of the images; what comes back is over all parts.

    Returns:
        The mean of each loss and "accuracy" (the mean logits decide), or None if given up.
    """
    with _evaluation(classifier, precision) as device:
        totals = torch.zeros(len(losses) + 2, device=device)
        for x, y in batches:
            if stop():
                return None
            logits = run_network(classifier, x, T)
            sums = [loss(logits, y) * len(y) for loss in losses.values()]
            totals += torch.stack([*sums, count_correct(logits, y).float(), totals.new_full((), len(y))])
        totals = ranks.sum(totals) if ranks else totals
    return dict(zip((*losses, "accuracy"), (totals[:-1] / totals[-1]).tolist(), strict=True))


def classes_by_step(classifier: Runnable, batches: Iterable[Tensor], *, T: int, precision: str = "fp32") -> Tensor:
    """The predicted class of each image after 1..T steps in eval mode, int64 `[T, N]` on the CPU, from one pass:
    neurons are causal, and the mean of the logits so far decides. The classifier's mode is put back afterwards.

    Args: see `measure`; `batches` are of images alone.

    Raises:
        ValueError: T is no whole number of at least 1, or there are fewer frames.
    """
    T = check_count("T", T)
    with _evaluation(classifier, precision):
        # the largest of the sum is that of the mean
        classes = [run_network(classifier, x, T).float().cumsum(0).argmax(-1) for x in batches]
        return torch.cat(classes, 1).cpu()


@contextmanager
def noting_silence(classifier: Classifier) -> Iterator[list[str]]:
    """Within it, the classifier runs; afterwards the list names its LIF modules (IF is one) of which no neuron fired.
    One that did not run is not among them."""
    fired: dict[str, bool] = {}
    silent: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def note(module: nn.Module, given: object, spikes: Tensor) -> None:
            fired[name] = fired.get(name, False) or bool(spikes.any())

        return note

    modules = classifier.network.named_modules()
    hooks = [module.register_forward_hook(hook(name)) for name, module in modules if isinstance(module, LIF)]
    try:
        yield silent
    finally:
        for handle in hooks:
            handle.remove()
    silent += [name for name, some in fired.items() if not some]


@contextmanager
def _evaluation(classifier: Runnable, precision: str) -> Iterator[torch.device]:
    """Within it the classifier is in eval mode, and nothing is kept for gradients; gives its device."""
    modes, device = [(module, module.training) for module in classifier.modules()], classifier.mean.device
    classifier.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            yield device
    finally:
        for module, training in modes:  # parents first; BN may be frozen in a network that is trained
            if module.training != training:
                module.train(training)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many images' largest mean logit is the label's, a scalar; the mean over time in float32."""
    return (logits.float().mean(0).argmax(-1) == labels).sum()
