"""Attention projections and token embeddings, against the libraries' own code and references from the papers."""

import importlib
import json
import re
import struct
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import encoders_float
import encoders_packed
import families
from checkpoints_in_memory import Memory, make
from chuk_lazarus.introspection.moe.errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat
from chuk_lazarus.introspection.moe.weights.attention import Attention, Embeddings
from chuk_lazarus.introspection.moe.weights.checkpoint import Checkpoint
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.layouts import (
    AttentionLayout,
    Kind,
    ProjectionTensor,
    load_attention_table,
    load_embedding_names,
    load_rotary_pairs,
    match_attention,
    match_embeddings,
)
from chuk_lazarus.introspection.moe.weights.repositories.find import find_repository
from places import FIXTURES
from sampling import examples, keep

Matrix = NDArray[np.float32]
Matrices = dict[str, Matrix]
ROWS = {row.name: row for row in load_attention_table()}
ORACLES = sorted(str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.glob("**/attention.npz"))


def open_folder(name: str) -> Attention:
    """The only stack of layers of a checkpoint that has a fused tensor."""
    checkpoint = Checkpoint(find_repository(str(FIXTURES / name)))
    stack = {"qwen4_exp": "model.language_model"}.get(name)
    if stack is None:
        (stack,) = {re.split(r"\.(?:layers|h|blocks)\.\d", name)[0] for name in checkpoint.names if "att" in name}
    return Attention(checkpoint, stack)


def random(rng: np.random.Generator, *shape: int) -> Matrix:
    return rng.standard_normal(shape).astype(np.float32)


def assert_same(found: Mapping[str, Matrix], expected: Mapping[str, Matrix]) -> None:
    assert list(found) == list(expected)
    for role, matrix in expected.items():
        assert found[role].dtype == np.float32
        np.testing.assert_array_equal(found[role], matrix, err_msg=role)


# ---------------------------------------------------------------------------------------------------------------------
# What transformers makes of its own fused tensors


@pytest.mark.parametrize("name", ORACLES)
def test_fused_projections_are_cut_as_transformers_cuts_them(name: str) -> None:
    attention = open_folder(name)
    with np.load(FIXTURES / name / "attention.npz") as oracle:
        for key in oracle.files:
            layer, role = key.split(".")
            found = attention.matrices(int(layer))
            np.testing.assert_array_equal(found[role], oracle[key], err_msg=key)
            assert {"q", "k", "v", "o"} == set(found)
            assert found["o"].shape == (found["q"].shape[1], found["q"].shape[0])


def test_outputs_of_a_conv1d_are_turned() -> None:
    """GPT-2's [in, out], where no shape tells, against what is multiplied with it in transformers: x @ weight."""
    attention = open_folder("dense_gpt2")
    name = "transformer.h.0.attn.c_proj.weight"
    stored = attention.checkpoint.whole(attention.checkpoint.info(name)).astype(np.float32)
    np.testing.assert_array_equal(attention.matrices(0)["o"], stored.T)


def test_projections_of_meta_are_brought_into_the_order_of_transformers() -> None:
    """One model, saved by transformers in the names of Mistral AI and in its own."""
    original = Attention(Checkpoint(find_repository(str(FIXTURES / "mistral_large4"))), "vision_encoder.transformer")
    ours = Checkpoint(find_repository(str(FIXTURES / "mistral_large4_fused")))
    assert_same(original.matrices(0), Attention(ours, "model.vision_tower.transformer").matrices(0))
    latent = Attention(original.checkpoint, "")
    assert_same(latent.matrices(1), Attention(ours, "model.language_model").matrices(1))
    assert list(latent.matrices(1)) == ["q", "kv_a", "kv_b", "o"]


def test_projections_of_paddle_are_turned() -> None:
    """ERNIE 4.5 in Paddle's form, with the input axis first, and in that of transformers; o is square."""
    rng = np.random.default_rng(0)
    q, k, v, o = (random(rng, rows, 16) for rows in (16, 8, 8, 16))
    config = {"model_type": "ernie4_5_moe", "num_attention_heads": 2, "num_key_value_heads": 1}
    qkv = np.ascontiguousarray(np.concatenate([q, k, v]).T)
    paddle = {"self_attn.qkv_proj": qkv, "self_attn.o_proj": np.ascontiguousarray(o.T)}
    usual = {f"self_attn.{role}_proj": matrix for role, matrix in {"q": q, "k": k, "v": v, "o": o}.items()}
    for tensors in (paddle, usual):
        stored = {f"model.layers.0.{name}.weight": matrix for name, matrix in tensors.items()}
        assert_same(open_made(stored, config).matrices(0), {"q": q, "k": k, "v": v, "o": o})


