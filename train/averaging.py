"""What an epoch keeps: a moving average of the weights, and BN's statistics, which for weights that BN never saw in
training are estimated anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tetdeploy.networks import Classifier, run_network
from tetdeploy.wording import counted

from .device import autocast
from .objective import draw_lengths
from .optimizer import trainable
from .schedule import derive_seed
from .session import BN_BATCHES, Session
from .state import TrainState

# Of what BN's running statistics start with, so much may be left after the last step: with a quarter and more the
# digits are validated near chance, with an eighth as they are with statistics estimated anew.
MOST_OF_START = 0.2


def kept_classifier(session: Session, state: TrainState) -> Classifier:
    """What an epoch's validation and checkpoint take: the classifier itself, or a copy with other weights or BN.

    With `ema` the copy has the averaged weights. With it or `random_T` its BN statistics are estimated anew on 10
    training batches, augmented and with numbers of time steps drawn as in training. The epoch decides what is drawn.
    With `qat` they stay.
    """
    config = session.config
    if not config.ema and not config.estimates_bn:
        return session.classifier
    kept = copy.deepcopy(session.classifier)
    for name, weight in trainable(kept.network).items():
        if name in state.average:
            weight.copy_(state.average[name])
    if not config.estimates_bn:
        return kept
    with estimating_bn(kept), autocast(session.device, session.precision):
        for index, (x, _) in enumerate(session.bn_batches(state.epoch)):
            number = state.epoch * BN_BATCHES + index
            T = max(draw_lengths(config, state.epoch, derive_seed(config.seed, "bn T", number)))
            run_network(kept, x, T)
    return kept


@torch.no_grad()
def update_average(average: dict[str, Tensor], network: nn.Module, *, decay: float, step: int) -> None:
    """Exponential moving average of the weights after a training step, in place: w_avg <- d w_avg + (1 - d) w.

    d = min(decay, (1 + step) / (10 + step)), so that the first steps do not average over the initial weights. (Polyak
    and Juditsky, SIAM J. Control Optim. 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage.)

    Args:
        average: parameters by name, as `trainable` gives them, cloned.
        network: whose weights the optimizer has just changed.
        decay: largest d, in [0, 1); 0.999 averages over about the last 1,000 steps.
        step: of the whole run, from 0.
    """
    d = min(decay, (1 + step) / (10 + step))
    weights = trainable(network)
    get_ema_multi_avg_fn(d)([*average.values()], [weights[name] for name in average], step)


@contextmanager
def estimating_bn(network: nn.Module) -> Iterator[None]:
    """Within it, forward passes estimate every BN's mean and variance from scratch; each pass counts the same.

    An average of weights has not the statistics of any of the weights it averages (Izmailov et al., UAI 2018). All
    else is in inference, dropout too. BN's momentum is put back afterwards, and the network is left in eval mode.
    """
    network.eval()
    norms = _running_norms(network)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over passes
        norm.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.eval()


def lagging_bn(session: Session) -> str:
    """What to say before a run of so few steps that BN's running statistics, by which it is validated, stay near what
    they start with: (1 - momentum)^steps of it is left. "" if not, and where they are trained or estimated anew."""
    config, steps = session.config, session.config.epochs * session.steps_per_epoch
    momenta = [n.momentum for n in _running_norms(session.classifier.network) if n.momentum is not None]
    left = (1 - min(momenta, default=1.0)) ** steps
    network = session.classifier.config
    if left <= MOST_OF_START or config.estimates_bn or config.qat or "init" in session.settings:
        return ""
    if network.is_own or network.ann:  # BN may run once a time step there; ReLU does not fall silent
        return ""
    return (
        f"after the {counted(steps, 'step')} of this run, {left:.0%} of BN's running statistics are still what they "
        "start with, and accuracy, which is measured with them, may be no better than chance: take a smaller "
        "--batch-size or more --epochs"
    )


def _running_norms(network: nn.Module) -> list[_BatchNorm]:
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
