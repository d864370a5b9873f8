"""Losses: against naive loops, the paper's gradients by hand, Lemma 4.1 as a property."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tetdeploy.train import distillation_loss, mse_loss, sdt_loss, tet_loss, total_loss


def draw(T: int = 5, N: int = 7, K: int = 4, *, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(T, N, K, generator=generator, dtype=torch.float64)
    return logits, torch.randint(K, (N,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tet_is_the_mean_of_every_steps_cross_entropy(smoothing: float) -> None:
    logits, labels = draw()
    naive = torch.zeros((), dtype=torch.float64)
    for t in range(len(logits)):
        for n, y in enumerate(labels.tolist()):
            log_softmax = logits[t, n] - logits[t, n].exp().sum().log()
            naive += -(1 - smoothing) * log_softmax[y] - smoothing * log_softmax.mean()
    naive /= logits.shape[0] * logits.shape[1]
    torch.testing.assert_close(tet_loss(logits, labels, label_smoothing=smoothing), naive, rtol=1e-13, atol=0)


def test_sdt_is_the_cross_entropy_of_the_mean_logits() -> None:
    logits, labels = draw()
    mean = sum(logits[t] for t in range(len(logits))) / len(logits)
    naive = -torch.stack([(mean[n].exp() / mean[n].exp().sum())[y].log() for n, y in enumerate(labels)]).mean()
    torch.testing.assert_close(sdt_loss(logits, labels), naive, rtol=1e-13, atol=0)


def test_mse_pulls_every_class_of_every_step_to_phi() -> None:
    logits = torch.tensor([[[1.0, 3.0]], [[0.0, 1.0]]])  # T=2, N=1, K=2
    assert mse_loss(logits, phi=1.0).item() == pytest.approx((0 + 4 + 1 + 0) / 4)
    assert mse_loss(logits, phi=0.0).item() == pytest.approx((1 + 9 + 0 + 1) / 4)


@pytest.mark.parametrize("lam", [0.0, 0.05, 1.0])
def test_total_weighs_tet_and_mse(lam: float) -> None:
    logits, labels = draw()
    for smoothing in (0.0, 0.1):
        tet = tet_loss(logits, labels, label_smoothing=smoothing)
        expected = (1 - lam) * tet + lam * mse_loss(logits, phi=0.7)
        got = total_loss(logits, labels, lam=lam, phi=0.7, label_smoothing=smoothing)
        torch.testing.assert_close(got, expected)


def test_lam_and_phi_are_by_default_those_of_the_paper_for_cifar() -> None:
    logits, labels = draw()
    logarithms = logits - logits.exp().sum(-1, keepdim=True).log()
    tet = -logarithms[:, range(len(labels)), labels].mean()  # no smoothing
    mse = ((logits - 1.0) ** 2).mean()  # phi = v_th = 1
    torch.testing.assert_close(total_loss(logits, labels), 0.95 * tet + 0.05 * mse)
    torch.testing.assert_close(mse_loss(logits), mse)


def test_gradient_of_tet_is_equation_10() -> None:
    logits, labels = draw()
    logits.requires_grad_()
    tet_loss(logits, labels).backward()
    T, N, K = logits.shape
    by_hand = (logits.detach().softmax(-1) - functional.one_hot(labels, K)) / (T * N)
    torch.testing.assert_close(logits.grad, by_hand, rtol=1e-12, atol=1e-15)


def test_gradient_of_sdt_is_equation_8() -> None:
    logits, labels = draw()
    logits.requires_grad_()
    sdt_loss(logits, labels).backward()
    T, N, K = logits.shape
    error = logits.detach().mean(0).softmax(-1) - functional.one_hot(labels, K)
    torch.testing.assert_close(logits.grad, (error / (T * N)).expand(T, N, K), rtol=1e-12, atol=1e-15)


@given(
    T=st.integers(1, 6),
    N=st.integers(1, 4),
    K=st.integers(2, 6),
    seed=st.integers(0, 2**31),
    scale=st.floats(0.01, 100.0),
    smoothing=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_lemma_4_1_sdt_never_exceeds_tet(T: int, N: int, K: int, seed: int, scale: float, smoothing: float) -> None:
    logits, labels = draw(T, N, K, seed=seed, scale=scale)
    sdt = sdt_loss(logits, labels, label_smoothing=smoothing).item()
    tet = tet_loss(logits, labels, label_smoothing=smoothing).item()
    assert sdt <= tet + 1e-12 * (1 + tet)


def test_lemma_4_1_is_strict_when_steps_disagree_and_tight_when_they_agree() -> None:
    logits, labels = draw()
    assert sdt_loss(logits, labels) < tet_loss(logits, labels)
    steady = logits[:1].expand(4, -1, -1)
    torch.testing.assert_close(sdt_loss(steady, labels), tet_loss(steady, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_raised_to_float32_first(dtype: torch.dtype) -> None:
    logits, labels = draw(T=6, scale=20.0)
    half, teacher = logits.to(dtype).requires_grad_(), logits[0].flip(0).to(dtype)

    def all_losses(logits: Tensor, teacher: Tensor) -> list[Tensor]:
        labelled = [loss(logits, labels) for loss in (sdt_loss, tet_loss, total_loss)]
        return [*labelled, mse_loss(logits), distillation_loss(logits, teacher)]

    with torch.autocast("cpu", dtype=dtype):
        losses = all_losses(half, teacher)
    expected = all_losses(half.detach().float(), teacher.float())
    assert [loss.dtype for loss in losses] == [torch.float32] * 5
    assert [loss.item() for loss in losses] == [loss.item() for loss in expected]
    losses[2].backward()
    assert half.grad is not None and half.grad.dtype == dtype and bool(half.grad.isfinite().all())


def test_float64_stays_float64() -> None:
    logits, labels = draw()
    assert total_loss(logits, labels).dtype == sdt_loss(logits, labels).dtype == torch.float64


def test_batch_first_or_flat_logits_are_refused() -> None:
    logits, labels = draw()
    with pytest.raises(ValueError, match=r"logits have shape \[7, 4\].*\[T, N, K\] with time first"):
        tet_loss(logits[0], labels)
    with pytest.raises(
        ValueError, match=r"labels have shape \[7\]; logits \[7, 5, 4\] want \[5\]; time comes first: fr"
    ):
        tet_loss(logits.transpose(0, 1), labels)
    with pytest.raises(ValueError, match="nothing empty"):
        mse_loss(logits[:0])


def test_wrong_dtypes_and_weights_are_refused() -> None:
    logits, labels = draw()
    with pytest.raises(ValueError, match=r"labels are torch.int32; .*labels\.long"):
        sdt_loss(logits, labels.int())
    with pytest.raises(ValueError, match=r"logits are torch.int64"):
        mse_loss(logits.long())
    with pytest.raises(ValueError, match=r"label_smoothing is 1.5; .*\[0, 1\]"):
        tet_loss(logits, labels, label_smoothing=1.5)
    for loss, smoothing in ((sdt_loss, 0.0), (tet_loss, 0.1)):
        for label in (9, -1, -100):  # the last is what PyTorch's own leaves out by default
            match = rf"labels must lie in 0\.\.3, one of K classes; Target {label} is out of bounds"
            with pytest.raises(ValueError, match=match):
                loss(logits, torch.full_like(labels, label), label_smoothing=smoothing)
            with pytest.raises(ValueError, match=match):
                loss(logits, labels.index_fill(0, torch.tensor(0), label), label_smoothing=smoothing)
    for lam in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"lam is {lam}; .*\[0, 1\]"):
            total_loss(logits, labels, lam=lam)


@pytest.mark.parametrize("tau_kd", [0.5, 3.0])
def test_distillation_against_a_naive_loop(tau_kd: float) -> None:
    logits, _ = draw()
    teacher = torch.randn(7, 4, dtype=torch.float64)
    total = 0.0
    for step in logits:
        for student_row, teacher_row in zip(step, teacher, strict=True):
            p, q = (torch.softmax(row / tau_kd, -1) for row in (teacher_row, student_row))
            total += (p * (p / q).log()).sum().item()
    expected = tau_kd**2 * total / (5 * 7)
    assert distillation_loss(logits, teacher, tau_kd=tau_kd).item() == pytest.approx(expected)
    same = logits[:1].expand(5, -1, -1)
    assert distillation_loss(same, logits[0], tau_kd=tau_kd).item() == pytest.approx(0.0, abs=1e-12)


def test_the_temperature_is_3_by_default() -> None:
    logits, _ = draw()
    teacher = torch.randn(7, 4, dtype=torch.float64)
    assert distillation_loss(logits, teacher) == distillation_loss(logits, teacher, tau_kd=3.0)


def test_distillation_teaches_the_student_alone() -> None:
    logits, _ = draw()
    teacher = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    distillation_loss(logits.requires_grad_(), teacher).backward()
    assert teacher.grad is None and logits.grad is not None and logits.grad.abs().max() > 0


def test_distillation_refuses() -> None:
    logits, _ = draw()
    with pytest.raises(ValueError, match=r"teacher_logits are torch.float32 \[5, 7, 4\]; .* want floating \[7, 4\]"):
        distillation_loss(logits, torch.zeros(5, 7, 4))
    with pytest.raises(ValueError, match=r"teacher_logits are torch.int64 \[7, 4\]; .* want floating"):
        distillation_loss(logits, torch.zeros(7, 4, dtype=torch.int64))
    for tau_kd in (0.0, float("inf")):
        with pytest.raises(ValueError, match=rf"tau_kd is {tau_kd}; .*above 0 and finite"):
            distillation_loss(logits, torch.zeros(7, 4), tau_kd=tau_kd)
