"""The plot of one sweep, as `tetdeploy sweep` writes it."""

from __future__ import annotations

from pathlib import Path

from tetdeploy.report.drawing import Style, drawable, end_at, save_plot, whole_numbers, wide_enough
from tetdeploy.sweep import Sweep
from tetdeploy.system.extras import import_extra


def plot_sweep(result: Sweep, path: Path | str, trained_T: int) -> None:
    """Accuracy and energy against T, as PNG (or what the file's ending says). The T of the training is marked.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    import_extra("matplotlib", "report")
    from matplotlib.figure import Figure

    blue, orange = (Style.of(number).colour for number in range(2))
    steps = [row.T for row in result.rows]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    left.plot(steps, [100 * row.accuracy for row in result.rows], "o-", color=blue)
    right.plot(steps, [row.energy_pj / 1e6 for row in result.rows], "s--", color=orange)
    if trained_T in steps:
        left.axvline(trained_T, color="0.6", linewidth=1, zorder=0)
        side = "right" if 2 * trained_T > steps[0] + steps[-1] else "left"
        left.annotate(f" trained at T={trained_T} ", (trained_T, 0.02), xycoords=("data", "axes fraction"), ha=side)
    left.set_xlabel("time steps T")
    left.set_ylabel("● accuracy (%)", color=blue)
    right.set_ylabel("■ energy (µJ per image)", color=orange)
    right.set_ylim(bottom=0)
    left.margins(y=0.12)  # so that the lowest point lies above the text
    end_at(left, 100)
    wide_enough(left, result.num_samples, 100)
    whole_numbers(left.xaxis)
    left.grid(axis="y", color="0.9")
    title = f"{Path(result.model).name} on {result.num_samples:,} images of {result.data}"
    left.set_title(drawable(title), fontsize=10, parse_math=False)
    save_plot(figure, Path(path))
