"""Prove that a change of the code changes nothing that a user sees.

    python tools/compare_outputs.py record BEFORE         # with the code as it was
    python tools/compare_outputs.py record AFTER          # with the code as it is
    python tools/compare_outputs.py compare BEFORE AFTER

`record` runs every command on the embedded models, on all test checkpoints, on every storage format and on GGUF files,
asks for help and makes mistakes. Each run becomes a text file with its arguments, exit code, output and written files.
Only seconds, speeds, the temporary folder and the ids in figures are taken out. `compare` prints what differs, and ends
with 1 if anything does. To record other code than what is installed, put its src/ on PYTHONPATH.
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from difflib import unified_diff
from itertools import product
from pathlib import Path

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"
DEMOS = ("demo:upcycled", "demo:native", "demo:permuted", "demo:lora")  # demo:parent is a parent, and no MoE
TEXTS = {".html", ".json", ".jsonl", ".md", ".svg", ".txt"}
SETTINGS = {
    "COLUMNS": "100",
    "HF_HUB_OFFLINE": "1",
    **dict.fromkeys(("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
}

Case = tuple[str, ...]
"""Commands that run one after the other in the same folder; variables may stand before a command, as in a shell."""

COMMANDS = (
    "moe-layout",
    "moe-type-analyze",
    "moe-type-compare",
    "moe-type-survey",
    "moe-weights-verify",
    "moe-overlay-compute",
    "moe-overlay-verify",
    "moe-overlay-estimate",
    "moe-overlay-compress",
    "moe-overlay-export",
    "moe-overlay-eval",
)

ANALYSES = (
    "",
    "-q",
    "-v",
    "--layer 1",
    "--layers all",
    "--layers 0,1 --experts all",
    "--layers 0-1/1 --experts 3 --variance 0.5,0.999",
    "--parent demo:parent",
    "--layers all --parent demo:parent -v",
    "--visualize",
    "--thorough",
    "--layers all --thorough --visualize --memory 1GB -v",
    "--quick",
    "--quick --layers all --budget 100kB -v",
)

RULES = (
    "",
    "--layers all -v",
    "--energy 0.5 --experts 3",
    "--gate-rank 4 --up-rank 8 --down-rank 0",
    "--gate-rank 2",
    "--max-error 0.05",
    "--layers all --max-error 0.3 --memory 1GB",
    "--target-ratio 2",
    "--layers all --target-ratio 1.5 -v",
)

OF_EVERY_MODEL = (
    "moe-layout {} --layers all -v",
    "moe-type-analyze {} --layers all -v --visualize",
    "moe-type-analyze {} --quick -v",
    "moe-overlay-compute {} -v",
    "moe-overlay-verify {} --layers all --max-error 0.3 --tolerance 0.3 --inputs 16",
    "moe-overlay-estimate {} --target-ratio 1.5",
)

MISTAKES = (
    "lazarus",
    "lazarus nothing",
    "lazarus --nothing",
    "lazarus introspect",
    "lazarus introspect nothing",
    "lazarus introspect moe-expert",
    "lazarus introspect moe-expert moe-type-analyse",
    *COMMANDS,
    *(f"{command} --nothing" for command in COMMANDS),
    "moe-layout -m",
    "moe-layout --model ''",
    "moe-layout -m demo:nothing",
    "moe-layout -m org/name",
    "moe-layout -m org/name@main",
    "moe-layout -m org/name/more",
    "moe-layout -m nowhere/at/all",
    "moe-layout -m fixtures",
    "moe-layout -m fixtures/README.md",
    "moe-layout -m fixtures/dense_llama",
    "moe-layout -m 'fixtures/dots3_note#nothing'",
    "moe-layout -m broken/config",
    "moe-layout -m broken/cut",
    "moe-layout -m broken/empty",
    "moe-layout -m broken/header",
    "moe-layout -m broken/names",
    "moe-layout -m broken/cut.gguf",
    "moe-type-analyze -m broken/cut",
    "moe-type-analyze -m broken/nan",
    "moe-layout -m demo:native --layers 9",
    "moe-type-analyze -m demo:native --layer 9",
    "moe-type-analyze -m demo:native --layer x",
    "moe-type-analyze -m demo:native --layer -1",
    "moe-type-analyze -m demo:native --layers x",
    "moe-type-analyze -m demo:native --layers 3-1",
    "moe-type-analyze -m demo:native --layer 0 --layers 0",
    "moe-type-analyze -m demo:native --experts 0",
    "moe-type-analyze -m demo:native --experts few",
    "moe-type-analyze -m demo:native --variance 2",
    "moe-type-analyze -m demo:native --variance much",
    "moe-type-analyze -m demo:native --memory 1kB",
    "moe-type-analyze -m demo:native --memory much",
    "moe-type-analyze -m demo:native --budget 1MB",
    "moe-type-analyze -m demo:native --quick --budget 1B",
    "moe-type-analyze -m demo:native --quick --budget much",
    "moe-type-analyze -m demo:native --quick --experts all",
    "moe-type-analyze -m demo:native --quick --dask tcp://127.0.0.1:1",
    "moe-type-analyze -m demo:native --memory 1GB --dask tcp://127.0.0.1:1",
    "moe-type-analyze -m demo:native --parent demo:native",
    "moe-type-analyze -m demo:native --parent fixtures/dense_llama",
    "moe-type-analyze -m demo:parent",
    "moe-type-analyze -m demo:native -o out",
    "moe-type-analyze -m demo:native -o nowhere/x.json",
    "moe-type-analyze -m demo:native --html nowhere/x.html",
    "moe-type-analyze -m demo:native --plot out/x.jpg",
    "moe-type-compare -m demo:native",
    "moe-type-compare -m demo:native -c demo:parent",
    "moe-type-compare -m demo:native -c demo:nothing",
    "moe-type-survey nowhere.txt",
    "moe-type-survey broken/list.txt",
    "moe-type-survey broken/list.toml",
    "moe-type-survey demo:native --jobs 0",
    "moe-type-survey demo:native --plan --quick",
    "moe-type-survey demo:native --jobs 2 --dask tcp://127.0.0.1:1",
    "moe-type-survey demo:native -o broken/list.txt",
    "moe-overlay-compute -m demo:native --gate-rank -1",
    "moe-overlay-compute -m demo:native --gate-rank 9999",
    "moe-overlay-compute -m demo:native --energy 2",
    "moe-overlay-compute -m demo:native --max-error nan",
    "moe-overlay-compute -m demo:native --max-error 0.1 --target-ratio 2",
    "moe-overlay-compute -m demo:native --gate-rank 2 --target-ratio 2",
    "moe-overlay-compute -m demo:native --target-ratio 1000",
    "moe-overlay-verify -m demo:native --tolerance -1",
    "moe-overlay-verify -m demo:native --inputs 0",
    "moe-overlay-verify -m demo:native --tolerance 0.001 --target-ratio 4",
    "moe-overlay-estimate -m demo:native --samples 0",
    "moe-overlay-estimate -m demo:native --samples 2 --layers 0",
    "moe-overlay-compress -m demo:native -O fixtures",
    "moe-overlay-compress -m demo:native -O nowhere/x",
    "moe-overlay-compress -m fixtures/published_grok2 -O out/overlay",
    "moe-overlay-export nowhere -O out/rebuilt",
    "moe-overlay-export fixtures/mixtral -O out/rebuilt",
    "moe-overlay-eval -m demo:native --overlay nowhere --text broken/list.txt",
    "moe-overlay-eval -m demo:native --overlay fixtures/mixtral --text nowhere.txt",
    "moe-overlay-eval -m demo:native --overlay fixtures/mixtral --text broken/list.txt",
)

SURVEYS: tuple[Case, ...] = (
    ("moe-type-survey demo:upcycled demo:native fixtures/dense_llama",),
    ("moe-type-survey demo:upcycled demo:native --json",),
    ("COLUMNS=180 moe-type-survey lists/models.txt -v -q --layers all",),
    ("moe-type-survey demo:upcycled demo:permuted --jobs 2 --quick --budget 1MB --experts 8",),
    ("COLUMNS=180 moe-type-survey demo:upcycled demo:permuted --jobs 2 --quick",),
    (
        "moe-type-survey demo:upcycled demo:nothing --layer 1 -o out/rows.jsonl",
        "COLUMNS=80 moe-type-survey demo:upcycled demo:native --layer 1 -v -o out/rows.jsonl",
    ),
    *((f"moe-type-survey lists/models.toml --plan{option}",) for option in ("", " -v", " -q", " --json")),
    ("COLUMNS=80 moe-type-survey lists/models.toml lists/models.txt --plan",),
)

PICTURES: tuple[Case, ...] = (
    ("moe-type-analyze -m demo:upcycled --layers all --parent demo:parent --html out/page.html --plot out/plot.svg",),
    ("moe-type-analyze -m fixtures/qwen3_moe_fused --html out/page.html --plot out/plot.svg",),
    ("moe-type-analyze -m fixtures/nemotron_h --layers all --html out/page.html --plot out/plot.png",),
    ("moe-type-compare -m demo:upcycled -c demo:native --layers all --html out/page.html --plot out/plot.svg",),
    ("moe-overlay-estimate -m demo:upcycled --plot out/plot.svg",),
    ("moe-overlay-estimate -m fixtures/gpt_oss_mxfp4 --layers all --plot out/plot.pdf",),
)

MODELS_TXT = """# models
demo:native
demo:permuted parent=demo:parent layers=0 experts=all
fixtures/deepseek_v3 experts=2
fixtures/dense_llama  # no experts
"""

MODELS_TOML = """
[[model]]
id = "demo:native"
origin = "native"

