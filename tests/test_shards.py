"""Shards: every file within its limit, the same tensors back, and what is wrong with a carried folder is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tetdeploy.storage.shards import INDEX_NAME, holds_shards, read_shards, read_shards_content, write_shards

CONTENT = {"format": 1, "said": 'with "quotes"'}


def tensors_of(sizes: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer{k}.weight": torch.rand(size, generator=generator) for k, size in enumerate(sizes)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shards"
    write_shards(path, tensors_of([300, 50, 350, 300]), CONTENT, limit=2000)
    return path


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12), limit=st.integers(4700, 8000))
def test_tensors_come_back_and_no_file_is_larger(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder, tensors = tmp_path_factory.mktemp("s") / "shards", tensors_of(sizes)
    content = {"format": 1, "said": '"' * 700}  # 2800 bytes of each file's header
    write_shards(folder, tensors, content, limit=limit)
    found = read_shards(folder)
    assert list(found) == list(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(file.stat().st_size <= limit for file in folder.glob("*.safetensors"))
    assert read_shards_content(folder) == content


def test_the_index_follows_the_convention_of_hugging_face(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    names = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert sorted(file.name for file in folder.iterdir()) == [*names, INDEX_NAME]
    assert index["metadata"]["total_size"] == 4000
    for tensor, file in index["weight_map"].items():
        assert tensor in load_file(folder / file)


def test_files_beside_are_copied(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    write_shards(tmp_path / "s", tensors_of([3]), CONTENT, limit=2000, beside=[tmp_path / "metrics.jsonl"])
    assert (tmp_path / "s" / "metrics.jsonl").read_text() == "{}\n"


def test_a_tensor_larger_than_a_shard_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    said = r"layer1\.weight alone takes 0\.0123 MB; shards of at most 0\.002 MB are too small: allow 0\.02 MB"
    with pytest.raises(ValueError, match=said):
        write_shards(tmp_path / "s", tensors_of([10, 3000, 20]), CONTENT, limit=2000)
    assert not any(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_shards(tmp_path / "s", tensors_of([10]), CONTENT, limit=2000)
    assert not any(tmp_path.iterdir())


def test_what_is_wrong_with_a_folder_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"holds no shards: it has no {INDEX_NAME}"):
        read_shards(tmp_path)
    second = folder / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        second.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"model-00002-of-00003\.safetensors is not the file that .* copy it again"
        ):
            read_shards(folder)
    second.unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00003\.safetensors, of 3 shards; copy them all"):
        read_shards(folder)
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of-00003\.safetensors, .*, of 3 shards; copy them all"):
        read_shards_content(folder)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"metadata": {"total_size": 3}}',
        '{"metadata": {"sha256": {}}, "weight_map": {}}',
        '{"metadata": {"sha256": {"x": "0", "../x": "0"}}, "weight_map": {}}',
        '{"metadata": {"sha256": ["x"]}, "weight_map": {}}',
        '{"metadata": {"sha256": {"x": "0", "y": 0}}, "weight_map": {}}',
        '{"metadata": {"sha256": {"x": "0"}}, "weight_map": []}',
        "[" * 100_000,
    ],
)
def test_an_index_that_is_not_ours_is_refused(folder: Path, index: str) -> None:
    (folder / INDEX_NAME).write_text(index)
    with pytest.raises(ValueError, match=r"index\.json is damaged, or was not written by tetdeploy"):
        read_shards(folder)


@pytest.mark.parametrize("change", [dict.popitem, lambda files: files.update(nowhere=min(files.values()))])
def test_an_index_of_other_tensors_than_its_shards_have_is_refused(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"does not list the tensors of its shards"):
        read_shards(folder)


def test_content_is_read_without_torch(folder: Path) -> None:
    assert holds_shards(folder) and not holds_shards(folder.parent)
    code = (
        "import sys; from pathlib import Path; from tetdeploy.storage import shards;"
        "print(shards.read_shards_content(Path(sys.argv[1]))['format']);"
        "assert not {'torch', 'safetensors'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("1\n", "")
