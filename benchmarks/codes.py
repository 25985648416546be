"""Overlays in codes: what coding a layer costs, and how fast they run, beside plain quantisation by MLX.

    python benchmarks/codes.py [--cosine C] [--layers N] [--bits B] [--only PART] [--repeat N] [--small N]

A model with the proportions of OLMoE: layers of 64 experts of 3 x 1024x2048 with attention, 8 experts for a token, and
of its vocabulary the part that falls to so many of its 16 layers. Weights are random, and the experts of a layer have
the cosine C with each other. The bits of the codes are the fewest, of those tried, with which experts err no more than
in MLX's 4 bits (groups of 64): that is the equal quality meant here. All else is in MLX's 4 bits in both models.

*Coding* is `compress --bits` of one layer, with reading, alignment, writing and verification, in processes of its own;
its floor is reading and decoding the same experts and `mx.quantize` at 4 bits. *Running* is in float32, on a CPU; both
models take turns in each round.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from layers import OLMOE, Shape, write_model
from measuring import CLOCKS, Figures, apart, benchmark, cores, medians, over, timed
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from chuk_lazarus.introspection.moe import Experts, MoECompressionService, load_overlay, memory_limit
from chuk_lazarus.introspection.moe.overlays.checkpoint.format import CodedExperts
from chuk_lazarus.introspection.moe.overlays.checkpoint.reader import read_overlay
from chuk_lazarus.introspection.moe.overlays.codes import list_matrices
from chuk_lazarus.introspection.moe.overlays.runtime.modules import CodedGLU

TOP_K, VOCABULARY, LAYERS = 8, 50304, 16  # of OLMoE
HEADS = 16
BITS, GROUP = 4, 64  # of the plain quantisation
TRIED = (1.25, 1.6, 1.8, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)
MEMORY = (None, "500MB")
DECODED, PROMPT = 32, 256  # tokens
MODELS = ("plain", "coded")


def write_whole_model(folder: Path, shape: Shape, layers: int, cosine: float) -> None:
    """Experts and all else that mlx-lm's olmoe has."""
    write_model(folder, shape, layers, cosine=cosine)
    (folder / "model.safetensors").rename(folder / "model-experts.safetensors")
    hidden, vocabulary = shape.hidden, VOCABULARY * layers // LAYERS
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens", "lm_head"), (vocabulary, hidden))
    shapes["model.norm"] = (hidden,)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        norms = ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
        shapes |= {f"{prefix}.{name}": (hidden,) for name in norms}
        shapes[f"{prefix}.mlp.gate"] = (shape.experts, hidden)
    mx.random.seed(0)
    tensors = {
        f"{name}.weight": (0.02 * mx.random.normal(size) if len(size) > 1 else mx.ones(size)).astype(mx.bfloat16)
        for name, size in shapes.items()
    }
    mx.save_safetensors(str(folder / "model-rest.safetensors"), tensors, {"format": "pt"})
    places = dict.fromkeys(tensors, "model-rest.safetensors")
    places |= dict.fromkeys(mx.load(str(folder / "model-experts.safetensors")), "model-experts.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        **json.loads((folder / "config.json").read_text()),
        "hidden_size": hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_experts_per_tok": TOP_K,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------------------------------------------------------------
# Coding


def code(model: str, folder: str, bits: float, memory: str | None) -> Figures:
    """The first layer, written as an overlay in codes."""
    with memory_limit(memory):
        return timed(lambda: MoECompressionService.compress(model, folder, layers=[0], bits=bits, force=True))


def quantise(model: str) -> Figures:
    """The floor: each expert read and decoded to float32, then quantised by MLX, one a core."""
    layer = Experts.open(model).layer(0)

    def quantise_expert(expert: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            for matrix in layer.matrices(expert).values():
                mx.eval(mx.quantize(mx.array(matrix), GROUP, BITS))

    with ThreadPoolExecutor(cores()) as pool:
        return timed(lambda: [None for _ in pool.map(quantise_expert, range(layer.count))])


def plain_error(model: str) -> float:
    """The relative error of an expert's weights in MLX's bits."""
    lost = energy = 0.0
    for matrix in Experts.open(model).layer(0).matrices(0).values():
        rounded = np.array(mx.dequantize(*mx.quantize(mx.array(matrix), GROUP, BITS), GROUP, BITS))
        lost += float(((rounded - matrix) ** 2).sum())
        energy += float((matrix**2).sum())
    return float((lost / energy) ** 0.5)


def find_bits(model: str, error: float, trying: Sequence[float]) -> tuple[float, Figures]:
    """The fewest bits tried whose experts err no more, and what was found on the way."""
    found = {}
    for bits in trying:
        layer = MoECompressionService.compute(model, layer=0, bits=bits).layers[0]
        assert layer.weight_error is not None
        codes = {role: f"{each.delta} on {each.base}" for role, each in layer.codes.items()}
        found[str(bits)] = {"weight_error": layer.weight_error, "codes": codes}
        if layer.weight_error <= error:
            return bits, found
    raise SystemExit("none of the bits tried is as good")


# ---------------------------------------------------------------------------------------------------------------------
# Running


def quantise_rest(model: nn.Module) -> nn.Module:
    """All linear layers and embeddings in MLX's bits, but for experts that are in codes; float32 for the rest."""
    nn.quantize(model, GROUP, BITS)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def decode(model: nn.Module, tokens: Any) -> None:
    """One token after the other."""
    cache = make_prompt_cache(model)
    for token in tokens:
        mx.eval(model(token.reshape(1, 1), cache=cache))


def read_prompt(model: nn.Module, tokens: Any) -> None:
    mx.eval(model(tokens[None], cache=make_prompt_cache(model)))


def time_down(block: CodedGLU, repeats: int = 50) -> Figures:
    """One token's experts of one layer, and of these the weighted sum of the down products: with the base's product
    for each expert, as mlx-lm's blocks call them, and with one for the weighted sum of their inputs."""
    down = block.down_proj
    hidden, inner = block.gate_proj._output_dims, down._output_dims
    x, rows = mx.random.normal((1, inner)), mx.random.normal((1, TOP_K, 1, hidden))
    experts = mx.arange(TOP_K).reshape(1, TOP_K)
    shares = mx.softmax(mx.random.normal((1, TOP_K, 1, 1)), axis=1)

    def for_each() -> mx.array:
        return (shares * down(rows, experts)).sum(axis=1)

    def for_the_sum() -> mx.array:
        return (shares * down.delta_product(rows, experts)).sum(axis=1) + down.base_product((shares * rows).sum(axis=1))

    assert mx.allclose(for_each(), for_the_sum(), rtol=1e-3, atol=1e-4)

    def all_three() -> mx.array:
        return (block(x, experts) * shares[..., 0]).sum(axis=-2)

    ways = {"the experts": all_three, "down, for each": for_each, "down, for the sum": for_the_sum}
    return {name: timed(lambda way=way: [mx.eval(way()) for _ in range(repeats)]) for name, way in ways.items()}


def bits_touched(shape: Shape, layer: CodedExperts) -> Figures:
    """Bits of experts that a token's product reads in one layer, with scales and biases in bfloat16, over the weights
    of the experts that it is routed to: in MLX's bits, and in codes, where a base is read once."""
    coded = 0
    for role, codes in layer.codes.items():
        for matrix in list_matrices(codes, layer.shape(role), layer.experts).values():
            rows, columns = matrix.shape
            group, bits = matrix.code.affine_settings(columns)
            coded += rows * columns * (bits + 32 / group) * (TOP_K if matrix.experts else 1)
    return {"plain": BITS + 32 / GROUP, "coded": coded / (TOP_K * shape.weights / shape.experts)}


def run(plain: nn.Module, coded: nn.Module, repeat: int) -> list[dict[str, Figures]]:
    tokens = mx.random.randint(0, plain.args.vocab_size, (DECODED + PROMPT,))
    mx.eval(tokens)
    block = next(module for module in coded.modules() if isinstance(module, CodedGLU))
    for model in (plain, coded):  # once without a clock
        decode(model, tokens[:4])
    rounds = []
    for _ in range(repeat):
        rounds.append(time_down(block))
        for name, model in (("plain", plain), ("coded", coded)):
            rounds[-1][f"decode, {name}"] = timed(lambda model=model: decode(model, tokens[:DECODED]))
            rounds[-1][f"prompt, {name}"] = timed(lambda model=model: read_prompt(model, tokens[DECODED:]))
    return rounds


def expert_bytes(model: nn.Module) -> int:
    return sum(array.nbytes for name, array in tree_flatten(model.parameters()) if ".switch_mlp." in name)


def measure_coding(model: Path, overlay: Path, shape: Shape, bits: float, repeat: int) -> Figures:
    rounds = []
    for _ in range(repeat):
        rounds.append({"floor": apart("codes.quantise", model=str(model))})
        for memory in MEMORY:
            found = apart("codes.code", model=str(model), folder=str(overlay), bits=bits, memory=memory)
            rounds[-1][f"memory {memory or 'as it is'}"] = found
    return {
        "expert_bytes": 2 * shape.weights,
        "seconds": medians(rounds),
        "cpu_seconds": medians(rounds, "cpu_seconds"),
        "over_floor": {name: over(rounds, name, "floor") for name in rounds[0]},
        "over_floor_cpu": {name: over(rounds, name, "floor", "cpu_seconds") for name in rounds[0]},
        "peak_gib": {name: max(one[name]["peak_bytes"] for one in rounds) / 2**30 for name in rounds[0]},
    }


def measure_running(model: Path, overlay: Path, shape: Shape, bits: float, repeat: int) -> Figures:
    MoECompressionService.compress(str(model), overlay, bits=bits, force=True)
    coded, plain = quantise_rest(load_overlay(overlay)[0]), quantise_rest(load_model(model)[0])
    rounds = run(plain, coded, repeat)
    seconds, cpu_seconds = medians(rounds), medians(rounds, "cpu_seconds")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": {name: DECODED / seconds[f"decode, {name}"] for name in MODELS},
        "tokens_per_cpu_second": {name: DECODED / cpu_seconds[f"decode, {name}"] for name in MODELS},
        "prompt_tokens_per_second": {name: PROMPT / seconds[f"prompt, {name}"] for name in MODELS},
        "prompt_tokens_per_cpu_second": {name: PROMPT / cpu_seconds[f"prompt, {name}"] for name in MODELS},
        "coded_over_plain": {
            f"{what}, {clock}": over(rounds, f"{what}, coded", f"{what}, plain", clock)
            for what in ("decode", "prompt")
            for clock in CLOCKS
        },
        "down_for_each_over_the_sum": {
            clock: over(rounds, "down, for each", "down, for the sum", clock) for clock in CLOCKS
        },
        "expert_bytes_in_memory": {"plain": expert_bytes(plain), "coded": expert_bytes(coded)},
        "bits_touched_for_a_token": bits_touched(shape, read_overlay(overlay).coded[0]),
    }


if __name__ == "__main__":
    own = argparse.ArgumentParser()
    own.add_argument("--cosine", type=float, default=0.9, help="of the experts with each other (default 0.9)")
    own.add_argument("--layers", type=int, default=2, help="of the model that runs (default 2)")
    own.add_argument("--bits", type=float, help="of the codes; without, they are searched")
    own.add_argument("--only", choices=("coding", "running"), help="measure no more than this")
    with benchmark(__doc__, own) as (options, figures):
        shape = OLMOE.smaller(options.small)
        model, overlay = options.folder / "model", options.folder / "overlay"
        write_whole_model(model, shape, options.layers, options.cosine)
        error = plain_error(str(model))
        figures |= {"cosine": options.cosine, "layers": options.layers, "plain": f"{BITS} bits, groups of {GROUP}"}
        bits, tried = find_bits(str(model), error, (options.bits,) if options.bits else TRIED)
        figures |= {"plain_weight_error": error, "bits": bits, "tried": tried}
        if options.only != "running":
            figures["coding"] = measure_coding(model, overlay, shape, bits, options.repeat)
        if options.only != "coding":
            figures["running"] = measure_running(model, overlay, shape, bits, options.repeat)
