"""The repository that a model's name stands for."""

import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from ...errors import ModelUnreadable
from ...files import as_path
from .local import Folder
from .source import Repository

DEMO_MODELS = ("lora", "upcycled", "native", "permuted", "parent")
DEMO_FOLDER = Path(__file__).parents[4] / "demo"


def find_repository(model: str) -> Repository:
    """The repository that `model` stands for.

    These are tried in order: an embedded model, `demo:NAME`; an existing folder or file; a Hub id, `org/name` or
    `org/name@revision`, or one of its GGUF files, `org/name/path/file.gguf`, or such an id in an address of
    the Hub's, or as a cache folder of its client has it (`models--org--name`). Raises ModelUnreadable for other
    texts.
    """
    if model.startswith("demo:"):
        name = model.removeprefix("demo:")
        if name not in DEMO_MODELS:
            known = ", ".join(f"demo:{demo}" for demo in DEMO_MODELS)
            raise ModelUnreadable(f"there is no embedded model {model}", f"the embedded models are {known}")
        return Folder(DEMO_FOLDER / name, model)
    path = as_path(model)
    try:
        exists = bool(model) and path.exists()
    except (OSError, ValueError):  # a name that is too long, a NUL
        exists = False
    if exists:
        path = _snapshot(path)
        return Folder(path.parent if path.name.endswith(".safetensors.index.json") else path)
    model = _as_hub_id(model)
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([^@]+\.gguf))?(?:@([\w./-]+))?", model)
    if match and not match[1].endswith((".safetensors", ".gguf")):
        from .hub import HubRepository

        return HubRepository(match[1], match[3], match[2])
    raise ModelUnreadable(
        f"{model}: no such folder or file" if model else "no model was given",
        "give a folder, a .safetensors or .gguf file, a Hub id such as org/name, or demo:upcycled",
    )


def _snapshot(path: Path) -> Path:
    """The model in a cache folder of the Hub's client, of the main branch or else the newest; or the path as it is."""
    if not (path.resolve().name.startswith("models--") and (path / "snapshots").is_dir()):
        return path
    with suppress(OSError, ValueError):
        commit = (path / "refs" / "main").read_text().strip()
        if re.fullmatch("[0-9a-f]+", commit) and (path / "snapshots" / commit).is_dir():
            return path / "snapshots" / commit
    snapshots = [folder for folder in (path / "snapshots").iterdir() if folder.is_dir()]
    if not snapshots:
        raise ModelUnreadable(f"{path} has no snapshot of the model", f"run: hf download {_as_hub_id(path.name)}")
    return max(snapshots, key=lambda folder: folder.stat().st_mtime)


def is_on_hub(model: str) -> bool:
    """Whether a model's name stands for one on the Hub, and for no file or folder here."""
    try:
        return not (model.startswith("demo:") or as_path(model.partition("#")[0]).exists())
    except (OSError, ValueError):
        return True


def _as_hub_id(model: str) -> str:
    """The Hub id that an address of the Hub, an id with a slash at its end, or a cache folder's name stands for."""
    text = re.sub(r"^(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:models/)?", "", model.strip())
    text = unquote(text.partition("?")[0]).rstrip("/")
    if cached := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", text):
        return f"{cached[1]}/{cached[2]}"
    text = re.sub(r"^([^/]+/[^/]+)/discussions(?:/.*)?$", r"\1", text)
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/(?:tree|blob|resolve|raw|commits?)/([^@]+)", text)
    if not match:
        return text
    name, rest = match[1], match[2]
    revision, _, file = rest.partition("/") if not rest.startswith("refs/") else (rest, "", "")
    return f"{name}/{file}@{revision}" if file.endswith(".gguf") else f"{name}@{revision}"
