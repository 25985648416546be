"""Which module may import which: packages without cycles, and no library before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MOE = "chuk_lazarus.introspection.moe"
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}

GROUND = {"errors", "terms", "text", "files", "progress", "arguments"}
BELOW = GROUND | {"numerics", "weights", "reports"}
DOORS = {"moe_cache", "moe_layout", "moe_type", "moe_survey", "moe_weights", "moe_compression", "plots"}

# package -> the packages, or single modules, that it may import beside itself
PACKAGES: dict[str, set[str]] = {
    "errors": set(),
    "terms": set(),
    "progress": set(),
    "text": {"errors"},
    "arguments": {"errors", "files", "text"},
    "files": {"errors"},
    "numerics": {"errors"},
    "reports": {"errors", "terms", "text"},
    "weights": GROUND | {"numerics.device"},
    "jobs": BELOW,
    "provenance": BELOW | {"jobs"},
    "overlays": BELOW | {"jobs"},
    "conversion": BELOW | {"jobs"},
    "views": GROUND | {"numerics", "reports", "provenance.classifier"},
    **dict.fromkeys(DOORS, BELOW | {"jobs", "provenance", "overlays", "conversion", "views"}),
    "cli": {"", "plots", "views", "files", "errors"},
    "": DOORS | BELOW | {"jobs", "overlays"},  # the public names
    "__main__": {"cli"},
}

# narrower rules inside a package: subpackage or module -> what it may import
WITHIN: dict[str, set[str]] = {
    "weights.repositories": GROUND,
    "weights.codecs": {"errors", "numerics.device"},
    "weights.layouts": GROUND,
    "overlays.codes": {"errors", "numerics", "weights.codecs"},
    "overlays.checkpoint": BELOW
    | {
        "jobs",
        "overlays.codes",
        "overlays.coded_layer",
        "overlays.coding",
        "overlays.fidelity",
        "overlays.moments",
        "overlays.quantisation",
    },
}

# library -> who may import it; numpy may be imported anywhere
LIBRARIES: dict[str, set[str]] = {
    "typer": {"cli"},
    "rich": {"cli", "views", "reports.report"},
    "pydantic": {"cli", "reports", "jobs.resume", "provenance", "overlays"},
    "scipy": {"numerics", "provenance", "views.figures"},
    "ml_dtypes": {"weights", "numerics", "overlays", "conversion"},
    "threadpoolctl": {"jobs.resources"},
    "dask": {"jobs.cluster"},
    "distributed": {"jobs.cluster"},
    "gguf": {"weights.gguf", "weights.codecs.gguf", "overlays.ggml"},
    "huggingface_hub": {"weights.repositories.hub"},
    "httpx2": {"weights.repositories.hub"},
    "jinja2": {"views.templates"},
    "matplotlib": {"views.figures"},
    "pandas": {"reports.report"},
    "numba": {"overlays.codes.viterbi"},
    "mlx": {"numerics.device", "overlays.runtime"},
    "mlx_lm": {"overlays.runtime"},
}
LATE = {
    "dask",
    "distributed",
    "gguf",
    "huggingface_hub",
    "httpx2",
    "jinja2",
    "matplotlib",
    "mlx",
    "mlx_lm",
    "numba",
    "pandas",
    "rich",
}
IMPORTED_LATE = (
    "weights.repositories.hub",
    "overlays.codes.viterbi",
    "overlays.runtime",
    "views.terminal",
)  # which import theirs at once


def short(module: str) -> str:
    """A module's name in the tables: "jobs.measure", "cli.app", "" for the public names."""
    return module.removeprefix(MOE).removeprefix("chuk_lazarus").lstrip(".")


def is_in(module: str, packages: set[str]) -> bool:
    return any(module == package or (package and module.startswith(f"{package}.")) for package in packages)


def is_for_types(node: ast.AST) -> bool:
    """Whether only the type checker reads it."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(module: str, tree: ast.AST, deep: bool = True) -> Iterator[str]:
    """The modules that a module imports, those inside of functions included if `deep`."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in FILES else base
        elif not is_for_types(node) and (deep or not isinstance(node, ast.FunctionDef)):
            yield from imports(module, node, deep)


def imported_by(module: str, deep: bool = True) -> set[str]:
    return set(imports(module, ast.parse(FILES[module].read_text()), deep))


def own_imports(module: str) -> set[str]:
    return {name for name in imported_by(module) if name in FILES} - {module}


def test_every_module_is_in_a_room() -> None:
    outside = {"chuk_lazarus", "chuk_lazarus.introspection"}
    assert not [name for name in FILES.keys() - outside if not is_in(short(name), set(PACKAGES))]


@pytest.mark.parametrize("module", FILES, ids=short)
def test_rooms_import_those_below_them(module: str) -> None:
    name = short(module)
    package = name.split(".")[0]
    allowed = PACKAGES.get(package, set()) | ({package} if package else set())
    for inner, narrow in WITHIN.items():
        if is_in(name, {inner}):
            allowed = narrow | {inner}
    for imported in own_imports(module):
        assert imported == "chuk_lazarus" or is_in(short(imported), allowed), f"{name} imports {short(imported)}"


@pytest.mark.parametrize("module", FILES, ids=short)
def test_each_library_has_its_place(module: str) -> None:
    for imported in imported_by(module):
        library = imported.split(".")[0]
        if library in sys.stdlib_module_names or library in ("chuk_lazarus", "numpy"):
            continue
        assert library in LIBRARIES, f"{library} is new: say who may import it"
        assert is_in(short(module), LIBRARIES[library]), f"{short(module)} imports {library}"


@pytest.mark.parametrize("module", FILES, ids=short)
def test_heavy_libraries_are_imported_late(module: str) -> None:
    if not is_in(short(module), set(IMPORTED_LATE)):
        assert not {name.split(".")[0] for name in imported_by(module, deep=False)} & LATE


def find_circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, [] where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for imported in sorted(edges[module]):
            if circle := visit(imported, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in edges if (circle := visit(module, []))), [])


def test_no_modules_import_each_other() -> None:
    assert find_circle({module: own_imports(module) for module in FILES}) == []


def test_a_circle_is_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from chuk_lazarus.cli.app import run; run(['--help']);"
        "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))
    assert not loaded & (LATE - {"rich"} | {"numpy", "scipy", "pydantic", "torch", "transformers"})
