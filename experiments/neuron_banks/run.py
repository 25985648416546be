"""Does a bank of neurons keep more of a model than plain codes, or one base, at the same bits?

    python experiments/neuron_banks/run.py ZOO [MODEL ...]      # adds to results.json beside this file
    python experiments/neuron_banks/run.py ZOO --natives        # how many natives of the zoo are given a bank

ZOO is what experiments/04_unseen_histories/zoo.py trained; a MODEL is FAMILY/NAME there. Each is written three ways at
the same bits a weight: plainly, with one base in the order that alignment finds, and as the program chooses. All run in
MLX, in float32, on held-out text of the family (every 20th page of 4096 bytes, as in zoo.py); KL is the mean of the
next token's, from the original, in nats. MISSING in trials.py was chosen on 00/drop50-160 alone; families 00 and 02
were looked at for the rest, and 09 for which neurons are found.
"""

import argparse
import json
import math
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from chuk_lazarus.introspection.moe import MoECompressionService, load_overlay
from chuk_lazarus.introspection.moe.overlays import analysis
from chuk_lazarus.introspection.moe.overlays.alignment import align_layer
from chuk_lazarus.introspection.moe.overlays.trials import RoleTrial

RESULTS = Path(__file__).with_name("results.json")
BITS = (1.6, 2.0, 3.0)
WINDOWS, LENGTH = 64, 128
MODELS = (  # of families whose codes were not looked at while this was written
    "09/slice4-shuffle-240",
    "09/groups-240",
    "09/drop50-240",
    "04/drop50-120",
    "04/granular-S8E64-turns-150",
    "21/drop50-240",
)
PARTS = {
    "modules": ["."],
    **{f"tests-{part}": ["test"] for part in range(4)},
    "network": ["asyncio", "email", "xml", "http", "urllib", "html", "xmlrpc", "multiprocessing", "logging"],
    "tools": ["idlelib", "tkinter", "unittest", "distutils", "lib2to3", "ctypes", "importlib"],
    "encodings": ["encodings"],
}


def read_part(part: str) -> bytes:
    """The text that zoo.py calls so."""
    if part == "licences":
        texts = sorted({path.resolve() for path in Path("/usr/share/common-licenses").iterdir()})
    else:
        root = Path(sysconfig.get_path("stdlib"))
        found = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        inside = [path for path in found if (path.parts[0] if len(path.parts) > 1 else ".") in PARTS[part]]
        share = part.partition("-")[2]
        texts = [root / path for path in (inside[int(share) :: 4] if share else inside)]
    return b"".join(path.read_bytes() for path in texts)[:4_000_000]


def read_windows(model: Path) -> mx.array:
    """Held-out bytes of the model's family, [WINDOWS, LENGTH + 1]."""
    texts = [read_part(part) for part in json.loads((model / "truth.json").read_text())["corpus"]]
    longest = max(map(len, texts))
    text = b"".join((text * math.ceil(longest / len(text)))[:longest] for text in texts)
    pages = [text[start : start + 4096] for start in range(0, len(text), 4096)]
    data = np.frombuffer(b"".join(pages[::20]), np.uint8)
    starts = np.linspace(0, len(data) - LENGTH - 2, WINDOWS).astype(int)
    return mx.array(data[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32))


def log_probabilities(model: Any, windows: mx.array) -> np.ndarray:
    model.set_dtype(mx.float32)
    found = []
    for rows in mx.split(windows, WINDOWS // 32):
        logits = model(rows[:, :-1]).astype(mx.float32)
        found.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
    return np.concatenate(found)


@contextmanager
def forced(way: str) -> Iterator[None]:
    """The program made to choose codes in this way, whatever pays."""
    align: Callable[..., Any] = (
        align_layer if way == "chosen" else lambda layer, resources, **_: align_layer(layer, resources)
    )
    with patch.object(analysis, "align_layer", align):
        if way == "chosen":
            yield
        else:
            with patch.object(RoleTrial, "has_base", PropertyMock(return_value=way == "one base")):
                yield


def measure(model: Path) -> list[dict[str, Any]]:
    """Loss and KL of each way at each size."""
    windows = read_windows(model)
    original = log_probabilities(load_model(model)[0], windows)
    targets = np.array(windows[:, 1:])[..., None]
    rows = []
    for way in ("plain", "one base", "chosen"):
        for bits in BITS:
            with tempfile.TemporaryDirectory() as scratch, forced(way):
                report = MoECompressionService.compress(str(model), Path(scratch) / "overlay", bits=bits)
                found = log_probabilities(load_overlay(Path(scratch) / "overlay")[0], windows)
            codes = [each for of_layer in report.codes.values() for each in of_layer.values()]
            kl = (np.exp(original) * (original - found)).sum(-1).mean(axis=1)
            rows.append(
                {
                    "way": way,
                    "bank": any(each.bank for each in codes),
                    "bits": round(report.bits_per_weight, 3),
                    "kl": round(float(kl.mean()), 5),
                    "kl_stderr": round(float(kl.std(ddof=1) / math.sqrt(len(kl))), 5),
                    "loss_change": round(float(-np.take_along_axis(found - original, targets, -1).mean()), 5),
                }
            )
    return rows


def count_natives(zoo: Path) -> dict[str, int]:
    """Of the natives and the untrained models of the zoo, as they were trained, how many get a bank in some layer."""
    folders = [
        folder for kind in ("native", "untrained") for folder in zoo.glob(f"*/{kind}*") if "+" not in folder.name
    ]
    count = 0
    for folder in folders:
        job = analysis.OverlayJob(str(folder), None, "all", lambda *_: None)
        alignments = [align_layer(layer, job.opened.resources, with_bank=True) for layer in job.layers]
        count += any(alignment.bank for alignment in alignments)
    return {"models": len(folders), "with_bank": count}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--natives", action="store_true")
    parser.add_argument("zoo", type=Path)
    parser.add_argument("models", nargs="*", default=MODELS)
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    if arguments.natives:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(results | {"natives": count_natives(arguments.zoo)}, indent=1) + "\n")
        return
    for name in arguments.models:
        rows = measure(arguments.zoo / name)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(results | {name: rows}, indent=1) + "\n")
        for row in rows:
            print(
                f"{name:30s} {row['way']:9s} {row['bits']:.2f} bits  KL {row['kl']:.4f} ({row['kl_stderr']:.4f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
