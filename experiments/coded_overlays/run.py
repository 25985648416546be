"""Set coded overlays against the methods of other people at equal bytes, on models of known history.

    python experiments/coded_overlays/run.py --zoo ZOO [--zoo OUT]       # appends to results.json what it does not have
    python experiments/coded_overlays/run.py --zoo ZOO --again overlay   # measures one method again

ZOO is what experiments/04_unseen_histories/zoo.py makes, OUT what upcycle64.py does. A row of results.json is one
model, method and setting; `--models` and `--methods` choose. Between our own budgets the
logarithm of our KL is interpolated, to compare at the bits that a method took.
"""

import argparse
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import calibrated
import ours
import peers
from candidate import Candidate, Method, Rebuilt, nearest
from models import MODELS, Bench, find_folder, weight_error

RESULTS = Path(__file__).resolve().parent / "results.json"
BUDGETS = (1.6, 2.1, 3.1)  # of peers
FEW_BUDGETS = (2.1,)  # of methods that train
OWN_BUDGETS = {
    "plain": (1.55, 1.65, 2.1, 2.6, 3.1, 3.5, 4.1),
    "trellis": (1.3, 1.6, 2.1, 2.6, 3.1, 4.1),
    "overlay": (1.3, 1.5, 1.55, 1.6, 1.65, 1.7, 1.85, 2.1, 2.25, 2.6, 3.1, 3.5, 4.1),
}

PEERS: dict[str, Method] = {
    "RTN": peers.rtn,
    "Lloyd-Max": peers.lloyd,
    "MINT": peers.mint,
    "BitDelta": peers.bitdelta,
    "D-QRELO": peers.dqrelo,
    "DeRS": peers.ders,
    "Delta-CoMe": peers.delta_come,
    "D2-MoE": peers.d2moe,
    "ResMoE": peers.resmoe,
    "MoLAE": peers.molae,
    "AIMER": peers.aimer,
    "GPTQ": calibrated.gptq,
    "REAP": calibrated.reap,
    "HC-SMoE": calibrated.hc_smoe,
    "MoBE": peers.mobe,
    "SLBF": peers.slbf,
}
OURS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "plain": ours.plain,
    "overlay": ours.overlay,
    "trellis": ours.trellis,
}

Row = dict[str, Any]


def measure_peer(bench: Bench, name: str, known: list[Row]) -> Iterator[Row]:
    """The rows of one peer that are not known yet: for each budget its variant of the least weight error, or all where
    experts are left out, so that there is none."""
    done = {(row["variant"], row["setting"]) for row in known}
    found: dict[tuple[str, str], tuple[Candidate, Rebuilt, float | None, float]] = {}
    for near in nearest(PEERS[name](bench), FEW_BUDGETS if name in ("MoBE", "SLBF") else BUDGETS):
        tried = []
        for candidate in near:
            started = time.perf_counter()
            rebuilt = candidate.rebuild()
            error = None if rebuilt.kept else weight_error(bench.layers, rebuilt.layers)
            tried.append((candidate, rebuilt, error, time.perf_counter() - started))
        for each in tried if tried[0][2] is None else [min(tried, key=lambda one: one[2])]:
            found[each[0].variant, each[0].setting] = each
    for key, (candidate, rebuilt, error, seconds) in found.items():
        if key not in done:
            yield {
                "variant": candidate.variant,
                "setting": candidate.setting,
                "bits": candidate.bits,
                "weight_error": error,
                **asdict(bench.measure(rebuilt.layers, rebuilt.kept)),
                "seconds": seconds,
            }


def measure_ours(bench: Bench, name: str, known: list[Row]) -> Iterator[Row]:
    """The rows of one of our methods that are not known yet."""
    for bits in sorted({*OWN_BUDGETS[name]} - {row["asked"] for row in known}):
        started = time.perf_counter()
        if row := OURS[name](bench, bits):
            yield {"variant": "", "asked": bits, **row, "seconds": time.perf_counter() - started}


def round_row(row: Row) -> Row:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def load_rows() -> list[Row]:
    rows: list[Row] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def save(model: str, method: str, own: list[Row]) -> None:
    """The file with these rows in the place of those of that model and method; two runs may write to it in turns."""
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [row for row in load_rows() if (row["model"], row["method"]) != (model, method)] + own
        order = {name: place for place, name in enumerate((*MODELS, *PEERS, *OURS))}
        rows.sort(key=lambda row: (order[row["model"]], order[row["method"]], row["bits"]))
        lines = ",\n".join(json.dumps(row) for row in rows)
        new = RESULTS.with_suffix(".new")
        new.write_text(f"[\n{lines}\n]\n")
        new.replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare coded overlays with other methods at equal bytes.")
    parser.add_argument("--zoo", type=Path, action="append", default=[])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=[*PEERS, *OURS])
    parser.add_argument("--again", nargs="*", default=[], help="methods that are measured anew")
    arguments = parser.parse_args()
    for model in arguments.models:
        folder = find_folder(MODELS[model], arguments.zoo)
        if folder is None:
            print(f"{model}: {MODELS[model]} is in none of the folders")
            continue
        bench, started = Bench(folder), time.perf_counter()
        for method in arguments.again or arguments.methods:
            of_model = [row for row in load_rows() if row["model"] == model]
            known = [row for row in of_model if row["method"] == method and method not in arguments.again]
            new = (measure_ours if method in OURS else measure_peer)(bench, method, known)
            for row in new:
                known.append(round_row({"model": model, "method": method, **row}))
                print(
                    f"{model:20s} {method:10s} {row['bits']:5.2f} bits  KL {row['kl']:.4f} +- {row['kl_stderr']:.4f}  "
                    f"{row['variant']} {row['setting'][:50]}",
                    flush=True,
                )
            save(model, method, known)
        print(f"{model}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
