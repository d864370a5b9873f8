"""A Triton model repository: each configuration against the schema and its graph, and a stand-in for Triton that feeds
ONNX Runtime exactly as the configuration says, against the engine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_helpers import LAYOUTS, digits, engine, exported, frames

pytest.importorskip("tritonclient")
from google.protobuf import text_format

from tetdeploy.engine import Engine
from tetdeploy.export import repository
from tetdeploy.export.repository import add_to_repository, triton
from tetdeploy.export.tensorrt import BuildConfig, build_engine

Array = np.ndarray[Any, Any]
DTYPES = {"TYPE_FP32": np.float32, "TYPE_UINT8": np.uint8}
SERVED = [(layout, options) for layout, options in LAYOUTS if "with_state" not in options]


def read_config(folder: Path) -> Any:
    """As Triton reads it: an unknown field or value is an error."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), triton.ModelConfig())


def dtype_of(tensor: Any) -> Any:
    return DTYPES[triton.DataType.Name(tensor.data_type)]


@dataclass
class StandIn:
    """Triton with its ONNX Runtime backend, as far as a configuration tells it what to do."""

    folder: Path
    sequences: dict[int, dict[str, Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import onnxruntime as ort

        newest = max(int(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        file = self.folder / str(newest) / "model.onnx"
        self.config = read_config(self.folder)
        self.session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])

    def infer(self, *requests: dict[str, Array], sequences: Sequence[tuple[int, bool]] = ()) -> list[dict[str, Array]]:
        """Requests of one batch; `sequences` are their (id, start) where the model keeps state."""
        for request in requests:
            assert request.keys() == {v.name for v in self.config.input}
            for v in self.config.input:
                dims = zip(v.dims, request[v.name].shape[1:], strict=True)
                assert all(dim in (-1, size) for dim, size in dims) and request[v.name].dtype == dtype_of(v)
        feed = {v.name: np.concatenate([request[v.name] for request in requests]) for v in self.config.input}
        assert len(next(iter(feed.values()))) <= self.config.max_batch_size
        states = self.config.sequence_batching.state
        for id_, start in sequences:
            if start:
                zeros = {s.input_name: s.initial_state[0] for s in states}
                assert all(zero.zero_data for zero in zeros.values())
                self.sequences[id_] = {name: np.zeros((1, *zero.dims), dtype_of(zero)) for name, zero in zeros.items()}
        for state in states:
            feed[state.input_name] = np.concatenate([self.sequences[id_][state.input_name] for id_, _ in sequences])
        names = [v.name for v in self.config.output] + [s.output_name for s in states]
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        for row, (id_, _) in enumerate(sequences):
            self.sequences[id_] = {s.input_name: outputs[s.output_name][row : row + 1] for s in states}
        ends = np.cumsum([len(next(iter(request.values()))) for request in requests])[:-1]
        split = {v.name: np.split(outputs[v.name], ends) for v in self.config.output}
        return [{name: parts[k] for name, parts in split.items()} for k in range(len(requests))]


def served(tmp_path: Path, layout: str, **options: Any) -> Path:
    (added,) = add_to_repository(tmp_path / "models", [exported(layout, **options)], "digits")
    assert added.version == 1 and added.name == "digits" + "-stream" * (layout == "step")
    return added.path


@pytest.mark.parametrize(("layout", "options"), SERVED, ids=str)
def test_the_configuration_is_that_of_the_graph(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = served(tmp_path, layout, **options)
    file = folder / "1" / "model.onnx"
    config, graph = read_config(folder), onnx.load(file).graph
    assert repository._read(file).metadata["encoded"] == []  # what a step graph encodes once is state as any other
    onnx_type = {"TYPE_FP32": onnx.TensorProto.FLOAT, "TYPE_UINT8": onnx.TensorProto.UINT8}

    def of_config(name: str, tensor: Any) -> tuple[str, int, list[int]]:
        return name, onnx_type[triton.DataType.Name(tensor.data_type)], list(tensor.dims)

    def of_graph(value: onnx.ValueInfoProto) -> tuple[str, int, list[int]]:
        batch, *dims = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        return value.name, value.type.tensor_type.elem_type, [-1 if d.dim_param else d.dim_value for d in dims]

    states = config.sequence_batching.state
    inputs = [of_config(v.name, v) for v in config.input] + [of_config(s.input_name, s) for s in states]
    outputs = [of_config(v.name, v) for v in config.output] + [of_config(s.output_name, s) for s in states]
    assert sorted(inputs) == sorted(of_graph(v) for v in graph.input)
    assert sorted(outputs) == sorted(of_graph(v) for v in graph.output)
    assert [of_config(s.input_name, s.initial_state[0]) for s in states] == [of_config(s.input_name, s) for s in states]
    assert all(s.initial_state[0].zero_data and s.initial_state[0].name for s in states)
    assert config.WhichOneof("scheduling_choice") == ("sequence_batching" if layout == "step" else "dynamic_batching")
    assert (config.name, config.platform) == (folder.name, "onnxruntime_onnx")
    assert [group.kind for group in config.instance_group] == [triton.ModelInstanceGroup.KIND_CPU]
    (classes,) = (v.label_filename for v in config.output if v.name == "logits")
    assert (folder / classes).read_text().splitlines() == list(digits().class_names)


def test_a_server_keeps_1024_streams_that_are_idle_for_a_minute_at_most() -> None:
    batching = repository.model_config(repository._read(exported("step")), "m-stream").sequence_batching
    assert (batching.oldest.max_candidate_sequences, batching.max_sequence_idle_microseconds) == (1024, 60_000_000)


def test_states_are_in_one_order_by_the_names_of_inputs_and_of_outputs() -> None:
    source = repository._read(exported("step"))
    first, second, *rest = source.metadata["states"]
    states = [first | {"output": second["output"]}, second | {"output": first["output"]}, *rest]
    with pytest.raises(AssertionError):
        repository.model_config(replace(source, metadata=source.metadata | {"states": states}), "m-stream")


def test_requests_of_any_T_are_answered_as_the_engine_answers(tmp_path: Path) -> None:
    server, images = StandIn(served(tmp_path, "dynamic")), digits().images
    for T in (1, 5):
        steps = [np.zeros((n, T), np.uint8) for n in (1, 3)]
        answers = server.infer({"x": images[:1], "steps": steps[0]}, {"x": images[1:4], "steps": steps[1]})
        expected = engine("dynamic").run(images[:4], T)
        np.testing.assert_allclose(np.concatenate([a["logits"] for a in answers]), expected.logits, atol=1e-5)
        np.testing.assert_allclose(np.concatenate([a["per_step"] for a in answers]), expected.per_step, atol=1e-5)


@pytest.mark.parametrize(("layout", "T"), [("unrolled", 3), ("dynamic", 4)])
def test_frames_are_answered_as_the_engine_answers(layout: str, T: int, tmp_path: Path) -> None:
    options = {"encoding": "frames"} | ({"T": T} if layout == "unrolled" else {})
    x = frames(4, T)
    (answer,) = StandIn(served(tmp_path, layout, **options)).infer({"x": x})
    np.testing.assert_allclose(answer["logits"], engine(layout, **options).run(x).logits, atol=1e-5)


@pytest.mark.parametrize("encoding", ["direct", "frames"])
def test_interleaved_streams_are_answered_as_the_engine_answers(encoding: str, tmp_path: Path) -> None:
    server, images = StandIn(served(tmp_path, "step", encoding=encoding)), digits().images
    black = np.zeros_like(images[:1])  # what `sequence.shown` holds before the first step
    shown = {7: [images[0:1]] * 4, 8: [black, black, images[1:2]], 9: [images[2:3], images[3:4], images[2:3]]}
    streams = {id_: engine("step", encoding=encoding).stream() for id_ in shown}
    for batch in ([7], [7, 8], [8, 9], [7, 8, 9], [9], [7], [8]):  # the last: a sequence begins once more
        now = [(id_, not streams[id_].t or not shown[id_]) for id_ in batch]
        for id_, start in now:
            if start:
                streams[id_].reset()
        images_now = [shown[id_].pop(0) if shown[id_] else images[5:6] for id_ in batch]
        answers = server.infer(*({"x": image} for image in images_now), sequences=now)
        for id_, image, answer in zip(batch, images_now, answers, strict=True):
            expected = streams[id_].push(image)
            np.testing.assert_allclose(answer["logits"], expected.logits, atol=1e-5)
            np.testing.assert_allclose(answer["per_step"][:, 0], expected.step_logits, atol=1e-5)
    assert [streams[id_].t for id_ in shown] == [4, 1, 3]


def test_an_image_shown_again_is_not_encoded_again(tmp_path: Path) -> None:
    server, images = StandIn(served(tmp_path, "step")), digits().images
    server.infer({"x": images[:1]}, sequences=[(1, True)])
    current = server.sequences[1]["encoded.0"]
    assert current.any()
    server.sequences[1]["encoded.0"] = np.full_like(current, 0.25)
    server.infer({"x": images[:1]}, sequences=[(1, False)])
    assert (server.sequences[1]["encoded.0"] == 0.25).all()
    server.infer({"x": images[1:2]}, sequences=[(1, False)])
    assert (server.sequences[1]["encoded.0"] != 0.25).any()


def test_the_mean_of_a_long_sequence_neither_drifts_nor_stands_still(tmp_path: Path) -> None:
    server, x = StandIn(served(tmp_path, "step")), digits().images[:1]
    server.infer({"x": x}, sequences=[(1, True)])
    stream = engine("step").stream()
    later = np.stack([stream.push(x).step_logits for _ in range(65)][1:]).mean(0, dtype=np.float64)
    state = server.sequences[1]
    state["sequence.t"][:], state["sequence.mean"][:] = 2**24, later  # as if all steps so far had been like those
    for _ in range(64):
        (answer,) = server.infer({"x": x}, sequences=[(1, False)])
    np.testing.assert_allclose(answer["logits"], later, rtol=1e-6)
    server.sequences[1]["sequence.mean"][:] = later + 100
    (answer,) = server.infer({"x": x}, sequences=[(1, False)])
    assert (answer["logits"] < later + 100).all()


@pytest.mark.parametrize("batch", [32, 128])
def test_a_new_version_keeps_the_configuration(batch: int, tmp_path: Path) -> None:
    folder = served(tmp_path, "unrolled", T=3)
    edited = (folder / "config.pbtxt").read_text().replace("max_batch_size: 64", f"max_batch_size: {batch}  # ours")
    assert "# ours" in edited
    (folder / "config.pbtxt").write_text(edited)
    for other in ("10", "²"):  # a digit, which int() takes for none
        (folder / other).mkdir()
    (added,) = add_to_repository(folder.parent, [exported("unrolled", T=3)], "digits")
    assert (added.version, added.path) == (11, folder)
    assert (folder / "11" / "model.onnx").read_bytes() == exported("unrolled", T=3).read_bytes()
    assert (folder / "config.pbtxt").read_text() == edited


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (
            "dynamic",
            {},
            r"has the inputs x UINT8 \[1, 8, 8\] and the new version .*, steps UINT8 \[-1\], but one config",
        ),
        (
            "unrolled",
            {"T": 4},
            r"has the outputs .*per_step FP32 \[3, 10\] and the new version .*per_step FP32 \[4, 10\]",
        ),
    ],
)
def test_a_new_version_of_another_form_is_refused(layout: str, options: Any, message: str, tmp_path: Path) -> None:
    folder = served(tmp_path, "unrolled", T=3)
    with pytest.raises(ValueError, match=message):
        add_to_repository(folder.parent, [exported(layout, **options)], "digits")
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "config.pbtxt", "labels.txt"]


