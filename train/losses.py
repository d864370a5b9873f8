"""Losses over per-step logits: standard direct training (SDT) and temporal efficient training (TET).

Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting", ICLR 2022. O(t) is the
input of the output layer at step t, that is `logits[t]`. The functions need only tensors and fit any training loop.
Half-precision logits (autocast) are raised to float32 before anything is summed; float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_NO_LABEL = torch.iinfo(torch.int64).min  # for torch to leave out: by default it leaves out -100 without a word


def sdt_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Standard direct training, Eq. 7: L_SDT = CE(1/T sum_t O(t), y), the cross-entropy of the mean logits.

    Args:
        logits: O(t), [T, N, K], floating.
        labels: y, [N], int64 in [0, K).
        label_smoothing: share of the target spread evenly over the K classes, in [0, 1].

    Returns:
        The mean over the batch, a scalar, in float32 (float64 for float64 logits).

    Raises:
        ValueError: wrong shapes, dtypes or smoothing; on a CPU also a label that is no class.
    """
    logits = _checked(logits, labels, label_smoothing)
    return _cross_entropy(logits.mean(0), labels, label_smoothing)


def tet_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Temporal efficient training, Eq. 9: L_TET = 1/T sum_t CE(O(t), y), the mean of every step's cross-entropy.

    Never below `sdt_loss` (Lemma 4.1): cross-entropy is convex in the logits, with label smoothing too.

    Args:
        logits: O(t), [T, N, K], floating.
        labels: y, [N], int64 in [0, K).
        label_smoothing: share of the target spread evenly over the K classes, in [0, 1].

    Returns:
        The mean over steps and batch, a scalar, in float32 (float64 for float64 logits).

    Raises:
        ValueError: wrong shapes, dtypes or smoothing; on a CPU also a label that is no class.
    """
    logits = _checked(logits, labels, label_smoothing)
    every_step = labels.expand(len(logits), -1).flatten()
    return _cross_entropy(logits.flatten(0, 1), every_step, label_smoothing)


def mse_loss(logits: Tensor, *, phi: float = 1.0) -> Tensor:
    """The regulariser of Eq. 12: L_MSE = 1/T sum_t MSE(O(t), phi), with the one constant phi as every class's target.

    Args:
        logits: O(t), [T, N, K], floating.
        phi: the target; the paper takes phi = v_th.

    Returns:
        The mean over steps, batch and classes, a scalar, in float32 (float64 for float64 logits).

    Raises:
        ValueError: logits are not [T, N, K] and floating.
    """
    return (_checked_logits(logits) - phi).square().mean()


def total_loss(
    logits: Tensor, labels: Tensor, *, lam: float = 0.05, phi: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """What TET minimises, Eq. 13: L_TOTAL = (1 - lam) L_TET + lam L_MSE.

    Args:
        logits: O(t), [T, N, K], floating.
        labels: y, [N], int64 in [0, K).
        lam: weight of the regulariser, in [0, 1]; the paper takes 0.05 for CIFAR, 0.001 for ImageNet and DVS-CIFAR10.
        phi: target of the regulariser (Eq. 12).
        label_smoothing: of L_TET, in [0, 1].

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: wrong shapes, dtypes, lam or smoothing; on a CPU also a label that is no class.
    """
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam is {lam}; it weighs the MSE term (Eq. 13) and must lie in [0, 1]")
    tet = tet_loss(logits, labels, label_smoothing=label_smoothing)
    return (1.0 - lam) * tet + lam * mse_loss(logits, phi=phi)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, *, tau_kd: float = 3.0) -> Tensor:
    """Distillation from an ANN twin at every step.

    L_KD = tau_kd^2 / T sum_t KL(softmax(z / tau_kd) || softmax(O(t) / tau_kd))

    tau_kd^2 keeps the size of the gradient whatever the temperature (Hinton et al., Distilling the Knowledge in a
    Neural Network, 2015); every step is taught on its own, as TET does it with the labels (temporal-decoupled
    distillation, ICML 2025). Zero where every O(t) gives the teacher's distribution.

    Args:
        logits: O(t), [T, N, K], floating.
        teacher_logits: z, [N, K], floating; no gradient flows into them.
        tau_kd: temperature, above 0.

    Returns:
        The mean over the batch, a scalar, in float32 (float64 for float64 logits).

    Raises:
        ValueError: wrong shapes, dtypes or temperature.
    """
    logits = _checked_logits(logits)
    if teacher_logits.shape != logits.shape[1:] or not teacher_logits.is_floating_point():
        raise ValueError(
            f"teacher_logits are {teacher_logits.dtype} {list(teacher_logits.shape)}; "
            f"logits {list(logits.shape)} want floating {list(logits.shape[1:])}"
        )
    if not 0.0 < tau_kd < float("inf"):
        raise ValueError(f"tau_kd is {tau_kd}; it is a temperature and must be above 0 and finite")
    targets = functional.log_softmax(teacher_logits.detach().to(logits.dtype) / tau_kd, dim=-1).expand_as(logits)
    student = functional.log_softmax(logits / tau_kd, dim=-1)
    divergence = functional.kl_div(student, targets, reduction="none", log_target=True).sum(-1)
    return tau_kd**2 * divergence.mean()


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """The mean of `logits [N, K]` against `labels [N]`. Labels are not looked at, for which a GPU would have to be
    waited for."""
    try:
        return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, ignore_index=_NO_LABEL)
    except IndexError as error:
        raise ValueError(f"labels must lie in 0..{logits.shape[-1] - 1}, one of K classes; {error}") from error


def _checked(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """`logits` in at least float32, after a look at everything a caller can mistake."""
    logits = _checked_logits(logits)
    if labels.shape != logits.shape[1:2]:
        swapped = "; time comes first: frames [N, T, ...] go into a network as x.transpose(0, 1)"
        raise ValueError(
            f"labels have shape {list(labels.shape)}; logits {list(logits.shape)} want [{logits.shape[1]}]"
            f"{swapped if labels.shape == logits.shape[:1] else ''}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; class indices must be torch.int64: labels.long()")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1]")
    return logits


def _checked_logits(logits: Tensor) -> Tensor:
    if logits.dim() != 3 or 0 in logits.shape:
        raise ValueError(
            f"logits have shape {list(logits.shape)}; per-step logits are [T, N, K] with time first and nothing empty"
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype}; a loss needs floating logits")
    # A bf16 sum over steps loses what the losses are compared by.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
