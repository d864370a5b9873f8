"""The paper's tables and figures, one command each: trains what is compared, then writes the table or the plot.

    python examples/paper.py table1              at the paper's size: ResNet-19, 300 epochs, three seeds (a GPU, days)
    python examples/paper.py figure4 --small     on Fashion-MNIST, four epochs of a small network: two cores, an hour
    python examples/paper.py table1 --smoke      the same on the small digits: two cores, minutes
    python examples/paper.py figure4 --out results --data-dir ~/data

Trains by the recipes in `examples/recipes`, one after the other; what is finished is not trained again, what was
interrupted goes on. Test accuracies are those of exported models under ONNX Runtime; of ANN twins and smooth spikes,
which have no export, those of PyTorch. A smoke run shows that the path works; its numbers say nothing about the paper.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tetdeploy.files import atomic_write, write_json

RECIPES = Path(__file__).parent / "recipes"
# Okabe and Ito's colours, which the colour-blind can tell apart; those of Figure 4 go by the T of the training.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLORS = dict(zip((4, 2, 3, 6), PALETTE, strict=False))
SMALL = ("--model", "convsnn", "--width", "0.5", "--augment", "none")
SCALES = {
    "full": (),
    "small": ("--data", "fashion-mnist", *SMALL, "--batch-size", "128", "--lr", "2e-3"),
    "smoke": ("--data", "digits", *SMALL, "--batch-size", "64"),
}
CAPTIONS = {
    "full": "",
    "small": " (Fashion-MNIST and a small network, a few epochs)",
    "smoke": " (smoke: digits and a small network, a few epochs)",
}


@dataclass(frozen=True)
class Entry:
    """One trained network of a table: its row's name, its recipe, options beside it, how long other scales train it."""

    name: str
    recipe: str
    options: tuple[str, ...] = ()
    smoke: tuple[str, ...] = ("--epochs", "6", "--seeds", "0,1")
    small: tuple[str, ...] = ("--epochs", "4")
    scales: tuple[str, ...] = ("full", "small", "smoke")
    needs: str = ""  # a folder in the data folder, for data that cannot be downloaded

    def left_out(self, scale: str, data_dir: Path) -> str:
        """Why it is not trained; "" if it is."""
        if scale not in self.scales:
            return f"only {' and '.join(self.scales)} runs have it"
        return f"it needs {data_dir / self.needs}" if not (data_dir / self.needs).is_dir() and self.needs else ""

    def chosen(self, scale: str) -> tuple[str, ...]:
        """The options beside the recipe, which they override; of a shorter run its own come last."""
        return (*self.options, *SCALES[scale], *{"full": (), "small": self.small, "smoke": self.smoke}[scale])


def entries(pattern: str, **names: str) -> tuple[Entry, ...]:
    return tuple(Entry(name, pattern.format(key)) for key, name in names.items())


