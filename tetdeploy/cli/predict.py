"""`tetdeploy predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetdeploy.cli.inputs import as_model_input, default_steps
from tetdeploy.cli.options import AT_LEAST_1, STEPS, device_option, json_option, runtime_option, threads_option
from tetdeploy.cli.terminal import console
from tetdeploy.measured import own_data, said_of_data
from tetdeploy.storage.files import write_json
from tetdeploy.system.extras import MissingExtraError, import_extra
from tetdeploy.wording import in_one_line

if TYPE_CHECKING:
    from tetdeploy.engine import Engine


@click.command(
    epilog="""\b
Examples:
  tetdeploy predict runs/r19/model-T6.onnx cat.png dog.jpg
  tetdeploy predict model-dynamic.onnx photo.jpg --resize --T 8 --top 5
  tetdeploy predict model-T4.engine cat.png --device tensorrt
  tetdeploy predict runs/gestures/model-T10.onnx recording.aedat4
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--T", "T", type=STEPS, help="Steps. [default: the T of the graph, or of the training]")
@click.option("--top", default=3, show_default=True, type=AT_LEAST_1, help="How many classes to show.")
@click.option(
    "--resize",
    is_flag=True,
    help="Scale and crop images of another size to the model's, bicubic and without a margin; no accuracy was measured "
    "on such. Not needed for models trained on imagenet: any image is scaled and cropped as in their evaluation.",
)
@device_option
@runtime_option
@threads_option
@json_option
def predict(
    model: Path,
    files: tuple[Path, ...],
    T: int | None,
    top: int,
    resize: bool,
    device: str,
    runtime: str,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Classify image files, or recordings of an event camera: the likeliest classes after each step, and how certain.

    Certainty is the softmax of the mean logits so far. Files are read as those of the data set that the model was
    trained on; recordings (.npz, .aedat4, .bin) are cut into frames as these were. Needs no torch.
    """
    import numpy as np

    from tetdeploy.early_exit import softmax
    from tetdeploy.engine import open_engine

    engine = open_engine(model, device=device, threads=threads, runtime=runtime)
    if engine.encoding == "frames":
        if resize:
            raise click.UsageError(f"--resize is for images; {model} takes frames of recordings")
        x = np.stack([_read_recording(path, engine) for path in files])
    else:
        x = np.stack([_read_image(path, engine, resize) for path in files])
    if T is None and engine.encoding == "frames":
        T = default_steps(engine)[-1]
    result = engine.run(x, T)
    steps = np.arange(1, result.per_step.shape[1] + 1)[None, :, None]
    certainty = softmax(np.cumsum(result.per_step, axis=1) / steps)
    if json_path is not None:
        write_json(
            json_path,
            {
                "model": str(model),
                "T": int(steps.size),
                "class_names": engine.class_names,
                "images": [{"file": str(p), "certainty": c.tolist()} for p, c in zip(files, certainty, strict=True)],
            },
        )
    for path, by_step in zip(files, certainty, strict=True):
        _print(path, by_step, engine.class_names, top)
    if json_path is not None:
        console.print(str(json_path))


def _print(path: Path, certainty: Any, class_names: tuple[str, ...], top: int) -> None:
    """One table: classes by rows, steps by columns."""
    from rich.text import Text

    from tetdeploy.report.result_table import ResultTable

    order = (-certainty[-1]).argsort(kind="stable")[:top]
    steps = (f"T={t}" for t in range(1, len(certainty) + 1))
    table = ResultTable("class", numbers=steps, title=Text(str(path), style="table.title"))
    for k in order:
        table.add_row(Text(class_names[k]), *(f"{certainty[t, k]:.1%}" for t in range(len(certainty))))
    console.print(table)


def _read_image(path: Path, engine: Engine, resize: bool) -> Any:
    """An image file as the graph takes it, `[C, H, W]`: read as those that its accuracy was measured on."""
    from tetdeploy.data import is_imagenet

    import_extra("PIL.Image", "cpu")
    cropped = is_imagenet(own_data(engine)) and engine.input_shape[0] == 3
    return as_model_input(engine, _cropped(path, engine.input_shape[-1]) if cropped else _whole(path, engine, resize))


def _read_recording(path: Path, engine: Engine) -> Any:
    """A recording as the graph takes it, `[T, C, H, W]`: framed as those that its accuracy was measured on."""
    from tetdeploy.data import Binning, Framing, read_recording, to_frames

    framing = Framing.of(said_of_data(engine))
    if framing is None:
        raise ValueError(
            f"{engine.path.name} does not say how recordings became the frames that it was trained on; run it from "
            "Python: Engine(...).run(frames) with frames [N, T, C, H, W]"
        )
    if not path.exists():
        raise FileNotFoundError(f"no recording at {path}")
    try:
        recording = read_recording(path)
    except MissingExtraError:
        raise
    except Exception as error:  # tonic and its readers raise whatever they like for damaged files
        raise ValueError(f"{path} cannot be read as a recording: {in_one_line(error)}") from error
    if recording.sensor not in (None, framing.sensor):
        said, own = (f"{width}x{height}" for height, width in (recording.sensor, framing.sensor))
        raise ValueError(f"{path} is of a sensor of {said} pixels (width x height); the network was trained on {own}")
    try:
        frames = to_frames(recording, Binning(engine.trained_T, framing.by), framing.sensor)
    except ValueError as error:
        raise ValueError(f"{path}: {error}, which the network was trained on") from error
    return as_model_input(engine, frames)


def _cropped(path: Path, size: int) -> Any:
    """An image file as `load_data("imagenet", ...)` has it, uint8 `[3, size, size]`."""
    from tetdeploy.data import read_crop

    if not path.exists():
        raise FileNotFoundError(f"no image at {path}")
    try:
        return read_crop(str(path), size)
    except ValueError as error:
        raise ValueError(f"cannot read {error}; give a png, jpeg, webp or bmp of 8 bits a channel") from error


def _whole(path: Path, engine: Engine, resize: bool) -> Any:
    """An image file of the model's size, or scaled and cropped to it, uint8 `[C, H, W]`."""
    import numpy as np

    from tetdeploy.data.decoding import open_image

    channels, height, width = engine.input_shape
    if channels not in (1, 3):
        raise ValueError(f"image files have 1 or 3 channels, {engine.path.name} takes {channels}; run it from Python")
    try:
        image = open_image(path.read_bytes()).convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more for damaged files
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ValueError(
            f"{path} cannot be read as an image: {reason}; give a png, jpeg, webp or bmp of 8 bits a channel"
        ) from error
    if image.size != (width, height):
        if not resize:
            raise ValueError(
                f"{path} has {image.size[0]}x{image.size[1]} pixels, {engine.path.name} takes {width}x{height}; "
                "pass --resize to scale and crop it"
            )
        image_ops = import_extra("PIL.ImageOps", "cpu")
        image = image_ops.fit(image, (width, height))
    return np.asarray(image, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