MODELS = [
    (path.parent.name, kind)
    for kind, file in (("routed", "oracle.npz"), ("dense", "dense.npz"))
    for path in sorted(FIXTURES.glob(f"*/{file}"))
]


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_every_model_has_its_projections(name: str, kind: Kind) -> None:
    """A layer that has q_proj and o_proj, and so on, has them as its files do."""
    experts = Experts.open(str(FIXTURES / name), kind)
    checkpoint = experts.checkpoint
    attention = Attention(checkpoint, experts.stack)
    assert set(attention.layers) <= {*experts.layers, *experts.mtp_layers, *range(max(experts.layers) + 3)}
    for layer in attention.layers:
        found = attention.matrices(layer)
        assert all(matrix.flags.c_contiguous and np.isfinite(matrix).all() for matrix in found.values())
        for role, leaf in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj"), ("q_b", "q_b_proj")):
            names = [name for name in checkpoint.names if name.endswith(f".{layer}.self_attn.{leaf}.weight")]
            names = [name for name in names if name.rpartition(f"layers.{layer}.")[0].rstrip(".") == experts.stack]
            if len(names) != 1 or checkpoint.info(names[0]).dtype != "BF16":
                continue
            stored = checkpoint.whole(checkpoint.info(names[0])).astype(np.float32)
            if found[role].shape == stored.shape:
                np.testing.assert_array_equal(found[role], stored)
            else:  # a gate lies beside q
                assert (role, 2 * len(found[role])) == ("q", len(stored))
    if name in ("moirai_moe", "nucleus_moe", "published_lingbot_video"):  # of time series, images and video: no tokens
        return
    embeddings = Embeddings(checkpoint, experts.stack)
    whole = embeddings.rows(0, embeddings.shape[0])
    assert whole.shape == embeddings.shape
    hidden = experts.config.get("hidden_size", whole.shape[1])
    assert whole.shape[1] == hidden


# ---------------------------------------------------------------------------------------------------------------------
# What MLX LM makes of its own fused tensors

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 16, "layer_norm_epsilon": 1e-5, "vocab_size": 24}
BAILING = {
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "norm_topk_prob": True,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "num_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_bias": False,
    "use_qkv_bias": False,
    "group_norm_size": 1,
    "partial_rotary_factor": 1.0,
    "use_qk_norm": False,
}
IN_MLX_LM: dict[str, dict[str, Any]] = {
    "baichuan_m1": BASE
    | {"conv_window": 2, "sliding_window": 8, "sliding_window_layers": [], "num_swa_attention_heads": 4},
    "bailing_hybrid": BASE
    | BAILING
    | {
        "kv_lora_rank": 8,
        "layer_group_size": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "bailing_moe": BASE | BAILING,
    "bailing_moe_linear": BASE | BAILING | {"layer_group_size": 1},
    "dbrx": {
        "vocab_size": 24,
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e9, "rope_theta": 10000.0},
    },
    "gpt2": GPT | {"n_ctx": 16},
    "gpt_bigcode": GPT | {"n_inner": 16, "num_key_value_heads": 1, "multi_query": True},
    "gpt_neox": BASE
    | {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5, "use_parallel_residual": True},
    "internlm2": BASE | {"bias": False},
    "openelm": {
        "num_transformer_layers": 1,
        "model_dim": 32,
        "head_dim": 8,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4],
        "num_kv_heads": [2],
        "vocab_size": 24,
        "ffn_multipliers": [0.5],
        "normalize_qk_projections": False,
        "rope_freq_constant": 10000.0,
        "rope_max_length": 32,
        "share_input_output_layers": True,
    },
    "phi3": BASE,
    "phi3small": BASE
    | {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 16,
        "gegelu_limit": 20.0,
        "layer_norm_epsilon": 1e-5,
        "num_hidden_layers": 2,
    },
    "phixtral": {
        "num_vocab": 24,
        "model_dim": 32,
        "num_heads": 4,
        "num_layers": 1,
        "rotary_dim": 4,
        "num_experts_per_tok": 1,
        "num_local_experts": 2,
        "n_head": 4,
    },
    "qwen": BASE
    | {"kv_channels": 8, "no_bias": True, "seq_length": 32, "rotary_emb_base": 10000, "num_key_value_heads": 4},
}
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack")