def switched(epochs: int) -> tuple[str, ...]:
    return ("--epochs", str(epochs), "--switch-to-tet", str(2 * epochs // 3), "--T", "4")


def inherited(T: int, first: int, second: int) -> tuple[str, ...]:
    """Options of a short run whose recipe inherits its weights from T=2, or at T=2 has no second stage."""
    length = ("--tit", f"2:{first},{T}:{second}") if T > 2 else ("--epochs", str(first + second))
    return (*length, "--seeds", "0,1")


TEACHER = "ANN twin"
OFF = ("--ema", "0", "--cutout", "0", "--random-T", "", "--distill", "", "--augment", "crop-flip", "--seeds", "0,1,2")


def modern(name: str, full: tuple[str, ...] = (), smoke: tuple[str, ...] = ()) -> Entry:
    """The modern recipe with SGD, and of the rest only what `full` switches on (in a smoke run `smoke`)."""
    short = ("--epochs", "12", "--warmup-epochs", "1", "--augment", "none")
    return Entry(name, "modern-cifar10", (*OFF, *full), (*short, *smoke), scales=("full", "smoke"))


TABLES = {
    "table1": entries(
        "table1-{}", **{"sdt-T4": "SDT T=4", "tet-T4": "TET T=4", "sdt-T6": "SDT T=6", "tet-T6": "TET T=6"}
    ),
    "table2": tuple(
        Entry(f"{loss.upper()} k={k}", f"table2-{loss}", ("--smooth-spike", str(k)), ("--epochs", "6"))
        for loss in ("sdt", "tet")
        for k in (1, 10, 20)
    ),
    "figure2": entries("table1-{}", **{"sdt-T4": "SDT", "tet-T4": "TET"}),
    "figure3": (
        Entry("SDT, then TET", "figure3", (), *(switched(epochs) for epochs in (12, 6))),
        Entry("SDT", "figure3", ("--switch-to-tet", "0"), *(("--epochs", str(n), "--T", "4") for n in (12, 6))),
    ),
    "figure4": (
        *entries("figure4a-{}", T2="TET T=2", T3="TET T=3", T4="TET T=4"),
        Entry("TIT T=2 to 6", "figure4a-tit", (), ("--tit", "2:6,6:2"), ("--tit", "2:4,6:1")),
        *(Entry(f"SDT T={T}", f"figure4a-T{T}", ("--loss", "sdt")) for T in (2, 3, 4)),
    ),
    "comparison": (
        *(
            Entry(
                f"CIFAR-{n} T={T}",
                f"comparison-cifar{n}-T{T}",
                (),
                *(inherited(T, *stages) for stages in ((4, 2), (3, 1))),
            )
            for n in (10, 100)
            for T in (2, 4, 6)
        ),
        *(Entry(f"CIFAR-{n} ANN", f"comparison-cifar{n}-ann") for n in (10, 100)),
        *(
            Entry(
                f"DVS-CIFAR10 {loss.upper()} T=10",
                f"comparison-dvs-cifar10-{loss}",
                smoke=("--data", "saccades:digits", "--T", "4", "--epochs", "6", "--seeds", "0,1"),
                scales=("full", "smoke"),
            )
            for loss in ("sdt", "tet")
        ),
        *(
            Entry(f"ImageNet {name} T={T}", f"imagenet-{model}", scales=("full",), needs="imagenet")
            for name, model, T in (("Spiking-ResNet-34", "spiking-resnet34", 6), ("SEW-ResNet-34", "sew-resnet34", 4))
        ),
    ),
    "modern": (
        Entry("paper's recipe", "figure4a-T4", (), ("--epochs", "12", "--seeds", "0,1,2"), scales=("full", "smoke")),
        modern("SGD"),
        modern("SGD, cutout", ("--cutout", "16"), ("--cutout", "2")),
        modern("SGD, EMA", ("--ema", "0.999"), ("--ema", "0.98")),
        modern("SGD, random T", *[("--random-T", "1:6")] * 2),
        modern("SGD, distilled", *[("--distill", f"{{out}}/runs/{TEACHER.replace(' ', '-')}")] * 2),
    ),
}


def tetdeploy(*arguments: object) -> None:
    command = [sys.executable, "-m", "tetdeploy", *map(str, arguments)]
    print("$ tetdeploy", *command[3:], flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)


def trained(entry: Entry, out: Path, data_dir: Path, scale: str) -> list[Path]:
    """Train an entry unless that is done; its runs, one for each seed."""
    folder = out / "runs" / entry.name.replace(" ", "-").replace(",", "").replace("=", "")
    done = folder / "done"
    if not done.exists():
        if (folder / "config.json").exists():
            tetdeploy("train", "--resume", folder, "--data-dir", data_dir, "--runs", out / "runs")
        else:
            recipe = ("--config", RECIPES / f"{entry.recipe}.toml", "--data-dir", data_dir, "--runs", out / "runs")
            options = (option.format(out=out) for option in entry.chosen(scale))
            tetdeploy("train", *recipe, *options, "--out", folder)
        done.touch()
    return sorted(folder.glob("seed-*")) or [folder]


def swept(run: Path, data_dir: Path, steps: str) -> list[dict[str, Any]]:
    """Export a run for any T and sweep it over its test set; the rows."""
    model, result = run / "model-dynamic.onnx", run / "sweep.json"
    if not result.exists():
        tetdeploy("export", run, "--layout", "dynamic", "--fold-bn", "--data-dir", data_dir, "--check", 200)
        tetdeploy("sweep", model, "--T", steps, "--data-dir", data_dir, "--json", result)
    rows: list[dict[str, Any]] = json.loads(result.read_text())["rows"]
    return rows


def final_accuracy(run: Path, data_dir: Path, steps: str) -> float:
    """On the test set, at the T of the training; in PyTorch where there is no export."""
    network, T = json.loads((run / "config.json").read_text())["network"], trained_T(run)
    if not network["ann"] and not network["smooth_spike"]:
        return float(next(row["accuracy"] for row in swept(run, data_dir, steps) if row["T"] == T))
    result = run / "evaluate.json"
    if not result.exists():
        tetdeploy("evaluate", run, "--T", T, "--data-dir", data_dir, "--json", result)
    return float(json.loads(result.read_text())["runs"][0]["accuracy"][0]["accuracy"])


def mean_std(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained_T(run: Path) -> int:
    return int(json.loads((run / "config.json").read_text())["training"]["T"])


def best_validation(run: Path) -> float:
    return max(float(row["val_accuracy"]) for row in metrics(run))


def write_table(out: Path, name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown, to a file and to the terminal."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    text = f"{title}\n\n" + "\n".join(lines) + "\n"
    with atomic_write(out / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\n{out / f'{name}.md'}")


def accuracy_table(name: str, out: Path, data_dir: Path, scale: str) -> None:
    """Mean and standard deviation of the accuracy, held out and on the test set."""
    rows, numbers = [], []
    for entry in TABLES[name]:
        if reason := entry.left_out(scale, data_dir):
            print(f"left out: {entry.name}: {reason}", flush=True)
            continue
        runs = trained(entry, out, data_dir, scale)
        held_out = [best_validation(run) for run in runs]
        steps = [
            f"1:{trained_T(run)}" if "dvs" in entry.recipe else "1:8" for run in runs
        ]  # of frames there are no more
        test = [final_accuracy(run, data_dir, wanted) for run, wanted in zip(runs, steps, strict=True)]
        numbers.append({"name": entry.name, "recipe": entry.recipe, "held_out": held_out, "test": test})
        rows.append([entry.name, mean_std(held_out), mean_std(test), str(len(runs))])
    write_json(out / f"{name}.json", {"scale": scale, "rows": numbers})
    write_table(out, name, caption(name, scale), ["", "held out (%)", "test (%)", "seeds"], rows)


def modern_table(out: Path, data_dir: Path, scale: str) -> None:
    """Test accuracy at several T: what each option of the modern recipe does by itself."""
    teacher = Entry(TEACHER, "modern-cifar10-teacher", (), ("--epochs", "12", "--warmup-epochs", "1", "--cutout", "0"))
    trained(teacher, out, data_dir, scale)
    shown, rows, numbers = (1, 2, 4, 6), [], []
    for entry in TABLES["modern"]:
        swept_runs = [swept(run, data_dir, "1:8") for run in trained(entry, out, data_dir, scale)]
        accuracy = {T: [row["accuracy"] for run in swept_runs for row in run if row["T"] == T] for T in shown}
        numbers.append({"name": entry.name, "test": accuracy})
        rows.append([entry.name, *(mean_std(accuracy[T]) for T in shown)])
    write_json(out / "modern.json", {"scale": scale, "rows": numbers})
    write_table(out, "modern", caption("modern", scale), ["trained at T=4, test (%)", *(f"T={T}" for T in shown)], rows)


def caption(name: str, scale: str) -> str:
    return f"**{name}**{CAPTIONS[scale]}"


def landscape(out: Path, data_dir: Path, scale: str) -> None:
    runs = [trained(entry, out, data_dir, scale)[0] for entry in TABLES["figure2"]]
    size = {"full": (), "small": ("--points", 15, "--limit", 1000), "smoke": ("--points", 9, "--limit", 300)}[scale]
    tetdeploy(
        "landscape", *runs, "--data-dir", data_dir, "--plot", out / "figure2.png", "--json", out / "figure2.json", *size
    )


def switch(out: Path, data_dir: Path, scale: str) -> None:
    """Both losses and the accuracy on the held-out set by epoch, with and without the switch."""
    figure, axes = subplots(3)
    curves = {}
    for entry in TABLES["figure3"]:
        rows = metrics(trained(entry, out, data_dir, scale)[0])
        curves[entry.name] = rows
        for axis, key, label in zip(
            axes, ("val_sdt_loss", "val_tet_loss", "val_accuracy"), ("L_SDT", "L_TET", "accuracy"), strict=True
        ):
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], label=entry.name)
            axis.set(xlabel="epoch", ylabel=f"{label}, held out")
    axes[0].legend(frameon=False)
    write_json(out / "figure3.json", {"scale": scale, "curves": curves})
    save(figure, out / "figure3.png", scale)


def scalability(out: Path, data_dir: Path, scale: str) -> None:
    """Accuracy against T and against energy, with no training at the new T; the T of the training is a large marker."""
    figure, (left, right) = subplots(2)
    curves = {}
    for entry in TABLES["figure4"]:
        folders = trained(entry, out, data_dir, scale)
        runs = [swept(run, data_dir, "1:8") for run in folders]
        steps = [row["T"] for row in runs[0]]
        accuracy = [statistics.mean(100 * run[k]["accuracy"] for run in runs) for k in range(len(steps))]
        energy = [statistics.mean(run[k]["energy_pj"] / 1e6 for run in runs) for k in range(len(steps))]
        T = trained_T(folders[0])
        curve = {"T": steps, "accuracy_percent": accuracy, "energy_uj": energy, "seeds": len(runs), "trained_T": T}
        curves[entry.name] = curve
        color, line = COLORS[T], "--" if "sdt" in entry.options else "-"
        for axis, x in ((left, steps), (right, energy)):
            axis.plot(x, accuracy, "o", linestyle=line, color=color, markersize=4, label=entry.name)
            axis.plot(x[steps.index(T)], accuracy[steps.index(T)], "o", color=color, markersize=9)
    left.set(xlabel="time steps T", ylabel="test accuracy (%)")
    right.set(xlabel="energy (µJ per image)", ylabel="test accuracy (%)")
    left.legend(frameon=False)
    write_json(out / "figure4.json", {"scale": scale, "curves": curves})
    rows = [[name, *(f"{a:.2f}" for a in curve["accuracy_percent"])] for name, curve in curves.items()]
    write_table(out, "figure4", caption("figure4", scale), ["test (%)", *(f"T={t}" for t in range(1, 9))], rows)
    save(figure, out / "figure4.png", scale)


def subplots(count: int) -> tuple[Any, Any]:
    from cycler import cycler
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    axes = figure.subplots(1, count)
    for axis in axes:
        axis.set_prop_cycle(cycler(color=PALETTE))
        axis.grid(color="0.92")
    return figure, axes


def save(figure: Any, path: Path, scale: str) -> None:
    figure.suptitle(caption(path.stem, scale).replace("**", ""), fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(path)


@click.command()
@click.argument("what", type=click.Choice(list(TABLES)))
@click.option("--smoke", "scale", flag_value="smoke", help="Digits and a small network: minutes on two cores.")
@click.option("--small", "scale", flag_value="small", help="Fashion-MNIST and a small network: an hour or two.")
@click.option("--out", type=click.Path(path_type=Path), help="Results and runs. [default: results/WHAT[-SCALE]]")
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"), envvar="TETDEPLOY_DATA")
def main(what: str, scale: str | None, out: Path | None, data_dir: Path) -> None:
    """Train, measure and write one of the paper's tables or figures."""
    out = out or Path("results") / (f"{what}-{scale}" if scale else what)
    scale = scale or "full"
    if not any(scale in entry.scales for entry in TABLES[what]):
        raise click.UsageError(f"{what} has no --{scale} run; choose {' or '.join(TABLES[what][0].scales)}")
    programs = {"figure2": landscape, "figure3": switch, "figure4": scalability, "modern": modern_table}
    program = programs.get(what)
    if program is None:
        accuracy_table(what, out, data_dir, scale)
    else:
        program(out, data_dir, scale)


if __name__ == "__main__":
    main()