def test_other_classes_are_no_new_version(tmp_path: Path) -> None:
    folder = served(tmp_path, "unrolled", T=3)
    (folder / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="has the classes cat, dog and the new version 0, 1, 2"):
        add_to_repository(folder.parent, [exported("unrolled", T=3)], "digits")


def test_other_states_are_no_new_version(tmp_path: Path) -> None:
    folder = served(tmp_path, "step")
    config = read_config(folder)
    config.sequence_batching.state[0].dims[0] += 1
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
    with pytest.raises(ValueError, match=r"has the states .* and the new version"):
        add_to_repository(folder.parent, [exported("step")], "digits")


@pytest.mark.parametrize(
    "config",
    [
        None,
        "",
        'name: "theirs"',
        'parameters { key: "mode" value { string_value: "theirs" } }',
        "no configuration",
    ],
)
def test_a_foreign_folder_is_left_alone(config: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    if config is not None:
        (folder / "config.pbtxt").write_text(config)
    before = list(folder.iterdir())
    with pytest.raises(ValueError, match="is there and was not written by tetdeploy; choose another --name or folder"):
        add_to_repository(tmp_path, [exported("step"), exported("dynamic")], "digits")
    assert list(tmp_path.iterdir()) == [folder] and list(folder.iterdir()) == before


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "digits-stream" not in str(self):
            return write(self, data)
        write(self, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        add_to_repository(tmp_path, [exported("dynamic"), exported("step")], "digits")
    assert caught.value.filename == str(tmp_path / "digits-stream")
    assert list(tmp_path.iterdir()) == []


def test_what_triton_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot keep in chunks of T; for streams export with --layout step"):
        add_to_repository(tmp_path, [exported("unrolled", T=3, with_state=True)], "digits")
    with pytest.raises(ValueError, match="would all be digits; add one of them"):
        add_to_repository(tmp_path, [exported("unrolled", T=3), exported("dynamic")], "digits")
    for name in ("", "..", "a/b", "größe"):
        with pytest.raises(ValueError, match=r"is no name for a served model, .*; choose one with --name"):
            add_to_repository(tmp_path, [exported("dynamic")], name)
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"foreign.onnx cannot be loaded"):
        add_to_repository(tmp_path / "models", [foreign], "digits")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("target", "kind", "accelerators"),
    [
        ("cpu", "KIND_CPU", ([], [])),
        ("openvino", "KIND_CPU", (["openvino"], [])),
        ("cuda", "KIND_GPU", ([], [])),
        ("tensorrt", "KIND_GPU", ([], ["tensorrt"])),
    ],
)
def test_the_target_says_where_triton_runs_it(target: str, kind: str, accelerators: Any, tmp_path: Path) -> None:
    config = read_config(served_with(tmp_path, target=target))
    assert [triton.ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group] == [kind]
    found = config.optimization.execution_accelerators
    on_both = (found.cpu_execution_accelerator, found.gpu_execution_accelerator)
    assert tuple([accelerator.name for accelerator in these] for these in on_both) == accelerators


