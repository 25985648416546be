"""What the remote modes fetch: bytes and requests, from a Hub on loopback that serves models of published shapes.

    python benchmarks/remote.py [--small N] [--folder DIR] [--output FILE]

The files are sparse, and hold nothing but experts, in OLMoE's names: their sizes are the published ones (13 GB, 90 GB,
654 GB), their weights zeros. Every mode starts with empty caches; `again` is the same call once more. Bytes and
requests are those that the servers saw, redirects, indices and configs included; a request is one line of HTTP. The
layer of the DeepSeek-V3-shaped model takes 11.3 GB of cache, for which there must be room.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from layers import DEEPSEEK_V3, MIXTRAL, OLMOE, Shape, write_holes
from measuring import Figures, apart, benchmark

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import hub_server

MODELS: dict[str, tuple[Shape, int, Shape | None]] = {
    "OLMoE": (OLMOE, 16, Shape("bf16", 1, 8192, 2048)),
    "Mixtral": (MIXTRAL, 32, Shape("bf16", 1, 14336, 4096)),
    "DeepSeek-V3": (DEEPSEEK_V3, 58, None),
}
"""Shape, MoE layers, and the dense model that is tried as a parent: OLMo-1B's and Mistral-7B's shapes."""


def scan(folder: Path, source: Path) -> hub_server._File:
    """A file whose hashes are those of its name: to hash half a terabyte of zeros would take an hour."""
    name = source.relative_to(folder).as_posix()
    text = f"{folder}/{name}".encode()
    size = source.stat().st_size
    return hub_server._File(source, name, size, hashlib.sha256(text).hexdigest(), hashlib.sha1(text).hexdigest(), 134)


def measure_mode(hub: hub_server.HubServer, caches: Path, **arguments: object) -> Figures:
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(caches / "hf"), "LAZARUS_CACHE": str(caches / "ranges")}
    found: Figures = {}
    for when in ("first", "again"):
        hub.clear_requests()
        job = apart("jobs.service", memory="2GB", **arguments)
        found[when] = {
            "weight_bytes": hub.body_bytes(".safetensors"),
            "weight_bytes_by_its_own_count": job["bytes_fetched"],
            "other_bytes": hub.body_bytes(".json"),
            "requests": len(hub.requests),
            "seconds": job["seconds"],
            "peak_gib": job["peak_bytes"] / 2**30,
        }
    shutil.rmtree(caches)
    return found


if __name__ == "__main__":
    with benchmark(__doc__) as (options, figures), hub_server.HubServer() as hub:
        hub_server._scan = scan
        os.environ["NO_PROXY"] = "127.0.0.1,localhost"
        figures["rounds"], figures["models"] = 1, {}
        for name, (shape, layers, parent) in MODELS.items():
            shape = shape.smaller(options.small)
            modes = {"layout": {"name": "layout"}, "quick": {"name": "quick"}, "one layer": {"name": "analyze"}}
            size = write_holes(options.folder / name, shape, layers)
            hub.add(f"bench/{name}", options.folder / name)
            if parent:
                write_holes(options.folder / f"{name}-parent", parent.smaller(options.small), layers)
                hub.add(f"bench/{name}-parent", options.folder / f"{name}-parent")
                modes["one layer, and its parent"] = {"name": "analyze", "parent": f"bench/{name}-parent"}
            figures["models"][name] = {
                "expert_bytes": size,
                "layer_bytes": size // layers,
                "modes": {
                    mode: measure_mode(hub, options.folder / "caches", model=f"bench/{name}", **arguments)
                    for mode, arguments in modes.items()
                },
            }
