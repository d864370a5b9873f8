"""Early exit in the terminal: the thresholds of a calibration, and what one keeps and saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from tetdeploy.early_exit.threshold import images_to_prove, provable_loss
from tetdeploy.report.numbers import energy, three_digits
from tetdeploy.report.result_table import ResultTable
from tetdeploy.report.tables import BILLS, hardware

Cells = tuple[str, str, str, str]  # what, T steps for each image, early exit, the difference


def calibration_shown(result: Mapping[str, Any]) -> Iterator[str | Text | Table]:
    """What the terminal shows of a calibration's JSON, from top to bottom."""
    yield f"{_measured(result)}   T={result['T']}"
    yield _frontier_table(result)
    fixed = "  ".join(f"{accuracy:.2%}" for accuracy in result["accuracy_by_T"])
    yield Text(f"every image the same T, 1 to {result['T']}: {fixed}", "dim")
    promise = "a test shows that less is lost than may be" if result["confident"] else "it is within what may be lost"
    yield Text(
        f"* goes beside the model; lost: points of accuracy against T={result['T']} for every image, with the "
        f"95 % interval that the answers turned wrong and right on the same images give; {promise}",
        "dim",
    )
    if result["mean_T"] == result["T"]:
        yield f"no image stops early: {_why_none_stops(result)}"
    N = result["num_samples"]
    if not result["confident"] and 0 < N * result["allowed_loss"] < 1:
        yield (
            f"one image is {three_digits(100 / N)} points here, more than may be lost: on other images the loss may "
            "well be larger; calibrate on more"
        )
    yield f"steps  {by_steps(result['num_images_by_steps'])}"


def _why_none_stops(result: Mapping[str, Any]) -> str:
    """The reason, and what else to try."""
    N, T, allowed = result["num_samples"], result["T"], result["allowed_loss"]
    if result["min_T"] == T:
        return f"{T} steps are the fewest, and the most"
    if not result["confident"]:
        return "at every other threshold more is lost on these images than may be; allow more with --loss"
    more = "allow more with --loss, or go by the loss found on these with --point-estimate"
    if provable_loss(N) >= allowed:
        enough = f"calibrate on {images_to_prove(allowed):,} or more, " if allowed else ""
        lowest = f"{N:,} images show no loss below {100 * provable_loss(N):.2g} points with 95 % confidence"
        return f"{lowest}; {enough}{more}"
    return f"too many of the surest answers before T={T} are right only at T={T}; calibrate on more images, {more}"


def _measured(result: Mapping[str, Any]) -> str:
    return f"{result['model']}   {result['num_samples']:,} images of {result['data']}"


def _frontier_table(result: Mapping[str, Any]) -> Table:
    headers = (
        "may\nlose",
        "criterion",
        "threshold",
        "accuracy",
        "lost",
        "turned wrong\n/ right",
        "mean T",
        "of T\nsteps",
    )
    table = ResultTable(numbers=headers)
    table.columns[1].justify = "left"
    for entry in result["frontier"]:
        table.add_row(
            f"{entry['allowed_loss'] * 100:g}{'*' if entry['allowed_loss'] == result['allowed_loss'] else ' '}",
            entry["criterion"],
            _threshold(entry["threshold"]),
            f"{entry['accuracy']:.2%}",
            lost(entry),
            f"{entry['lost']} / {entry['gained']}",
            f"{entry['mean_T']:.2f}",
            f"{entry['mean_T'] / result['T']:.0%}",
        )
    return table


def savings_shown(result: Mapping[str, Any]) -> Iterator[str | Text | Table]:
    """What the terminal shows of an early exit's JSON, from top to bottom."""
    early = result["early_exit"]
    yield f"{_measured(result)}   {rule(early)}"
    table = ResultTable("", numbers=(f"T={early['T']}", "early exit", ""))
    for cells in compared(early):
        table.add_row(*cells)
    yield table
    yield f"steps  {by_steps([entry['num_images'] for entry in early['by_steps']])}"
    on = result["machine"]
    yield Text(f"{hardware(on)}, {on['provider']}, batches of {early['batch_size']}", "dim")
    yield Text(turned(early), "dim")
    if (early["load"] or 0) >= 1:
        yield Text(f"{early['load']:.1f} processes were running when this began: an idle machine is faster", "dim")


def compared(early: Mapping[str, Any]) -> Iterator[Cells]:
    """The rows of the comparison with T steps for each image; costs are per image, time is of the whole run."""
    yield "accuracy", f"{early['fixed_accuracy']:.2%}", f"{early['accuracy']:.2%}", f"{lost(early)} points lost"
    yield "mean T", f"{early['T']:.2f}", f"{early['mean_T']:.2f}", _times(early["T"], early["mean_T"])
    labels = {"paper": "energy", "exact": "energy, exact", "once": "energy, first layer once"}
    for name, key in BILLS.items():
        fixed, cost = early["fixed_cost"][key], early["cost"][key]
        yield labels[name], energy(fixed), energy(cost), _times(fixed, cost)
    fixed, seconds = (f"{three_digits(early[key])} s" for key in ("fixed_seconds", "seconds"))
    yield "time of the run", fixed, seconds, _speed(early["speedup"])


def _speed(speedup: float) -> str:
    return f"{1 / speedup:.2f} × slower" if 0 < speedup < 1 else f"{speedup:.2f} × faster"


def lost(entry: Mapping[str, Any]) -> str:
    """Points of accuracy with their interval: `0.08 ± 0.20`."""
    return f"{entry['loss'] * 100:.2f} ± {entry['loss_95'] * 100:.2f}"


def turned(early: Mapping[str, Any]) -> str:
    """The paired flips in words; and of a threshold that is a point estimate, how little it promises."""
    flips = f"Against T={early['T']} for every image, answers turned wrong: {early['lost']}, right: {early['gained']}."
    if early.get("confident", True):
        return flips
    return f"{flips} The threshold is a point estimate: on other images it may well lose more than was allowed."


def rule(exit: Mapping[str, Any]) -> str:
    """`confidence > 0.93`."""
    least = f", from T={exit['min_T']}" if exit["min_T"] > 1 else ""
    return f"{exit['criterion']} > {_threshold(exit['threshold'])}{least}"


def _threshold(value: float) -> str:
    """`0.9300`, with more decimals where four would say 1, which stops no image: `0.99997`."""
    longer = (f"{value:.{decimals}f}" for decimals in range(4, 18))
    return next(text for text in longer if float(text) != 1 or value == 1)


def by_steps(counts: list[int]) -> str:
    """`1: 60.1 %   2: 20.0 %   ...`, the share of the images that took so many steps, if any did: of 64 few may."""
    total = sum(counts)
    return "   ".join(f"{t}: {count / total:.1%}" for t, count in enumerate(counts, start=1) if count)


def _times(fixed: float, early: float) -> str:
    return f"{fixed / early:.2f} × less" if early else ""
