"""Lists of models for a survey: files with one model per line, or one table per model, and folders of models."""

import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest, printable
from ..files import as_path
from ..reports import SurveyRequest
from ..weights.experts import parse_layers
from ..weights.repositories.local import find_models

LISTS = (".txt", ".toml")
STDIN = "-"  # in the place of a list
OPTIONS = ("parent", "layers", "experts")
BITS = {"f32": 32, "bf16": 16, "f16": 16, "fp8": 8 + 32 / 128**2, "mxfp4": 4 + 8 / 32}  # of a weight and its scale
MAX_WORDS = 4096  # characters of a name or a list of layers: the request is passed as an argument to a process
MAX_SIZE = 2**40  # of anything in the shape of a model


@dataclass(frozen=True, slots=True)
class Shape:
    """The routed experts of a model as a list gives them: `matrices` of [intermediate, hidden] per expert, and the
    stored bytes of one layer."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    matrices: int
    layer_bytes: int

    @property
    def stored_bytes(self) -> int:
        return self.layers * self.layer_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a list; `shown` is its request as reports and files name it."""

    request: SurveyRequest
    stated: str | None = None
    shape: Shape | None = None

    @property
    def shown(self) -> SurveyRequest:
        named = {"model": self.request.model, "parent": self.request.parent}
        return self.request.model_copy(update={key: name and printable(name) for key, name in named.items()})


def spell_layers(layer: int | None, layers: Sequence[int] | str | None) -> str | None:
    """The wanted layers in the words of the command line."""
    if layer is not None and layers is not None:
        raise InvalidRequest("both layer and layers are given", "give one of the two")
    if layers is None:
        return None if layer is None else str(layer)
    return layers if isinstance(layers, str) else ",".join(map(str, layers))


def read_entries(
    models: Iterable[str | SurveyRequest], layers: str | None, experts: int | None, budget: int | None
) -> tuple[Entry, ...]:
    """All models that are given or listed, each request once; raises InvalidRequest."""
    usual = {"layers": layers, "experts": "all" if experts is None else experts}
    by_request: dict[SurveyRequest, Entry] = {}
    for model in [models] if isinstance(models, str) else models:
        if isinstance(model, SurveyRequest):
            count = "all" if model.experts is None else model.experts
            entries = [_entry(model.model, {**model.model_dump(), "id": model.model, "experts": count})]
        else:
            is_list = model == STDIN or (model.endswith(LISTS) and not os.path.isdir(model))
            listed = _read_list(model) if is_list else [(model, {"id": model})]
            entries = [
                _entry(where, usual | options | {"id": name})
                for where, options in listed
                for name in _expand(options.get("id"))
            ]
        for entry in entries:
            if budget is not None:
                quick = SurveyRequest(model=entry.request.model, layers=entry.request.layers, budget=budget)
                entry = replace(entry, request=quick)
            by_request.setdefault(entry.request, entry)
    if not by_request:
        raise InvalidRequest("no model is given or listed", "give a model, or a list with one model per line")
    return tuple(by_request.values())


def _expand(name: Any) -> list[Any]:
    """The models in a folder of models; anything else unchanged."""
    if not (isinstance(name, str) and name.strip()):
        return [name]
    try:
        return list(map(str, find_models(as_path(name)))) or [name]
    except (OSError, ValueError):  # a name that is too long, a NUL
        return [name]


def _read_list(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The models of a list, each with its place in the list for messages."""
    where_from = "the standard input" if path == STDIN else path
    try:
        data = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        tables = tomllib.loads(text).get("model") if path.endswith(".toml") else None
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}", "give a list of models, or a model") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, or no TOML
        raise InvalidRequest(f"{where_from} is not a list of models: {error}") from None
    if not path.endswith(".toml"):
        for number, line in enumerate(text.split("\n"), 1):
            if line := re.sub(r"(^|\s)#.*", "", line).strip():
                model, *options = re.split(r"\s+(?=\w+=)", line)
                pairs = (option.partition("=")[::2] for option in options)
                where = f"{where_from}, line {number}"
                yield where, {"id": model, **{_check_option(where, key): value for key, value in pairs}}
    elif isinstance(tables, list) and all(isinstance(table, dict) for table in tables):
        for number, table in enumerate(tables, 1):
            yield f"{path}, model {number}", table
    else:
        raise InvalidRequest(f"{path} has no [[model]] tables")


def _check_option(where: str, name: str) -> str:
    if name not in OPTIONS:
        raise InvalidRequest(f"{where}: there is no option {name}", f"the options are {', '.join(OPTIONS)}")
    return name


def _entry(where: str, options: Mapping[str, Any]) -> Entry:
    """A model from its entry in a list; raises InvalidRequest, naming the place, for an invalid one."""
    model, parent = options.get("id"), options.get("parent")
    for name, value in (("id", model), *([("parent", parent)] if parent is not None else [])):
        if not (isinstance(value, str) and value.strip()):
            raise InvalidRequest(f"{where}: {name} is not the name of a model")
    layers, experts, stated = options.get("layers"), options.get("experts"), options.get("origin")
    layers = None if layers is None else str(layers)
    for name, value in (("id", model), ("parent", parent), ("layers", layers)):
        if value and len(value) > MAX_WORDS:
            raise InvalidRequest(f"{where}: {name} is longer than {MAX_WORDS} characters")
    try:
        if layers not in (None, "all"):
            parse_layers(layers)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error.message}", error.hint) from None
    if not re.fullmatch(r"all|0*[1-9]\d{0,8}", str(experts)):
        raise InvalidRequest(f"{where}: {experts!r} is neither a number of experts, 1 or more, nor 'all'")
    request = SurveyRequest(
        model=str(model),
        parent=None if options.get("parent_needs") else parent,  # it is known that this parent can't be read
        layers=layers,
        experts=None if experts == "all" else int(str(experts)),
    )
    return Entry(request, printable(stated) if isinstance(stated, str) else None, _read_shape(options))


def _read_shape(options: Mapping[str, Any]) -> Shape | None:
    """The shape of a model, if its list gives a valid one."""
    try:
        sizes = {name: int(options["shape"][name]) for name in ("layers", "experts", "hidden", "intermediate")}
        if not all(0 < size <= MAX_SIZE for size in sizes.values()):
            return None
        matrices = 3 if options.get("gated", True) else 2
        weights = prod(sizes.values()) // sizes["layers"] * matrices
        return Shape(**sizes, matrices=matrices, layer_bytes=round(weights * BITS[options["storage"]] / 8))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
