"""Options that several commands share, and how they find the newest run and export."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from zipfile import BadZipFile, ZipFile

import click

from tetdeploy.steps import MAX_T, parse_steps
from tetdeploy.storage.files import MODELS, check_writable
from tetdeploy.storage.run_folder import is_read_again, newest_export

if TYPE_CHECKING:
    from tetdeploy.engine import Engine

F = TypeVar("F", bound=Callable[..., Any])


class FiniteRange(click.FloatRange):
    """Numbers within a range, of which click takes NaN for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number to calculate with.", param, ctx)
        return number


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """Whole numbers with commas between them, such as `1,8`; a tuple of each once."""

    name = "numbers"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not isinstance(value, str):  # converted already
            return tuple(value)
        try:
            numbers = tuple(dict.fromkeys(int(part) for part in value.split(",")))
        except ValueError:
            self.fail(f"must be like 8 or 1,8,64; got {value!r}", param, ctx)
        if min(numbers) < self.least:
            self.fail(f"must be at least {self.least}, got {min(numbers)}", param, ctx)
        return numbers


class PlaceToWrite(click.Path):
    """Where files go. No empty path, as a shell's variable that is not set gives one: it would be the current
    folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            way_out = "" if param is not None and param.required else ", or leave the option out"
            self.fail(f"it is empty; name a place{way_out}", param, ctx)
        return super().convert(value, param, ctx)


STEPS = click.IntRange(1, MAX_T)  # the type of a --T that takes one number
AT_LEAST_1 = click.IntRange(min=1)
ABOVE_0 = FiniteRange(min=0, min_open=True)


class _Parts(click.Choice):  # type: ignore[type-arg]  # of click 8.1 it takes none
    """Of a data set as a run has it; `val` is `validation`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert("validation" if value == "val" else value, param, ctx)


