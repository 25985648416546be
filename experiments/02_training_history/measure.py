"""Judge every checkpoint of the zoo, and say how often the verdicts were right: results.json.

    python experiments/02_training_history/measure.py ZOO

Families (seeds) are split before anything is calibrated: CALIBRATION chooses the thresholds, the others are held out,
with a size, schemes' lengths and rates of their own. Needs the zoo that zoo.py trains, and nothing but the package.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta, rankdata

from chuk_lazarus.introspection.moe import InvalidRequest, MoETypeService
from chuk_lazarus.introspection.moe.provenance.classifier import LINEAGE, THRESHOLDS

HERE = Path(__file__).resolve().parent
CALIBRATION = {0, 1, 2, 3, 7}
NATIVE, REDRAWN, SPLIT = "native", "redrawn", "split"  # `split` duplicates no neuron: only a parent can tell it
LONGEST = "-longest"  # the end of two schemes' names that are trained far beyond the others: a curve of their own
QUICK_PARTS = (1, 0.25)  # of gate and up that a quick verdict reads
DETECTORS = ("type", "rule", "cosine_alone")
LENGTHS = ((0, 0), (1, 50), (51, 400), (401, 10**6))  # steps, first and last
FIGURES = ("kept", "close", "chance", "p_value", "spread", "in_place")


def judge_all(zoo: Path) -> list[dict[str, Any]]:
    found = []
    for log_file in sorted(zoo.glob("*/log.json")):
        log, seed = json.loads(log_file.read_text()), int(log_file.parent.name)
        for name, facts in sorted(log["checkpoints"].items()):
            folder = log_file.parent / name
            if facts["scheme"] == "dense" or not (folder / "model.safetensors").exists():
                continue
            report = MoETypeService.analyze(str(folder), layers="all")
            dense = log_file.parent / "parent-1000"
            parent = None
            if dense.exists():
                parent = MoETypeService.analyze(str(folder), layer=0, parent=str(dense)).layers[0].lineage.parent
            row = {
                "seed": seed,
                "name": name,
                **{key: facts[key] for key in ("scheme", "steps", "rate", "loss")},
                **{key: log["family"][key] for key in ("hidden", "experts", "corpus", "optimiser")},
                "type": report.type,
                "kind": report.kind,
                "rule": report.documented_rule.type,
                "cosine_alone": judge_cosine(report.cosine),
                "cosine": round(report.cosine, 4),
                "from_parent": parent and round(parent.kept, 4),
                "from_parent_by_chance": parent and round(parent.chance, 4),
                "layer_types": [layer.type for layer in report.layers],
            }
            for part in QUICK_PARTS:
                two_thirds = report.original_bytes * 2 // 3  # gate and up
                try:
                    quick = MoETypeService.quick(str(folder), layers="all", budget=round(part * two_thirds))
                    row[f"quick_{part:g}"] = [quick.type, round(quick.close, 4), round(quick.reach, 4)]
                except InvalidRequest:  # a part of a few neurons
                    row[f"quick_{part:g}"] = ["UNDETERMINED", 0.0, 0.0]
            for figure in FIGURES:
                row[figure] = float(np.mean([getattr(layer.lineage, figure) for layer in report.layers]))
            found.append(row)
            print(seed, name, report.type, f"{row['kept']:.3f}", flush=True)
    return found


def judge_cosine(cosine: float) -> str:
    """A verdict by the mean cosine alone, with the documented thresholds."""
    if cosine > THRESHOLDS.upcycled_cosine:
        return "UPCYCLED"
    return "NATIVE" if cosine < THRESHOLDS.native_cosine else "UNDETERMINED"


def is_upcycled(row: dict[str, Any]) -> bool:
    return row["scheme"].removesuffix(LONGEST) not in (NATIVE, REDRAWN)


def is_shown(row: dict[str, Any]) -> bool:
    """Whether weights can show the origin, at the lengths of training that the rates are about."""
    return row["scheme"] not in (REDRAWN, SPLIT) and not row["scheme"].endswith(LONGEST)


def auroc(rows: list[dict[str, Any]], score: str) -> float:
    """The probability that an upcycled checkpoint scores higher than a native one."""
    values = np.array([row["kept"] - row["chance"] if score == "kept" else row[score] for row in rows])
    truth = np.array([is_upcycled(row) for row in rows])
    ranks = rankdata(values)
    positives, negatives = truth.sum(), (~truth).sum()
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def interval(hits: int, total: int) -> list[float]:
    """The exact 95 % interval of a rate (Clopper and Pearson)."""
    low = float(beta.ppf(0.025, hits, total - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, total - hits)) if hits < total else 1.0
    return [round(low, 4), round(high, 4)]


def confusion(rows: Iterable[dict[str, Any]], verdict: str) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        truth = "upcycled" if is_upcycled(row) else "native"
        line = table.setdefault(truth, dict.fromkeys(("UPCYCLED", "NATIVE", "UNDETERMINED"), 0))
        line[row[verdict]] += 1
    return table


def outcomes(verdicts: Iterable[str]) -> dict[str, int]:
    found = list(verdicts)
    return {verdict: found.count(verdict) for verdict in ("UPCYCLED", "NATIVE", "UNDETERMINED")}


def predictive(rows: list[dict[str, Any]], detector: str, verdict: str) -> list[Any]:
    """How many of the checkpoints that were called so are so, of how many, with the interval."""
    called = [row for row in rows if row[detector][0] == verdict]
    right = sum(is_upcycled(row) == (verdict == "UPCYCLED") for row in called)
    return [right, len(called), interval(right, len(called)) if called else None]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates on checkpoints whose origin weights can show: without `redrawn` and `split`, which stand apart."""
    main = [row for row in rows if is_shown(row)]
    upcycled = [row for row in main if is_upcycled(row)]
    natives = [row for row in main if not is_upcycled(row)]
    right = sum(row["type"] == "UPCYCLED" for row in upcycled)
    wrong = sum(row["type"] == "UPCYCLED" for row in natives)
    kept_native = sum(row["type"] == "NATIVE" for row in natives)
    schemes = sorted({row["scheme"] for row in rows})
    return {
        "checkpoints": len(main),
        "upcycled": len(upcycled),
        "native": len(natives),
        "auroc": {score: round(auroc(main, score), 4) for score in ("kept", "cosine")},
        "confusion": {detector: confusion(main, detector) for detector in DETECTORS},
        "recognised": [right, len(upcycled), interval(right, len(upcycled))],
        "natives_called_upcycled": [wrong, len(natives), interval(wrong, len(natives))],
        "natives_recognised": [kept_native, len(natives), interval(kept_native, len(natives))],
        "undetermined": [sum(row["type"] == "UNDETERMINED" for row in main), len(main)],
        "by_scheme": {
            scheme: {
                "checkpoints": len(own),
                "UPCYCLED": sum(row["type"] == "UPCYCLED" for row in own),
                "NATIVE": sum(row["type"] == "NATIVE" for row in own),
                "rule_UPCYCLED": sum(row["rule"] == "UPCYCLED" for row in own),
                "cosine_alone_UPCYCLED": sum(row["cosine_alone"] == "UPCYCLED" for row in own),
                "kept": [round(min(r["kept"] - r["chance"] for r in own), 4), round(max(r["kept"] for r in own), 4)],
                "cosine": [min(r["cosine"] for r in own), max(r["cosine"] for r in own)],
                "from_parent": [pick(r["from_parent"] or 0.0 for r in own) for pick in (min, max)],
            }
            for scheme in schemes
            if (own := [row for row in rows if row["scheme"] == scheme])
        },
        "quick": {
            f"{part:g}": {
                "upcycled": outcomes(row[f"quick_{part:g}"][0] for row in upcycled),
                "native": outcomes(row[f"quick_{part:g}"][0] for row in natives),
                "called_upcycled": predictive(main, f"quick_{part:g}", "UPCYCLED"),
                "called_native": predictive(main, f"quick_{part:g}", "NATIVE"),
                "natives_called_upcycled": [
                    wrong := sum(row[f"quick_{part:g}"][0] == "UPCYCLED" for row in natives),
                    len(natives),
                    interval(wrong, len(natives)),
                ],
            }
            for part in QUICK_PARTS
        },
        "by_length": [
            {
                "steps": [first, last],
                "upcycled": len(own),
                **{f"{one}_UPCYCLED": sum(row[one] == "UPCYCLED" for row in own) for one in DETECTORS},
                "native": len(others),
                **{f"{one}_false": sum(row[one] == "UPCYCLED" for row in others) for one in DETECTORS},
            }
            for first, last in LENGTHS
            for own, others in [
                [[row for row in part if first <= row["steps"] <= last] for part in (upcycled, natives)]
            ]
        ],
    }


