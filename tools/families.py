"""Write docs/families.md: what is read, by family and by storage format, and what says that it is read right.

    python tools/families.py

Nothing is listed that no test reads: families come from the test checkpoints with an oracle, formats from those and
from the tensors below tests/fixtures/formats.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from chuk_lazarus.introspection.moe.weights.checkpoint import Checkpoint
from chuk_lazarus.introspection.moe.weights.codecs import refused
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.layouts import (
    AttentionLayout,
    Kind,
    Layout,
    load_attention_table,
    load_embedding_names,
    load_rotary_pairs,
    load_table,
)
from chuk_lazarus.introspection.moe.weights.repositories.find import find_repository
from chuk_lazarus.introspection.moe.weights.stored import open_stored
from model_types import REASONS

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests/fixtures"
PAGE = ROOT / "docs/families.md"

# who wrote and decoded the tensors below tests/fixtures/formats
LIBRARIES = {
    "float_ct_mxfp6": "compressed-tensors 0.20.1",
    "packed_ct_int3": "compressed-tensors 0.20.1",
    "packed_ct_int5": "compressed-tensors 0.20.1",
    "packed_ct_int6": "compressed-tensors 0.20.1",
    "packed_ct_int7": "compressed-tensors 0.20.1",
    "packed_ct_plain_block": "compressed-tensors 0.20.1",
    "packed_quark": "Quark 0.13",
    "float_ct": "compressed-tensors 0.20.0",
    "float_hf": "transformers 5.23.0",
    "float_modelopt_awq": "ModelOpt 0.47.0",
    "packed_modelopt": "ModelOpt 0.47.0",
    "float_modelopt": "compressed-tensors 0.20.0, from ModelOpt's parts",
    "packed_ours": "compressed-tensors 0.20.1",
    "packed_ct": "compressed-tensors 0.20.0 (0.12.2 for `weight_g_idx`)",
    "packed_bnb": "bitsandbytes 0.50.2",
    "packed_gptq": "GPTQModel 7.7.0",
    "packed_awq": "AutoAWQ 0.2.7",
    "packed_autoround": "AutoRound 0.16.1",
}

# what the gguf package decodes besides plain floating point numbers
GGML_TYPES = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS",
    "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
]  # fmt: skip

# types with a fused tensor that neither transformers nor mlx-lm has under this very name
FROM_PUBLISHED_CODE = [
    "baichuan", "chatglm", "ernie4_5_moe", "ernie4_5_moe_vl", "hunyuan_image_3_moe", "llada2_moe", "nomic_bert",
    "phi-msft", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_8_flash_next", "qwen3_8_flash_next_text", "qwen4_exp",
    "qwen35", "qwen35moe", "qwen3next",
]  # fmt: skip

INTRODUCTION = """# Families and storage formats

What can be read, and what proves that it is read correctly. `python tools/families.py` makes this page from the layout
table and the test checkpoints, and a test compares them: everything listed is read by a test.

The **oracle** is what the experts' matrices are compared with. It is a tiny model of that class, built and saved by
`transformers`, `mlx-lm` or another library, whose own forward pass agrees with the matrices for every expert. If no
library builds the family, it is tensors with the published names and shapes (`published shapes`). That proves
how these names are read, but not that every published file has them.

A model type that is not listed works too if its tensors' names and shapes fit one row of the table, and the report
says so. No shape shows whether gate and up rows in one tensor are stored as halves or interleaved. Then the weights
decide, by the norms of up rows and down columns, which training keeps alike; if these are not clear, the model is
refused.

## Families

`model_type` is the one in `config.json` (for diffusers `_class_name`), with that of its text part in parentheses. GGUF
files are read by llama.cpp's tensor names, whatever the architecture (rows `gguf` and so on below; the oracle is
files written by the `gguf` package).

