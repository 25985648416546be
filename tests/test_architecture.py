"""Who may import whom, and what must not be imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src/chuk_lazarus"
MOE = "introspection.moe"
CODECS = ("awq", "bitsandbytes", "fp8", "gguf", "gptq", "mlx", "mxfp4", "mxfp8", "nvfp4", "pack_quantized", "plain")

# module -> what it may import: our own modules (below chuk_lazarus), then others beyond the standard library
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "cli": ({"cli.app"}, set()),
    "cli.app": ({"cli", "cli.moe_expert", "cli.output", MOE, ""}, {"typer"}),
    "cli.moe_expert": (
        {"cli.output", MOE, *(f"{MOE}.{name}" for name in ("page", "plots", "terminal_plots"))},
        {"typer"},
    ),
    "cli.output": ({MOE, f"{MOE}.plots"}, {"rich", "pydantic", "typer"}),
    MOE: (
        {
            f"{MOE}.{name}"
            for name in (
                "errors",
                "measure",
                "moe_compression",
                "moe_layout",
                "moe_survey",
                "moe_type",
                "reports",
                "runtime",
                "weights.expert_layer",
                "weights.experts",
            )
        },
        set(),
    ),
    f"{MOE}.errors": (set(), set()),
    f"{MOE}.moe_type": (
        {
            f"{MOE}.{name}"
            for name in (
                "classifier",
                "cluster",
                "errors",
                "lineage",
                "measure",
                "overlay",
                "quick",
                "reports",
                "similarity",
                "spectra",
                "sweep",
                "weights.expert_layer",
                "weights.experts",
                "weights.layouts",
                "weights.range_cache",
                "weights.source",
            )
        },
        {"numpy", "scipy"},
    ),
    f"{MOE}.quick": (
        {f"{MOE}.{name}" for name in ("classifier", "errors", "lineage", "measure", "reports")}
        | {f"{MOE}.weights.{name}" for name in ("expert_layer", "experts", "source")},
        {"numpy"},
    ),
    f"{MOE}.sweep": (
        {"", *(f"{MOE}.weights.{name}" for name in ("checkpoint", "expert_layer", "range_cache", "source"))},
        set(),
    ),
    f"{MOE}.lineage": (set(), {"numpy", "scipy"}),
    f"{MOE}.moe_layout": (
        {f"{MOE}.{name}" for name in ("errors", "measure", "moe_type", "quick", "reports")}
        | {
            f"{MOE}.weights.{name}"
            for name in ("checkpoint", "expert_layer", "experts", "layouts", "range_cache", "source")
        },
        set(),
    ),
    f"{MOE}.moe_survey": (
        {f"{MOE}.{name}" for name in ("cluster", "errors", "measure", "moe_type", "reports", "wording")}
        | {f"{MOE}.weights.{name}" for name in ("experts", "range_cache", "source")},
        set(),
    ),
    f"{MOE}.cluster": (
        {f"{MOE}.{name}" for name in ("errors", "measure", "weights.experts", "weights.source")},
        {"dask", "distributed"},
    ),
    f"{MOE}.measure": (
        {f"{MOE}.{name}" for name in ("errors", "lineage", "spectra")}
        | {f"{MOE}.weights.{name}" for name in ("expert_layer", "range_cache", "source")},
        {"numpy", "threadpoolctl"},
    ),
    f"{MOE}.reports": ({f"{MOE}.{name}" for name in ("classifier", "page", "tables", "wording")}, {"pydantic", "rich"}),
    f"{MOE}.page": (
        {"", *(f"{MOE}.{name}" for name in ("errors", "plots", "reports", "wording"))},
        {"jinja2", "matplotlib"},
    ),
    f"{MOE}.plots": (
        {f"{MOE}.{name}" for name in ("errors", "reports", "spectra", "wording")},
        {"numpy", "scipy", "matplotlib"},
    ),
    f"{MOE}.terminal_plots": ({f"{MOE}.{name}" for name in ("reports", "spectra", "wording")}, {"numpy", "rich"}),
    f"{MOE}.tables": ({f"{MOE}.{name}" for name in ("errors", "reports", "wording")}, {"rich"}),
    f"{MOE}.wording": ({f"{MOE}.{name}" for name in ("classifier", "reports")}, set()),
    f"{MOE}.classifier": (set(), {"scipy"}),
    f"{MOE}.moe_compression": (
        {
            f"{MOE}.{name}"
            for name in (
                "errors",
                "fidelity",
                "forward",
                "measure",
                "overlay",
                "overlay_checkpoint",
                "reports",
                "runtime",
                "spectra",
                "sweep",
                "weights.checkpoint",
                "weights.expert_layer",
                "weights.experts",
                "weights.source",
            )
        },
        {"numpy"},
    ),
    f"{MOE}.fidelity": (
        {f"{MOE}.{name}" for name in ("errors", "forward", "measure", "overlay", "spectra")}
        | {f"{MOE}.weights.{name}" for name in ("expert_layer", "source")},
        {"numpy"},
    ),
    f"{MOE}.forward": (set(), {"numpy", "scipy"}),
    f"{MOE}.overlay_checkpoint": (
        {f"{MOE}.{name}" for name in ("errors", "fidelity", "measure", "model_folder", "overlay")}
        | {
            f"{MOE}.weights.{name}"
            for name in ("checkpoint", "codecs", "expert_layer", "experts", "layouts", "source", "stored")
        },
        {"numpy", "ml_dtypes"},
    ),
    f"{MOE}.model_folder": (
        {f"{MOE}.{name}" for name in ("errors", "weights.checkpoint", "weights.source")},
        set(),
    ),
    f"{MOE}.runtime": (
        {f"{MOE}.{name}" for name in ("errors", "reports", "weights.checkpoint", "weights.source")},
        {"mlx", "mlx_lm"},
    ),
    f"{MOE}.overlay": ({f"{MOE}.lapack", f"{MOE}.spectra"}, {"numpy", "ml_dtypes"}),
    f"{MOE}.similarity": (set(), {"numpy"}),
    f"{MOE}.device": ({f"{MOE}.errors"}, {"numpy", "mlx"}),
    f"{MOE}.spectra": ({f"{MOE}.lapack", f"{MOE}.device"}, {"numpy", "scipy"}),
    f"{MOE}.lapack": (set(), {"numpy", "scipy"}),
    f"{MOE}.weights.experts": (
        {f"{MOE}.errors"} | {f"{MOE}.weights.{name}" for name in ("checkpoint", "expert_layer", "layouts", "source")},
        set(),
    ),
    f"{MOE}.weights.expert_layer": (
        {f"{MOE}.errors"}
        | {f"{MOE}.weights.{name}" for name in ("checkpoint", "codecs", "layouts", "source", "stored")},
        {"numpy"},
    ),
    f"{MOE}.weights.stored": (
        {f"{MOE}.errors"} | {f"{MOE}.weights.{name}" for name in ("checkpoint", "codecs", "layouts")},
        {"numpy"},
    ),
    f"{MOE}.weights.checkpoint": (
        {f"{MOE}.errors"}
        | {f"{MOE}.weights.{name}" for name in ("gguf", "safetensors_header", "source", "tensor_info")},
        {"numpy"},
    ),
    f"{MOE}.weights.gguf": (
        {f"{MOE}.errors", f"{MOE}.weights.source", f"{MOE}.weights.tensor_info"},
        {"gguf"},
    ),
    f"{MOE}.weights.safetensors_header": (
        {f"{MOE}.errors", f"{MOE}.weights.source", f"{MOE}.weights.tensor_info"},
        set(),
    ),
    f"{MOE}.weights.tensor_info": ({f"{MOE}.errors"}, {"numpy", "ml_dtypes"}),
    f"{MOE}.weights.layouts": (set(), set()),
    f"{MOE}.weights.source": ({f"{MOE}.errors", f"{MOE}.weights.hub"}, set()),
    f"{MOE}.weights.hub": (
        {f"{MOE}.errors", f"{MOE}.weights.range_cache", f"{MOE}.weights.source"},
        {"httpx2", "huggingface_hub"},
    ),
    f"{MOE}.weights.range_cache": ({f"{MOE}.errors", f"{MOE}.weights.source"}, set()),
    f"{MOE}.weights.codecs": (
        {f"{MOE}.errors"} | {f"{MOE}.weights.codecs.{name}" for name in CODECS},
        {"numpy"},
    ),
    f"{MOE}.weights.codecs.gguf": (
        {f"{MOE}.errors", f"{MOE}.weights.codecs", f"{MOE}.weights.codecs.plain"},
        {"numpy", "gguf"},
    ),
}
CODEC = (
    {f"{MOE}.device", f"{MOE}.errors", f"{MOE}.weights.codecs"}
    | {f"{MOE}.weights.codecs.{name}" for name in ("bits", "fp8", "gptq", "mxfp4", "small_floats")},
    {"numpy", "ml_dtypes"},
)
LATE = {"dask", "distributed", "gguf", "huggingface_hub", "httpx2", "mlx", "mlx_lm", "matplotlib"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.AST) -> set[str]:
    """The absolute names of the modules that a file imports, our own without the package's name in front."""
    here = ["chuk_lazarus", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                found.add(f"{module}.{alias.name}" if module.startswith("chuk_lazarus") and is_module else module)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_keep_to_the_plan(path: Path) -> None:
    name = module_name(path)
    own, others = ALLOWED.get(name, CODEC if ".codecs." in name else (set(), set()))
    for imported in imports(path, ast.parse(path.read_text())):
        root = imported.split(".")[0]
        if root == "chuk_lazarus":
            assert imported.removeprefix("chuk_lazarus").lstrip(".") in own, f"{name} imports {imported}"
        else:
            assert root in sys.stdlib_module_names or root in others, f"{name} imports {imported}"


def for_types(node: ast.stmt) -> bool:
    """Whether only the type checker reads it."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_heavy_imports_are_late(path: Path) -> None:
    if module_name(path) in (f"{MOE}.weights.hub", f"{MOE}.runtime"):  # themselves imported late
        return
    body = ast.parse(path.read_text()).body
    top_level = ast.Module([node for node in body if not (isinstance(node, ast.FunctionDef) or for_types(node))], [])
    functions = [node for node in ast.walk(top_level) if isinstance(node, ast.FunctionDef)]
    late = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(top_level):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in late:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module or ""}
            assert not {name.split(".")[0] for name in names} & LATE


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from chuk_lazarus.cli.app import run; run(['--help']);"
        "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))
    assert not loaded & (LATE | {"numpy", "scipy", "pydantic", "torch", "transformers"})