def longest_curves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is left of copies, and found in natives, after very long and hot training."""
    figures = ("seed", "scheme", "steps", "loss", "type", "rule", "kept", "close", "chance", "cosine", "from_parent")
    found = [row for row in rows if row["scheme"].endswith(LONGEST)]
    return [
        {key: row[key] for key in figures} for row in sorted(found, key=lambda r: (r["scheme"], r["seed"], r["steps"]))
    ]


def leave_one_scheme_out(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A threshold halfway, by ratio, between natives and the other schemes, tried on the scheme left out."""
    result = {}
    main = [row for row in rows if is_shown(row)]
    natives = max(row["kept"] - row["chance"] for row in main if not is_upcycled(row))
    for scheme in sorted({row["scheme"] for row in main if is_upcycled(row)}):
        least = min(r["kept"] - r["chance"] for r in main if is_upcycled(r) and r["scheme"] != scheme)
        threshold = sqrt(max(natives, 1e-3) * least)
        own = [row for row in main if row["scheme"] == scheme]
        right = sum(row["kept"] - row["chance"] > threshold for row in own)
        result[scheme] = {"threshold": round(threshold, 4), "recognised": [right, len(own)]}
    return result


def rate(hits: int, total: int, low_high: list[float]) -> str:
    return f"{hits} of {total} ({100 * low_high[0]:.1f} to {100 * low_high[1]:.1f} %)"


