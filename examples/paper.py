"""The paper's tables and figures, one command each: trains what is compared, then writes the table or the plot.

    python examples/paper.py table1              at the paper's size: ResNet-19, 300 epochs, three seeds (a GPU, days)
    python examples/paper.py figure4 --small     on Fashion-MNIST, four epochs of a small network: two cores, an hour
    python examples/paper.py table1 --smoke      the same on the small digits: two cores, minutes
    python examples/paper.py figure4 --out results --data-dir ~/data

Trains by the recipes in `examples/recipes`, one after the other; what is finished is not trained again, what was
interrupted (Ctrl-C, SIGTERM, SIGHUP) goes on, and what was trained by another recipe than it has now is refused. Test
accuracies are those of exported models under ONNX Runtime; of ANN twins and smooth spikes, which have no export, those
of PyTorch. The JSON beside a table or plot names the runs of each number: folder, seed, T, SHA-256 of the weights. A
smoke run shows that the path works; its numbers say nothing about the paper.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from tetdeploy.checkpoint import read_metadata
from tetdeploy.report.drawing import save_plot
from tetdeploy.storage.files import atomic_write, sha256_of, write_json
from tetdeploy.storage.metrics import read_metrics
from tetdeploy.storage.provenance import version, written
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, CONFIG_NAME, seed_runs
from tetdeploy.system.signals import handled, terminations

COMMAND = (sys.executable, "-m", "tetdeploy")
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

    def settings(self, scale: str) -> dict[str, str]:
        """What recipe and options say, by option; without the seeds, of which there may be more later."""
        recipe = tomllib.loads((RECIPES / f"{self.recipe}.toml").read_text(encoding="utf-8"))
        names, values = self.chosen(scale)[::2], self.chosen(scale)[1::2]
        said = recipe | dict(zip((name.removeprefix("--") for name in names), values, strict=True))
        return {name: str(value) for name, value in said.items() if name != "seeds"}


@dataclass(frozen=True)
class Place:
    """Where results and runs go, and where the data are."""

    out: Path
    data_dir: Path
    what: str
    scale: str

    @property
    def runs(self) -> Path:
        """Of this table alone at this scale: another one trains others by the same names."""
        return self.out / "runs" / f"{self.what}-{self.scale}"

    def result(self, ending: str) -> Path:
        return self.out / f"{self.what}{ending}"

    @property
    def caption(self) -> str:
        return f"**{self.what}**{CAPTIONS[self.scale]}"


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
    "figure2": tuple(
        Entry(loss.upper(), f"table1-{loss}-T4", ("--seeds", "0"), ("--epochs", "6")) for loss in ("sdt", "tet")
    ),
    "figure3": (
        Entry("SDT, then TET", "figure3", (), *(switched(epochs) for epochs in (12, 6))),
        Entry("SDT", "figure3", ("--switch-to-tet", "0"), *(("--epochs", str(n), "--T", "4") for n in (12, 6))),
    ),
    "figure4": (
        *entries("figure4a-{}", T2="TET T=2", T3="TET T=3", T4="TET T=4"),
        Entry("TIT T=2 to 6", "figure4a-tit", (), ("--tit", "2:6,6:2"), ("--tit", "2:4,6:1")),
        Entry("TET T=6", "table1-tet-T6", ("--seeds", "0"), ("--epochs", "8"), ("--epochs", "5")),
        *(Entry(f"SDT T={T}", f"figure4a-T{T}", ("--loss", "sdt")) for T in (2, 3, 4)),
    ),
    "comparison": (
        *(
            Entry(
                f"CIFAR-{n} T={T}",
                f"comparison-cifar{n}-T{T}",
                (),
                *(inherited(T, *stages) for stages in ((4, 2), (3, 1))),
                scales=scales,
            )
            for n, scales in ((10, ("full", "small", "smoke")), (100, ("full",)))  # smaller ones are of other data
            for T in (2, 4, 6)
        ),
        Entry("CIFAR-10 ANN", "comparison-cifar10-ann", small=("--epochs", "4", "--seeds", "0,1")),
        Entry("CIFAR-100 ANN", "comparison-cifar100-ann", scales=("full",)),
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
        Entry(
            "paper's recipe",
            "figure4a-T4",
            ("--data", "cifar10", "--seeds", "0,1,2"),
            ("--epochs", "12"),
            scales=("full", "smoke"),
        ),
        modern("SGD"),
        modern("SGD, cutout", ("--cutout", "16"), ("--cutout", "2")),
        modern("SGD, EMA", ("--ema", "0.999"), ("--ema", "0.98")),
        modern("SGD, random T", *[("--random-T", "1:6")] * 2),
        modern("SGD, distilled", *[("--distill", f"{{runs}}/{TEACHER.replace(' ', '-')}")] * 2),
    ),
}


def tetdeploy(*arguments: object) -> None:
    """Run a command. Ctrl-C, which a terminal sends to it as well, and SIGTERM and SIGHUP, which are handed on, end it
    as it ends itself, with what it saves; and then this program."""
    words = list(map(str, arguments))
    print("$", shlex.join(["tetdeploy", *words]), flush=True)
    asked: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        if number != signal.SIGINT and started:
            started[0].terminate()

    with handled(stop, signal.SIGINT, *terminations()), subprocess.Popen([*COMMAND, *words]) as process:
        started.append(process)
        if asked:  # while it was started, which it may not have been told
            process.terminate()
        code = process.wait()
    if code or asked:
        raise SystemExit(code or 130)


def folder_of(entry: Entry, at: Place) -> Path:
    """Its name has nothing that a shell reads otherwise."""
    return at.runs / re.sub("[,=']", "", entry.name.replace(" ", "-"))


def trained(entry: Entry, at: Place) -> list[Path]:
    """Train an entry, or what of it is not finished; its runs, one for each seed.

    Refuses a folder that was begun by another recipe: `train --resume` does so where the recipe says otherwise than the
    run, or the images or the teacher are others; for what the recipe says no more it would take what the run has.
    """
    folder = folder_of(entry, at)
    begun, recipe, now = (folder / CONFIG_NAME).exists(), folder / "recipe.json", entry.settings(at.scale)
    before = json.loads(recipe.read_text()) if begun and recipe.exists() else now
    if before != now:
        names = [name for name in before | now if before.get(name) != now.get(name)]
        changes = "; ".join(f"{name}: {before.get(name, '(none)')} -> {now.get(name, '(none)')}" for name in names)
        raise click.ClickException(
            f"{folder} was trained by another recipe: {changes}; remove it to train anew, or choose another --out"
        )
    if not begun:
        write_json(recipe, now)
    where = ("--data-dir", at.data_dir, "--runs", at.runs, "--resume" if begun else "--out", folder)
    options = (option.format(runs=at.runs) for option in entry.chosen(at.scale))
    tetdeploy("train", "--config", RECIPES / f"{entry.recipe}.toml", *options, *where)
    return seed_runs(folder) or [folder]


def measured(result: Path, run: Path) -> Any:
    """What a file of results says of the run's weights; None without it, or if it is of others."""
    found = json.loads(result.read_text()) if result.exists() else {}
    (first, *_) = found.get("runs", [found])
    return found if first.get("checkpoint_sha256") == sha256_of(run / CHECKPOINT_NAME) else None


