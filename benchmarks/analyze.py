"""An analysis of one layer: against its bare floor, stage by stage, and against what else is used for such spectra.

    python benchmarks/analyze.py [--repeat N] [--small N] [--output FILE]

Three cases, each measured in rounds that go through all its lines: a default analysis of an OLMoE-shaped layer (64
experts of 3 x 1024x2048 in bf16, 8 of them sampled), the same with the spectra of all 64, and a default analysis of a
GPT-OSS-shaped layer (32 experts of 3 x 2880x2880 in MXFP4). Everything runs in a process of its own and reads from
the page cache. Decompositions are timed on a sample of the deltas and scaled to all: each takes the same time. The
layers are random; the times do not depend on the values, and the ranks are compared with those that full SVDs give.

`floor` is reading, the products of experts and of deltas, and the eigenvalues; `floor_with_matching` adds the products
that match neurons, and `floor_with_all` decoding and the mean.
"""

from dataclasses import asdict
from pathlib import Path
from statistics import median

from layers import GPT_OSS, OLMOE, Shape, write_model
from measuring import CLOCKS, Figures, apart, benchmark, medians, over

STRICT = ("read", "expert products", "delta products", "eigenvalues")
CASES: dict[str, tuple[Shape, int | None, int]] = {
    "OLMoE-shaped, 8 experts sampled": (OLMOE, 8, 6),
    "OLMoE-shaped, all 64 experts": (OLMOE, None, 6),
    "GPT-OSS-shaped, 8 experts sampled": (GPT_OSS, 8, 3),
}
"""Shape, how many experts' spectra are taken, and how many decompositions are timed."""
RIVALS = ("numpy_svd", "numpy_svd_side_by_side", "torch_svdvals", "weightwatcher_analyze", "lazarus_0_4_1")


def one_round(model: str, shape: Shape, experts: int | None, sample: int) -> dict[str, Figures]:
    chosen = experts or shape.experts
    found = {"analysis": apart("jobs.service", name="analyze", model=model, experts=experts)}
    found["floor"] = apart("jobs.floor", model=model, shape=asdict(shape), chosen=chosen)
    found["analysis, stages watched"] = apart("jobs.stages", model=model, experts=experts)
    stages = found["floor"]["stages"]
    for clock in CLOCKS:
        found["floor"][clock] = sum(stages[name][clock] for name in STRICT)
        found.setdefault("floor_with_matching", {})[clock] = found["floor"][clock] + stages["matching"][clock]
        found.setdefault("floor_with_all", {})[clock] = sum(stage[clock] for stage in stages.values())
    for rival in RIVALS if experts else RIVALS[:-1]:  # the last never takes more than eight
        found[rival] = apart(f"jobs.{rival}", model=model, chosen=chosen, sample=sample)
    return found


def measure_case(folder: Path, repeat: int, shape: Shape, experts: int | None, sample: int) -> Figures:
    size = write_model(folder, shape)
    model = str(folder)
    apart("jobs.service", name="analyze", model=model)  # warms the page cache, and compiles
    rounds = [one_round(model, shape, experts, sample) for _ in range(repeat)]
    rivals = [rival for rival in RIVALS if rival in rounds[0]]
    ours = rounds[0]["analysis"]["ranks"]
    ranks = [ours[role][place] for place in range(-(-sample // 3)) for role in ours][:sample]
    return {
        "shape": asdict(shape),
        "expert_bytes": size,
        "experts_sampled": experts or shape.experts,
        "decompositions_timed": sample,
        "seconds": medians(rounds),
        "cpu_seconds": medians(rounds, "cpu_seconds"),
        **{
            f"over_{floor}{suffix}": over(rounds, "analysis", floor, clock)
            for floor in ("floor", "floor_with_matching", "floor_with_all")
            for clock, suffix in zip(CLOCKS, ("", "_cpu"), strict=True)
        },
        "rivals_over_analysis": {rival: over(rounds, rival, "analysis") for rival in rivals},
        "rivals_over_analysis_cpu": {rival: over(rounds, rival, "analysis", "cpu_seconds") for rival in rivals},
        "stages_cpu_seconds": {
            stage: median(one["analysis, stages watched"]["stages"].get(stage, 0.0) for one in rounds)
            for stage in dict.fromkeys(stage for one in rounds for stage in one["analysis, stages watched"]["stages"])
        },
        "floor_cpu_seconds": {
            stage: median(one["floor"]["stages"][stage]["cpu_seconds"] for one in rounds)
            for stage in rounds[0]["floor"]["stages"]
        },
        "peak_gib": max(one["analysis"]["peak_bytes"] for one in rounds) / 2**30,
        "bytes_read_over_expert_bytes": rounds[0]["analysis"]["bytes_read"] / size,
        "ranks_equal_those_of_full_svds": ranks == rounds[0]["numpy_svd"]["ranks"],
    }


if __name__ == "__main__":
    with benchmark(__doc__) as (options, figures):
        figures["cases"] = {}
        for number, (name, (shape, experts, sample)) in enumerate(CASES.items()):
            folder = options.folder / str(number)
            figures["cases"][name] = measure_case(folder, options.repeat, shape.smaller(options.small), experts, sample)
