"""Hostile input is read or refused: a short run of the fuzzer, what it has found so far, and readers against others.

`tests/hostile/fuzz/README.md` says what is hostile, and what is to come of it.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import Experts, MoECompressionService, MoELayoutService, MoETypeService
from chuk_lazarus.introspection.moe.errors import InvalidRequest, ModelUnreadable
from chuk_lazarus.introspection.moe.overlays.checkpoint.reader import read_overlay
from chuk_lazarus.introspection.moe.weights.repositories.local import LocalFile
from chuk_lazarus.introspection.moe.weights.safetensors_header import read_header
from hostile.fuzz.cases import CPU_SECONDS, HANGS_AFTER, OK, Bench, Hangs, Outcome, deadline, read_everything
from hostile.fuzz.corpus import (
    FIXTURES,
    JOBS,
    Files,
    Stopped,
    encoded_files,
    fixture_files,
    join_safetensors,
    read_folder,
    split_safetensors,
    write_folder,
)
from hub_server import HubServer

SHORT_RUN = 350  # cases

Header = dict[str, Any]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Path(os.path.realpath(tmp_path_factory.mktemp("bench"))), Path(os.environ["HF_HOME"]))


@pytest.fixture
def judge(bench: Bench) -> Callable[[Files, Callable[[str], Any]], Outcome]:
    """Write a model and run something on it, under the limits of time, memory and files."""

    def judge(files: Files, drive: Callable[[str], Any], cpu_seconds: float = CPU_SECONDS) -> Outcome:
        bench.make("safetensors", dict(files))
        with suppress(Exception, Hangs), deadline():
            drive(str(bench.model))  # what is imported late is no cost of the case
        return bench.judge(lambda: drive(str(bench.model)), sum(map(len, files.values())), cpu_seconds)

    return judge


Judge = Callable[..., Outcome]


def change(name: str, header: Callable[[Header], None], config: Header | None = None, body: bytes = b"") -> Files:
    """A fixture with another header, what its config says changed, and bytes put behind its tensors'."""
    files = fixture_files(name)
    found, data = split_safetensors(files["model.safetensors"])
    header(found)
    said = {**json.loads(files["config.json"]), **(config or {})}
    return {"model.safetensors": join_safetensors(found, data + body), "config.json": json.dumps(said).encode()}


def tiny(**changed: Any) -> Files:
    """A small Mixtral that is read, with more tensors or others."""
    name = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    shapes = {"w1": (12, 8), "w3": (12, 8), "w2": (8, 12)}
    tensors = {name.format(e, w): np.ones(shape, np.float32) for e in range(4) for w, shape in shapes.items()}
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": 4}
    return {"model.safetensors": save(tensors | changed), "config.json": json.dumps(config).encode()}


def with_config(files: Files, **said: Any) -> Files:
    return {**files, "config.json": json.dumps({**json.loads(files["config.json"]), **said}).encode()}


# Anything at all


