"""Downloads that stopped halfway, pointers in the place of files, files beside others, and addresses of the Hub."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from chuk_lazarus.introspection.moe import ModelUnreadable, MoELayoutService, MoETypeService
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.repositories.find import DEMO_FOLDER

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 4976698672\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """`demo:native` with a file for each of its layers, and one for the rest."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = load_file(DEMO_FOLDER / "native/model.safetensors")
    places = {name: 1 + (".layers.0." in name) + 2 * (".layers.1." in name) for name in tensors}
    files = {name: f"model-{place:05}-of-00003.safetensors" for name, place in places.items()}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_bytes((DEMO_FOLDER / "native/config.json").read_bytes())
    return folder


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", INDEX])
def test_a_git_lfs_pointer_is_called_one(sharded: Path, name: str) -> None:
    (sharded / name).write_bytes(POINTER)
    with pytest.raises(ModelUnreadable, match=f"{name} is a Git LFS pointer") as caught:
        MoETypeService.analyze(str(sharded))
    assert "git lfs pull" in caught.value.hint


def test_a_git_lfs_pointer_to_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(POINTER)
    with pytest.raises(ModelUnreadable, match=r"model\.gguf is a Git LFS pointer"):
        MoETypeService.analyze(str(tmp_path))


def test_half_a_download_is_analysed_where_the_layer_is_there(sharded: Path) -> None:
    whole = MoETypeService.analyze(str(sharded), layer=0)
    (sharded / "model-00003-of-00003.safetensors").unlink()
    half = MoETypeService.analyze(str(sharded))
    assert half.layers[0].projections == whole.layers[0].projections
    assert any("1 of 3 files are missing, such as model-00003-of-00003.safetensors" in note for note in half.notes)
    with pytest.raises(ModelUnreadable, match=r"model-00003-of-00003\.safetensors is missing"):
        MoETypeService.analyze(str(sharded), layer=1)


def test_an_index_of_another_split_is_called_stale(sharded: Path) -> None:
    for file in sorted(sharded.glob("*.safetensors")):
        file.rename(sharded / file.name.replace("00003", "00007"))
    with pytest.raises(ModelUnreadable, match=r"index\.json is stale: it lists model-00001-of-00003\.safetensors"):
        Experts.open(str(sharded))


@pytest.mark.parametrize("name", ["model.safetensors", "mtp.safetensors"])
def test_weights_beside_those_of_the_index_are_named_and_not_read(sharded: Path, name: str) -> None:
    shards = {file.name: load_file(file) for file in sharded.glob("*.safetensors")}
    spoilt = {tensor: np.zeros_like(value) for shard in shards.values() for tensor, value in shard.items()}
    before = MoETypeService.analyze(str(sharded), layer=0)
    save_file(spoilt, sharded / name)
    after = MoETypeService.analyze(str(sharded), layer=0)
    assert after.layers == before.layers
    assert any(note.startswith(f"{name} beside the files of {INDEX} was not read") for note in after.notes)


def test_weights_beside_a_single_file_are_named(tmp_path: Path) -> None:
    save_file(load_file(DEMO_FOLDER / "native/model.safetensors"), tmp_path / "model.safetensors")
    save_file({"mtp.norm.weight": np.ones(4, np.float32)}, tmp_path / "mtp.safetensors")
    assert "mtp.safetensors beside model.safetensors was not read" in MoELayoutService.describe(str(tmp_path)).notes


@pytest.fixture
def uneven(tmp_path: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
    """A folder with the config of `demo:native`, and its tensors without the last expert of layer 1."""
    tensors = dict(load_file(DEMO_FOLDER / "native/model.safetensors"))
    for name in [name for name in tensors if ".layers.1.block_sparse_moe.experts.7." in name]:
        del tensors[name]
    (tmp_path / "config.json").write_bytes((DEMO_FOLDER / "native/config.json").read_bytes())
    return tmp_path, tensors


def test_the_router_decides_how_many_experts_there_are(uneven: tuple[Path, dict[str, NDArray[Any]]]) -> None:
    folder, tensors = uneven
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelUnreadable, match="layer 1 lacks the gate projection of expert 7"):
        MoETypeService.analyze(str(folder), layer=1)
    router = "model.layers.1.block_sparse_moe.gate.weight"
    save_file({**tensors, router: tensors[router][:7]}, folder / "model.safetensors")
    report = MoETypeService.analyze(str(folder), layers="all")
    assert "layer 1 has 7 experts, as its router says, although config.json says 8" in report.notes
    assert report.experts_range == (7, 8)
    assert "7 to 8" in report._repr_html_()


@pytest.mark.parametrize("said", [{"quantization_config": {"quant_method": "fp8"}}, {}])
def test_an_expert_without_its_scale_is_named(tmp_path: Path, said: dict[str, Any]) -> None:
    tensors: dict[str, NDArray[Any]] = dict(load_file(DEMO_FOLDER / "native/model.safetensors"))
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        tensors[name.replace("weight", "weight_scale")] = np.asarray(1.0, np.float32)
    config = json.loads((DEMO_FOLDER / "native/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | said))
    for expert in (0, 4, 7):
        lacking = f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight_scale"
        save_file({n: value for n, value in tensors.items() if n != lacking}, tmp_path / "model.safetensors")
        with pytest.raises(ModelUnreadable, match=f"layer 0: expert {expert} lacks the weight_scale"):
            MoETypeService.analyze(str(tmp_path))
