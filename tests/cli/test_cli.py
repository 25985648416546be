"""The command line as a user meets it: what it prints where, how it ends, and the JSON contract."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from chuk_lazarus import __version__
from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import MoETypeAnalysis, MoETypeComparison, MoETypeService
from places import FIXTURES
from processor_time import HANGS, of_children, of_process
from sampling import keep
from terminals import run_on_terminal, without_steps

ANALYZE = ["introspect", "moe-expert", "moe-type-analyze"]
COMPARE = ["introspect", "moe-expert", "moe-type-compare"]
NATIVE = [*ANALYZE, "-m", "demo:native"]
BOTH = [*COMPARE, "-m", "demo:native", "-c", "demo:upcycled"]
PROGRAM = [sys.executable, "-m", "chuk_lazarus.cli"]

Capture = pytest.CaptureFixture[str]


def call(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, its outputs piped."""
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=plain | environment,
        timeout=HANGS,
        check=False,
    )


def run_ok(capsys: Capture, arguments: list[str]) -> str:
    """What a run that ends well prints; on stderr it says nothing but what may come next."""
    capsys.readouterr()
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert without_steps(err) == ""
    return out


def write_mixtral(folder: Path, layers: int, experts: int, inner: int, hidden: int) -> str:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    tensors = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{weight}.weight": rng.standard_normal(
            (hidden, inner) if weight == "w2" else (inner, hidden), np.float32
        )
        for layer in range(layers)
        for expert in range(experts)
        for weight in ("w1", "w2", "w3")
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return str(folder)


# The JSON contract


def check_analysis(analysis: dict[str, Any]) -> None:
    """Every key of the contract, with the right type and a sensible value."""
    assert analysis["schema"] == "moe-type-analysis/1"
    assert isinstance(analysis["model"], str)
    assert analysis["revision"] is None or isinstance(analysis["revision"], str)
    assert isinstance(analysis["family"], str)
    assert isinstance(analysis["model_type"], str)
    assert isinstance(analysis["storage"], str)
    assert type(analysis["experts"]) is int
    assert analysis["type"] in ("UPCYCLED", "NATIVE", "UNDETERMINED")
    assert 0 <= analysis["confidence"] <= 1
    assert type(analysis["compressible"]) is bool
    assert analysis["overlay_ratio"] > 0
    assert analysis["layers"]
    for layer in analysis["layers"]:
        assert type(layer["layer"]) is int
        assert layer["cosine"].keys() >= {"mean", "std", "gate", "up", "down"}
        assert layer["cosine"]["mean"] == layer["cosine"]["down"]
        assert list(layer["projections"]) == ["gate", "up", "down"]
        for projection in layer["projections"].values():
            assert projection["max_rank"] == min(projection["shape"])
            assert projection["rank"].keys() == {"0.90", "0.95", "0.99"}
            ranks = [projection["rank"][share] for share in ("0.90", "0.95", "0.99")]
            assert ranks == sorted(ranks)
            assert projection["rank_ratio"] == pytest.approx(ranks[1] / projection["max_rank"])
            assert projection["noise_rank_ratio"] >= projection["rank_ratio"]
            assert projection["delta_energy"] >= 0
            assert projection["experts"] == sorted(set(projection["experts"]))
            assert set(projection["experts"]) <= set(range(analysis["experts"]))
    assert type(analysis["cost"]["bytes_read"]) is int
    assert analysis["cost"]["seconds"] > 0


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "options", [[], ["--layers", "all"], ["--experts", "all"], ["--experts", "3"], ["-v"], ["-q"]], ids=" ".join
)
def test_analysis_as_json(capsys: Capture, options: list[str]) -> None:
    assert run([*NATIVE, "--json", *options]) == 0
    analysis = json.loads(capsys.readouterr().out)  # so there is nothing but one object
    check_analysis(analysis)
    assert analysis["model"] == "demo:native"
    assert (analysis["experts"], analysis["storage"], analysis["type"]) == (8, "bf16", "NATIVE")