def print_tables(results: dict[str, Any]) -> None:
    """The tables of RESULTS.md, in markdown."""
    found = results["held_out"]
    confused, total = found["confusion"], found["checkpoints"]

    def row(what: str, cells: Iterable[object]) -> None:
        print(f"| {what} | " + " | ".join(map(str, cells)) + " |")

    row("held out", ["the verdict", "the documented rule", "mean cosine alone"])
    print("|---|---|---|---|")
    row("AUROC", [f"{found['auroc']['kept']:.3f}", "", f"{found['auroc']['cosine']:.3f}"])
    for truth in ("upcycled", "native"):
        for said in ("UPCYCLED", "NATIVE"):
            hits = [confused[one][truth][said] for one in DETECTORS]
            count = found[truth]
            row(f"{truth} called {said}", [rate(hit, count, interval(hit, count)) for hit in hits])
    undecided = [sum(confused[one][truth]["UNDETERMINED"] for truth in confused[one]) for one in DETECTORS]
    row("UNDETERMINED", [f"{n} of {total}" for n in undecided])
    print()
    row("steps", ["upcycled", *(f"{one} UPCYCLED" for one in DETECTORS), "native", *(f"{o} wrong" for o in DETECTORS)])
    print("|" + "---|" * 9)
    for line in found["by_length"]:
        first, last = line["steps"]
        steps = str(first) if first == last else f"{first} to {last}" if last < 10**6 else f"from {first}"
        counts = [line["upcycled"], *(line[f"{one}_UPCYCLED"] for one in DETECTORS)]
        row(steps, [*counts, line["native"], *(line[f"{one}_false"] for one in DETECTORS)])
    print()
    row(
        "scheme",
        ["checkpoints", "recognised", "by rule", "by cosine", "found again, beyond chance", "cosine", "in the parent"],
    )
    print("|" + "---|" * 8)
    for scheme, line in found["by_scheme"].items():
        spans = [f"{100 * low:.0f} to {100 * high:.0f} %" for low, high in (line["kept"], line["from_parent"])]
        cosine = "{:.2f} to {:.2f}".format(*line["cosine"])
        own = [line[key] for key in ("UPCYCLED", "rule_UPCYCLED", "cosine_alone_UPCYCLED")]
        row(scheme, [line["checkpoints"], *own, spans[0], cosine, spans[1]])
    print()
    row(
        "trained for very long",
        ["seed", "steps", "loss", "verdict", "found again", "closely", "cosine", "in the parent"],
    )
    print("|" + "---|" * 9)
    for line in results["longest"]:
        shares = [f"{100 * line[key]:.1f} %" for key in ("kept", "close")]
        parent = "" if line["from_parent"] is None else f"{100 * line['from_parent']:.1f} %"
        figures = [line[key] for key in ("seed", "steps", "loss", "type")]
        row(line["scheme"], [*figures, *shares, f"{line['cosine']:.2f}", parent])
    print()
    for part, line in found["quick"].items():
        print(f"quick, {part} of gate and up:", json.dumps(line))


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the zoo.")
    parser.add_argument("zoo", type=Path)
    rows = judge_all(parser.parse_args().zoo)
    parts = {"calibration": [], "held_out": []}
    for row in rows:
        parts["calibration" if row["seed"] in CALIBRATION else "held_out"].append(row)
    results = {
        "thresholds": asdict(LINEAGE),
        **{name: summarise(own) for name, own in parts.items() if own},
        "leave_one_scheme_out": leave_one_scheme_out(rows),
        "longest": longest_curves(rows),
        "rows": rows,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_tables(results)


if __name__ == "__main__":
    main()
