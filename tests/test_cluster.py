"""What the command line writes for servers of many machines: Triton's model repository, KServe's InferenceService."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_helpers import printed, refused
from export_helpers import exported
from PIL import Image

pytest.importorskip("tritonclient")
pytest.importorskip("yaml")
import yaml

from tetdeploy.cli.serve import serve
from tetdeploy.export.kserve import inference_service
from tetdeploy.serve.scheduler import GRACE_SECONDS
from tetdeploy.storage.files import sha256_of, write_json

URI = "s3://models/digits"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("cluster") / "runs"
    printed("train", "--epochs", 1, "--width", 0.125, "--runs", runs)
    return runs / "digits-convsnn"


def test_a_run_becomes_a_repository_and_then_its_next_version(run: Path, tmp_path: Path) -> None:
    arguments = ["export", run, "--layout", "dynamic", "--check", 20, "--format", "triton-repository", "-o", tmp_path]
    output = printed(*arguments, "--json", tmp_path / "written.json")
    assert f"{tmp_path}/digits-convsnn-stream/1   onnxruntime_onnx" in output
    assert output.endswith(f"next: tritonserver --model-repository {shlex.quote(str(tmp_path))}   (docs/cluster.md)\n")
    assert output.count("next: ") == 1
    models = json.loads((tmp_path / "written.json").read_text())["models"]
    assert [(m["name"], m["version"]) for m in models] == [("digits-convsnn", 1), ("digits-convsnn-stream", 1)]
    served = (tmp_path / "digits-convsnn" / "1" / "model.onnx").read_bytes()
    assert served == (run / "model-dynamic.onnx").read_bytes()
    assert (run / "model-step.reference.npz").exists()
    again = printed("export", run / "model-step.onnx", "--format", "triton-repository", "-o", tmp_path)
    assert f"{tmp_path}/digits-convsnn-stream/2" in again


def test_paths_with_brackets_are_shown_whole(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[red]"
    folder.mkdir()
    model, image, result = folder / "m.onnx", folder / "[bold].png", folder / "r.json"
    Image.new("L", (8, 8)).save(image)
    output = printed("export", run, "--layout", "dynamic", "--check", 20, "-o", model)
    assert f"{model}   " in output and f"next: tetdeploy sweep '{model}'\n" in output
    output = printed("export", model, "--format", "triton-repository", "--name", "m", "-o", folder / "triton")
    assert f"{folder / 'triton' / 'm'}/1   onnx" in output and f"--model-repository '{folder / 'triton'}'   " in output
    output = printed(
        "export", model, "--format", "kserve", "--storage-uri", URI, "--name", "m", "-o", folder / "m.yaml"
    )
    assert f"{folder / 'm.yaml'}   m" in output and f"copy '{model}', '{folder}/m.reference.npz' to" in output
    assert f"kubectl apply -f '{folder / 'm.yaml'}'   (docs" in output
    output = printed("predict", model, image, "--json", result)
    assert "[bold].png" in output and f"{result}\n" in output
    output = printed("validate", model, "--json", result)
    assert f"{result}\nnext: tetdeploy report '{result}'\n" in output


def test_the_inference_service_is_what_kserve_and_our_server_know(tmp_path: Path) -> None:
    file, model = tmp_path / "digits.yaml", Path(shutil.copy(exported("step"), tmp_path))
    arguments = "export", model, "--format", "kserve", "--name", "digits-t4", "--storage-uri", URI, "-o", file
    quoted = shlex.quote(str(model))
    assert f"next: copy {quoted} to {URI}, then kubectl apply -f {shlex.quote(str(file))}" in printed(*arguments)
    beside = [tmp_path / f"{model.stem}{ending}" for ending in (".reference.npz", ".exit.json")]
    beside[0].touch()
    write_json(beside[1], {"threshold": 0.9, "criterion": "margin", "min_T": 1, "T": 3, "model_sha256": "another's"})
    said = printed(*arguments)
    assert f"{beside[1]} holds the threshold of another model" in said
    assert f"next: copy {quoted}, {shlex.quote(str(beside[0]))} to {URI}, then" in said
    write_json(beside[1], json.loads(beside[1].read_text()) | {"model_sha256": sha256_of(model)})
    all_three = ", ".join(shlex.quote(str(path)) for path in (model, *beside))
    assert f"next: copy {all_three} to {URI}, then" in printed(*arguments)
    service = yaml.safe_load(file.read_text())
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"]["name"] == "digits-t4"
    (container,) = service["spec"]["predictor"]["containers"]
    assert (container["name"], container["image"]) == ("kserve-container", "tetdeploy:latest")
    assert container["env"] == [{"name": "STORAGE_URI", "value": URI}, {"name": "PROTOCOL", "value": "v2"}]
    command, *arguments = container["args"]
    assert command == "serve"
    options = serve.make_context("serve", list(arguments)).params  # refuses an option that the command does not have
    assert options["models"] == (f"digits-t4=/mnt/models/{model.name}",)
    assert (options["host"], options["http_port"], options["threads"]) == ("::", 8080, 2)
    assert (options["runtime"], options["max_state"]) == ("onnxruntime", 250e6)
    assert container["resources"] == {kind: {"cpu": "2", "memory": "2Gi"} for kind in ("requests", "limits")}
    confined = container["securityContext"]
    assert confined["runAsNonRoot"] and not confined["allowPrivilegeEscalation"]
    assert confined["capabilities"] == {"drop": ["ALL"]} and confined["seccompProfile"] == {"type": "RuntimeDefault"}
    assert all(container[f"{kind}Probe"]["timeoutSeconds"] == 5 for kind in ("readiness", "startup", "liveness"))
    assert container["ports"][0]["containerPort"] == container["readinessProbe"]["httpGet"]["port"] == 8080
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    starts, (_, sleep) = container["startupProbe"], container["lifecycle"]["preStop"]["exec"]["command"]
    assert starts["httpGet"] == container["livenessProbe"]["httpGet"]
    assert starts["periodSeconds"] * starts["failureThreshold"] >= 300  # a liveness probe would end the pod after 15 s
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] > int(sleep) + GRACE_SECONDS


def test_graphs_of_openvino_are_served_by_it(tmp_path: Path) -> None:
    file, model = tmp_path / "m.yaml", exported("step", target="openvino")
    output = printed("export", model, "--format", "kserve", "--name", "m", "--storage-uri", URI, "-o", file)
    assert "tetdeploy:latest needs the runtime: docker build --build-arg RUNTIME=openvino" in output
    (container,) = yaml.safe_load(file.read_text())["spec"]["predictor"]["containers"]
    assert serve.make_context("serve", container["args"][1:]).params["runtime"] == "openvino"
    assert "ARG RUNTIME=cpu\n" in (ROOT / "examples" / "serving" / "Dockerfile").read_text()


@pytest.mark.parametrize("folder", ["_r19 (2)_", "R19.2-", "r19__2"])
def test_a_service_is_called_as_the_folder_of_its_model(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    model = shutil.copy(exported("step"), tmp_path / folder)
    printed("export", model, "--format", "kserve", "--storage-uri", URI)
    service = yaml.safe_load((tmp_path / folder / "kserve.yaml").read_text())
    assert service["metadata"]["name"] == "r19-2"


KSERVES = {"minReplicas"}  # of the fields of a predictor; the others are a pod's, inline


def unknown_fields(value: Any, kind: str) -> Iterator[str]:
    """What a value has and its type in Kubernetes has not."""
    kubernetes = pytest.importorskip("kubernetes.client")
    if listed := re.fullmatch(r"[Ll]ist\[(\w+)\]", kind):
        for entry in value:
            yield from unknown_fields(entry, listed[1])
    elif isinstance(value, dict) and not kind.startswith(("dict", "Dict")):
        known = getattr(kubernetes, kind)
        fields = {known.attribute_map[field]: inner for field, inner in known.openapi_types.items()}
        for key, inner in value.items():
            yield from unknown_fields(inner, fields[key]) if key in fields else [f"{kind} has no {key}"]


def test_every_field_is_one_of_a_pods() -> None:
    service = inference_service("a" * 53, model_file="m", storage_uri=URI, image="tetdeploy:1", runtime="openvino")
    assert list(service) == ["apiVersion", "kind", "metadata", "spec"] and list(service["spec"]) == ["predictor"]
    assert not list(unknown_fields(service["metadata"], "V1ObjectMeta"))
    pod = {name: value for name, value in service["spec"]["predictor"].items() if name not in KSERVES}
    assert not list(unknown_fields(pod, "V1PodSpec"))
    pod["containers"][0]["readinessProbe"]["httpGet"]["prot"] = 1
    assert list(unknown_fields(pod, "V1PodSpec")) == ["V1HTTPGetAction has no prot"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--format", "kserve"), 2, "--format kserve needs --storage-uri"),
        (("--format", "kserve", "--storage-uri", "models/digits"), 1, "'models/digits' is no storage URI"),
        (("--format", "kserve", "--storage-uri", URI, "--name", "-x"), 1, "is no name for a service of Kubernetes"),
        (("--format", "triton-repository", "--name", "a/b"), 1, "'a/b' is no name for a served model"),
        (("--format", "triton-repository", "--T", 3), 2, "--T: .* is exported already; give the run to export anew"),
        (("--format", "triton-repository", "--image", "x"), 2, "--image goes with --format kserve"),
        (("--name", "x"), 2, "--name goes with --format triton-repository or kserve"),
        (("--format", "nir", "--storage-uri", URI), 2, "--storage-uri goes with --format kserve"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: tuple[object, ...], code: int, message: str, tmp_path: Path
) -> None:
    assert re.search(message, refused("export", exported("step"), "-o", tmp_path / "out", *options, code=code))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("triton-repository", "--name", "a/b"), 1, "'a/b' is no name for a served model"),
        (("triton-repository", "--with-state"), 2, "--with-state cannot go with --format triton-repository"),
        (("triton-repository", "--target", "tensorrt-rtx"), 1, "the export is for tensorrt-rtx, which Triton has not"),
        (
            ("kserve", "--storage-uri", URI, "--name", "Digits_T4"),
            1,
            "'Digits_T4' is no name for a service of Kubernetes",
        ),
        (("kserve", "--storage-uri", URI, "--name", ""), 1, "'' is no name for a service of Kubernetes"),
        (("kserve", "--storage-uri", URI, "--image", "x: {y"), 1, "'x: {y' is no name of a container image"),
        (("kserve", "--storage-uri", URI, "--image", ""), 1, "'' is no name of a container image"),
        (("triton-repository", "--name", ""), 1, "'' is no name for a served model"),
        (("kserve", "--storage-uri", URI, "--name", "7"), 1, "'7' is no name for a service of Kubernetes"),
        (("kserve", "--storage-uri", URI, "--name", "a" * 54), 1, "has at most 53 of them, as KServe adds -predictor"),
        (("kserve", "--storage-uri", "models/digits"), 1, "'models/digits' is no storage URI"),
        (
            ("kserve", "--storage-uri", URI, "--target", "cuda"),
            1,
            "the export is for cuda, and the container that KServe",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_export(
    run: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.iterdir()}
    assert message in refused("export", run, "--format", *options, code=code)
    assert {file: file.stat().st_mtime_ns for file in run.iterdir()} == before


def test_a_graph_that_our_server_does_not_run_becomes_no_service(tmp_path: Path) -> None:
    printed("export", exported("step"), "--format", "triton-repository", "--name", "m", "-o", tmp_path)
    graph = tmp_path / "m-stream" / "1" / "model.onnx"
    assert "is a step graph for Triton" in refused(
        "export", graph, "--format", "kserve", "--storage-uri", URI, "--name", "m"
    )
    assert [file.name for file in graph.parent.iterdir()] == ["model.onnx"]


def test_what_is_no_model_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign.onnx").write_bytes(b"no model")
    (tmp_path / "old.engine").write_bytes(b"an engine")
    for file_format, model, message in (
        ("kserve", "foreign.onnx", "foreign.onnx cannot be loaded: not an ONNX model, or a damaged one"),
        ("kserve", "none.onnx", "no model at"),
        ("kserve", "old.engine", "is a TensorRT engine; the container that KServe runs takes the .onnx file"),
        ("triton-repository", "none.onnx", "no model at"),
        ("triton-repository", "old.engine", "there is no .*old.engine.json"),
    ):
        options = ("--storage-uri", URI) if file_format == "kserve" else ()
        assert re.search(message, refused("export", tmp_path / model, "--format", file_format, *options))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["foreign.onnx", "old.engine"]


def test_the_image_is_made_of_what_is_there() -> None:
    lines = (ROOT / "examples" / "serving" / "Dockerfile").read_text().splitlines()
    stages = [k for k, line in enumerate(lines) if line.startswith("FROM")]
    build, image = lines[: stages[1]], lines[stages[1] :]
    assert build[stages[0]] == "FROM python:3.12 AS build"  # which has a C compiler, as slim has not
    assert image[0] == "FROM python:3.12-slim" and "COPY --from=build /wheel /wheel" in image
    copied = [name for line in build if line.startswith("COPY") for name in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    [user] = [line.partition(" ")[2] for line in image if line.startswith("USER")]
    assert int(user) > 0  # of a name Kubernetes would not know that it is not root's
    entry = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith(("ENTRYPOINT", "CMD"))]
    assert [words[0] for words in entry] == ["tetdeploy", "serve"]
    serve.make_context("serve", entry[1][1:])
