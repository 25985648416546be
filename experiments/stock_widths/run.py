"""At equal bytes, what do widths by measured error lose, and what do mlx-lm's own uniform and mixed quantisations?

    python experiments/stock_widths/run.py [--zoo ZOO ...] [--models NAME ...]     # -> results.json
    python experiments/stock_widths/run.py --table                                 # the tables of RESULTS.md

mlx-lm quantises each model in its own ways; then `moe-overlay-compress --format mlx --fit` writes a folder whose
tensors take no more bytes than mlx-lm's. Both are compared with the original on the text that it never saw.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from math import exp, hypot, log
from pathlib import Path
from typing import Any

from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.errors import InvalidRequest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "coded_overlays"))
from models import read_demo_text  # noqa: E402  found by the line above

DEMO = HERE.parents[1] / "src" / "chuk_lazarus" / "demo"
RESULTS = HERE / "results.json"
UNIFORM = [(bits, group) for bits in (2, 3, 4, 5, 6) for group in (32, 64)]
MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
TOKENS = 8_192
REST_BITS = (8, 6, 5, 4, 3, 2)  # of which the first that fits is taken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", type=Path, action="append", default=[])
    parser.add_argument("--models", nargs="*", default=["demo:native", "demo:upcycled"])
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print_tables(json.loads(RESULTS.read_text()))
        return
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    with tempfile.NamedTemporaryFile(suffix=".txt") as text:
        text.write(read_demo_text(held_out=True)[:200_000])
        text.flush()
        for model in given.models:
            rows = [row for row in rows if row["model"] != model]
            rows += list(compare(model, find_folder(model, given.zoo), Path(text.name)))
            RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def print_tables(rows: list[dict[str, Any]]) -> None:
    """How KL compares on each model, and the rows of a demo model."""
    print("| model | rows | KL over mlx-lm's (geometric mean) | worst | better, same, worse |\n|---|---|---|---|---|")
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        ratios = [row["ours_kl"] / row["theirs_kl"] for row in own]
        errors = [hypot(row["ours_stderr"], row["theirs_stderr"]) for row in own]
        differences = [(row["ours_kl"] - row["theirs_kl"]) / error for row, error in zip(own, errors, strict=True)]
        better, worse = sum(each < -2 for each in differences), sum(each > 2 for each in differences)
        mean = exp(sum(map(log, ratios)) / len(ratios))
        verdicts = f"{better}, {len(own) - better - worse}, {worse}"
        print(f"| {model} | {len(own)} | {mean:.2f} | {max(ratios):.2f} | {verdicts} |")
    print("\n| mlx-lm | bytes | KL of mlx-lm's | KL of ours | the rest of ours |\n|---|---|---|---|---|")
    for row in rows:
        if row["model"] == "demo:native" and (row["peer"].endswith("64") or "mixed" in row["peer"]):
            kls = f"{row['theirs_kl']:.4f} | {row['ours_kl']:.4f}"
            print(f"| {row['peer']} | {row['bytes']:,} | {kls} | {row['rest_bits']} bits |")


def find_folder(model: str, zoos: list[Path]) -> Path:
    if model.startswith("demo:"):
        return DEMO / model.removeprefix("demo:")
    return next(zoo / model for zoo in zoos if (zoo / model).is_dir())


def compare(model: str, folder: Path, text: Path) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        for name, settings in list_settings():
            theirs, ours = Path(scratch, "theirs"), Path(scratch, "ours")
            quantise(folder, theirs, **settings)
            size = tensor_bytes(theirs)
            for rest_bits in REST_BITS:
                try:
                    written = fit(folder, ours, size, rest_bits)
                except InvalidRequest:
                    continue
                row = {"model": model, "peer": name, "bytes": size, "rest_bits": rest_bits, "ours_bytes": written}
                for side, path in (("theirs", theirs), ("ours", ours)):
                    result = MoECompressionService.evaluate(str(folder), path, text, context=64, tokens=TOKENS)
                    row |= {f"{side}_kl": result.kl.mean, f"{side}_stderr": result.kl.stderr}
                    row |= {f"{side}_loss": result.loss_difference}
                print(row, flush=True)
                yield row
                shutil.rmtree(ours)
                break
            shutil.rmtree(theirs)


def list_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    for bits, group in UNIFORM:
        yield f"{bits} bits in {group}", {"bits": bits, "group": group}
    for recipe in MIXED:
        yield recipe, {"bits": 4, "group": 64, "recipe": recipe}


def quantise(folder: Path, target: Path, bits: int, group: int, recipe: str | None = None) -> None:
    """As `mlx_lm.convert -q`, but for the tokenizer, which these models lack."""
    model, config = load_model(folder, lazy=True)
    predicate = mixed_quant_predicate_builder(recipe, model, group) if recipe else None
    model, config = quantize_model(model, config, group, bits, quant_predicate=predicate)
    target.mkdir()
    save_model(target, model)
    save_config(config, target / "config.json")


def fit(folder: Path, target: Path, size: int, rest_bits: int) -> int:
    """A folder of ours whose tensors take at most `size` bytes; returns how many they take."""
    texts = 40_000  # bytes of the folder that are no tensors'
    for _ in range(4):
        shutil.rmtree(target, ignore_errors=True)
        MoECompressionService.compress(str(folder), target, fit=size + texts, format="mlx", rest_bits=rest_bits)
        others = sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) - tensor_bytes(target)
        if others == texts:
            break
        texts = others
    return tensor_bytes(target)


def tensor_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        total += len(data) - 8 - int.from_bytes(data[:8], "little")
    return total


if __name__ == "__main__":
    main()
