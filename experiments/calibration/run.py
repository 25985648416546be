"""What does a text to calibrate with gain, at equal bytes?

    python experiments/calibration/run.py                 # the demo models; writes results.json beside this file
    python experiments/calibration/run.py ZOO/04/copy-150 ZOO/04/native-400

Each model is written in codes with and without `--calibrate`, and the mean KL of the next byte from the original is
measured on held-out text. The text to calibrate with is from the part that the model was trained on: for the demo
models other files of the standard library than those that validate, for a model of `04_unseen_histories` the pages of
its corpus that it was trained on.
"""

import argparse
import hashlib
import json
import math
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.overlays.runtime.load import load_overlay
from chuk_lazarus.introspection.moe.weights.repositories.find import find_repository

HERE = Path(__file__).resolve().parent
DEMO_MODELS = ("demo:upcycled", "demo:native")
BITS = (1.65, 2.25, 3.1)
CALIBRATED, TOKENS, CONTEXT = 16_384, 8_192, 128
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
PARTS = {  # as in 04_unseen_histories/zoo.py
    "modules": ["."],
    "network": ["asyncio", "email", "xml", "http", "urllib", "html", "xmlrpc", "multiprocessing", "logging"],
    "tools": ["idlelib", "tkinter", "unittest", "distutils", "lib2to3", "ctypes", "importlib"],
    "encodings": ["encodings"],
    **{f"tests-{share}": ["test"] for share in range(4)},
}


def read_library() -> tuple[bytes, bytes]:
    """The standard library as the demo models had it: training and validation bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if EXCLUDED.intersection(Path(name).parts) or "config-" in name or Path(name).name.startswith("_sysconfigdata"):
            continue
        parts[int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0].append((root / name).read_bytes())
    return b"".join(parts[0]), b"".join(parts[1])


def read_zoo_corpus(parts: list[str]) -> tuple[bytes, bytes]:
    """The corpus of a model of 04_unseen_histories: training and validation bytes."""
    texts = []
    for part in parts:
        root = Path(sysconfig.get_path("stdlib"))
        paths = sorted({path.resolve() for path in Path("/usr/share/common-licenses").iterdir()})
        if part != "licences":
            found = sorted(path.relative_to(root) for path in root.rglob("*.py"))
            inside = [path for path in found if (path.parts[0] if len(path.parts) > 1 else ".") in PARTS[part]]
            paths = [root / path for path in (inside[int(part[-1]) :: 4] if part.startswith("tests") else inside)]
        texts.append(b"".join(path.read_bytes() for path in paths)[:4_000_000])
    longest = max(map(len, texts))
    text = b"".join((each * math.ceil(longest / len(each)))[:longest] if texts[1:] else each for each in texts)
    pages = [text[start : start + 4096] for start in range(0, len(text), 4096)]
    return b"".join(page for number, page in enumerate(pages) if number % 20), b"".join(pages[::20])


def predict(model: Any, windows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Log-probabilities of the next byte, [windows, tokens, bytes]."""
    model.set_dtype(mx.float32)
    logits = [
        np.array(model(mx.array(windows[row : row + 16])).astype(mx.float32)) for row in range(0, len(windows), 16)
    ]
    joined = np.concatenate(logits)
    joined -= joined.max(axis=-1, keepdims=True)
    return joined - np.log(np.exp(joined).sum(axis=-1, keepdims=True))


def spread(text: bytes, count: int) -> bytes:
    """So many bytes of a text, in 32 runs all over it, as text in UTF-8."""
    step, run = len(text) // 32, count // 32
    chosen = b"".join(text[start * step : start * step + run] for start in range(32))
    return bytes(byte if byte < 128 else 63 for byte in chosen)


def measure(model: str) -> dict[str, Any]:
    folder = Path(find_repository(model).path)  # type: ignore[attr-defined]
    is_demo = model.startswith("demo:")
    training, validation = (
        read_library() if is_demo else read_zoo_corpus(json.loads((folder / "truth.json").read_text())["corpus"])
    )
    windows = np.frombuffer(validation, np.uint8)[:TOKENS].astype(np.int32)
    windows = windows[: len(windows) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    exact = predict(load_model(folder)[0], windows)
    rows: dict[str, Any] = {}
    for bits in BITS:
        for tokens in (0, CALIBRATED):
            with tempfile.TemporaryDirectory() as scratch:
                text, target = Path(scratch, "text"), Path(scratch, "overlay")
                text.write_bytes(spread(training, tokens))
                written = MoECompressionService.compress(model, target, bits=bits, calibrate=text if tokens else None)
                found = predict(load_overlay(target)[0], windows)
            kl = (np.exp(exact) * (exact - found)).sum(axis=-1).mean(axis=1)
            row = {
                "bits_per_weight": written.bits_per_weight,
                "kl": float(kl.mean()),
                "stderr": float(kl.std(ddof=1) / len(kl) ** 0.5),
            }
            rows[f"{bits:g} bits, {tokens} tokens"] = row
            print(f"{model}  {bits:4g}  {tokens:6d}  {row['kl']:.4f} +- {row['stderr']:.4f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=DEMO_MODELS)
    file = HERE / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for model in parser.parse_args().models:
        results["/".join(Path(model).parts[-2:])] = measure(model)
        file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
