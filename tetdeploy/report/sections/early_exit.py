"""Early exit: how many steps images take, what that keeps and saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tetdeploy.report.document import Note, Plot, Row, Section, Table
from tetdeploy.report.drawing import draw, energy_axis, energy_unit, mark, percent_axis, whole_numbers
from tetdeploy.report.early_exit import compared, rule, turned
from tetdeploy.report.results import Measurement, Results
from tetdeploy.report.tables import hardware

_NOTE = (
    "An image stops as soon as its answer is certain enough, by the softmax of the mean logits so far, and leaves the "
    "batch. Points lost: with their 95 % interval, from the answers that changed on the same images. Energy is that of "
    "the steps that each image took. Time: all images, in turns with T steps for every image."
)


def early_exit(results: Results) -> Section | None:
    """The steps that images take, accuracy against energy, and a table for each model that was measured so."""
    measured = [m for m in results.measurements if m.content.get("early_exit")]
    if not measured:
        return None
    plots = Row((_steps(results, measured), _accuracy(results, measured)))
    return Section("Early exit", (plots, *map(_table, measured), Note(_NOTE)))


def _steps(results: Results, measured: Sequence[Measurement]) -> Plot:
    """The share of the images that take so many steps."""
    shares = {m.name: _shares(m.content["early_exit"]) for m in measured}
    width = 0.8 / len(measured)

    def paint(axes: Any) -> None:
        for k, (name, bars) in enumerate(shares.items()):
            where = [T + (k - (len(shares) - 1) / 2) * width for T, _ in bars]
            colour = results.style_of[name].colour
            axes.bar(where, [share for _, share in bars], width, color=colour, label=results.label_of[name])
        axes.set_xlabel("time steps taken")
        axes.set_ylabel("images (%)")
        axes.grid(visible=False, axis="x")
        whole_numbers(axes.xaxis)
        percent_axis(axes.yaxis)

    listed = "; ".join(
        f"{name}: {', '.join(f'{share:.1%} at T={T}' for T, share in bars if share)}" for name, bars in shares.items()
    )
    caption = "How many steps images take with early exit."
    return draw(paint, description=f"Images by steps taken. {listed}", caption=caption, legend=len(measured) > 1)


def _accuracy(results: Results, measured: Sequence[Measurement]) -> Plot:
    """Accuracy against energy: every image the same T, and early exit."""
    points = {m.name: m.points("energy_pj", "accuracy") for m in measured}
    early = {m.name: m.content["early_exit"] for m in measured}
    energies = [pj for own in points.values() for _, pj, _ in own] + [e["cost"]["energy_pj"] for e in early.values()]
    unit, size = energy_unit(max(energies))

    def paint(axes: Any) -> None:
        for name, own in points.items():
            style, label = results.style_of[name], results.label_of[name]
            axes.plot([pj / size for _, pj, _ in own], [y for *_, y in own], label=label, **style.options)
            for T, pj, y in own:
                mark(axes, f"T={T}", pj / size, y)
            star = {"marker": "*", "markersize": 13, "linestyle": "none", "color": style.colour, "zorder": 3}
            axes.plot(early[name]["cost"]["energy_pj"] / size, early[name]["accuracy"], **star)
        energy_axis(axes, energies, unit)
        axes.set_ylabel("accuracy (%)")
        percent_axis(axes.yaxis, results.fewest_images)

    listed = "; ".join(f"{name}: {e['accuracy']:.2%} with {e['mean_T']:.2f} steps" for name, e in early.items())
    return draw(
        paint,
        description=f"Accuracy against energy with early exit. {listed}",
        caption="Accuracy against energy per image: each point is one T for every image, the star is early exit.",
        legend=len(measured) > 1,
    )


def _shares(early: dict[str, Any]) -> list[tuple[int, float]]:
    """Steps, and the share of the images that took them."""
    total = sum(entry["num_images"] for entry in early["by_steps"])
    return [(entry["T"], entry["num_images"] / total) for entry in early["by_steps"]]


def _table(m: Measurement) -> Table:
    early = m.content["early_exit"]
    caption = f"{m.name}: {m.images}, stopping at {rule(early)}. {turned(early)}"
    if early.get("calibrated_on"):
        caption += " The threshold was found on these very images: on others it may lose more."
    if on := m.content.get("machine"):  # not always where the latencies of the same model were measured
        caption += f" Timed on {hardware(on)}, {on['provider']}."
    return Table(caption, ("", f"T={early['T']}", "early exit", ""), tuple(compared(early)))
