"""What does an overlay of a really upcycled model cost in loss, against its bytes?

    python experiments/overlay_loss/run.py          # writes results.json beside this file

For `demo:upcycled` and `demo:native`: overlays of uniform ranks and of given ratios (rank spread by energy per byte)
are written, run in MLX on held-out text, and compared with the original. The text is the validation part of the corpus
that the demo models were trained on: every 20th file of the standard library by the sha1 of its name.
"""

import hashlib
import json
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from chuk_lazarus.introspection.moe import MoECompressionService

HERE = Path(__file__).resolve().parent
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
TOKENS, CONTEXT = 32_768, 128
RANKS = (0, 4, 8, 16, 32, 64)
RATIOS = (2, 4, 6)


def read_validation() -> str:
    """The validation files, joined, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    chosen = [
        name
        for name in names
        if not EXCLUDED.intersection(Path(name).parts)
        and "config-" not in name
        and not Path(name).name.startswith("_sysconfigdata")
        and int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0
    ]
    return "".join((root / name).read_text(encoding="utf-8", errors="replace") for name in chosen)


def measure(model: str, text: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Write one overlay, and run it beside the original."""
    with tempfile.TemporaryDirectory() as scratch:
        written = MoECompressionService.compress(model, Path(scratch) / "overlay", experts=None, **options)
        sizes = MoECompressionService.compute(model, layers="all", **options)
        pair = MoECompressionService.evaluate(
            model, Path(scratch) / "overlay", text, context=CONTEXT, tokens=TOKENS + 1
        )
    return {
        "ranks": written.ranks,
        "expert_bytes_share": sizes.overlay_bytes / sizes.original_bytes,
        "weight_error": [layer.weight_error for layer in sizes.layers],
        "original_loss": pair.original_result.loss,
        "overlay_loss": pair.overlay_result.loss,
        "loss_change": pair.loss_difference / pair.original_result.loss,
    }


def main() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as text:
        text.write(read_validation())
        text.flush()
        results: dict[str, Any] = {"tokens": TOKENS, "context": CONTEXT, "models": {}}
        for model in ("demo:upcycled", "demo:native"):
            found = {}
            for rank in RANKS:
                found[f"rank {rank}"] = measure(
                    model, Path(text.name), {"ranks": dict.fromkeys(("gate", "up", "down"), rank)}
                )
            for ratio in RATIOS:
                found[f"ratio {ratio}"] = measure(model, Path(text.name), {"target_ratio": ratio})
            results["models"][model] = found
            for name, row in found.items():
                print(
                    f"{model}  {name:9s}  {row['expert_bytes_share']:6.1%} of the expert bytes  "
                    f"loss {row['overlay_loss']:.4f} ({row['loss_change']:+.1%})"
                )
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
