"""What the verdict says of the checkpoints of the zoo, against the truth: `measure.py ZOO` -> results.json.

Families that were looked at while the rule was made are only there for its confidence to be fitted to
(`calibrate.py`); rates are of the others, which are held out.
"""

import json
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from scipy.stats import beta

from chuk_lazarus.introspection.moe import MoEError, MoETypeService
from chuk_lazarus.introspection.moe.provenance.classifier import weigh_neurons, weigh_parts

LOOKED_AT = {"00", "01", "02", "03", "04", "05", "06", "12", "13", "14", "15", "16", "17"}
# Kinds whose experts share nothing by construction, and natives whose experts began as copies of one noise
APART = ("redrawn", "split", "native-one-seed")
HERE = Path(__file__).parent
QUICK_BUDGET = 10**9  # all that a quick analysis can read of such a model


def measure(folder: str) -> dict[str, Any] | None:
    """One checkpoint: its truth, the verdict, the quick verdict, and the evidence that they rest on."""
    truth = json.loads((Path(folder) / "truth.json").read_text())
    if truth["origin"] == "DENSE":
        return None
    keys = ("family", "origin", "kind", "experts", "hidden", "intermediate")
    row = {"name": f"{truth['family']}/{Path(folder).name}", **{key: truth[key] for key in keys}}
    try:
        usual = MoETypeService.analyze(folder)
        row |= {"usual": usual.type, "usual_confidence": round(usual.confidence, 4)}
        analysis = MoETypeService.analyze(folder, layers="all")
        lineages = [layer.lineage for layer in analysis.layers]
        row |= {"type": analysis.type, "confidence": round(analysis.confidence, 4), "kind_found": analysis.kind}
        row["weight"] = round(weigh_neurons(lineages), 4)
        for what in ("shared", "strong", "without_down"):
            row[what] = [round(getattr(lineage.sharing, what) or 0.0, 4) for lineage in lineages]
        row["neurons"] = sum(lineage.sharing.neurons for lineage in lineages)
        row["first_layer"] = analysis.layers[0].type
        row["breadth"] = {
            what: round(min(p.breadth[what] for x in analysis.layers for p in x.projections.values()), 3)
            for what in ("base", "deltas")
        }
        row["delta_energy"] = round(
            sum(p.delta_energy for x in analysis.layers for p in x.projections.values())
            / sum(len(x.projections) for x in analysis.layers),
            4,
        )
    except MoEError as error:
        row["error"] = error.message
    try:
        quick = MoETypeService.quick(folder, budget=QUICK_BUDGET)
        row |= {"quick": quick.type, "quick_confidence": round(quick.confidence, 4)}
        row["quick_weight"] = round(weigh_parts(quick.layers), 4)
    except MoEError as error:
        row["quick_error"] = error.message
    return row


def interval(hits: int, count: int) -> list[float]:
    """The 95 % interval of a rate (Clopper and Pearson, 1934)."""
    if not count:
        return [0.0, 1.0]
    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return [round(low, 4), round(high, 4)]


def summarise(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """How often each origin got each verdict."""
    summary: dict[str, Any] = {}
    for origin in ("NATIVE", "UPCYCLED"):
        verdicts = [row[key] for row in rows if row["origin"] == origin and key in row]
        counts = {verdict: verdicts.count(verdict) for verdict in ("NATIVE", "UPCYCLED", "UNDETERMINED")}
        summary[origin] = {
            "count": len(verdicts),
            **{verdict: {"count": n, "interval": interval(n, len(verdicts))} for verdict, n in counts.items()},
        }
    return summary


def rate_verdicts(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Of each verdict: how often it was right."""
    rates: dict[str, Any] = {}
    for verdict in ("NATIVE", "UPCYCLED"):
        given = [row["origin"] for row in rows if row.get(key) == verdict]
        right = given.count(verdict)
        rates[verdict] = {"right": right, "count": len(given), "interval": interval(right, len(given))}
    return rates


def main() -> None:
    folders = sorted(str(path.parent) for path in Path(sys.argv[1]).rglob("truth.json"))
    with ProcessPoolExecutor(2) as pool:
        write_results([row for row in pool.map(measure, folders, chunksize=4) if row])


def write_results(rows: list[dict[str, Any]]) -> None:
    """The rates of the held-out families, and all rows."""
    held_out = [row for row in rows if row["family"] not in LOOKED_AT]
    usual = [row for row in held_out if row["kind"].split("+")[0] not in APART]
    keys = ("usual", "type", "first_layer", "quick")
    by_kind: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in held_out:
        by_kind[f"{row['origin']} {row['kind']}"][row.get("usual", "error")] += 1
    result = {
        "looked_at": sorted({row["family"] for row in rows} & LOOKED_AT),
        "families": sorted({row["family"] for row in held_out}),
        "right": {key: rate_verdicts(held_out, key) for key in keys},
        "all": {key: summarise(held_out, key) for key in keys},
        "apart": APART,
        "without_apart": {key: summarise(usual, key) for key in keys},
        "by_kind": {kind: dict(counts) for kind, counts in sorted(by_kind.items())},
        "rows": rows,
    }
    text = json.dumps({**result, "rows": []}, indent=1)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "results.json").write_text(text.replace('"rows": []', f'"rows": [\n{lines}\n]') + "\n")
    print(json.dumps({"right": result["right"], "without_apart": result["without_apart"]}, indent=1))


if __name__ == "__main__":
    main()