def test_instances_are_the_owners_to_edit(tmp_path: Path) -> None:
    file = served(tmp_path, "dynamic") / "config.pbtxt"
    edited = file.read_text().replace("kind: KIND_CPU", "kind: KIND_GPU\n  gpus: 0").replace("count: 1", "count: 2")
    assert edited.count("KIND_GPU") == edited.count("count: 2") == 1
    file.write_text(edited)
    (added,) = add_to_repository(tmp_path / "models", [exported("dynamic")], "digits")
    assert (added.version, file.read_text()) == (2, edited)


def test_a_target_that_triton_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is for tensorrt-rtx, which Triton has not; choose --target"):
        served_with(tmp_path, target="tensorrt-rtx")


def test_a_line_break_in_a_class_name_moves_no_label(tmp_path: Path) -> None:
    names = ["a\nb", *"123456789"]
    assert (served_with(tmp_path, class_names=names) / "labels.txt").read_text() == "a b\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"


def test_class_names_that_are_no_utf8_are_told_apart(tmp_path: Path) -> None:
    names = [*map(os.fsdecode, (b"caf\xe9", b"caf\xe8")), *"23456789"]
    labels = (served_with(tmp_path, class_names=names) / "labels.txt").read_text(encoding="utf-8")
    assert labels.splitlines()[:3] == [r"caf\udce9", r"caf\udce8", "2"]