def rows_in_mlx_lm(library: Any, module: Any, leaf: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The rows of q, k and v in a fused tensor: its results are 0, 1, 2, ..., and what attention gets is noted.

    One token at position 0, where rotary embeddings change nothing.
    """
    import mlx.core as mx

    size = module[leaf].weight.shape[0]
    found: dict[str, Any] = {}

    def attend(queries: Any, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
        found.update({"q": queries, "k": keys, "v": values})
        return mx.zeros((1, queries.shape[1], 1, values.shape[3]))

    def recur(q: Any, k: Any, v: Any, **_: Any) -> Any:
        return attend(q, k, v), None

    numbers = mx.arange(size, dtype=mx.float32)
    setattr(module, leaf, lambda x: mx.broadcast_to(numbers, (*x.shape[:-1], size)))
    monkeypatch.setattr(module, "_custom_convolution", lambda x, weights, state: x, raising=False)
    monkeypatch.setattr(module, "_block_sparse_attention", attend, raising=False)
    monkeypatch.setattr(library, "scaled_dot_product_attention", attend, raising=False)
    monkeypatch.setattr(library, "recurrent_gla", recur, raising=False)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    module(mx.zeros((1, 1, 32)))
    return {role: np.array(values).round().astype(int).ravel().tolist() for role, values in found.items()}


@pytest.mark.parametrize("name", IN_MLX_LM)
def test_fused_projections_are_cut_as_mlx_lm_cuts_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = importlib.import_module(f"mlx_lm.models.{name}")
    config = {"model_type": name, **IN_MLX_LM[name]}
    mx.random.seed(1)
    model = library.Model(library.ModelArgs.from_dict(config))
    weights = {key: mx.random.normal(value.shape) for key, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    modules = [(path, module) for path, module in model.named_modules() if any(leaf in module for leaf in FUSED)]
    for path, module in modules:
        leaf = next(leaf for leaf in FUSED if leaf in module)
        with monkeypatch.context() as patches:
            rows = rows_in_mlx_lm(library, module, leaf, patches)
        stored = np.array(weights[f"{path}.{leaf}.weight"])
        *root, layer, _ = path.removesuffix(".attn" if "norm_attn_norm" in path else "").split(".")
        attention = Attention(Checkpoint(find_repository(str(tmp_path))), ".".join(root[:-1]))
        found = attention.matrices(int(layer))
        assert set(found) == {"q", "k", "v", "o"}
        for role, numbers in rows.items():
            assert len(set(numbers)) == len(numbers)
            np.testing.assert_array_equal(found[role], stored[numbers], err_msg=role)
    assert modules


def test_hunyuan_is_cut_as_mlx_lm_converts_it() -> None:
    mx = pytest.importorskip("mlx.core")
    hunyuan = importlib.import_module("mlx_lm.models.hunyuan")

    class Arguments:
        hidden_size, num_key_value_heads, num_attention_heads, num_hidden_layers = 32, 2, 4, 1

    class Model:
        args = Arguments

    rng = np.random.default_rng(0)
    prefix = "model.layers.0.self_attn."
    tensors = {f"{prefix}qkv_proj.weight": random(rng, 64, 32), f"{prefix}o_proj.weight": random(rng, 32, 32)}
    theirs = hunyuan.Model.sanitize(
        Model(),
        {key: mx.array(value) for key, value in tensors.items()}
        | {"model.layers.0.mlp.gate_and_up_proj.weight": mx.zeros((4, 32))},
    )
    found = open_made(tensors, {"model_type": "hunyuan", "num_attention_heads": 4}).matrices(0)
    for role in "qkv":
        np.testing.assert_array_equal(found[role], np.array(theirs[f"{prefix}{role}_proj.weight"]))


# ---------------------------------------------------------------------------------------------------------------------
# References, written from how the arrangements are described


def fuse(axes: str, q: Matrix, k: Matrix, v: Matrix, size: int) -> Matrix:
    """The stored tensor of matrices with heads of `size` rows; for a gate, v stands for it."""
    if "G Q K V" in axes:
        rows = []
        share = len(q) // len(k)
        for group in range(len(k) // size):
            for head in range(group * share, (group + 1) * share):
                rows += list(q[head * size : (head + 1) * size])
            rows += [*k[group * size : (group + 1) * size], *v[group * size : (group + 1) * size]]
        fused = np.array(rows)
    elif "A Q Z" in axes:
        heads = range(len(q) // size)
        fused = np.concatenate([one[h * size : (h + 1) * size] for h in heads for one in (q, v)])
    else:
        fused = np.concatenate([q, k, v])
    return fused.T if axes.startswith("H (") else fused


def open_made(tensors: Mapping[str, Any], config: Mapping[str, Any] | None, stack: str = "model") -> Attention:
    return Attention(Checkpoint(make(tensors, config)), stack)


CASES = [
    (row, tensor, name, model_type)
    for row in ROWS.values()
    for tensor in row.tensors
    if len(tensor.outputs) > 1
    for name in (tensor.names if row.model_types else tensor.names[:1])
    for model_type in sorted(row.model_types) or ["mystery"]
]


@given(
    case=st.sampled_from(CASES),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    size=st.integers(1, 5),
    hidden=st.integers(1, 9),
    keys=st.sampled_from(["num_attention_heads", "n_head", "n_heads", "num_heads"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_cutting_is_the_inverse_of_fusing(
    case: tuple[AttentionLayout, ProjectionTensor, str, str],
    groups: int,
    share: int,
    size: int,
    hidden: int,
    keys: str,
    seed: int,
) -> None:
    row, tensor, name, model_type = case
    rng, heads = np.random.default_rng(seed), groups * share
    q, o = random(rng, heads * size, hidden), random(rng, hidden, heads * size)
    k, v = random(rng, groups * size, hidden), random(rng, groups * size, hidden)
    output = next(other for other in row.tensors if other.role == "o")
    stored = o.T if output.is_transposed else o
    prefix = "model.layers.3."
    tensors = {f"{prefix}{output.names[0]}.weight": np.ascontiguousarray(stored)}
    if tensor.role == "q":
        gate = random(rng, *q.shape)
        tensors[f"{prefix}{name}.weight"] = fuse(tensor.axes, q, k, gate, size)
        for role, matrix in (("k", k), ("v", v)):
            other = next(one for one in row.tensors if one.role == role)
            tensors[f"{prefix}{other.names[0]}.weight"] = matrix
    else:
        tensors[f"{prefix}{name}.weight"] = np.ascontiguousarray(fuse(tensor.axes, q, k, v, size))
    attention = open_made(tensors, {"model_type": model_type, keys: heads})
    assert attention.layers == (3,)
    if model_type == "gpt2" and hidden in (heads * size, (heads + 2 * groups) * size):
        return  # a square tells nothing of which axis comes first
    assert_same(attention.matrices(3), {"q": q, "k": k, "v": v, "o": o})
    assert attention.notes == ()
    assert attention.nbytes(3) == sum(array.nbytes for array in tensors.values())


def in_pairs(matrix: Matrix, size: int) -> Matrix:
    """Rows in halves (0 and half turn together) in the order of pairs (0 and 1 do), written out."""
    order = [
        head * size + place + half * size // 2
        for head in range(len(matrix) // size)
        for place in range(size // 2)
        for half in range(2)
    ]
    return matrix[order]


def test_a_gate_may_be_switched_off() -> None:
    rng = np.random.default_rng(0)
    q, o = random(rng, 8, 6), random(rng, 6, 8)
    tensors = {"model.layers.0.self_attn.q_proj.weight": q, "model.layers.0.self_attn.o_proj.weight": o}
    attention = open_made(tensors, {"model_type": "qwen3_5_moe_text", "num_attention_heads": 2})
    assert_same(attention.matrices(0), {"q": q, "o": o})


def test_the_order_of_pairs_is_that_of_mlx_lm() -> None:
    gguf_of_mlx = pytest.importorskip("mlx_lm.gguf")
    matrix = random(np.random.default_rng(0), 24, 5)
    np.testing.assert_array_equal(gguf_of_mlx.permute_weights(matrix, 4, 4), in_pairs(matrix, 6))
    np.testing.assert_array_equal(gguf_of_mlx.permute_weights(matrix, 8, 2), in_pairs(matrix, 12))


def test_names_of_meta_are_in_pairs() -> None:
    rng = np.random.default_rng(0)
    q, k, v, o = random(rng, 24, 7), random(rng, 12, 7), random(rng, 12, 7), random(rng, 7, 24)
    stored = {"wq": in_pairs(q, 6), "wk": in_pairs(k, 6), "wv": v, "wo": o}
    tensors = {f"layers.0.attention.{name}.weight": matrix for name, matrix in stored.items()}
    attention = open_made(tensors, {"num_attention_heads": 4}, "")
    assert_same(attention.matrices(0), {"q": q, "k": k, "v": v, "o": o})
    without = open_made(tensors, None, "")
    assert_same(without.matrices(0), {"v": v, "o": o})
    assert "number of heads" in without.notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# GGUF

LATENT = {"attn_q_a": (12, 32), "attn_q_b": (48, 12), "attn_kv_a_mqa": (20, 32), "attn_kv_b": (64, 16)}


def write_gguf(path: Path, architecture: str, tensors: Mapping[str, Matrix], kind: Any, heads: Any = 4) -> Matrices:
    """A file by the gguf package; what it quantised means what this package makes of it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(heads)
    meant = {}
    for name, matrix in tensors.items():
        data = gguf.quants.quantize(matrix, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        meant[name] = gguf.quants.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", ["llama", "granitemoe", "deepseek", "qwen3moe", "gemma3"])
def test_gguf_files_are_read_in_the_order_of_transformers(architecture: str, kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    q, k, v, o = random(rng, 64, 96), random(rng, 32, 96), random(rng, 32, 96), random(rng, 96, 64)
    turn = in_pairs if architecture in ("llama", "granitemoe", "deepseek") else lambda matrix, size: matrix
    tensors = {"attn_q": turn(q, 16), "attn_k": turn(k, 16), "attn_v": v, "attn_output": o}
    stored = {f"blk.1.{name}": matrix for name, matrix in tensors.items()}
    table = random(rng, 40, 96)
    meant = write_gguf(
        tmp_path / "model.gguf", architecture, stored | {"token_embd": table}, gguf.GGMLQuantizationType[kind]
    )
    checkpoint = Checkpoint(find_repository(str(tmp_path)))
    found = Attention(checkpoint, "").matrices(1)
    for role, name, own in (("q", "attn_q", q), ("k", "attn_k", k), ("v", "attn_v", v), ("o", "attn_output", o)):
        order = turn(found[role], 16) if role in "qk" else found[role]
        np.testing.assert_array_equal(order, meant[f"blk.1.{name}"])
        np.testing.assert_allclose(found[role], own, atol=0.6 if kind == "Q4_0" else 0.05)
    embeddings = Embeddings(checkpoint, "")
    np.testing.assert_array_equal(embeddings.rows(7, 23), meant["token_embd"][7:23])


def test_gguf_has_heads_by_layer_fused_latent_and_gated_attention(tmp_path: Path) -> None:
    rng, plain = np.random.default_rng(0), gguf.GGMLQuantizationType.F32
    q, k, v, o = random(rng, 64, 32), random(rng, 32, 32), random(rng, 32, 32), random(rng, 32, 64)
    stored = {
        "blk.0.attn_qkv": np.concatenate([q, k, v]),
        "blk.0.attn_output": o,
        "blk.1.attn_q": in_pairs(q, 8),
        "blk.1.attn_k": in_pairs(k, 8),
        "blk.1.attn_v": v,
        "blk.1.attn_output": o,
    }
    write_gguf(tmp_path / "a.gguf", "llama", stored, plain, heads=[4, 8])
    attention = Attention(Checkpoint(find_repository(str(tmp_path / "a.gguf"))), "")
    assert_same(attention.matrices(1), {"q": q, "k": k, "v": v, "o": o})
    assert attention.matrices(0).keys() == {"q", "k", "v", "o"}

    latent = {name: random(rng, *shape) for name, shape in LATENT.items()} | {"attn_output": random(rng, 32, 40)}
    write_gguf(tmp_path / "b.gguf", "deepseek2", {f"blk.0.{name}": m for name, m in latent.items()}, plain)
    attention = Attention(Checkpoint(find_repository(str(tmp_path / "b.gguf"))), "")
    assert_same(attention.matrices(0), dict(zip(("q_a", "q_b", "kv_a", "kv_b", "o"), latent.values(), strict=True)))

    gated = {"attn_q": fuse("(A Q Z) H", q, k, random(rng, 64, 32), 16), "attn_k": k, "attn_v": v, "attn_output": o}
    for architecture, roles in (("qwen3next", "qkvo"), ("unheard", "kvo")):
        write_gguf(tmp_path / "c.gguf", architecture, {f"blk.0.{name}": m for name, m in gated.items()}, plain)
        attention = Attention(Checkpoint(find_repository(str(tmp_path / "c.gguf"))), "")
        assert_same(attention.matrices(0), {role: {"q": q, "k": k, "v": v, "o": o}[role] for role in roles})


# ---------------------------------------------------------------------------------------------------------------------
# Storage formats

ENCODERS = {**encoders_float.ENCODERS, **encoders_packed.ENCODERS}


def in_file(tensors: Mapping[str, tuple[str, Any]], config: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint of tensors of any dtype; F4 has two elements in a byte."""
    entries, data = {}, b""
    for name, (dtype, array) in tensors.items():
        shape = (*array.shape[:-1], array.shape[-1] * 2) if dtype == "F4" else array.shape
        start, data = len(data), data + array.tobytes()
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, len(data)]}
    header = json.dumps(entries).encode()
    contents = {"model.safetensors": struct.pack("<Q", len(header)) + header + data}
    return Checkpoint(Memory(contents | {"config.json": json.dumps(config).encode()}))


WHOLE = [name for name in ENCODERS if name != "nvfp4_halves"]
OF_EACH_METHOD = {name.partition("_")[0]: name for name in WHOLE}


@pytest.mark.parametrize("name", keep(WHOLE, *OF_EACH_METHOD.values()))
def test_projections_and_embeddings_in_every_format(name: str) -> None:
    """A fused tensor, k of its own in another layer, and embeddings, whose rows are read by ranges."""
    rng = np.random.default_rng(0)
    encoder = ENCODERS[name][0]
    hidden, heads = 128, 4
    matrices = {
        "model.layers.0.self_attn.qkv_proj": random(rng, 2 * hidden, hidden),
        "model.layers.0.self_attn.o_proj": random(rng, hidden, hidden),
        "model.layers.1.self_attn.k_proj": random(rng, 64, hidden),
        "model.embed_tokens": random(rng, 256, hidden),
    }
    tensors: dict[str, tuple[str, Any]] = {}
    values: dict[str, Matrix] = {}
    quantization: dict[str, Any] = {}
    for module, matrix in matrices.items():
        encoded = encoder(matrix, np.random.default_rng(1))
        tensors |= {f"{module}.{part}": stored for part, stored in encoded.parts.items()}
        values[module], quantization = encoded.values, {**encoded.quantization}
    config: dict[str, Any] = {"model_type": "phi3", "num_attention_heads": heads}
    if quantization:
        config["quantization" if name.startswith("mlx") else "quantization_config"] = quantization
    checkpoint = in_file(tensors, config)
    attention = Attention(checkpoint, "model")
    first, second = attention.matrices(0), attention.matrices(1)
    fused, output, key, table = values.values()
    close = {"rtol": 2e-7} if name == "bnb_int8" else {"rtol": 0}  # weight * SCB / 127, rounded at another place
    np.testing.assert_allclose(np.concatenate([first["q"], first["k"], first["v"]]), fused, **close)
    np.testing.assert_allclose(first["o"], output, **close)
    np.testing.assert_allclose(second["k"], key, **close)
    assert attention.nbytes(0) <= sum(
        array.nbytes for name, (_, array) in tensors.items() if "layers.0" in name and "bias" not in name.split(".")
    )
    try:
        embeddings = Embeddings(checkpoint, "model")
    except UnknownFormat:
        assert any(part in name for part in ("gptq", "awq", "quark"))  # these have their rows as inputs
        return
    assert embeddings.shape == (256, hidden)
    for start, stop in ((0, 256), (0, 1), (130, 131), (127, 200), (255, 256), (5, 5)):
        np.testing.assert_allclose(embeddings.rows(start, stop), table[start:stop], **close)


def test_scales_of_the_cache_are_no_part_of_a_projection() -> None:
    rng = np.random.default_rng(0)
    encoded = encoders_float.ENCODERS["fp8_channel"][0](random(rng, 32, 32), rng)
    module = "model.layers.0.self_attn.k_proj"
    tensors = {f"{module}.{part}": stored for part, stored in encoded.parts.items()}
    scale = ("F32", np.ones((), np.float32))
    tensors |= {f"{module}.{part}": scale for part in ("k_scale", "output_scale", "input_scale")}
    attention = Attention(in_file(tensors, {"quantization_config": encoded.quantization}), "model")
    np.testing.assert_array_equal(attention.matrices(0)["k"], encoded.values)


def test_large_projections_are_decoded_in_windows() -> None:
    rng = np.random.default_rng(0)
    q = random(rng, 3000, 2000)
    attention = open_made({"model.layers.0.attn.q_proj.weight": q.astype(ml_dtypes.bfloat16)}, None)
    np.testing.assert_array_equal(attention.matrices(0)["q"], q.astype(ml_dtypes.bfloat16).astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# What is read, and what it takes


def test_nothing_but_the_projections_is_read() -> None:
    rng = np.random.default_rng(0)
    shapes = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}
    tensors = {
        f"model.layers.{layer}.self_attn.{name}.weight": random(rng, *shape)
        for layer in range(3)
        for name, shape in shapes.items()
    } | {"model.layers.0.mlp.up_proj.weight": random(rng, 99, 8), "model.embed_tokens.weight": random(rng, 50, 8)}
    repository = make(tensors, {"model_type": "llama"})
    wanted: list[Any] = []
    repository.prefetch = lambda ranges, progress: wanted.append(ranges)  # type: ignore[method-assign]
    checkpoint = Checkpoint(repository)
    attention = Attention(checkpoint, "model")
    assert attention.layers == (0, 1, 2)
    before = checkpoint.bytes_read
    attention.matrices(1)
    assert checkpoint.bytes_read - before == attention.nbytes(1) == 4 * (64 + 32 + 32 + 64)
    attention.prefetch([0, 2])
    (ranges,) = wanted
    assert sum(stop - start for start, stop in ranges["model.safetensors"]) == 2 * attention.nbytes(1)
    assert attention.storage(1) == "f32"

    embeddings = Embeddings(checkpoint, "model")
    before = checkpoint.bytes_read
    np.testing.assert_array_equal(embeddings.rows(20, 30), tensors["model.embed_tokens.weight"][20:30])
    assert checkpoint.bytes_read - before == 10 * 8 * 4
    assert (embeddings.shape, embeddings.nbytes, embeddings.storage) == ((50, 8), 1600, "f32")
    embeddings.prefetch([(3, 5), (7, 7)])
    assert sum(stop - start for start, stop in wanted[-1]["model.safetensors"]) == 2 * 8 * 4


def test_slices_of_tensor_parallel_ranks_are_joined() -> None:
    rng = np.random.default_rng(0)
    q, k, v, o = random(rng, 8, 6), random(rng, 4, 6), random(rng, 4, 6), random(rng, 6, 8)
    whole = {"q_proj": (q, 0), "k_proj": (k, 0), "v_proj": (v, 0), "o_proj": (o, 1)}
    contents = {}
    for rank in range(2):
        shard = {
            f"model.layers.0.self_attn.{name}.weight": np.ascontiguousarray(np.split(matrix, 2, axis)[rank])
            for name, (matrix, axis) in whole.items()
        }
        contents[f"pytorch_model-0000{rank}-TP-00{rank}.safetensors"] = make(shard, None).contents["model.safetensors"]
    attention = Attention(Checkpoint(Memory(contents)), "model")
    assert_same(attention.matrices(0), {"q": q, "k": k, "v": v, "o": o})


@pytest.mark.parametrize(
    ("tensor", "stack", "found"),
    [
        ("model.embed_tokens.weight", "model", True),
        ("model.embed_tokens.weight", "model.decoder", True),
        ("model.language_model.embed_tokens.weight", "model.language_model", True),
        ("model.language_model.embed_tokens.weight", "model.vision", False),
        ("model.layers.61.embed_tokens.weight", "model", False),
        ("transformer.wte.weight", "transformer", True),
        ("transformer.wpe.weight", "transformer", False),
        ("transformer.embedding.word_embeddings.weight", "transformer.encoder", True),
        ("model.embed_tokens_per_layer.weight", "model", False),
        ("embeddings.position_embeddings.weight", "", False),
        ("token_embd.weight", "", True),
        ("token_embd_norm.weight", "", False),
        ("model.embed_tokens", "model", True),
    ],
)
def test_embeddings_by_name(tensor: str, stack: str, found: bool) -> None:
    assert (tensor in match_embeddings([tensor, "model.layers.0.mlp.up_proj.weight"], stack).values()) == found


def test_embeddings_of_the_stack_go_first() -> None:
    names = ["shared.weight", "encoder.embed_tokens.weight", "talker.model.embed_tokens.weight"]
    assert match_embeddings(names, "encoder") == {"weight": "encoder.embed_tokens.weight"}
    assert match_embeddings(names, "decoder") == {"weight": "shared.weight"}
    assert match_embeddings(names, "talker.model") == {"weight": "talker.model.embed_tokens.weight"}
    assert load_embedding_names()[0] == "embed_tokens"


def test_large_headers_are_matched_quickly() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj.weight"
        for layer in range(60)
        for expert in range(550)
        for leaf in ("gate", "up", "down")
    ]
    names += [f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in range(60) for role in "qkvo"]
    start = time.process_time()
    assert len(match_attention(names, "model")) == 60
    assert match_embeddings(names, "model") == {}
    assert time.process_time() - start < 4


# ---------------------------------------------------------------------------------------------------------------------
# What can't be read


def fused(rows: int = 24, name: str = "self_attn.qkv_proj", columns: int = 8, **others: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {f"model.layers.0.{name}.weight": random(rng, rows, columns)} | others


OUTPUT = {"model.layers.0.self_attn.o_proj.weight": np.ones((8, 8), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "config", "roles", "reason"),
    [
        (fused() | OUTPUT, {"model_type": "unheard"}, ["o"], "is not known for model_type unheard"),
        (fused() | OUTPUT, None, ["o"], "is not known for model_type (none)"),
        (
            fused(name="attention.query_key_value")
            | {"model.layers.0.attention.dense.weight": np.ones((8, 8), np.float32)},
            {"model_type": "chatglm", "num_attention_heads": 2},
            ["o"],
            "is not known for model_type chatglm",
        ),
        (fused(), {"model_type": "phi3"}, [], "without o"),
        (fused(23) | OUTPUT, {"model_type": "phi3"}, ["o"], "does not fit o of 8 columns"),
        (fused(8) | OUTPUT, {"model_type": "phi3"}, ["o"], "does not fit o of 8 columns"),
        (fused(14) | OUTPUT, {"model_type": "phi3", "num_attention_heads": 2}, ["o"], "does not fit o of 8 columns"),
        (fused(columns=9) | OUTPUT, {"model_type": "phi3"}, ["o"], "do not fit together"),
        (fused() | OUTPUT, {"model_type": "minimax"}, ["o"], "needs the number of heads"),
        (fused() | OUTPUT, {"model_type": "minimax", "num_attention_heads": 3}, ["o"], "does not fit 3 heads"),
        (fused(20) | OUTPUT, {"model_type": "minimax", "num_attention_heads": 2}, ["o"], "does not fit 2 heads"),
        (fused() | OUTPUT, {"model_type": "minimax", "num_attention_heads": 2, "head_dim": 8}, ["o"], "heads of 8"),
        (fused(16, "self_attn.q_proj") | OUTPUT, {"model_type": "unheard"}, ["o"], "may hold a gate"),
        (
            fused(12, "self_attn.q_proj") | OUTPUT,
            {"model_type": "qwen3_next", "num_attention_heads": 2},
            ["o"],
            "a gate",
        ),
        (fused(name="linear_attn.in_proj_qkvz"), {"model_type": "qwen3_next"}, None, "linear_attn.in_proj_qkvz"),
        (fused(name="mlp.up_proj"), {"model_type": "llama"}, None, "no attention projections"),
        (
            {"model.layers.0.self_attn.q_proj.weight": np.ones((2, 2, 2), np.float32)} | OUTPUT,
            {"model_type": "llama"},
            ["o"],
            "not a projection",
        ),
        (
            {"model.layers.0.self_attn.q_proj.qqq": np.ones((2, 2), np.float32)} | OUTPUT,
            {"model_type": "llama"},
            ["o"],
            "can't decode",
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight": np.ones((0, 8), np.float32)} | OUTPUT,
            {"model_type": "llama"},
            ["o"],
            "not a projection",
        ),
    ],
)
def test_what_can_not_be_read_is_left_out_with_a_note(
    tensors: dict[str, Any], config: dict[str, Any] | None, roles: list[str] | None, reason: str
) -> None:
    attention = open_made(tensors, config)
    if roles is None:
        assert attention.layers == ()
    else:
        assert list(attention.matrices(0)) == roles
        assert list(attention.matrices(0)) == roles
    notes = [note for note in attention.notes if reason in note]
    assert len(notes) == 1
    assert notes[0].startswith("layer 0: ")
    assert len(set(attention.notes)) == len(attention.notes)


ANY_NAME = sorted({name for row in ROWS.values() for tensor in row.tensors for name in tensor.names})
ANY_TYPE = sorted({model_type for row in ROWS.values() for model_type in row.model_types} | {"llama", "unheard"})


@given(
    shapes=st.dictionaries(
        st.tuples(st.sampled_from(ANY_NAME), st.sampled_from(["weight", "scales", "bias", "weight.absmax", "x"])),
        st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(["<f4", "|u1"])),
        max_size=8,
    ),
    model_type=st.sampled_from(ANY_TYPE),
    heads=st.one_of(st.integers(-1, 5), st.lists(st.integers(-1, 5), max_size=2), st.just("4"), st.none()),
    size=st.one_of(st.integers(-1, 5), st.just([])),
)
@settings(deadline=None, max_examples=examples(300))
def test_whatever_a_header_says_the_errors_are_ours(shapes: Any, model_type: str, heads: Any, size: Any) -> None:
    tensors = {
        f"model.layers.0.{name}.{part}": np.zeros(shape, dtype) for (name, part), (shape, dtype) in shapes.items()
    } | {"model.embed_tokens.weight": np.zeros((3, 4), np.float32)}
    attention = open_made(tensors, {"model_type": model_type, "num_attention_heads": heads, "head_dim": size})
    for layer in attention.layers:
        found = attention.matrices(layer)
        assert all(matrix.ndim == 2 and matrix.dtype == np.float32 for matrix in found.values())
        assert attention.nbytes(layer) >= 0
        assert found or attention.notes


def test_notes_are_one_for_each_reason() -> None:
    tensors = {f"model.layers.{layer}.mamba.in_proj.weight": np.ones((4, 4), np.float32) for layer in (0, 1, 2, 5)}
    tensors["model.layers.3.self_attn.q_proj.weight"] = np.ones((4, 4), np.float32)
    attention = open_made(tensors, None)
    (note,) = attention.notes
    assert note.startswith("layers 0-2, 5: ")
    assert "mamba.in_proj" in note
    attention.matrices(3)
    assert "layer 3: no k and v of its own" in attention.notes


def test_requests_that_can_not_be_met() -> None:
    tensors = {"model.layers.0.self_attn.k_proj.weight": np.ones((4, 4), np.float32)}
    attention = open_made(tensors, None)
    for call in (attention.matrices, attention.nbytes, attention.byte_ranges):
        with pytest.raises(InvalidRequest, match="layer 7"):
            call(7)
    assert open_made(tensors, None, "talker").notes == ("there is no stack of layers named talker",)
    with pytest.raises(UnknownFormat, match="no name of the token embeddings"):
        Embeddings(attention.checkpoint, "model")
    embeddings = Embeddings(Checkpoint(make({"model.embed_tokens.weight": np.ones((5, 4), np.float32)}, None)), "model")
    for start, stop in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(InvalidRequest, match="vocabulary of 5"):
            embeddings.rows(start, stop)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (4, 0)])
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MoEError):
        Embeddings(Checkpoint(make({"model.embed_tokens.weight": np.ones(shape, np.float32)}, None)), "model")


def test_a_header_that_can_not_be_read_is_an_error_and_no_note() -> None:
    tensors = {f"model.layers.{layer}.self_attn.k_proj.weight": np.ones((4, 4), np.float32) for layer in range(2)}
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    contents = {file: make({name: tensors[name]}, None).contents["model.safetensors"] for name, file in files.items()}
    contents["model-1.safetensors"] = b"x" * 9
    contents["model.safetensors.index.json"] = json.dumps({"weight_map": files}).encode()
    attention = Attention(Checkpoint(Memory(contents)), "model")
    assert attention.layers == (0, 1)
    assert attention.matrices(0).keys() == {"k"}
    for _ in range(2):
        with pytest.raises(ModelUnreadable):
            attention.matrices(1)


def test_missing_bytes_are_an_error() -> None:
    tensors = {"model.layers.0.self_attn.k_proj.weight": np.ones((4, 4), np.float32)}
    repository = make(tensors, None)
    repository.contents["model.safetensors"] = repository.contents["model.safetensors"][:-8]
    with pytest.raises(ModelUnreadable):
        Attention(Checkpoint(repository), "model").matrices(0)


# ---------------------------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize("axes", ["Q", "Q K", "(Q K V) (H)x", "Q H O", "() H"])
def test_axes_refuse_what_describes_no_projection(axes: str) -> None:
    with pytest.raises(ValueError, match="axes"):
        ProjectionTensor.parse("q", ("q",), axes)


def test_every_fused_row_holds_for_named_types_or_is_of_gguf() -> None:
    for row in ROWS.values():
        is_fused = any(len(tensor.outputs) > 1 for tensor in row.tensors)
        assert not is_fused or row.model_types or row.name == "gguf_attention"


def test_every_type_with_a_fused_tensor_has_an_oracle() -> None:
    configs = [json.loads((FIXTURES / name / "config.json").read_text()) for name in ORACLES]
    types = {config.get("text_config", config)["model_type"] for config in configs}
    listed = set().union(*(row.model_types for row in ROWS.values()))
    assert listed - types - set(IN_MLX_LM) - {"hunyuan"} == set(families.FROM_PUBLISHED_CODE)


def test_architectures_in_pairs_are_those_of_llama_cpp() -> None:
    assert set(gguf.MODEL_ARCH_NAMES.values()) >= set(load_rotary_pairs())