[[model]]
id = "org/some-model"
origin = "upcycled"
parent = "org/its-parent"
storage = "bf16"
shape = { layers = 16, experts = 64, top_k = 8, hidden = 2048, intermediate = 1024 }

[[model]]
id = "org/another-model@main"
layers = "0,5"
gated = false
storage = "mxfp4"
shape = { layers = 24, experts = 32, hidden = 2880, intermediate = 2880 }
"""


def cases(place: Path) -> Iterator[Case]:
    """All that is run, on the models that lie in `place`."""
    for level in ("lazarus", "lazarus introspect", "lazarus introspect moe-expert", *COMMANDS):
        yield (f"{level} --help",)
        yield (f"COLUMNS=80 {level} --help",)
    yield ("lazarus --version",)
    for mistake, option in product(MISTAKES, ("", " --json")):
        yield (mistake + option,)
    for demo in DEMOS:
        yield from asked_both_ways(f"moe-layout -m {demo}", "-v", "--layers all")
        yield from asked_both_ways(f"moe-type-analyze -m {demo}", *ANALYSES)
        for command in ("moe-overlay-compute", "moe-overlay-verify --inputs 64"):
            yield from asked_both_ways(f"{command} -m {demo}", *RULES)
        options = (rule for rule in RULES if "--layers" not in rule)
        yield from asked_both_ways(f"moe-overlay-estimate -m {demo}", "--layers all", "--samples 2 -v", *options)
        for command in ("moe-layout", "moe-type-analyze", "moe-type-analyze --quick", "moe-overlay-estimate"):
            yield (f"COLUMNS=80 {command} -m {demo}",)
        for rule in RULES:
            compress, export, again, evaluate = overlaid(demo, rule.replace("--layers all", "--layers 1"))
            yield compress, again, f"{again} --force --json", export, evaluate, f"{evaluate} --context 16 --json"
    comparisons = ("", "-v", "--layers all --experts 3", "--layer 1 --thorough")
    for one, other in (DEMOS[:2], DEMOS[1:3], ("fixtures/mixtral", "fixtures/qwen3_moe_fused")):
        yield from asked_both_ways(f"moe-type-compare -m {one} -c {other}", *comparisons)
        yield (f"COLUMNS=80 moe-type-compare -m {one} -c {other}",)
    yield from (*SURVEYS, *PICTURES)
    for model in models(place):
        for command in OF_EVERY_MODEL:
            yield (f"{command.format(f'-m {shlex.quote(model)}')} -o out/result.json",)
        yield overlaid(model, "--gate-rank 2 --up-rank 3 --down-rank 4")[:2]
    for model in ("fixtures/nemotron_h", "fixtures/qwen2_moe"):
        yield overlaid(model, "--target-ratio 2")


def asked_both_ways(command: str, *options: str) -> Iterator[Case]:
    """The command with each of the options: on the screen and in a file, and as JSON."""
    for option in options:
        yield (f"{command} {option} -o out/result.json",)
        yield (f"{command} {option} --json",)


def overlaid(model: str, rule: str) -> Case:
    """Write an overlay of a model, rebuild the model from it, try to write it again, and run both."""
    model = f"-m {shlex.quote(model)}"
    compress = f"moe-overlay-compress {model} -O out/overlay {rule}"
    return (
        f"{compress} -o out/overlay.json",
        "moe-overlay-export out/overlay -O out/rebuilt -o out/rebuilt.json",
        compress,
        f"moe-overlay-eval {model} --overlay out/overlay --text lists/models.toml",
    )


def models(place: Path) -> list[str]:
    """The models in `place`: folders with weights, and stacks in them, and GGUF files."""
    folders = {file.parent for name in ("fixtures", "formats") for file in (place / name).rglob("*.safetensors")}
    matrices = place / "fixtures" / "formats"
    found = [str(folder.relative_to(place)) for folder in folders if matrices not in folder.parents]
    return sorted([*found, *(f"gguf/{file.name}" for file in (place / "gguf").iterdir())])


def make_models(fixtures: Path, place: Path) -> None:
    """Copy the test checkpoints, and make what is not among them: a model in each storage format, GGUF, broken ones."""
    shutil.copytree(fixtures, place / "fixtures")
    for name in ("out", "lists", "gguf", "broken/empty", "broken/config"):
        (place / name).mkdir(parents=True)
    (place / "lists/models.txt").write_text(MODELS_TXT)
    (place / "lists/models.toml").write_text(MODELS_TOML)
    for matrix in (place / "fixtures/formats").iterdir():
        make_format(matrix, place / "formats" / matrix.name)
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "Q4_K", "Q6_K", "IQ4_XS"):
        make_gguf(kind, place / f"gguf/{kind}.gguf")
    break_models(place)


def make_format(matrix: Path, folder: Path) -> None:
    """A model of one layer, all of whose gates and ups are the one matrix of a folder below fixtures/formats."""
    import numpy as np

    data = (matrix / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    stored = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    down = np.ascontiguousarray(np.load(matrix / "oracle.npz")["x"].T, np.float32)
    header, body = dict[str, object](), b""

    def add(name: str, dtype: str, shape: list[int], content: bytes) -> None:
        nonlocal body
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content

    for expert in range(2):
        prefix = f"model.layers.0.block_sparse_moe.experts.{expert}"
        for role, (name, entry) in product(("w1", "w3"), stored.items()):
            begin, end = entry["data_offsets"]
            content = data[start + begin : start + end]
            add(prefix + "." + role + name.removeprefix("x"), entry["dtype"], entry["shape"], content)
        add(f"{prefix}.w2.weight", "F32", [*down.shape], (down * (1 + expert)).tobytes())
    config = json.loads((matrix / "config.json").read_text())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_experts_per_tok": 1, **config}))
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


def make_gguf(kind: str, file: Path) -> None:
    """A small model whose experts are in a type of GGUF: bytes at random where its package does not encode it."""
    import gguf
    import numpy as np

    dtype, rng = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[dtype]
    writer = gguf.GGUFWriter(file, "mixtral")
    for key, value in (("block_count", 2), ("expert_count", 3), ("expert_used_count", 2), ("embedding_length", 512)):
        writer.add_uint32(f"mixtral.{key}", value)
    for layer, (role, shape) in product(
        range(2), (("gate", (3, 256, 512)), ("up", (3, 256, 512)), ("down", (3, 512, 256)))
    ):
        try:
            data = gguf.quants.quantize(rng.standard_normal(shape, np.float32), dtype)
        except NotImplementedError:
            data = rng.integers(0, 64, (*shape[:-1], shape[-1] // block * size), np.uint8)
        writer.add_tensor(f"blk.{layer}.ffn_{role}_exps.weight", data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def break_models(place: Path) -> None:
    """Models and lists that are wrong in some way."""
    broken, good = place / "broken", place / "fixtures/mixtral"
    weights = (good / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    wrong = {
        "cut": weights[:-100],
        "header": b"\xff" * 8 + weights[8:],
        "names": weights.replace(b".w1.", b".u1.").replace(b".w2.", b".u2.").replace(b".w3.", b".u3."),
        "nan": weights[:start] + b"\xff" * (len(weights) - start),
    }
    for name, data in wrong.items():
        shutil.copytree(good, broken / name)
        (broken / name / "model.safetensors").write_bytes(data)
    (broken / "config/model.safetensors").write_bytes(weights)
    (broken / "config/config.json").write_text('{"model_type": ')
    (broken / "cut.gguf").write_bytes((place / "gguf/Q8_0.gguf").read_bytes()[:1000])
    (broken / "list.txt").write_text("demo:native colour=blue\n")
    (broken / "list.toml").write_text('[[model]]\nid = ""\n')


def record(folder: Path, fixtures: Path) -> None:
    """Run everything, and write a text file for each run into `folder`."""
    started, fixtures = time.monotonic(), fixtures.resolve()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")

    def keep(name: str, text: str) -> None:
        file = folder / (re.sub(r"[^\w.,:=-]+", "_", name).strip("_")[:200] + ".txt")
        with file.open("x", encoding="utf-8") as new:
            new.write(plain(text, place))

    with tempfile.TemporaryDirectory(prefix="lazarus-compare-") as name, contextlib.chdir(name):
        place = Path(name)
        caches = {"HF_HOME": name + "/caches/hf", "LAZARUS_CACHE": name + "/caches/lazarus"}
        for variable in ("FORCE_COLOR", "NO_COLOR", "HF_TOKEN", "HF_ENDPOINT", "PYTHONWARNINGS"):
            os.environ.pop(variable, None)
        os.environ.update(SETTINGS | caches)
        make_models(fixtures, place)
        for case in cases(place):
            for step, command in enumerate(case, 1):
                name = f"{case[0]} step {step}" if len(case) > 1 else command
                keep(name, f"$ {command}\n\n{run_command(command)}{written(Path('out'))}")
            shutil.rmtree("out")
            os.mkdir("out")
        for title, text in interface():
            keep(title, text)
    print(f"{len(list(folder.iterdir()))} runs in {time.monotonic() - started:.0f} s")


def run_command(command: str) -> str:
    """The exit code of a command line, and what it says."""
    from chuk_lazarus.cli.app import run

    words, columns = shlex.split(command), SETTINGS["COLUMNS"]
    if words[0].startswith("COLUMNS="):
        columns = words.pop(0).partition("=")[2]
    words = ["introspect", "moe-expert", *words] if words[0] in COMMANDS else words[1:]
    os.environ["COLUMNS"] = columns
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = str(run(words))
        except (Exception, SystemExit) as error:
            code = f"none, {type(error).__name__}: {error}"
    said = out.getvalue()
    if re.search("^ *Tokens per second", said, re.MULTILINE):  # the columns are as wide as these numbers
        said = re.sub(r"(Tokens per second) .*", r"\1 <numbers>", said)
        said = re.sub("  +", "  ", re.sub("──+", "──", said))
    return f"exit code: {code}\n" + section("stdout", said) + section("stderr", err.getvalue())


def written(folder: Path) -> str:
    """All files of a folder: texts as they are, others as digests."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(
        section(
            path.as_posix(),
            path.read_text("utf-8")
            if path.suffix in TEXTS
            else f"{path.stat().st_size} bytes, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}",
        )
        for path in files
    )