def swept(run: Path, at: Place, steps: str) -> list[dict[str, Any]]:
    """Export a run for any T and sweep it over its test set; the rows."""
    model, result = run / "model-dynamic.onnx", run / "sweep.json"
    found = measured(result, run)
    if found is None:
        tetdeploy("export", run, "--layout", "dynamic", "--fold-bn", "--data-dir", at.data_dir, "--check", 200)
        tetdeploy("sweep", model, "--T", steps, "--data-dir", at.data_dir)
        found = json.loads(model.with_suffix(".sweep.json").read_text())  # what `tetdeploy report` shows of the run
        write_json(result, found)  # a copy: the table stays as it is where a sweep by hand replaces the other
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def final_accuracy(run: Path, at: Place, steps: str) -> float:
    """On the test set, at the T of the training; in PyTorch where there is no export."""
    network, T = json.loads((run / "config.json").read_text())["network"], trained_T(run)
    if not network["ann"] and not network["smooth_spike"]:
        return float(next(row["accuracy"] for row in swept(run, at, steps) if row["T"] == T))
    result = run / "evaluate.json"
    found = measured(result, run)
    if found is None:
        tetdeploy("evaluate", run, "--T", T, "--data-dir", at.data_dir, "--json", result)
        found = json.loads(result.read_text())
    return float(found["runs"][0]["accuracy"][0]["accuracy"])