def test_comparison_as_json(capsys: Capture) -> None:
    comparison = json.loads(run_ok(capsys, [*BOTH, "--json"]))
    assert comparison.keys() >= {"schema", "models"}
    assert comparison["schema"] == "moe-type-comparison/1"
    assert [model["model"] for model in comparison["models"]] == ["demo:native", "demo:upcycled"]
    for model in comparison["models"]:
        check_analysis(model)


def test_the_json_of_a_comparison_is_that_of_its_analyses(capsys: Capture) -> None:
    comparison = json.loads(run_ok(capsys, [*BOTH, "--json"]))
    single = json.loads(run_ok(capsys, [*NATIVE, "--json"]))
    assert without_seconds(comparison["models"][0]) == without_seconds(single)


@pytest.mark.parametrize("arguments", [NATIVE, [*NATIVE, "--layers", "all", "--experts", "all"], BOTH])
def test_the_same_input_gives_the_same_json(capsys: Capture, arguments: list[str]) -> None:
    first, second = (json.loads(run_ok(capsys, [*arguments, "--json"])) for _ in range(2))
    assert without_seconds(first) == without_seconds(second)


@pytest.mark.parametrize(("arguments", "report"), [(NATIVE, MoETypeAnalysis), (BOTH, MoETypeComparison)])
def test_json_goes_back_into_its_report(
    capsys: Capture, arguments: list[str], report: type[MoETypeAnalysis | MoETypeComparison]
) -> None:
    text = run_ok(capsys, [*arguments, "--json"])
    assert report.model_validate_json(text).model_dump(mode="json") == json.loads(text)


# Options


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ([], [0]),
        (["--layer", "1"], [1]),
        (["--layers", "1"], [1]),
        (["--layers", "all"], [0, 1]),
        (["--layers", "0,1"], [0, 1]),
        (["--layers", "0-1"], [0, 1]),
        (["--layers", "0-1/1"], [0, 1]),
        (["--layers", "0-1/2"], [0]),
        (["--layers", " 0 , 1 "], [0, 1]),
        (["--layers", "1,1"], [1]),
    ],
)
def test_layers(capsys: Capture, options: list[str], layers: list[int]) -> None:
    analysis = json.loads(run_ok(capsys, [*NATIVE, "--json", *options]))
    assert [layer["layer"] for layer in analysis["layers"]] == layers
    table = run_ok(capsys, [*NATIVE, *options])
    named = re.search(r"^Layers?\s+([\d, ]+)$", table, re.MULTILINE)
    assert named
    assert named[1].strip() == ", ".join(map(str, layers))
    if len(layers) > 1:
        rows = re.findall(r"^\s+(\d+)\s.*%.*x  NATIVE$", table, re.MULTILINE)
        assert rows == [str(layer) for layer in layers]


@pytest.mark.parametrize(("experts", "chosen"), [("1", 2), ("3", 3), ("8", 8), ("99", 8), ("all", 8)])
def test_experts(capsys: Capture, experts: str, chosen: int) -> None:
    analysis = json.loads(run_ok(capsys, [*NATIVE, "--json", "--experts", experts]))
    assert len(analysis["layers"][0]["projections"]["gate"]["experts"]) == chosen


