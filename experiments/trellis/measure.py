"""What do trellises buy in a model? Overlays in levels and in trellises of the same bits, run beside the original.

    python experiments/trellis/measure.py           # writes results.json beside this file

The models are the demo ones, and the text is that of experiments/overlay_loss. Measured is the Kullback-Leibler
divergence of the next token's distribution from the original's, in nats, the mean over tokens; both run in float32.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model

from chuk_lazarus.introspection.moe import MoECompressionService, load_overlay
from chuk_lazarus.introspection.moe.weights.repositories.find import find_repository

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "overlay_loss"))
from run import CONTEXT, read_validation  # noqa: E402

BITS = {"demo:upcycled": (1.4, 1.64, 2.2, 2.64, 3.64), "demo:native": (1.15, 2.12, 3.12, 4.12)}
TOKENS, BATCH = 8192, 16


def read_tokens() -> mx.array:
    text = read_validation().encode()[:TOKENS]
    return mx.array(list(text)).reshape(-1, CONTEXT)


def log_probabilities(model: Any, tokens: mx.array) -> list[mx.array]:
    model.set_dtype(mx.float32)
    found = []
    for start in range(0, len(tokens), BATCH):
        logits = model(tokens[start : start + BATCH])
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(found[-1])
    return found


def measure(model: str, tokens: mx.array, original: list[mx.array], **options: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        written = MoECompressionService.compress(model, Path(scratch) / "overlay", **options)
        ours = log_probabilities(load_overlay(Path(scratch) / "overlay")[0], tokens)
    divergence = sum(float((mx.exp(p) * (p - q)).sum()) for p, q in zip(original, ours, strict=True)) / tokens.size
    return {"bits_per_weight": written.bits_per_weight, "divergence": divergence, "seconds": written.cost.seconds}


def main() -> None:
    tokens = read_tokens()
    results: dict[str, Any] = {"tokens": tokens.size, "context": CONTEXT, "models": {}}
    for model, widths in BITS.items():
        original = log_probabilities(load_model(find_repository(model).path)[0], tokens)
        for bits in widths:
            for trellis in (False, True):
                row = measure(model, tokens, original, bits=bits, trellis=trellis)
                name = f"{bits} {'trellis' if trellis else 'levels'}"
                results["models"].setdefault(model, {})[name] = row
                print(f"{model}  {name:13s} {row['bits_per_weight']:.3f} bits  KL {row['divergence']:.5f}", flush=True)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
