"""Pooling as PyTorch does it, in graphs of one pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_helpers import computed
from torch import nn

from tetdeploy.export.pooling import close_windows, refuse_divisors


def described(pool: Any, before: torch.Size, after: torch.Size) -> ir.Model:
    """A pool with ceil_mode as torch.onnx writes it."""
    kernel, strides = ([n, n] if isinstance(n, int) else [*n] for n in (pool.kernel_size, pool.stride))
    pads = 2 * ([pool.padding] * 2 if isinstance(pool.padding, int) else [*pool.padding])
    average = isinstance(pool, nn.AvgPool2d)
    own = "count_include_pad = 1" if average else f"dilations = {[pool.dilation] * 2}"
    text = f"""<ir_version: 10, opset_import: ["": 20]> g (float{[*before]} x) => (float{[*after]} y)
        {{ y = {"AveragePool" if average else "MaxPool"}<kernel_shape = {kernel}, strides = {strides},
            pads = {pads}, ceil_mode = 1, {own}> (x) }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize(("pool", "size"), [
    (nn.AvgPool2d((1, 2), 2, ceil_mode=True), (8, 7)),
    (nn.MaxPool2d((1, 2), 2, ceil_mode=True), (8, 7)),
    (nn.MaxPool2d(2, 2, 1, dilation=2, ceil_mode=True), (7, 8)),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (8, 8)),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (7, 7)),
    (nn.AvgPool2d((2, 3), 3, (1, 0), ceil_mode=True), (8, 8)),
])  # fmt: skip
def test_windows_of_ceil_mode_are_pytorchs(pool: Any, size: tuple[int, int]) -> None:
    x = torch.arange(1.0, 1 + size[0] * size[1]).reshape(1, 1, *size)
    wanted = pool(x)
    model = described(pool, x.shape, wanted.shape)
    close_windows(model)
    np.testing.assert_allclose(computed(model, x.numpy())[0], wanted, rtol=1e-6)


def test_a_divisor_of_volumes_is_refused_as_well() -> None:
    network = nn.Sequential(nn.AvgPool3d(2, divisor_override=3))
    with pytest.raises(ValueError, match=r"^'0' averages with divisor_override=3, which ONNX has not"):
        refuse_divisors(torch.export.export(network, (torch.zeros(1, 4, 4, 4),)).graph)