def served_with(tmp_path: Path, **changed: Any) -> Path:
    """`digits` from a graph whose metadata say something else."""
    graph = onnx.load(exported("unrolled", T=3))
    metadata = json.loads(graph.metadata_props[0].value) | changed
    graph.metadata_props[0].value = json.dumps(metadata)
    onnx.save(graph, tmp_path / "model.onnx")
    (added,) = add_to_repository(tmp_path / "models", [tmp_path / "model.onnx"], "digits")
    return added.path


def test_the_engine_does_not_take_a_graph_of_tritons(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a step graph for Triton, which keeps its state"):
        Engine(served(tmp_path, "step") / "1" / "model.onnx")


class TestEngines:
    """Plans. They are built by TensorRT-RTX, which needs no GPU, and said to be TensorRT's."""

    @pytest.fixture
    def built(self, tmp_path: Path) -> Any:
        pytest.importorskip("tensorrt_rtx")

        def build(model: Path, *, package: str = "tensorrt", **options: Any) -> Path:
            path = build_engine(model, tmp_path / f"{model.stem}.engine", BuildConfig("tensorrt-rtx", **options)).path
            manifest = path.with_name(f"{path.name}.json")
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"package": package}))
            return path

        return build

    @pytest.mark.parametrize(("layout", "options"), [("unrolled", {"T": 3}), ("dynamic", {"encoding": "frames"})])
    def test_a_plan_is_described_as_its_graph_is(self, layout: str, options: Any, built: Any, tmp_path: Path) -> None:
        plan = built(exported(layout, **options), batch=(1, 4, 16))
        (added,) = add_to_repository(tmp_path / "models", [plan], "plan")
        config, of_graph = read_config(added.path), read_config(served(tmp_path, layout, **options))
        assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 16)
        assert (list(config.input), list(config.output)) == (list(of_graph.input), list(of_graph.output))
        assert config.instance_group[0].kind == triton.ModelInstanceGroup.KIND_GPU
        assert not config.HasField("optimization")
        assert (added.path / "1" / "model.plan").read_bytes() == plan.read_bytes()

    def test_a_stream_is_built_from_the_graph_in_the_repository(self, built: Any, tmp_path: Path) -> None:
        graph = served(tmp_path, "step")
        plan = built(graph / "1" / "model.onnx", batch=(1, 8, 64))
        (added,) = add_to_repository(tmp_path / "plans", [plan], "digits")
        config, of_graph = read_config(added.path), read_config(graph)
        assert added.name == "digits-stream"
        assert config.sequence_batching == of_graph.sequence_batching
        assert (list(config.input), list(config.output)) == (list(of_graph.input), list(of_graph.output))
        with pytest.raises(
            ValueError, match="has the platform onnxruntime_onnx and the new version tensorrt_plan, but"
        ):
            add_to_repository(graph.parent, [plan], "digits")

    def test_engines_that_triton_cannot_run_are_refused(self, built: Any, tmp_path: Path) -> None:
        for model, options, message in (
            (
                exported("unrolled", T=3),
                {"package": "tensorrt-rtx"},
                "is an engine of tensorrt-rtx, which Triton has not",
            ),
            (exported("unrolled", T=3), {"batch": (2, 4, 4)}, "built for 2 images or more, and Triton may send one"),
            (exported("step"), {}, "is a step engine, .*build from the graph there, NAME-stream/1/model.onnx"),
        ):
            with pytest.raises(ValueError, match=message):
                add_to_repository(tmp_path / "models", [built(model, **options)], "digits")
        assert not (tmp_path / "models").exists()

    def test_a_plan_of_smaller_batches_is_no_new_version(self, built: Any, tmp_path: Path) -> None:
        model = exported("unrolled", T=3)
        add_to_repository(tmp_path / "models", [built(model, batch=(1, 4, 16))], "digits")
        with pytest.raises(
            ValueError, match=r"sends batches of up to 16 and the engine takes 8; build it with --batch"
        ):
            add_to_repository(tmp_path / "models", [built(model, batch=(1, 4, 8))], "digits")
