"""The tour of docs/notebook.ipynb runs, and what it shows is what is stored; run as a program, this file renews it."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from hub_server import HubServer
from places import FIXTURES, ROOT

NOTEBOOK = ROOT / "docs/notebook.ipynb"


def execute(folder: str) -> NotebookNode:
    """The notebook with the outputs of now, run from top to bottom by a kernel in `folder`.

    A report's repr has every number that there is, times among them; where there is HTML, it is left out.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}}
    ).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "data" in output and len(output.data) > 1:
                output.data.pop("text/plain", None)
    return notebook


def outputs(notebook: NotebookNode) -> list[dict[str, str]]:
    """What each code cell shows: the text by kind of output, without drawings and style sheets."""
    found = []
    for cell in notebook.cells:
        shown: dict[str, str] = {}
        for output in cell.get("outputs", []):
            data = output.get("data", {output.get("name", output.output_type): output.get("text", "")})
            for kind, text in data.items():
                plain = re.sub(r"<(svg|style).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL)
                shown[kind] = f"{shown.get(kind, '')} {plain}"
        if cell.cell_type == "code":
            found.append(shown)
    return found


STALE = "docs/notebook.ipynb shows something else: python tests/test_notebook.py renews it"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@pytest.mark.long
def test_the_notebook_runs_and_shows_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    stored, now = outputs(nbformat.read(NOTEBOOK, as_version=4)), outputs(execute(str(tmp_path)))
    assert sum(map(bool, stored)) >= 8, STALE
    assert not [text for shown in now for text in shown.values() if str(ROOT) in text]  # where it lies is no matter
    for before, after in zip(stored, now, strict=True):
        assert before.keys() == after.keys(), STALE
        for kind, text in before.items():
            assert NUMBER.sub("#", text).split() == NUMBER.sub("#", after[kind]).split(), STALE
            numbers = [[float(x.replace(",", "")) for x in NUMBER.findall(one)] for one in (text, after[kind])]
            assert numbers[1] == pytest.approx(numbers[0], rel=0.02, abs=0.11), STALE  # another BLAS rounds otherwise


def test_the_cells_that_need_the_network_run_as_they_stand(hub: HubServer, cache: Path) -> None:
    hub.add("allenai/OLMoE-1B-7B-0924", FIXTURES / "olmoe")  # a tiny model of that family
    cells = [
        cell.source
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        if "skip-execution" in cell.metadata.get("tags", ())
    ]
    assert len(cells) == 2
    shown: dict[str, object] = {}
    exec("from chuk_lazarus.introspection.moe import MoELayoutService", shown)  # in the first cell, which is run
    for source in cells:
        *statements, result = source.strip().splitlines()
        exec("\n".join(statements), shown)
        assert eval(result, shown).model == "allenai/OLMoE-1B-7B-0924"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(folder), NOTEBOOK)