PARTS = _Parts(("train", "validation", "test"))  # the type of a --split

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=Path("data"),
    envvar="TETDEPLOY_DATA",
    show_default=True,
    show_envvar=True,
    help="Folder of the data sets, and of downloads.",
)
runs_option = click.option(
    "--runs",
    type=PlaceToWrite(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Folder of the runs.",
)


def checked_output(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """The callback of an output file: one that cannot be written is refused before the work whose result goes there."""
    if path is not None:
        _check_output(path, param.opts[0])
    return path


def _check_output(path: Path, option: str) -> None:
    begins = {"--json": b"{", "--predictions": b"PK", "--markdown": b"# "}.get(option, b"")
    check_writable(path, begins=begins, remedy=f"choose another with {option}")
    is_other = {"--json": is_read_again, "--predictions": _holds_no_predictions}.get(option)
    if is_other is not None and path.is_file() and path.stat().st_size and is_other(path):
        text = f"it is there, and something else; choose another with {option}, or remove it"
        raise OSError(f"cannot write {path}: {text}")
    ending = Path(os.path.realpath(path)).suffix
    if option == "--json" and ending in {*MODELS, ".npz"}:  # it might be what the command writes
        raise OSError(f"cannot write {path}: JSON has no name in {ending}; choose another with --json")


def _holds_no_predictions(path: Path) -> bool:
    """But a data set, say, which may be a `.npz` too."""
    try:
        with ZipFile(path) as arrays:
            return "predicted.npy" not in arrays.namelist()
    except BadZipFile:
        return True


def steps_option(default: str) -> Callable[[F], F]:
    """The --T of a command that takes several; `default` says which it takes where none is given, as None."""
    return click.option("--T", "steps", callback=_parsed_steps, help=f"Steps: 6, 1:6 or 1,2,4. [default: {default}]")


def _parsed_steps(ctx: click.Context, param: click.Parameter, steps: str | None) -> tuple[int, ...] | None:
    if steps is None:
        return None
    try:
        return parse_steps(steps)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _json_option(text: str) -> Callable[[F], F]:
    file = click.Path(path_type=Path, dir_okay=False)
    return click.option("--json", "json_path", type=file, callback=checked_output, help=text)


json_option = _json_option("Also write the result here.")


def result_option(ending: str) -> Callable[[F], F]:
    """The --json of a command that always writes its result, by default beside the model, see `output_path`."""
    return _json_option(f"Where the result goes. [default: MODEL{ending}]")


def output_path(given: Path | None, engine: Engine, ending: str) -> Path:
    """Where a result goes: beside the model, unless --json says otherwise. A file that cannot be written is refused
    before the work whose result goes there."""
    path = given or engine.path.with_suffix(ending)
    _check_output(path, "--json")
    return path


def check_distinct(outputs: Mapping[str, Path | None]) -> None:
    """Refuse outputs, by their options or what they are, of which one would take another's place.

    Raises:
        click.UsageError: two are one file.
    """
    taken: dict[str, str] = {}
    for option, path in outputs.items():
        if path is not None and (other := taken.setdefault(os.path.realpath(path), option)) != option:
            options = " or ".join(name for name in (other, option) if name.startswith("--"))
            raise click.UsageError(f"{other} and {option} would be one file, {path}; choose another with {options}")


test_data_option = click.option(
    "--data",
    help="A data set's name or FILE.npz with images and labels. [default: the test set of the training's data]",
)
limit_option = click.option("--limit", type=AT_LEAST_1, help="Use only this many images, the first ones.")
own_network_option = click.option("--model", help="package.module:function, if the network is your own.")
torch_device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
torch_batch_option = click.option("--batch-size", type=AT_LEAST_1, help="[default: 64 on a CPU, 512 on a GPU]")
torch_precision_option = click.option(
    "--precision", default="fp32", show_default=True, type=click.Choice(("fp32", "bf16", "fp16", "auto"))
)
threads_option = click.option(
    "--threads", type=AT_LEAST_1, help="CPU threads. [default: all cores, or those that affinity and a CPU quota leave]"
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda or tensorrt; no other is used in its place."
)
runtime_option = click.option(
    "--runtime",
    default="onnxruntime",
    show_default=True,
    help="onnxruntime, or openvino on a CPU (pip install 'tetdeploy[openvino]').",
)


@dataclass(frozen=True)
class ChosenModel:
    """MODEL and how it is to be opened, as `opens_model` gives them to a command."""

    given: Path | None
    runs: Path
    device: str
    runtime: str
    threads: int | None

    @property
    def path(self) -> Path:
        """The newest export where none is named.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.given or newest_export(self.runs)

    def engine(self) -> Engine:
        """Opens it, which may fail: first comes what is wrong with the options."""
        from tetdeploy.engine import Engine

        return Engine(self.path, device=self.device, threads=self.threads, runtime=self.runtime)


def opens_model(*, threads: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """MODEL and how it is opened: --device, --runtime, --threads (unless the command has its own) and --runs, among
    which the newest export is MODEL's default. The command gets them as one `ChosenModel`, `chosen`."""
    options = [device_option, runtime_option, *([threads_option] if threads else []), runs_option]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def with_model(*arguments: Any, model: Path | None, runs: Path, device: str, runtime: str, **given: Any) -> Any:
            own = given.pop("threads") if threads else None
            return command(*arguments, chosen=ChosenModel(model, runs, device, runtime, own), **given)

        decorated: Callable[..., Any] = with_model
        for option in reversed(options):
            decorated = option(decorated)
        return click.argument("model", required=False, type=click.Path(path_type=Path))(decorated)

    return decorate


def default_plot(result: Path, *, named: bool) -> Path:
    """Where the plot of a result goes unless --plot says otherwise: beside it, `.png`.

    Args: `named` says whether the user chose the result's name, after which a picture may be called as well.

    Raises:
        OSError: a file of that name is there without the result, and so is no plot of it.
    """
    plot = result.with_suffix(".png")
    if named and plot.is_file() and not result.exists():
        raise OSError(
            f"cannot write {plot}: it is there without {result.name}, and so something else; "
            "choose another with --plot, or remove it"
        )
    return plot


def check_plot(path: Path) -> None:
    """Refuse the name of a plot that matplotlib, which must be there, has no format for.

    Raises:
        ValueError: it has none.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"{path} is no plot's name: it must end in one of .{', .'.join(formats)}; choose another --plot"
        )
