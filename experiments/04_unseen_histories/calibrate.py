"""How sure the verdict may be: the confidence, fitted to the looked-at families and tried on the others.

Reads results.json, writes calibration.json and docs/calibration.svg, and prints the constants of classifier.py.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from measure import APART, interval
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import rankdata

from chuk_lazarus.introspection.moe.provenance.classifier import Calibration

matplotlib.use("svg")
HERE = Path(__file__).parent
FIGURE = HERE.parents[1] / "docs/calibration.svg"
RULES = {"type": "a layer or more", "quick": "--quick"}
WEIGHTS = {"type": "weight", "quick": "quick_weight"}
EDGES = (0.5, 0.8, 0.9, 0.95, 1.0)  # of confidence, between which verdicts are counted
Row = dict[str, Any]


def probabilities(calibration: Calibration, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([calibration.probability(float(weight)) for weight in weights])


def log_loss(predicted: NDArray[np.float64], upcycled: NDArray[np.bool_]) -> float:
    return -float(np.where(upcycled, np.log(predicted), np.log1p(-predicted)).mean())


def fit(weights: NDArray[np.float64], upcycled: NDArray[np.bool_]) -> Calibration:
    """The likeliest calibration; floor and ceiling keep a distance of half a model in the number of models."""
    margin = 0.5 / len(weights)

    def build(parameters: NDArray[np.float64]) -> Calibration:
        floor, below = margin + (0.5 - margin) / (1 + np.exp(-np.clip(parameters[:2], -50, 50)))
        middle, slope = np.exp(np.clip(parameters[2:], [-6, -1], [1, 2]))
        return Calibration(float(floor), float(1 - below), float(middle), float(slope))

    def loss(parameters: NDArray[np.float64]) -> float:
        return log_loss(probabilities(build(parameters), weights), upcycled)

    starts = (np.array([-1.5, -3.0, np.log(middle), np.log(2.0)]) for middle in (0.1, 0.5, 1.0))
    found = [minimize(loss, start, method="Nelder-Mead", options={"maxiter": 4000}) for start in starts]
    return build(min(found, key=lambda one: float(one.fun)).x)


def select(rows: Sequence[Row], rule: str) -> list[Row]:
    """The rows whose verdict is by the weight of evidence: not where all experts are identical, nor where they were
    rebuilt from a base, which leaves the verdict open whatever the weight."""
    return [
        row
        for row in rows
        if row.get(rule) and row["neurons"] and not (row[rule] == "UNDETERMINED" and row[WEIGHTS[rule]] > 1)
    ]


def read(rows: Sequence[Row], rule: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Weights, and which are upcycled."""
    chosen = select(rows, rule)
    return np.array([row[WEIGHTS[rule]] for row in chosen]), np.array([row["origin"] == "UPCYCLED" for row in chosen])


def rank(rows: Sequence[Row], rule: str, calibration: Calibration) -> float:
    """The area under the ROC curve (Mann and Whitney's U) of all models, an open verdict's probability being 0.5 where
    the weight does not decide."""
    decided = {row["name"] for row in select(rows, rule)}
    scores = rankdata(
        [calibration.probability(row[WEIGHTS[rule]]) if row["name"] in decided else 0.5 for row in rows if rule in row]
    )
    upcycled = np.array([row["origin"] == "UPCYCLED" for row in rows if rule in row])
    count, others = int(upcycled.sum()), int((~upcycled).sum())
    return float((scores[upcycled].sum() - count * (count + 1) / 2) / (count * others))


def count_by_confidence(rows: Sequence[Row], rule: str, calibration: Calibration) -> list[dict[str, Any]]:
    """How often verdicts of each confidence are right."""
    given = [
        (calibration.decide(row[rule], row[WEIGHTS[rule]]).confidence, row[rule] == row["origin"])
        for row in select(rows, rule)
        if row[rule] != "UNDETERMINED"
    ]
    bins = []
    for low, high in pairwise(EDGES):
        inside = [
            (confidence, right) for confidence, right in given if low <= confidence < high or confidence == high == 1
        ]
        right = sum(right for _, right in inside)
        if inside:
            mean = float(np.mean([confidence for confidence, _ in inside]))
            bins.append(
                {
                    "confidence": round(mean, 4),
                    "right": right,
                    "count": len(inside),
                    "interval": interval(right, len(inside)),
                }
            )
    return bins


def draw(bins: dict[str, list[dict[str, Any]]]) -> None:
    """The reliability diagram."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "calibration", "font.size": 10})
    figure, axes = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, label="as often right as said")
    for (rule, found), marker, colour in zip(bins.items(), "os", ("#1b6ca8", "#d1495b"), strict=True):
        x = np.array([one["confidence"] for one in found])
        y = np.array([one["right"] / one["count"] for one in found])
        low, high = (np.array([one["interval"][end] for one in found]) for end in (0, 1))
        shift = 0.002 if rule == "quick" else -0.002
        axes.errorbar(x + shift, y, [y - low, high - y], fmt=marker, color=colour, capsize=3, label=RULES[rule])
        for one, at, height in zip(found, x, y, strict=True):
            axes.annotate(
                str(one["count"]), (at + shift, height), textcoords="offset points", xytext=(6, -11), fontsize=8
            )
    axes.set(xlabel="confidence of the verdict", ylabel="share that is right", xlim=(0.5, 1.02), ylim=(0.4, 1.02))
    axes.set_title("Held-out models of known history, 95 % intervals", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    results = json.loads((HERE / "results.json").read_text())
    looked_at = [row for row in results["rows"] if row["family"] in results["looked_at"]]
    held_out = [row for row in results["rows"] if row["family"] not in results["looked_at"]]
    usual = [row for row in held_out if row["kind"].split("+")[0] not in APART]
    result: dict[str, Any] = {}
    bins = {}
    for rule in RULES:
        calibration = fit(*read(looked_at, rule))
        weights, upcycled = read(held_out, rule)
        predicted = probabilities(calibration, weights)
        share = float(np.mean(read(looked_at, rule)[1]))
        bins[rule] = count_by_confidence(held_out, rule, calibration)
        result[rule] = {
            "calibration": {name: round(getattr(calibration, name), 3) for name in calibration.__slots__},
            "fitted_to": len(read(looked_at, rule)[0]),
            "tried_on": len(weights),
            "log_loss": round(log_loss(predicted, upcycled), 4),
            "log_loss_of_a_constant": round(log_loss(np.full(len(upcycled), share), upcycled), 4),
            "brier": round(float(np.square(predicted - upcycled).mean()), 4),
            "brier_of_a_constant": round(float(np.square(share - upcycled).mean()), 4),
            "area_under_curve": round(rank(held_out, rule, calibration), 4),
            "area_under_curve_without_apart": round(rank(usual, rule, calibration), 4),
            "reliability": bins[rule],
        }
    (HERE / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(bins)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