def section(title: str, text: str) -> str:
    """A titled part of a record; none where there is no text."""
    return f"\n--- {title}\n{text}" + "\n" * (not text.endswith("\n")) if text else ""


def plain(text: str, place: Path) -> str:
    """The text without the temporary folder and what a clock says, and with the ids in figures numbered.

    Those are digests of coordinates with all their digits, of which the last is not the same in every process.
    """
    ids = dict[str, str]()
    text = text.replace(str(place.resolve()), "<folder>").replace(str(place), "<folder>")
    text = re.sub(r'("(?:seconds|tokens_per_second)": )[\d.e+-]+', r"\1<number>", text)
    text = re.sub(r"\b\d+\.\d s\b", "<seconds>", text)
    return re.sub(r"\bf[0-9a-f]{8}-\w+", lambda found: ids.setdefault(found[0], f"id-{len(ids) + 1}"), text)


def interface() -> Iterator[tuple[str, str]]:
    """The public names, the JSON schema of each report, and how reports look in a notebook."""
    import chuk_lazarus.introspection.moe as moe

    yield "public names", "\n".join(sorted(moe.__all__))
    for name in moe.__all__:
        schema: Callable[..., object] | None = getattr(getattr(moe, name), "model_json_schema", None)
        if inspect.ismethod(schema):
            yield f"schema of {name}", json.dumps(schema(mode="serialization"), indent=2, ensure_ascii=False)
    demo = "demo:upcycled"
    reports = {
        "layout": moe.MoELayoutService.describe(demo),
        "analysis": moe.MoETypeService.analyze(demo, layers="all"),
        "quick analysis": moe.MoETypeService.quick(demo),
        "comparison": moe.MoETypeService.compare(demo, "demo:native"),
        "overlay": moe.MoECompressionService.compute(demo),
        "verification": moe.MoECompressionService.verify(demo),
        "estimate": moe.MoECompressionService.estimate(demo),
        "survey": moe.MoESurveyService.survey([demo, "demo:native"]),
        "plan": moe.MoESurveyService.plan(["lists/models.toml"]),
    }
    for name, report in reports.items():
        yield f"notebook {name}", report._repr_html_() + "\n"


def compare(before: Path, after: Path) -> int:
    """Print what differs between two records; 1 if anything does."""
    names = sorted({file.name for folder in (before, after) for file in folder.glob("*.txt")})
    if not names:
        sys.exit("nothing is recorded there")
    differing = 0
    for name in names:
        old, new = (
            file.read_text("utf-8").splitlines() if (file := folder / name).exists() else []
            for folder in (before, after)
        )
        if old != new:
            differing += 1
            print(*unified_diff(old, new, str(before / name), str(after / name), lineterm=""), sep="\n")
    print(f"{differing} of {len(names)} runs differ" if differing else f"all {len(names)} runs are equal")
    return min(differing, 1)


def main() -> int:
    """Record or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record", help="run everything and keep what it says and writes")
    recording.add_argument("folder", type=Path, help="a new folder for it")
    recording.add_argument("--fixtures", type=Path, default=FIXTURES, help="the test checkpoints")
    comparing = actions.add_parser("compare", help="say what differs")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.action == "compare":
        return compare(options.before, options.after)
    record(options.folder, options.fixtures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