@pytest.mark.long
def test_a_short_run(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tests/hostile/fuzz/run.py` runs many more."""
    root = Path(os.path.realpath(tmp_path))
    monkeypatch.setenv("LAZARUS_CACHE", str(root / "cache"))
    write_folder(root / "served", fixture_files("mixtral"))
    hub.add("fuzz/mixtral", root / "served")
    bench = Bench(root, Path(os.environ["HF_HOME"]), root / "served")
    seeds = bench.seeds()
    parsers = sorted({seed.parser for seed in seeds})
    failed = []
    for number in range(SHORT_RUN):
        random = Random(f"test/{number}")
        parser = random.choice(parsers)
        seed = random.choice([seed for seed in seeds if seed.parser == parser])
        _, outcome = bench.run(seed, random)
        if outcome.kind not in OK:
            failed.append(f"{number} {seed.parser} {seed.name}: {outcome.kind} {outcome.detail[-2000:]}")
    assert not failed, "\n".join(failed)


ELEMENTS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3")
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(ELEMENTS),
        "shape": st.lists(st.integers(0, 4), max_size=3),
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2).map(sorted),
    }
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.dictionaries(st.text("abc.", max_size=4), ENTRIES, max_size=3), st.integers(0, 48), st.booleans())
def test_a_header_that_the_safetensors_library_takes_means_the_same_here(
    tmp_path_factory: pytest.TempPathFactory, header: Header, size: int, fitting: bool
) -> None:
    """The library wants tensors without gaps in between; where it finds nothing wrong, neither do we."""
    if fitting:
        stop = 0
        for entry in header.values():
            start, stop = stop, stop + SIZES[entry["dtype"]] * int(np.prod(entry["shape"], dtype=int))
            entry["data_offsets"] = [start, stop]
        size = stop
    data = join_safetensors(header, bytes(range(256))[:size].ljust(size, b"\x01"))
    path = tmp_path_factory.getbasetemp() / "differential.safetensors"
    path.write_bytes(data)
    try:
        theirs = {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        theirs = None
    try:
        ours = {
            name: (info.dtype, list(info.shape), data[info.start : info.stop])
            for name, info in read_header("file", LocalFile(path)).items()
        }
    except ModelUnreadable:
        ours = None
    assert theirs is None or ours == theirs
    assert theirs is not None or not fitting


SIZES = dict(zip(ELEMENTS, (8, 4, 2, 2, 8, 4, 2, 1, 1, 1, 1), strict=True))


# Files that are not the model's


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "quantize_config.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file(judge: Judge, bench: Bench, name: str, kind: str) -> None:
    def drive(model: str) -> None:
        path = Path(model, name)
        if path.is_file():
            path.unlink()
        if not path.exists():
            os.mkfifo(path) if kind == "fifo" else path.mkdir()
        read_everything(model)

    outcome = judge(tiny(), drive)
    assert outcome.kind in ("read", "ModelUnreadable"), outcome.detail
    assert kind == "folder" or f"{name} is not a regular file" in outcome.detail


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "quantize_config.json", "tokenizer.json"])
@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "../outside/secret", "/proc/self/environ"])
def test_a_link_that_leads_to_something_else_is_never_copied(
    judge: Judge, bench: Bench, name: str, target: str
) -> None:
    """It is followed for reading, and says that it is no such file."""

    def drive(model: str) -> None:
        Path(model, name).unlink(missing_ok=True)
        Path(model, name).symlink_to(target)
        if name == "tokenizer.json":
            MoECompressionService.compress(model, bench.target, ranks=dict.fromkeys(("gate", "up", "down"), 1))
        else:
            read_everything(model)

    outcome = judge(tiny(), drive)
    assert outcome.kind == "ModelUnreadable", outcome.detail
    if name == "tokenizer.json":
        assert "tokenizer.json links to a file outside the model's folder" in outcome.detail
    assert not bench.target.exists()


@pytest.mark.parametrize("named", ["folder", "file"])
def test_links_of_the_hub_cache_are_followed(tmp_path: Path, named: str) -> None:
    """Its snapshots are links into its blobs, also where a folder elsewhere has links there."""
    repository = tmp_path / "models--org--name"
    for place in (repository / "snapshots/abc", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        for number, (name, data) in enumerate(tiny().items()):
            (repository / "blobs").mkdir(exist_ok=True)
            (repository / f"blobs/{number}").write_bytes(data)
            (place / name).symlink_to(os.path.relpath(repository / f"blobs/{number}", place))
        model = place if named == "folder" else place / "model.safetensors"
        assert Experts.open(str(model)).layer(0).count == 4


def test_weights_may_be_links_to_weights(tmp_path: Path) -> None:
    """As people have them who share large files between folders, and so may the config."""
    write_folder(tmp_path / "disk", tiny())
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(tmp_path / "disk/model.safetensors")
    assert Experts.open(str(model)).layer(0).count == 4
    (model / "config.json").symlink_to(tmp_path / "disk/config.json")
    assert Experts.open(str(model)).model_type == "mixtral"
    ranks = dict.fromkeys(("gate", "up", "down"), 1)
    MoECompressionService.compress(str(model), tmp_path / "overlay", ranks=ranks)
    (tmp_path / "disk/config.json").rename(tmp_path / "disk/private")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(tmp_path / "disk/private")
    assert Experts.open(str(model)).model_type == "mixtral"
    with pytest.raises(ModelUnreadable, match=r"config\.json links to a file outside the model's folder"):
        MoECompressionService.compress(str(model), tmp_path / "copy", ranks=ranks)


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "model/real", tiny())
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "model" / name).symlink_to(f"real/{name}")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "one").symlink_to("model/real/model.safetensors")
    for model in ("model", "link", "link/model.safetensors", "one.safetensors"):
        if model == "one.safetensors":
            (tmp_path / "one").rename(tmp_path / model)
        assert Experts.open(str(tmp_path / model)).layer(0).count == 4


@pytest.mark.parametrize("target", ["nowhere", "notes.txt"])
def test_a_link_that_leads_nowhere_beside_the_weights_does_no_harm(tmp_path: Path, target: str) -> None:
    write_folder(tmp_path, tiny())
    (tmp_path / "notes.txt").symlink_to(target)
    assert MoETypeService.analyze(str(tmp_path)).experts == 4


@pytest.mark.parametrize("count", ["9" * 9, "9" * 200])
def test_shards_whose_names_tell_of_many_others(judge: Judge, count: str) -> None:
    data = tiny()["model.safetensors"]
    outcome = judge({f"m-{n}-of-{count}.safetensors": data for n in "12"}, read_everything)
    assert (outcome.kind, "shard 3 of" in outcome.detail) == ("ModelUnreadable", len(count) < 20), outcome


@pytest.mark.parametrize("model", ["x" * 300 + "#encoder", "\0#encoder", "~#encoder", "/root/x" + "/y" * 3000 + "#z"])
def test_a_name_with_a_stack_that_no_file_can_have(model: str) -> None:
    with pytest.raises(ModelUnreadable):
        Experts.open(model)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_not_opened(bench: Bench, judge: Judge, file: str) -> None:
    outcome = judge({file: b"cos\nsystem\n(S'true'\ntR."}, read_everything)
    assert (outcome.kind, "pickle" in outcome.detail) == ("ModelUnreadable", True)


def test_code_of_a_checkpoint_is_not_run(judge: Judge) -> None:
    """Each case of the fuzzer has the same canary beside it."""
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "canary.Model")
    files = with_config(tiny(), auto_map=auto_map, model_file="canary.py", trust_remote_code=True)
    assert judge(files, lambda model: (read_everything(model), MoETypeService.analyze(model))).kind == "read"


@pytest.mark.parametrize("listed", ["../../x.gguf", "/x.gguf", "a/../../x.gguf", "..\\x.gguf", "\x1b.gguf"])
def test_a_hub_that_lists_files_outside_of_the_repository(
    tmp_path: Path, hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    from huggingface_hub import HfApi

    write_folder(tmp_path / "m", {"notes.txt": b""})
    hub.add("tests/outside", tmp_path / "m")
    asked = HfApi.model_info

    def answer(self: HfApi, *arguments: Any, **more: Any) -> Any:
        info = asked(self, *arguments, **more)
        info.siblings[0].rfilename = listed
        return info

    monkeypatch.setattr(HfApi, "model_info", answer)
    with pytest.raises(ModelUnreadable, match="no safetensors or GGUF file"):
        Experts.open("tests/outside")


# JSON


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_many_keys_of_which_the_last_is_there_twice(judge: Judge, file: str) -> None:
    text = b"{" + b",".join(b'"%d":1' % n for n in [*range(100_000), 99_999]) + b"}"
    outcome = judge(tiny() | {file: join_safetensors(text, b"") if "safe" in file else text}, read_everything)
    assert (outcome.kind, "'99999' appears twice" in outcome.detail) == ("ModelUnreadable", True), outcome


@pytest.mark.parametrize("depth", [90, 150, 300, 900])
def test_a_deep_config_is_written_or_refused(judge: Judge, bench: Bench, depth: int) -> None:
    """What can be read can be written again."""
    files = tiny() | {"config.json": b'{"x":' * depth + b"1" + b"}" * depth}
    ranks = dict.fromkeys(("gate", "up", "down"), 1)
    outcome = judge(files, lambda model: MoECompressionService.compress(model, bench.target, ranks=ranks, force=True))
    assert outcome.kind == ("read" if depth < 100 else "ModelUnreadable"), outcome.detail


@pytest.mark.parametrize("axes", [65, 100_000])
def test_a_tensor_of_many_axes(judge: Judge, axes: int) -> None:
    """The product of so many sizes alone would take minutes."""
    entry = {"dtype": "F32", "shape": [2**62] * axes, "data_offsets": [0, 0]}
    outcome = judge({"model.safetensors": join_safetensors({"a": entry}, b"")}, read_everything)
    assert (outcome.kind, "axes" in outcome.detail) == ("ModelUnreadable", True), outcome


@pytest.mark.parametrize(
    "name",
    [
        "layers.1." * 100_000 + "\n",
        ".lora_a.x" * 100_000 + "\n",
        "x.overlay" * 100_000,
        "layers." * 100_000,
        "_scale" * 100_000,
    ],
    ids=lambda name: name[:10],
)
def test_a_name_that_patterns_would_try_in_every_way(judge: Judge, name: str) -> None:
    assert judge(tiny(**{name: np.ones(1, np.float32)}), MoELayoutService.describe).kind in OK


def test_an_error_is_not_as_long_as_what_it_is_about(judge: Judge) -> None:
    name = f"model.layers.0.mlp.experts.{'x' * 100_000}.weight"
    outcome = judge(tiny(**{name: np.ones(1, np.float32)}), read_everything)
    assert (outcome.kind, len(outcome.detail) < 3000) == ("UnknownFormat", True)


@pytest.mark.long
def test_a_config_for_each_of_many_layers(judge: Judge) -> None:
    """The time is in proportion to the layers, and hardly depends on what else the config says."""

    def seconds(layers: int, more: int) -> float:
        name = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
        ones = {name.format(n, 0, w): np.ones((1, 1), np.float32) for n in range(layers) for w in ("w1", "w2", "w3")}
        said = {"per_layer_config": {str(n): {} for n in range(layers)}, **{str(n): n for n in range(more)}}
        files = {"model.safetensors": save(ones), "config.json": json.dumps(said).encode()}
        outcome = judge(files, MoELayoutService.describe, HANGS_AFTER)
        assert outcome.kind == "read", outcome
        return outcome.seconds

    rounds: list[list[float]] = []
    for _ in range(5):  # what else the machine does only adds time
        rounds.append([seconds(80, 80), seconds(800, 800), seconds(800, 100_000)])
        few, many, much = (min(times) for times in zip(*rounds, strict=True))
        if many < 40 * few and much < 3 * many:
            break
    assert many < 40 * few, "of ten times as many layers; 100 if each costs as many times more"
    assert much < 3 * many, "4 or more if the config is copied for each layer"


# Sizes


@pytest.mark.parametrize("experts", [10_000, 1_000_000])
def test_more_experts_than_any_model_has(judge: Judge, experts: int) -> None:
    """The matrix of the experts' products grows with the square of their number."""
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": np.ones((experts, 2, 1), np.float16),
        "model.layers.0.mlp.experts.down_proj": np.ones((experts, 1, 1), np.float16),
    }
    files = {"model.safetensors": save(tensors), "config.json": b'{"model_type": "mixtral"}'}
    outcome = judge(files, MoETypeService.analyze)
    assert (outcome.kind, f"{experts} experts" in outcome.detail) == ("UnknownFormat", True), outcome


def test_as_many_experts_as_a_model_may_have(judge: Judge) -> None:
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": np.ones((2048, 4, 2), np.float16),
        "model.layers.0.mlp.experts.down_proj": np.ones((2048, 2, 2), np.float16),
    }
    files = {"model.safetensors": save(tensors), "config.json": b'{"model_type": "mixtral"}'}
    assert judge(files, lambda model: Experts.open(model).layer(0).matrices(2047)).kind == "read"


def test_a_matrix_longer_than_any_model_has(judge: Judge) -> None:
    """512 neurons are looked for among all others at once."""
    length = 2**20
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": np.ones((2, 2 * length, 1), np.float16),
        "model.layers.0.mlp.experts.down_proj": np.ones((2, 1, length), np.float16),
    }
    files = {"model.safetensors": save(tensors), "config.json": b'{"model_type": "mixtral"}'}
    assert judge(files, MoETypeService.analyze).kind == "UnknownFormat"


@pytest.mark.sample
@pytest.mark.parametrize("shape", [[2**61, 0], [0, 2**61], [2**61, 1, 0], [0] * 40])
@pytest.mark.parametrize("dtype", ["F32", "I64", "F4", "F8_E4M3", "F6_E2M3"])
def test_tensors_without_bytes_that_claim_to_be_large(judge: Judge, bench: Bench, dtype: str, shape: list[int]) -> None:
    def add(header: Header) -> None:
        for name in ("model.embed.weight", "model.layers.0.block_sparse_moe.gate.bias", "model.norm.weight_scale"):
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}

    ranks = dict.fromkeys(("gate", "up", "down"), 1)
    files = change("mixtral", add, {"quantization_config": {"quant_method": "fp8"}})
    outcome = judge(files, lambda model: MoETypeService.analyze(model))
    assert outcome.kind in OK, outcome
    outcome = judge(files, lambda model: MoECompressionService.compress(model, bench.target, ranks=ranks, force=True))
    assert outcome.kind in OK, outcome


@pytest.mark.parametrize("count", [0, -1, -4, 10**30])
@pytest.mark.parametrize("where", ["config", "router"])
def test_a_count_of_experts_that_lie_in_one_matrix(judge: Judge, count: int, where: str) -> None:
    """Then no shape tells how many they are: another tensor does, or the config."""

    def change_router(header: Header) -> None:
        for name in [name for name in header if "router" in name]:
            del header[name]
            if where == "router":
                header[name] = {"dtype": "F32", "shape": [max(0, count), 0], "data_offsets": [0, 0]}

    said = json.loads(fixture_files("dbrx")["config.json"])["ffn_config"]
    config = {"ffn_config": {**said, "moe_num_experts": count if where == "config" else None}}
    assert judge(change("dbrx", change_router, config), read_everything).kind in ("UnknownFormat", "ModelUnreadable")


@pytest.mark.parametrize("shape", [[3, 16], [24, 3], [1, 24, 16], [24, 0], [0]])
def test_slices_that_are_not_alike(judge: Judge, shape: list[int]) -> None:
    """Grok-2's files each hold a slice of an expert's matrices."""
    files = fixture_files("published_grok2")
    sliced = max(file for file in files if file.endswith("TP-001.safetensors"))
    header, body = split_safetensors(files[sliced])
    name = next(name for name in header if "experts.1." in name)
    stop = 2 * int(np.prod(shape))
    header[name] |= {"shape": shape, "data_offsets": [len(body), len(body) + stop]}
    outcome = judge(files | {sliced: join_safetensors(header, body + bytes(stop))}, read_everything)
    assert (outcome.kind, "differ in dtype or shape" in outcome.detail) == ("ModelUnreadable", True), outcome.detail


def test_roles_that_are_never_in_one_layer(judge: Judge) -> None:
    files = rename(tiny(), "layers.0.block_sparse_moe.experts.0.w2", "layers.1.block_sparse_moe.experts.0.w2")
    for expert in "123":
        files = rename(files, f"layers.0.block_sparse_moe.experts.{expert}.w2", f"layers.1.x.{expert}.w2")
    outcome = judge(files, read_everything)
    assert (outcome.kind, "no layer has" in outcome.detail) == ("ModelUnreadable", True), outcome.detail


@pytest.mark.parametrize("said", [{"model_type": "gpt_oss"}, {"hidden_act": "swiglu_oai"}])
def test_an_activation_that_needs_a_gate_where_there_is_none(judge: Judge, said: Header) -> None:
    files = with_config(fixture_files("published_nomic_bert_moe"), **said)
    assert judge(files, lambda model: MoECompressionService.verify(model, inputs=4)).kind in OK


def test_a_bias_without_its_weight(judge: Judge) -> None:
    def only_biases(header: Header) -> None:
        for name in [name for name in header if name.endswith("gate_up_proj")]:
            del header[name]

    assert judge(change("gpt_oss", only_biases), read_everything).kind in ("ModelUnreadable", "UnknownFormat")


# What is said of the quantisation


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gptq_4", {"bits": []}),
        ("gptq_4", {"bits": {}}),
        ("gptq_4", {"checkpoint_format": []}),
        ("gptq_4", {"quant_method": "auto-round", "packing_format": []}),
        ("mlx_affine_4", {"mode": []}),
        ("mlx_affine_4", {"mode": {}}),
        ("pack_int4_sym", {"config_groups": {"": {"weights": {"num_bits": 4, "group_size": [32]}}}}),
        ("pack_int4_sym", {"config_groups": {"": {"weights": {"num_bits": 4, "group_size": {}}}}}),
        (
            "fp8_block",
            {"config_groups": {"": {"weights": {"strategy": "block", "block_structure": "9" * 5000 + "x1"}}}},
        ),
        ("fp8_block", {"config_groups": {"": {"weights": {"strategy": "block", "block_structure": "\u00b2x1"}}}}),
    ],
)
def test_quantisation_of_a_wrong_type_is_refused(judge: Judge, name: str, said: Header) -> None:
    key = "quantization" if name.startswith("mlx") else "quantization_config"
    files = encoded_files(name)
    own = json.loads(files["config.json"])[key]
    outcome = judge(with_config(files, **{key: {**own, **said}}), read_everything)
    assert outcome.kind in OK, outcome.detail


@pytest.mark.parametrize("leading", [10**9, 2**61])
def test_a_stack_of_packed_matrices_that_are_empty(judge: Judge, leading: int) -> None:
    files = encoded_files("pack_int4_sym", stacked=True)
    header, body = split_safetensors(files["model.safetensors"])
    for name in [name for name in header if name.endswith("weight_packed")]:
        header[name] |= {"shape": [leading, 32, 0], "data_offsets": [0, 0]}
    outcome = judge(files | {"model.safetensors": join_safetensors(header, body)}, read_everything)
    assert outcome.kind == "ModelUnreadable", outcome


@pytest.mark.parametrize("offset", [10**400, -(10**400), "1", None, True])
def test_an_offset_that_is_none(judge: Judge, offset: Any) -> None:
    files = encoded_files("bnb_nf4_nested")
    header, body = split_safetensors(files["model.safetensors"])
    for name in [name for name in header if "quant_state" in name]:
        start, stop = header[name]["data_offsets"]
        text = json.dumps({**json.loads(body[start:stop]), "nested_offset": offset}).encode()
        header[name] = {"dtype": "U8", "shape": [len(text)], "data_offsets": [len(body), len(body) + len(text)]}
        body += text
    outcome = judge(files | {"model.safetensors": join_safetensors(header, body)}, read_everything)
    assert (outcome.kind, "nested_offset" in outcome.detail) == ("ModelUnreadable", True), outcome.detail


def test_experts_in_two_kinds_of_four_bits(judge: Judge) -> None:
    """Their tensors differ in the name of a part alone."""
    files = rename(
        encoded_files("bnb_nf4"),
        "experts.1.w1.weight.quant_state.bitsandbytes__nf4",
        "experts.1.w1.weight.quant_state.bitsandbytes__fp4",
    )
    assert judge(files, read_everything).kind == "ModelUnreadable"


# What lies beside the experts


@pytest.mark.sample
@pytest.mark.parametrize("what", ["gate_up_proj_bias", "down_proj_bias", "router.bias"])
@pytest.mark.parametrize("shape", [[1], [2], [4], [1, 1], [4, 1], [4, 7], [0], [0, 9], [4, 0]])
def test_biases_of_another_shape(judge: Judge, what: str, shape: list[int]) -> None:
    size = int(np.prod(shape)) * 4

    def reshape(header: Header) -> None:
        stop = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        for name in [name for name in header if name.endswith(what)]:
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [stop, stop + size]}
            stop += size

    files = change("gpt_oss", reshape, body=bytes(10 * size))
    assert judge(files, lambda model: MoECompressionService.verify(model, inputs=4)).kind in OK


@pytest.mark.parametrize("shape", [[1], [2], [3, 3], [0], [4, 0], [16]])
def test_a_correction_of_another_shape(judge: Judge, shape: list[int]) -> None:
    size = int(np.prod(shape)) * 4

    def reshape(header: Header) -> None:
        stop = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        for name in [name for name in header if name.endswith("correction_bias")]:
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [stop, stop + size]}
            stop += size

    files = change("deepseek_v3", reshape, body=bytes(10 * size))
    assert judge(files, lambda model: MoECompressionService.verify(model, inputs=4)).kind in OK


# Overlays


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("overlay") / "folder"
    ranks = dict.fromkeys(("gate", "up", "down"), 0)
    MoECompressionService.compress(str(FIXTURES / "mixtral"), folder, ranks=ranks)
    return read_folder(folder)


def export(bench: Bench) -> Callable[[str], Any]:
    return lambda model: MoECompressionService.export(model, bench.target, force=True)


def reshape_overlay(files: Files, part: str, shape: list[int]) -> Files:
    changed = dict(files)
    for file in [file for file in files if file.endswith(".safetensors")]:
        header, body = split_safetensors(files[file])
        for name in [name for name in header if name.endswith(part)]:
            header[name] |= {"shape": shape, "data_offsets": [0, 0]}
        changed[file] = join_safetensors(header, body)
    return changed


@pytest.mark.parametrize("count", [10**6, 2**61])
def test_an_overlay_of_rank_0_that_claims_many_experts(judge: Judge, bench: Bench, overlay: Files, count: int) -> None:
    """Factors of rank 0 have no bytes, whatever number of experts they are for."""
    base = next(
        entry["shape"]
        for file, data in overlay.items()
        if file.endswith(".safetensors")
        for name, entry in split_safetensors(data)[0].items()
        if name.endswith("overlay.gate.base")
    )
    files = overlay
    for role, (out, inner) in {"gate": base, "up": base, "down": base[::-1]}.items():
        files = reshape_overlay(files, f"overlay.{role}.left", [count, out, 0])
        files = reshape_overlay(files, f"overlay.{role}.right", [count, 0, inner])
    outcome = judge(files, export(bench))
    assert (outcome.kind, "experts" in outcome.detail) == ("UnknownFormat", True), outcome


@pytest.mark.parametrize("size", [0, 2**61])
def test_an_overlay_whose_base_is_empty(judge: Judge, bench: Bench, overlay: Files, size: int) -> None:
    files = overlay
    for role in ("gate", "up", "down"):
        shape = [size, 0] if role == "down" else [0, size]
        files = reshape_overlay(files, f"overlay.{role}.base", shape)
        files = reshape_overlay(files, f"overlay.{role}.left", [4, shape[0], 0])
        files = reshape_overlay(files, f"overlay.{role}.right", [4, 0, shape[1]])
    assert judge(files, export(bench)).kind == "ModelUnreadable"


@pytest.mark.parametrize(
    "names",
    [
        {"gate": "x.{expert}", "up": "x.{expert}", "down": "x.{expert}"},
        {"gate": "{expert}{expert}", "up": "{expert}", "down": "a"},
    ],
)
def test_an_overlay_whose_experts_would_get_one_name(judge: Judge, bench: Bench, overlay: Files, names: Header) -> None:
    config = json.loads(overlay["config.json"])
    files = with_config(overlay, overlay_config={**config["overlay_config"], "names": names})
    outcome = judge(files, export(bench))
    assert outcome.kind == "ModelUnreadable", outcome


def test_an_overlay_whose_expert_would_take_the_name_of_another_tensor(
    judge: Judge, bench: Bench, overlay: Files
) -> None:
    config = json.loads(overlay["config.json"])
    names = {**config["overlay_config"]["names"], "gate": "input_layernorm.weight"}
    files = with_config(overlay, overlay_config={**config["overlay_config"], "names": names})
    assert judge(files, export(bench)).kind == "ModelUnreadable"


@pytest.mark.parametrize("value", [0x7F80, 0x7FC0, 0x7F7F], ids=["infinity", "NaN", "largest"])
def test_an_overlay_whose_experts_are_not_finite(judge: Judge, bench: Bench, tmp_path: Path, value: int) -> None:
    """The numbers of base and factors themselves may be: their sums are not."""
    ranks = dict.fromkeys(("gate", "up", "down"), 2)
    MoECompressionService.compress(str(FIXTURES / "mixtral"), tmp_path / "folder", ranks=ranks)
    files = read_folder(tmp_path / "folder")
    for file in [file for file in files if file.endswith(".safetensors")]:
        header, body = split_safetensors(files[file])
        for name in [name for name in header if ".overlay.up.left" in name or ".overlay.up.right" in name]:
            start, stop = header[name]["data_offsets"]
            body = body[:start] + value.to_bytes(2, "little") * ((stop - start) // 2) + body[stop:]
        files[file] = join_safetensors(header, body)
    outcome = judge(files, export(bench))
    assert (outcome.kind, "expert 0: the up projection holds" in outcome.detail) == ("ModelUnreadable", True), outcome
    with pytest.raises(ModelUnreadable, match="expert 3: the up projection holds"):
        read_overlay(bench.model).expert(0, 3)


# What we have written ourselves, and somebody else has changed


KEPT = {
    "analyze": ("0.json", ("cosine", "layer", "projections")),
    "compute": ("0.json", ("shapes", "natural", "energy", "experts", "choices")),
}


@pytest.mark.sample
@pytest.mark.parametrize("damage", ["[" * 100_000, "[1]", '{"a": Infinity}', "1e400", "\ud800", "9" * 5000])
@pytest.mark.parametrize("job", list(JOBS))
def test_damaged_results_of_an_interrupted_job_are_found_again(
    tmp_path: Path, cache: Path, job: str, damage: str
) -> None:
    write_folder(tmp_path / "model", fixture_files("mixtral"))
    work, last = JOBS[job]

    def stop(what: str, done: int, total: int) -> None:
        if what == last and done > total // 2:
            raise Stopped

    with suppress(Stopped):
        work(str(tmp_path / "model"), tmp_path / "folder", stop)
    kept = [*cache.rglob("*.json"), *tmp_path.glob("folder.partial/*.json")]
    assert kept
    for file in kept:
        file.write_text(damage, errors="surrogatepass")
    with suppress(InvalidRequest):  # unfinished work of another model
        work(str(tmp_path / "model"), tmp_path / "folder", lambda what, done, total: None)


@pytest.mark.parametrize("place", range(0, 1100, 90))
def test_a_kept_result_in_which_a_digit_has_changed_is_found_again(tmp_path: Path, cache: Path, place: int) -> None:
    write_folder(tmp_path / "model", fixture_files("mixtral"))
    work, last = JOBS["compute"]

    def stop(what: str, done: int, total: int) -> None:
        if what == last and done > total // 2:
            raise Stopped

    def result() -> Any:
        found = work(str(tmp_path / "model"), tmp_path / "folder", lambda what, done, total: None)
        return found.model_dump(exclude={"cost"})

    undisturbed = result()
    with suppress(Stopped):
        work(str(tmp_path / "model"), tmp_path / "folder", stop)
    (file,) = cache.rglob("*.json")
    data = bytearray(file.read_bytes())
    place = next(n for n in [*range(place, len(data)), *range(place)] if chr(data[n]).isdigit())
    data[place] = ord("1") if data[place] != ord("1") else ord("2")
    file.write_bytes(data)
    assert result() == undisturbed


@pytest.mark.parametrize(
    "damage", ["[" * 100_000, "[]", '{"commit": 1}', '{"size": 1e400}', '{"commit": "../../x", "files": [1]}']
)
def test_damaged_notes_on_the_hub_are_asked_anew(tmp_path: Path, hub: HubServer, cache: Path, damage: str) -> None:
    write_folder(tmp_path / "m", tiny())
    hub.add("tests/notes", tmp_path / "m")
    before = read_everything("tests/notes")
    for folder in ("refs", "files"):
        for file in (cache / folder).glob("*.json"):
            file.write_text(damage)
    assert read_everything("tests/notes") == before


# What is printed


EVIL = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "[red]x[/red]",
    "[/]",
    "\u202eabc",
    "\x7f",
    "\ud800",
    "a\rb\nc",
]
LAYOUT = ["introspect", "moe-expert", "moe-layout"]
ANALYZE = ["introspect", "moe-expert", "moe-type-analyze"]
VERIFY = ["introspect", "moe-expert", "moe-overlay-verify"]


def shown(capsys: Capture, arguments: list[str], output: Path) -> str:
    """What a command prints, as a table and as JSON, and writes; checked to have nothing that a terminal obeys."""
    text = ""
    for options in ([], ["--json", "-o", str(output)]):
        output.unlink(missing_ok=True)
        code = run([*arguments, *options])
        out, line = capsys.readouterr()
        assert code in (0, 1, 2, 3, 4)
        assert not output.exists() or output.read_text(encoding="utf-8") == out
        text += out + line
    assert not [char for char in text if not char.isprintable() and char != "\n"], ascii(text)
    return text


def rename(files: Files, old: str, new: str) -> Files:
    header, body = split_safetensors(files["model.safetensors"])
    renamed = {name.replace(old, new): entry for name, entry in header.items()}
    return files | {"model.safetensors": join_safetensors(renamed, body)}


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
@pytest.mark.parametrize("old", ["model.", "block_sparse_moe", "w1.weight"])
def test_evil_names_of_tensors_in_a_layout(capsys: Capture, tmp_path: Path, old: str, evil: str) -> None:
    new = {"model.": f"{evil}.model.", "block_sparse_moe": f"block_sparse_moe.{evil}", "w1.weight": f"w1.{evil}"}[old]
    write_folder(tmp_path / "m", rename(tiny(), old, new))
    text = shown(capsys, [*LAYOUT, "-m", str(tmp_path / "m")], tmp_path / "o.json")
    assert "[" not in evil[:1] or evil in text


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_evil_names_of_two_stacks(capsys: Capture, tmp_path: Path, evil: str) -> None:
    files = tiny()
    header, body = split_safetensors(files["model.safetensors"])
    header |= {
        f"{evil}.{name}": {**entry, "data_offsets": [offset + len(body) for offset in entry["data_offsets"]]}
        for name, entry in header.items()
        if name != "__metadata__"
    }
    write_folder(tmp_path / "m", files | {"model.safetensors": join_safetensors(header, body + body)})
    for name in ("m", "m#nothing"):
        shown(capsys, [*LAYOUT, "-m", str(tmp_path / name)], tmp_path / "o.json")


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_evil_words_in_a_config(capsys: Capture, tmp_path: Path, evil: str) -> None:
    keys = ("model_type", "hidden_act", "scoring_func", "architectures", "torch_dtype")
    said = {**dict.fromkeys(keys, evil), "quantization_config": {"quant_method": evil, "format": evil}}
    write_folder(tmp_path / "m", with_config(tiny(), **said))
    for command in (LAYOUT, ANALYZE, VERIFY):
        text = shown(capsys, [*command, "-m", str(tmp_path / "m")], tmp_path / "o.json")
        assert "[" not in evil[:1] or evil in text  # markup is not for us to interpret


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_evil_words_in_an_overlay(capsys: Capture, tmp_path: Path, overlay: Files, evil: str) -> None:
    config = json.loads(overlay["config.json"])["overlay_config"]
    for number, changed in enumerate(
        [{"family": evil}, {"source": evil}, {"version": evil}, {"layers": {evil: {}}}, {"names": {"gate": evil}}]
    ):
        write_folder(tmp_path / "m", with_config(overlay, overlay_config=config | changed))
        command = [
            "introspect",
            "moe-expert",
            "moe-overlay-export",
            str(tmp_path / "m"),
            "-O",
            str(tmp_path / f"{number}"),
        ]
        shown(capsys, command, tmp_path / "o.json")


@pytest.mark.parametrize("evil", [evil for evil in EVIL if not set(evil) & set("/\ud800")] + ["\udcff"], ids=ascii)
def test_evil_names_of_folders_that_are_written(capsys: Capture, tmp_path: Path, evil: str) -> None:
    write_folder(tmp_path / "m", tiny())
    overlay, rebuilt = str(tmp_path / f"o{evil}"), str(tmp_path / f"r{evil}")
    compress = ["moe-overlay-compress", "-m", str(tmp_path / "m"), "-O", overlay, "--energy", "0.5"]
    for command in (compress, ["moe-overlay-export", overlay, "-O", rebuilt]):
        shown(capsys, ["introspect", "moe-expert", *command, "--force"], tmp_path / "o.json")
        assert "folder" in json.loads((tmp_path / "o.json").read_text())
    said: set[str] = set()
    MoECompressionService.export(overlay, rebuilt, force=True, progress=lambda what, done, total: said.add(what))
    assert all(what.isprintable() for what in said)


@pytest.mark.parametrize("evil", [evil for evil in EVIL if "\ud800" not in evil], ids=ascii)
def test_evil_names_in_a_gguf(capsys: Capture, tmp_path: Path, evil: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", evil)
    for role, shape in {"gate": (2, 8, 4), "up": (2, 8, 4), "down": (2, 4, 8)}.items():
        writer.add_tensor(f"{evil}.blk.0.ffn_{role}_exps.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for command in (LAYOUT, ANALYZE):
        shown(capsys, [*command, "-m", str(tmp_path / "m.gguf")], tmp_path / "o.json")