def mean_std(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def trained_T(run: Path) -> int:
    return int(json.loads((run / "config.json").read_text())["training"]["T"])


def ran(entry: Entry, run: Path) -> str:
    """The name of a comparison's row with the data and the T of its run, as shorter runs have others than the paper."""
    settings = json.loads((run / "config.json").read_text())
    _, *words = entry.name.split()
    T = [] if settings["network"]["ann"] else [f"T={trained_T(run)}"]
    return " ".join([settings["data"]["name"], *(word for word in words if not word.startswith("T=")), *T])


def held_out_accuracy(run: Path) -> float:
    """On the held-out images, of the weights that were kept, which are those of the last stage's best epoch."""
    return float(read_metadata(run / CHECKPOINT_NAME)["provenance"]["val_accuracy"])


def traced(runs: Sequence[Path], at: Place) -> list[dict[str, Any]]:
    """What a number can be traced back by: of each run its folder beside the results, seed, T and weights, and the
    versions that trained it."""
    return [
        {
            "run": run.relative_to(at.out).as_posix(),
            "seed": provenance["seed"],
            "T": trained_T(run),
            "checkpoint_sha256": sha256_of(run / CHECKPOINT_NAME),
            "versions": provenance["versions"],
        }
        for run in runs
        for provenance in [read_metadata(run / CHECKPOINT_NAME)["provenance"]]
    ]


def write_numbers(at: Place, content: dict[str, Any]) -> None:
    write_json(at.result(".json"), {"scale": at.scale} | content | written())


def write_table(at: Place, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown, to a file and to the terminal."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    text = f"{at.caption}\n\n" + "\n".join(lines) + "\n"
    file = at.result(".md")
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\n{file}")


def accuracy_table(at: Place) -> None:
    """Mean and standard deviation of the accuracy, held out and on the test set."""
    rows, numbers = [], []
    for entry in TABLES[at.what]:
        if reason := entry.left_out(at.scale, at.data_dir):
            print(f"left out: {entry.name}: {reason}", flush=True)
            continue
        runs = trained(entry, at)
        held_out = [held_out_accuracy(run) for run in runs]
        steps = [
            f"1:{trained_T(run)}" if "dvs" in entry.recipe else "1:8" for run in runs
        ]  # of frames there are no more
        test = [final_accuracy(run, at, wanted) for run, wanted in zip(runs, steps, strict=True)]
        name = entry.name if at.scale == "full" or at.what != "comparison" else ran(entry, runs[0])
        of = {"name": name, "recipe": entry.recipe, "runs": traced(runs, at)}
        numbers.append(of | {"held_out": held_out, "test": test})
        rows.append([name, mean_std(held_out), mean_std(test), str(len(runs))])
    write_numbers(at, {"rows": numbers})
    write_table(at, ["", "held out (%)", "test (%)", "seeds"], rows)


def modern_table(at: Place) -> None:
    """Test accuracy at several T: what each option of the modern recipe does by itself."""
    teacher = Entry(TEACHER, "modern-cifar10-teacher", (), ("--epochs", "12", "--warmup-epochs", "1", "--cutout", "0"))
    trained(teacher, at)
    shown, rows, numbers = (1, 2, 4, 6), [], []
    for entry in TABLES["modern"]:
        runs = trained(entry, at)
        swept_runs = [swept(run, at, "1:8") for run in runs]
        accuracy = {T: [row["accuracy"] for run in swept_runs for row in run if row["T"] == T] for T in shown}
        of = {"name": entry.name, "recipe": entry.recipe, "runs": traced(runs, at)}
        numbers.append(of | {"test": accuracy})
        rows.append([entry.name, *(mean_std(accuracy[T]) for T in shown), str(len(runs))])
    write_numbers(at, {"rows": numbers})
    write_table(at, ["trained at T=4, test (%)", *(f"T={T}" for T in shown), "seeds"], rows)


def landscape(at: Place) -> None:
    runs = [trained(entry, at)[0] for entry in TABLES["figure2"]]
    size = {"full": (), "small": ("--points", 15, "--limit", 1000), "smoke": ("--points", 9, "--limit", 300)}[at.scale]
    files = ("--plot", at.result(".png"), "--json", at.result(".json"))
    tetdeploy("landscape", *runs, "--data-dir", at.data_dir, *files, *size)


def switch(at: Place) -> None:
    """Both losses and the accuracy on the held-out set by epoch, with and without the switch, which is marked."""
    figure, axes = subplots(3)
    curves, runs = {}, {}
    for entry in TABLES["figure3"]:
        folders = trained(entry, at)
        rows, runs[entry.name] = read_metrics(folders[0]), traced(folders, at)
        curves[entry.name] = rows
        line = "-" if "TET" in entry.name else "--"  # before the switch both are one, and both are to be seen
        for axis, key, label, unit in zip(
            axes,
            ("val_sdt_loss", "val_tet_loss", "val_accuracy"),
            ("L_SDT", "L_TET", "accuracy (%)"),
            (1, 1, 100),
            strict=True,
        ):
            axis.plot([row["epoch"] for row in rows], [unit * row[key] for row in rows], line, label=entry.name)
            for before, after in pairwise(rows):
                if before["loss"] != after["loss"]:
                    axis.axvline(before["epoch"] + 0.5, color="0.4", linestyle=":", label="switch to TET")
            axis.set(xlabel="epoch", ylabel=f"{label}, held out")
    axes[0].legend(framealpha=1, edgecolor="none")
    write_numbers(at, {"curves": curves, "runs": runs})
    save(figure, at)


def scalability(at: Place) -> None:
    """Accuracy against T and against energy, with no training at the new T; the T of the training is a large marker,
    SDT's are hollow. Of several seeds it is the mean, and bars are the standard deviation."""
    figure, (left, right) = subplots(2, sharey=True)
    curves, rows = {}, []
    for entry in TABLES["figure4"]:
        folders = trained(entry, at)
        runs = [swept(run, at, "1:8") for run in folders]
        steps = [row["T"] for row in runs[0]]
        fractions = [[run[k]["accuracy"] for run in runs] for k in range(len(steps))]
        accuracy = [100 * statistics.mean(values) for values in fractions]
        std = [100 * statistics.stdev(values) for values in fractions] if len(runs) > 1 else None
        energy = [statistics.mean(run[k]["energy_pj"] / 1e6 for run in runs) for k in range(len(steps))]
        T = trained_T(folders[0])
        curve = {"T": steps, "accuracy_percent": accuracy, "accuracy_std": std, "energy_uj": energy}
        curves[entry.name] = curve | {"trained_T": T, "recipe": entry.recipe, "runs": traced(folders, at)}
        rows.append([entry.name, *map(mean_std, fractions), str(len(runs))])
        color, line = COLORS[T], "--" if "sdt" in entry.options else ":" if "tit" in entry.recipe else "-"
        points = {"color": color, "markerfacecolor": "white" if "sdt" in entry.options else color}
        for axis, x in ((left, steps), (right, energy)):
            axis.plot(x, accuracy, "o", linestyle=line, markersize=4, label=entry.name, **points)
            axis.errorbar(x, accuracy, std, linestyle="none", color=color, capsize=2)
            axis.plot(x[steps.index(T)], accuracy[steps.index(T)], "o", markersize=9, **points)
    left.plot([], [], "o", color="0.4", markersize=9, label="large: T of the training")
    if any(curve["accuracy_std"] for curve in curves.values()):
        left.plot([], [], "|", color="0.4", markersize=12, label="bars: standard deviation")
    left.set(xlabel="time steps T", ylabel="test accuracy (%)")
    right.set(xlabel="energy (µJ per image)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    write_numbers(at, {"curves": curves})
    write_table(at, ["test (%)", *(f"T={t}" for t in range(1, 9)), "seeds"], rows)
    save(figure, at)


def subplots(count: int, *, sharey: bool = False) -> tuple[Any, Any]:
    from cycler import cycler
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    axes = figure.subplots(1, count, sharey=sharey)
    for axis in axes:
        axis.set_prop_cycle(cycler(color=PALETTE))
        axis.grid(color="0.92")
    return figure, axes


def save(figure: Any, at: Place) -> None:
    figure.suptitle(at.caption.replace("**", ""), fontsize=10)
    file = at.result(".png")
    save_plot(figure, file)
    print(file)


@click.command()
@click.argument("what", type=click.Choice(list(TABLES)))
@click.option("--smoke", is_flag=True, help="Digits and a small network: minutes on two cores.")
@click.option("--small", is_flag=True, help="Fashion-MNIST and a small network: an hour or two.")
@click.option("--out", type=click.Path(path_type=Path), help="Results and runs. [default: results/WHAT[-SCALE]]")
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"), envvar="TETDEPLOY_DATA")
def main(what: str, smoke: bool, small: bool, out: Path | None, data_dir: Path) -> None:
    """Train, measure and write one of the paper's tables or figures."""
    if smoke and small:
        raise click.UsageError("--smoke and --small are two sizes; choose one")
    scale = "smoke" if smoke else "small" if small else None
    version()  # as of now, whatever a `git pull` brings while it trains
    out = out or Path("results") / (f"{what}-{scale}" if scale else what)
    scale = scale or "full"
    if not any(scale in entry.scales for entry in TABLES[what]):
        others = " or ".join(f"--{other}" for other in TABLES[what][0].scales if other != "full")
        raise click.UsageError(f"{what} has no --{scale} run; choose {others}, or neither for the full size")
    programs = {"figure2": landscape, "figure3": switch, "figure4": scalability, "modern": modern_table}
    programs.get(what, accuracy_table)(Place(out, data_dir, what, scale))


if __name__ == "__main__":
    main()
