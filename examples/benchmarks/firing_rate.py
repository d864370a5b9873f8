"""One convolution of spikes on a CPU by how many neurons fire: ONNX Runtime's own, by additions, lookups, and in tiles.

    \b
    python examples/benchmarks/firing_rate.py [--int8] [--channels 256] [--size 16] [--images 32] [--threads 1]

3x3 taps, random spikes, as many output as input channels; medians over ten runs of the convolution's kernel in ONNX
Runtime's profile. Columns are those of this processor: additions in registers of 64 bytes take AVX-512, of 32 AVX2,
lookups, which are int8's alone, AVX-512 with VNNI, tiles AMX. `either` is the way that a call takes where lookups are
used: these, or additions if few neurons fire.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest import mock

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from tetdeploy import native
from tetdeploy.cli.errors import CleanErrors

sys.path.insert(0, str(Path(__file__).parent))
from subject import convolution_share

RATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.0)


def convolution(channels: int, size: int, int8: bool) -> onnx.ModelProto:
    """`per_step [N, C, H, W]`, the currents of spikes where `x [N, C, H, W]` is above 0."""
    weights = np.random.default_rng(0).normal(size=(channels, channels, 3, 3)).astype(np.float32)
    constants: dict[str, np.ndarray] = {"zero": np.zeros((), np.float32)}
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["fires"]),
        helper.make_node("Cast", ["fires"], ["spikes"], to=TensorProto.UINT8 if int8 else TensorProto.FLOAT),
    ]
    if int8:
        constants |= {"w": np.clip(np.rint(weights * 30), -127, 127).astype(np.int8), "w_scale": np.float32(1 / 30)}
        constants |= {"one": np.float32(1), "y_scale": np.float32(1), "none": np.uint8(0), "middle": np.uint8(128)}
        constants |= {"w_zero": np.int8(0), "bias": np.zeros(channels, np.int32)}
        read = ["spikes", "one", "none", "w", "w_scale", "w_zero", "y_scale", "middle", "bias"]
        nodes += [
            helper.make_node("QLinearConv", read, ["y"], pads=[1, 1, 1, 1]),
            helper.make_node("DequantizeLinear", ["y", "y_scale", "middle"], ["per_step"]),
        ]
    else:
        constants["w"] = weights
        nodes.append(helper.make_node("Conv", ["spikes", "w"], ["per_step"], pads=[1, 1, 1, 1]))
    graph = helper.make_graph(
        nodes,
        "convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, size, size])],
        [helper.make_tensor_value_info("per_step", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def measure(side: str, model: Path, x: np.ndarray, threads: int) -> float:
    kind, _, registers = side.partition(" ")
    longest = native.vector_bytes() if kind == "either" else int(registers) if kind == "additions" else 0
    with (
        mock.patch.object(native, "has_tiles", return_value=side == "tiles"),
        mock.patch.object(native, "vector_bytes", return_value=longest),
        mock.patch.object(native, "has_vnni", return_value=kind != "additions"),
        mock.patch.object(native, "has_fast_lookups", return_value=kind in ("lookups", "either")),
    ):
        return convolution_share(model, x, threads, own=side == "ONNX Runtime")["convolutions"]


@click.command(cls=CleanErrors, help=__doc__)
@click.option("--int8", is_flag=True, help="In int8, in place of float32.")
@click.option("--channels", default=256, show_default=True, type=click.IntRange(32))
@click.option("--size", default=16, show_default=True, type=click.IntRange(1), help="Height and width.")
@click.option("--images", default=32, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
def main(int8: bool, channels: int, size: int, images: int, threads: int) -> None:
    if (why := native.missing()) is not None:
        raise click.ClickException(why)
    sides = ["ONNX Runtime", *(f"additions {bytes_}" for bytes_ in (64, 32) if bytes_ <= native.vector_bytes())]
    sides += ["lookups", "either"] if int8 and native.has_lookups() else []
    sides += ["tiles"] if native.has_tiles() else []
    table = Table(
        title=f"{'int8' if int8 else 'float32'}, {channels} channels, 3x3, {images} x {size}x{size}, "
        f"threads: {threads}; ms, and times as fast"
    )
    for header in ("firing rate", *sides):
        table.add_column(header, justify="right")
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "convolution.onnx"
        onnx.save(convolution(channels, size, int8), model)
        for rate in RATES:
            x = (rng.random((images, channels, size, size)) < rate).astype(np.float32)
            took = [measure(side, model, x, threads) for side in sides]
            table.add_row(f"{rate:g}", f"{took[0]:.1f}", *(f"{ms:.1f}  {took[0] / ms:.1f}x" for ms in took[1:]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