| model_type | layout | oracle | storage |
|---|---|---|---|
"""

WITHOUT_ROW = """
Types that libraries load but no row lists (`python tools/model_types.py` finds them in a library's source):

| model_type | |
|---|---|
"""

LAYOUTS = """
## Layouts

One row of [layouts.toml](../src/chuk_lazarus/introspection/moe/weights/layouts.toml) each. Names follow `layers.N.` (or
`blocks.N.`, `blk.N.`, ...), with alternatives in braces. Axes: E experts, I intermediate, H hidden.
`(2 I)` has all gate rows before all up rows, or the reverse in `up_gate`; `(I 2)` interleaves them; `(E I)` has the
rows of one expert after those of another.

| layout | tensors |
|---|---|
"""

ATTENTION = """
## Attention and embeddings

These show that a model comes from a dense one even if every expert is new: the projections q, k, v and o of a layer,
or, with latent attention, q or q_a and q_b, kv_a, kv_b and o. Axes as above, and Q, K, V for the rows of q, k and v.
`(Q K V)` has all rows of q before those of k, `(G Q K V)` has them group by group (the heads that share one key),
`(A Q Z)` head by head, each with a gate on its output, which is not read. A row without model types is for all.

No shape shows how a fused tensor is arranged. For the model types named here it is cut as the library's own code does,
and for these as published code does: {published}. For other types only o is read, and a note says so. The order of
rows is that of transformers: rows that Meta's names or llama.cpp store in rotary pairs for each head of q and k
(GGUF of {pairs}) are put back in that order.

Not read, with a note: linear attention and state space layers, the compressed attention of DeepSeek-V4, the double
attention of LongCat-Flash, JetMoE's mixture of attention, tensors that MLX fuses for Inkling, Kimi-K3 and Muse Spark,
and in MLX's form of latent attention kv_b.

Token embeddings, {embeddings}, are read below the root of the stack of layers or above it, in every storage format.

| layout | model_type | tensors |
|---|---|---|
"""

FORMATS = """
## Storage formats

The storage is what reports print. Every format is also tested with random bytes and sizes against an encoder of its own
(`tests/encoders_float.py`, `tests/encoders_packed.py`), in every layout in which it can occur.

The quantisation is taken from `config.json` or, if that says nothing, from `hf_quant_config.json` (ModelOpt),
`quantize_config.json` (AutoGPTQ), `quant_config.json` (AutoAWQ) or `quant_model_description.json` (ModelSlim) beside
it. MLX's `quantization` takes precedence over the `quantization_config` of a model that was converted. Settings of a
module take precedence over general ones (MLX, ModelOpt's `quantized_layers`, AutoRound's `extra_config`, Quark).
Experts of one layer may be in several formats if each is stored as rows of outputs.

ModelOpt's AWQ and SmoothQuant divide a weight in any format by factors of its inputs, and store these factors as
`pre_quant_scale`. The weight is multiplied by them again when it is read and exported.

| storage | oracle |
|---|---|
"""

REFUSED = """
Refused by name: FP8 in blocks without `weight_block_size`, and FP8 scales that can be read in two ways; integers of 3,
5, 6 and 7 bits packed by old versions of compressed-tensors, as many as fit into a word; GPTQ in the marlin packing;
AWQ other than 4-bit GEMM; stacks in bitsandbytes' 4-bit and of Quark's integers; {refused}; in GGUF Q8_1, Q8_K, Q1_0,
the types of ik_llama.cpp and every type that the `gguf` package does not decode. Pickles are never opened.
"""


def fixtures(kind: Kind) -> Iterable[tuple[str, Experts]]:
    """Each test checkpoint, stack by stack, that has an oracle of this kind."""
    file = {"routed": "oracle"}.get(kind, kind)
    for path in sorted(FIXTURES.glob(f"*/{file}*.npz")):
        stack = path.stem.removeprefix(file).removeprefix(".")
        yield path.parent.name, Experts.open(str(path.parent) + (f"#{stack}" if stack else ""), kind)


def code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in dict.fromkeys(words))


def families() -> list[str]:
    """One line per model type."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for folder, experts in fixtures("routed"):
        config = experts.checkpoint.config
        whole = config.get("model_type", config.get("_class_name"))
        label = f"`{name}`" if (name := whole or experts.model_type) else "(not given)"
        if whole and experts.model_type != whole:
            label += f" (`{experts.model_type}`)"
        line = found.setdefault(label, {"layout": {}, "oracle": {}, "storage": {}})
        line["layout"][experts.family] = None
        line["oracle"][json.loads((FIXTURES / folder / "origin.json").read_text())["oracle"]] = None
        line["storage"] |= dict.fromkeys(experts.layer(experts.layers[0]).storage.split("+"))
    return [
        f"| {label} | {code(line['layout'])} | {'; '.join(line['oracle'])} | {code(line['storage'])} |"
        for label, line in sorted(found.items(), key=lambda item: item[0].lower())
    ]


def layouts() -> list[str]:
    """One line per row of the table."""

    def describe(row: Layout) -> str:
        lines = []
        for tensor in row.tensors:
            leaf = tensor.names[0]
            while not all(name.endswith(leaf) for name in tensor.names):
                leaf = leaf.partition(".")[2]
            blocks = [name.removesuffix(leaf) for name in tensor.names]
            front = f"{{{','.join(blocks)}}}" if len(blocks) > 1 else ""
            lines.append(f"{tensor.role} `{front}{leaf}`: `{tensor.axes.text}`")
        return "<br>".join(lines)

    kinds = {"routed": "", "shared": " (shared experts)", "dense": " (dense layers)"}
    return [f"| `{row.name}`{kinds[row.kind]} | {describe(row)} |" for row in load_table()]


def attention() -> list[str]:
    """One line per row of the table for attention."""

    def describe(row: AttentionLayout) -> str:
        lines: dict[tuple[str, str], list[str]] = {}
        for tensor in row.tensors:
            lines.setdefault((tensor.role, tensor.axes), []).extend(tensor.names)
        return "<br>".join(f"{role} `{axes}`: {code(names)}" for (role, axes), names in lines.items())

    return [f"| `{row.name}` | {code(sorted(row.model_types))} | {describe(row)} |" for row in load_attention_table()]


def formats() -> list[str]:
    """One line per storage format."""
    found: dict[str, dict[str, None]] = {}
    for folder in sorted((FIXTURES / "formats").iterdir()):
        checkpoint = Checkpoint(find_repository(str(folder)))
        parts = {name.removeprefix("x."): name for name in checkpoint.names}
        _, stored = open_stored(checkpoint, parts, checkpoint.config["quantization_config"])
        library = next(library for prefix, library in LIBRARIES.items() if folder.name.startswith(prefix))
        found.setdefault(stored.codec, {})[library] = None
    for name, experts in fixtures("routed"):
        for storage in experts.layer(experts.layers[0]).storage.split("+"):
            oracle = json.loads((FIXTURES / name / "origin.json").read_text())["oracle"].partition(",")[0]
            if oracle != "published shapes":
                found.setdefault(storage, {})[oracle] = None
    lines = [f"| `{storage}` | {'; '.join(oracles)} |" for storage, oracles in sorted(found.items())]
    return [*lines, f"| {code(GGML_TYPES)} (GGUF) | gguf 0.19 |"]


def page() -> str:
    sections = [
        INTRODUCTION + "\n".join(families()),
        WITHOUT_ROW + "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(REASONS.items())),
        LAYOUTS + "\n".join(layouts()),
        ATTENTION.format(
            published=code(FROM_PUBLISHED_CODE),
            pairs=code(load_rotary_pairs()),
            embeddings=code(load_embedding_names()),
        )
        + "\n".join(attention()),
        FORMATS + "\n".join(formats()),
        REFUSED.format(refused=", ".join(sorted({*refused.METHODS.values(), *refused.PARTS}))).rstrip(),
    ]
    return "\n".join(sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