def test_verbose_tells_the_cost_on_stderr(capsys: Capture) -> None:
    assert run([*NATIVE, "-v"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"read .*B.* in .* s\n", without_steps(err))
    assert err not in out


def test_a_verbose_comparison_says_of_each_model_what_a_verbose_analysis_does(capsys: Capture) -> None:
    assert run([*BOTH, "-v"]) == 0
    compared, err = capsys.readouterr()
    assert err.startswith("demo:native: read ")
    for model in ("demo:native", "demo:upcycled"):
        assert run([*ANALYZE, "-m", model, "-v"]) == 0
        details = capsys.readouterr().out.partition("\nMORE\n")[2]
        assert "By rank  an older rule, by rank and cosine, says" in details
        assert f"MORE: {model}\n{details}" in compared


def test_quiet_still_prints_the_report(capsys: Capture) -> None:
    assert run_ok(capsys, [*NATIVE, "-q"]) == run_ok(capsys, NATIVE)


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals to make here")
@pytest.mark.parametrize("quiet", keep([False, True], False))
def test_progress_is_for_terminals_and_never_on_stdout(tmp_path: Path, quiet: bool) -> None:
    model = write_mixtral(tmp_path / "m", 2, 4, 256, 512)
    code, out, shown = run_on_terminal([*PROGRAM, *ANALYZE, "-m", model, "--json", *(["-q"] if quiet else [])], 80)
    assert code == 0
    check_analysis(json.loads(out))
    assert (b"layer 0" in shown) != quiet


# -o


@pytest.mark.parametrize("arguments", [NATIVE, BOTH])
def test_output_file(capsys: Capture, tmp_path: Path, arguments: list[str]) -> None:
    """The same object as on stdout, and the table can have stdout for itself."""
    file = tmp_path / "results.json"
    file.write_text("what was here before")
    text = run_ok(capsys, [*arguments, "--json", "-o", str(file)])
    assert file.read_text() == text
    table = run_ok(capsys, [*arguments, "-o", str(file)])
    assert table == run_ok(capsys, arguments)
    assert without_seconds(json.loads(file.read_text())) == without_seconds(json.loads(text))
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize("place", ["", ".", "/", "folder", "folder/", "nowhere/x.json", "file/x.json", "n" * 300])
def test_output_to_where_nothing_can_be_written(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, as_json: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    assert run([*NATIVE, "-o", place, *as_json]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert place.rstrip("/") in err
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failed_analysis_leaves_the_old_output(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("kept")
    assert run([*ANALYZE, "-m", str(FIXTURES / "dense_llama"), "-o", str(file)]) == 4
    assert file.read_text() == "kept"


def test_an_output_name_as_long_as_names_may_be(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / ("n" * 250 + ".json")
    run_ok(capsys, [*NATIVE, "-o", str(file)])
    check_analysis(json.loads(file.read_text()))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_an_output_that_is_no_plain_file_is_not_replaced(capsys: Capture, tmp_path: Path) -> None:
    """For instance /dev/stdout, /dev/null, or the pipe that `>(command)` makes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        run([*NATIVE, "-o", str(pipe)])
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    finally:
        os.close(reader)


def test_an_output_that_is_a_link_is_followed(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    run_ok(capsys, [*NATIVE, "-o", str(tmp_path / "link.json")])
    assert (tmp_path / "link.json").is_symlink()
    check_analysis(json.loads((tmp_path / "target.json").read_text()))


# What a person reads


@pytest.mark.parametrize("arguments", [NATIVE, [*NATIVE, "--layers", "all"], BOTH], ids=["one", "layers", "compare"])
@pytest.mark.parametrize("columns", ["", "60", "80", "200"])
def test_tables_fit_their_width(
    arguments: list[str], columns: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    table = run_ok(capsys, arguments)
    assert max(map(len, table.splitlines())) <= int(columns or 80)
    assert "…" not in table
    assert "\x1b" not in table
    assert "NATIVE" in table


@pytest.mark.parametrize("fixture", ["deepseek_v3_fp8", "gpt_oss_mxfp4", "qwen3_moe_fused_square"])
@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_long_names_are_shown_whole(capsys: Capture, fixture: str, command: str) -> None:
    model = str(FIXTURES / fixture)
    table = run_ok(capsys, [*ANALYZE, "-m", model] if command == "analyze" else [*COMPARE, "-m", model, "-c", model])
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    if command == "analyze":  # in a comparison the columns are narrow, and names go over several lines
        assert fixture in "".join(table.split())


def test_many_layers_have_a_row_each(capsys: Capture, tmp_path: Path) -> None:
    table = run_ok(capsys, [*ANALYZE, "-m", write_mixtral(tmp_path / "m", 100, 2, 4, 8), "--layers", "all"])
    assert re.findall(r"^\s+(\d+)\s.*%.*  [A-Z]+$", table, re.MULTILINE) == [str(layer) for layer in range(100)]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("encoding", keep(["ascii", "latin-1", "cp1252", "utf-8"], "ascii"))
def test_a_terminal_that_lacks_characters_still_gets_a_table(encoding: str) -> None:
    done = subprocess.run(
        [*PROGRAM, *NATIVE],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        timeout=HANGS,
        check=False,
    )
    assert (done.returncode, without_steps(done.stderr.decode())) == (0, "")
    assert b"NATIVE" in done.stdout


def write_odd_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_mixtral(folder / "a<b>&c", 1, 4, 12, 8)
    monkeypatch.chdir(folder)
    return "a<b>&c"


def test_reports_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_odd_name(tmp_path, monkeypatch)
    for report in (MoETypeService.analyze(name), MoETypeService.compare(name, "demo:upcycled")):
        html = report._repr_html_()
        assert html.lstrip().startswith("<")
        assert "a&lt;b&gt;&amp;c" in html
        assert "a<b>" not in html
        assert "NATIVE" in html
        assert "<html" not in html  # it is a part of a page


def test_reports_in_a_program(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rich

    name = write_odd_name(tmp_path, monkeypatch)
    report = MoETypeService.analyze(name, layer=0)
    assert name in str(report)
    assert repr(report) == f"<MoETypeAnalysis {name}: {report.type}>"
    assert len(str(report).splitlines()) < 7
    rich.print(report)
    assert f"Model {name}" in " ".join(capsys.readouterr().out.split())


def test_public_names() -> None:
    names: dict[str, Any] = {}
    exec("from chuk_lazarus.introspection.moe import *", names)
    wanted = {"MoETypeService", "MoETypeAnalysis", "MoETypeComparison", "Experts", "ExpertLayer"}
    errors = {"MoEError", "InvalidRequest", "ModelUnreadable", "NotMoE", "UnknownFormat"}
    assert names.keys() >= wanted | errors
    codes = {name: names[name].exit_code for name in errors - {"MoEError"}}
    assert codes == {"InvalidRequest": 2, "ModelUnreadable": 3, "NotMoE": 4, "UnknownFormat": 4}
    assert all(issubclass(names[name], names["MoEError"]) for name in errors)


# Help and usage

LEVELS = [[], ["introspect"], ["introspect", "moe-expert"], ANALYZE, COMPARE]


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: " ".join(["lazarus", *level]))
def test_help_has_an_example(capsys: Capture, level: list[str]) -> None:
    text = run_ok(capsys, [*level, "--help"])
    assert text.startswith("Usage: lazarus")
    examples = re.findall(r"^ +(lazarus .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        assert example.split()[1:4] in (ANALYZE, COMPARE) or example == "lazarus analyze demo:native"


@pytest.mark.parametrize("level", [ANALYZE, COMPARE], ids=["analyze", "compare"])
def test_help_names_every_option(capsys: Capture, level: list[str]) -> None:
    text = run_ok(capsys, [*level, "--help"])
    options = ["-m, --model", "--layer ", "--layers ", "--experts ", "--json", "-o, --output", "-q, --quiet"]
    assert [option for option in [*options, "-v, --verbose"] if option not in text] == []
    assert ("-c, --compare" in text) == (level == COMPARE)


@pytest.mark.parametrize("level", LEVELS[:3], ids=lambda level: " ".join(["lazarus", *level]))
def test_help_tells_the_commands_in_full_sentences(capsys: Capture, level: list[str]) -> None:
    assert "..." not in run_ok(capsys, [*level, "--help"]).replace("[ARGS]...", "")


@pytest.mark.parametrize("level", LEVELS[:3], ids=lambda level: " ".join(["lazarus", *level]))
def test_no_arguments_print_the_help(capsys: Capture, level: list[str]) -> None:
    text = run_ok(capsys, [*level, "--help"])
    assert run(level) in (0, 2)
    out, err = capsys.readouterr()
    assert (out or err) == text
    assert not (out and err)


def test_version(capsys: Capture) -> None:
    assert __version__ in run_ok(capsys, ["--version"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["nonsense"]),
        (["introspect", "nonsense"], ["nonsense"]),
        (["introspect", "moe-expert", "nonsense"], ["nonsense"]),
        (["--nonsense"], ["--nonsense"]),
        ([*NATIVE, "--nonsense"], ["--nonsense"]),
        ([*NATIVE, "extra"], ["extra"]),
        ([*NATIVE, "--layer"], ["--layer"]),
        ([*ANALYZE], ["--model", "-m"]),
        ([*ANALYZE, "--layer", "1"], ["--model", "-m"]),
        ([*ANALYZE, "-m"], ["-m"]),
        ([*COMPARE, "-m", "demo:native"], ["--compare", "-c"]),
        ([*COMPARE, "-c", "demo:native"], ["--model", "-m"]),
    ],
)
def test_usage_errors(capsys: Capture, arguments: list[str], words: list[str]) -> None:
    assert run(arguments) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    assert [word for word in words if word not in line] == []
    if arguments[: len(ANALYZE)] in (ANALYZE, COMPARE):
        flagged = [*arguments[: len(ANALYZE)], "--json", *arguments[len(ANALYZE) :]]
        assert run(flagged) == 2
        out, line = capsys.readouterr()
        assert (out, line.count("\n")) == ("", 1)
        assert json.loads(line)["error"]["code"] == 2


def test_errors_of_a_real_process() -> None:
    done = call([*ANALYZE, "-m", "/no/such/model"])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    done = call([*ANALYZE, "-m", "/no/such/model", "--json"])
    assert json.loads(done.stderr)["error"]["code"] == 3


HEAVY = {"numpy", "scipy", "pydantic", "mlx", "huggingface_hub", "matplotlib", "transformers", "torch", "safetensors"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from chuk_lazarus.cli.app import run; run(sys.argv[1:]);"
        "sys.stdout.write('|' + ' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.rpartition("|")[2].split()}
    assert loaded & HEAVY == set()


# Pipes and signals


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
@pytest.mark.parametrize(
    "arguments", keep([NATIVE, [*NATIVE, "--json"], BOTH, ["--help"]], NATIVE, ["--help"]), ids=" ".join
)
def test_a_reader_that_has_gone_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PROGRAM, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert without_steps(done.stderr) == ""
    assert done.returncode != 1  # which says that a check failed


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_head() -> None:
    command = f'"{sys.executable}" -m chuk_lazarus.cli {" ".join(NATIVE)} --layers all | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, without_steps(done.stderr)) == ("MOE TYPE ANALYSIS\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("options", keep([[], ["--json"]], []))
def test_a_full_disk_is_said_in_one_line(options: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROGRAM, *NATIVE, *options], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode not in (0, 1)
    assert done.stderr.count("\n") == 1
    assert "space" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit for what a process is given")
def test_what_is_not_the_output_is_not_called_so(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A survey whose processes can't be started."""
    for number in range(100):
        monkeypatch.setenv(f"FILLING_{number}", "x" * 100_000)
    assert run(["introspect", "moe-expert", "moe-type-survey", "demo:native"]) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert sys.executable in err
    assert "output" not in err


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_mixtral(tmp_path_factory.mktemp("large") / "m", 3, 4, 1536, 1536)


ON_ONE_CORE = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
from chuk_lazarus.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are otherwise there")
@pytest.mark.parametrize("options", keep([[], ["--json"]], ["--json"]))
@pytest.mark.parametrize("after", keep([1.0, 2.0], 1.0))
def test_interrupted(large_model: str, tmp_path: Path, options: list[str], after: float) -> None:
    """A single core, so that a fast machine is not done before it is interrupted."""
    output = tmp_path / "results.json"
    arguments = [*ANALYZE, "-m", large_model, "--layers", "all", "--experts", "all", "-o", str(output), *options]
    children_before = of_children()
    with subprocess.Popen(
        [sys.executable, "-c", ON_ONE_CORE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while process.poll() is None and of_process(process.pid) < after:
            time.sleep(0.01)
        assert process.poll() is None, "it was done before it could be interrupted"
        before = of_process(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANGS)
    used = of_children() - children_before - before
    assert (process.returncode, out, err.count("\n")) == (130, "", 1), err[-1000:]
    assert "interrupted" in err
    if options:
        assert json.loads(err)["error"]["code"] == 130
    assert used < 2.5
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("columns", keep(["0", "00", "1", "19", "", "-1", "1e3", "9" * 20], "0", "19"))
def test_a_width_that_is_none_is_not_believed(columns: str) -> None:
    """Containers and runners of tests say 0."""
    arguments = ["introspect", "moe-expert", "moe-layout", "-m", "demo:native"]
    assert call(arguments, COLUMNS=columns).stdout == call(arguments, COLUMNS="80").stdout
