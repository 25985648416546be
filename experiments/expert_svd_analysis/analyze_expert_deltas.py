"""The ranks of what sets each expert apart from the mean of all, layer by layer: a table, and a JSON file in results/.

    python experiments/expert_svd_analysis/analyze_expert_deltas.py --model allenai/OLMoE-1B-7B-0924 --layers 0,5,10,15

MODEL is what `lazarus` takes: a folder, a file, a Hub id or demo:NAME. Nothing is random but the neurons that are
matched for the verdict, and these are the same each time.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from chuk_lazarus.introspection.moe import MoEError, MoETypeAnalysis, MoETypeService

HERE = Path(__file__).resolve().parent
SHARES = ("0.90", "0.95", "0.99")


def summarise(report: MoETypeAnalysis) -> dict[str, Any]:
    """What the table shows, of every layer and projection; standard deviations are over the experts measured."""
    return {
        "model": report.model,
        "revision": report.revision,
        "family": report.family,
        "storage": report.storage,
        "experts": report.experts,
        "type": report.type,
        "kind": report.kind,
        "documented_rule": report.documented_rule.model_dump(include={"type", "confidence"}),
        "overlay_ratio": report.overlay_ratio,
        "layers": [
            {
                "layer": layer.layer,
                "projection": role,
                "max_rank": one.max_rank,
                "rank": one.rank,
                "std": {share: float(np.std(one.expert_ranks[share])) for share in SHARES},
                "experts": one.experts,
                "expert_ranks": one.expert_ranks["0.95"],
                "rank_ratio": one.rank_ratio,
                "noise_rank_ratio": one.noise_rank_ratio,
                "delta_energy": one.delta_energy,
                "cosine": getattr(layer.cosine, role),
            }
            for layer in report.layers
            for role, one in layer.projections.items()
        ],
        "bytes_read": report.cost.bytes_read,
    }


def add_means(found: dict[str, Any]) -> None:
    """Means over the layers, by projection."""
    roles = dict.fromkeys(row["projection"] for row in found["layers"])
    found["means"] = []
    for role in roles:
        rows = [row for row in found["layers"] if row["projection"] == role]
        figures = {
            name: float(np.mean([row[name] for row in rows]))
            for name in ("max_rank", "rank_ratio", "noise_rank_ratio", "delta_energy", "cosine")
        }
        ranks = {share: float(np.mean([row["rank"][share] for row in rows])) for share in SHARES}
        found["means"].append({"layer": "mean", "projection": role, "rank": ranks, **figures})


def to_table(found: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| layer | projection | 90 % | 95 % | 99 % | of | share | vs noise | first, last | delta energy | cosine |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in [*found["layers"], *found["means"]]:
        ranks = [f"{row['rank'][s]:.1f}" + (f" ± {row['std'][s]:.1f}" if "std" in row else "") for s in SHARES]
        ends = f"{row['expert_ranks'][0]}, {row['expert_ranks'][-1]}" if "expert_ranks" in row else ""
        shares = [f"{row[name]:.1%}" for name in ("rank_ratio", "noise_rank_ratio")]
        cells = [*ranks, f"{row['max_rank']:g}", *shares, ends, f"{row['delta_energy']:.1%}", f"{row['cosine']:.3f}"]
        lines.append(f"| {row['layer']} | {row['projection']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_count(text: str) -> int | None:
    return None if text == "all" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ranks of expert deltas, layer by layer.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", help='such as "0,5,10,15", "0-23/6" or "all"; the first MoE layer by default')
    parser.add_argument("--experts", type=parse_count, default=8, help='of how many experts (8), or "all"')
    parser.add_argument("--out", type=Path, help="the JSON file; results/MODEL.json by default")
    given = parser.parse_args()
    try:
        report = MoETypeService.analyze(
            given.model, layers=given.layers, experts=given.experts, variance=[float(share) for share in SHARES]
        )
    except MoEError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    found = summarise(report)
    add_means(found)
    out = given.out or HERE / "results" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', given.model)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    rule = found["documented_rule"]
    print(f"{found['model']}: {found['type']} ({found['kind'] or 'no copies'})")
    print(f"documented rule: {rule['type']} ({rule['confidence']:.0%}); overlay ratio {found['overlay_ratio']:.1f}\n")
    print(to_table(found))


if __name__ == "__main__":
    main()
