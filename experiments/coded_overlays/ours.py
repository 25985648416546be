"""What this repository makes: overlays in codes, through the product itself, and its codes without any base."""

import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from models import Bench, weight_error

from chuk_lazarus.introspection.moe import Experts, InvalidRequest, MoECompressionService
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.numerics.alignment import keep_order
from chuk_lazarus.introspection.moe.overlays.bit_budget import BitRule
from chuk_lazarus.introspection.moe.overlays.checkpoint.reader import read_overlay
from chuk_lazarus.introspection.moe.overlays.layer import coded_bytes, sum_parts
from chuk_lazarus.introspection.moe.overlays.trials import try_layer


def overlay(bench: Bench, bits: float, **options: Any) -> dict[str, Any] | None:
    """`moe-overlay-compress --bits`, and the experts that its file holds: a row of results, None where so few bits
    are out of reach.

    The weight error is that of the report, the root of the mean square over layers, roles and experts.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "overlay"
        try:
            written = MoECompressionService.compress(str(bench.folder), folder, bits=bits, **options)
        except InvalidRequest:
            return None
        stored = read_overlay(folder)
        rebuilt = []
        for number, layer in enumerate(bench.layers):
            experts = [stored.expert(number, expert) for expert in range(len(layer["gate"]))]
            rebuilt.append({role: np.stack([expert[role] for expert in experts]) for role in layer})
    errors = [spread.mean for layer in written.verification for spread in layer.weight_error.values()]
    codes = sorted({f"{code.base} + {code.delta}" for layer in written.codes.values() for code in layer.values()})
    return {
        "setting": f"--bits {bits:g}: {', '.join(codes)}",
        "bits": written.bits_per_weight,
        "weight_error": math.sqrt(np.square(errors).mean()),
        **asdict(bench.measure(rebuilt)),
    }


def trellis(bench: Bench, bits: float) -> dict[str, Any] | None:
    """`moe-overlay-compress --bits --trellis`."""
    return overlay(bench, bits, trellis=True)


def plain(bench: Bench, bits: float) -> dict[str, Any] | None:
    """The same codes and the same rule, without a base: the best plain code that the product has."""
    opened, resources = Experts.open(str(bench.folder)), Resources.current()
    layers = [opened.layer(number) for number in range(len(bench.layers))]
    trials = {}
    for layer in layers:
        found = try_layer(layer, keep_order(layer.count, layer.sizes["I"]), resources)
        trials[layer.number] = {role: replace(trial, delta_share=1.0) for role, trial in found.items()}
    try:
        chosen = BitRule(bits).choose(trials)
    except InvalidRequest:
        return None
    rebuilt = []
    for layer, original in zip(layers, bench.layers, strict=True):
        codes = chosen[layer.number]
        assert all(code.base is None for code in codes.values())
        rebuilt.append(
            {
                role: np.stack(
                    [
                        codes[role].delta.decode(codes[role].delta.encode(matrix, unbiased=True), matrix.shape)
                        for matrix in matrices
                    ]
                )
                for role, matrices in original.items()
            }
        )
    taken = sum_parts(coded_bytes(layers, [chosen[layer.number] for layer in layers]))
    names = sorted({str(code.delta) for codes in chosen.values() for code in codes.values()})
    return {
        "setting": f"{bits:g} bits: {', '.join(names)}",
        "bits": 8 * taken / sum(layer.parameters for layer in layers),
        "weight_error": weight_error(bench.layers, rebuilt),
        **asdict(bench.measure(rebuilt)),
    }
