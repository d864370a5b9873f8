"""`tetdeploy export --format triton-repository` and `--format kserve`: what a server of many machines is given."""

from __future__ import annotations

import re
from pathlib import Path

import click

from tetdeploy.cli.inputs import note_unfit_threshold
from tetdeploy.cli.options import check_distinct
from tetdeploy.cli.terminal import console
from tetdeploy.storage.files import check_writable, write_json
from tetdeploy.storage.model_file import read_model
from tetdeploy.storage.run_folder import newest_run, weights_file
from tetdeploy.system.extras import import_extra
from tetdeploy.wording import quoted

FORMATS = ("triton-repository", "kserve")
DEFAULT_IMAGE = "tetdeploy:latest"
_SERVED = (".onnx", ".engine")


def export_for_cluster(ctx: click.Context, onnx_options: list[str]) -> None:
    """Export RUN as ONNX if it is a run and no model, and write what the format is from the model.

    Args:
        ctx: of `tetdeploy export`.
        onnx_options: those typed that say how a graph is made.
    """
    run, file_format = ctx.params["run"], ctx.params["file_format"]
    for package in ("onnx", "yaml") if file_format == "kserve" else ("onnx", "grpc", "tritonclient"):
        import_extra(package, "cluster")
    if file_format == "kserve" and not ctx.params["storage_uri"]:
        raise click.UsageError(
            "--format kserve needs --storage-uri, where the cluster finds the model: s3://... pvc://..."
        )
    is_model = run is not None and run.suffix in _SERVED
    if is_model and onnx_options:
        raise click.UsageError(f"{', '.join(onnx_options)}: {run} is exported already; give the run to export anew")
    if not is_model:
        _refuse_what_the_cluster_lacks(ctx)
    source = run if is_model else _checkpoint(ctx)
    name = _checked_name(ctx, source)
    out = ctx.params["out"] or source.parent / ("kserve.yaml" if file_format == "kserve" else "triton")
    _check_outputs(out, name, file_format, ctx.params["json_path"])  # before the exports that may come first
    models = [run] if is_model else _exported(ctx)
    if is_model:
        note_unfit_threshold(run)
    if file_format == "kserve":
        _write_service(ctx, models[0], name, out)
    else:
        _write_repository(ctx, models, name, out)


def _check_outputs(out: Path, name: str, file_format: str, json_path: Path | None) -> None:
    written = {"--out": out}
    if file_format != "kserve":
        folders, texts = (name, f"{name}-stream"), ("config.pbtxt", "labels.txt")
        written = {f"{folder}/{text}": out / folder / text for folder in folders for text in texts}
    for path in written.values():
        check_writable(path, remedy="choose another with --out")
    check_distinct(written | {"--json": json_path})


def _refuse_what_the_cluster_lacks(ctx: click.Context) -> None:
    if ctx.params["file_format"] == "kserve":
        from tetdeploy.export.kserve import check_target
    else:
        from tetdeploy.export.repository import check_target

        if ctx.params["with_state"]:
            raise click.UsageError(
                "--with-state cannot go with --format triton-repository: Triton cannot keep its state in chunks of T; "
                "the step layout, which is added to any other, serves streams"
            )
    check_target("the export", ctx.params["target"])


def _checkpoint(ctx: click.Context) -> Path:
    import_extra("torch", "train")
    return weights_file(ctx.params["run"] or newest_run(ctx.params["runs"]))


def _checked_name(ctx: click.Context, source: Path) -> str:
    """What the model is called, by default as the folder of its `source`. Refused before an export takes its time."""
    name = source.resolve().parent.name if ctx.params["name"] is None else str(ctx.params["name"])
    if ctx.params["file_format"] == "triton-repository":
        from tetdeploy.export.repository import check_name

        check_name(name)
        return name
    from tetdeploy.export.kserve import check_image, check_service_name, check_storage_uri

    if ctx.params["name"] is None:
        name = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    check_service_name(name)
    check_storage_uri(ctx.params["storage_uri"])
    check_image(_image(ctx))
    return name


def _image(ctx: click.Context) -> str:
    return DEFAULT_IMAGE if ctx.params["image"] is None else str(ctx.params["image"])


def _exported(ctx: click.Context) -> list[Path]:
    """The run's models, newly exported to their usual places: for Triton the step layout beside the one asked for."""
    layouts = [ctx.params["layout"]]
    if ctx.params["file_format"] == "triton-repository" and layouts != ["step"]:
        layouts.append("step")
    own = {"file_format": "onnx", "out": None, "json_path": None, "name": None, "storage_uri": None, "image": None}
    return [ctx.invoke(ctx.command, **ctx.params | own | {"layout": layout}) for layout in layouts]


def _write_repository(ctx: click.Context, models: list[Path], name: str, repository: Path) -> None:
    from tetdeploy.export.repository import add_to_repository

    added = add_to_repository(repository, models, name)
    if ctx.params["json_path"] is not None:
        write_json(ctx.params["json_path"], {"models": [model.to_dict() for model in added]})
    for model in added:
        console.print(f"{model.path}/{model.version}   {model.platform}")
    console.print(f"next: tritonserver --model-repository {quoted(repository)}   (docs/cluster.md)")


def _write_service(ctx: click.Context, model: Path, name: str, path: Path) -> None:
    from tetdeploy.agreement import reference_path
    from tetdeploy.early_exit import exit_path, why_unfit
    from tetdeploy.export.kserve import RUNTIMES, check_target, inference_service, write_inference_service
    from tetdeploy.export.reading import parse_graph

    if model.suffix != ".onnx":
        raise ValueError(f"{model} is a TensorRT engine; the container that KServe runs takes the .onnx file")
    metadata = parse_graph(read_model(model), model)[1]
    if metadata["layout"] == "sequence":
        raise ValueError(f"{model} is a step graph for Triton, which keeps its state; give the one it was made of")
    check_target(model, metadata["target"])
    storage_uri, image = ctx.params["storage_uri"], _image(ctx)
    runtime = RUNTIMES[metadata["target"]]
    service = inference_service(name, model_file=model.name, storage_uri=storage_uri, image=image, runtime=runtime)
    write_inference_service(path, service)
    if ctx.params["json_path"] is not None:
        write_json(ctx.params["json_path"], {"path": str(path), "service": service})
    console.print(f"{path}   {service['metadata']['name']}   {image}")
    # Beside it: what the estimated energy and early_exit: true need.
    beside = [reference_path(model)] if why_unfit(model) else [reference_path(model), exit_path(model)]
    copied = [model, *filter(Path.exists, beside)]
    if runtime != "onnxruntime":
        console.print(f"{image} needs the runtime: docker build --build-arg RUNTIME={runtime} ...   (docs/cluster.md)")
    files, manifest = ", ".join(quoted(file) for file in copied), quoted(path)
    console.print(f"next: copy {files} to {storage_uri}, then kubectl apply -f {manifest}   (docs/cluster.md)")
