"""Checks the arguments of the Python API and brings them into one form; raises InvalidRequest for anything else."""

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import InvalidRequest
from .files import as_path
from .text import parse_size

ModelName = str | os.PathLike[str]
"""A folder, a file, a Hub id or `demo:NAME`; a path where it is one."""

Layers = int | Sequence[int] | str
"""One layer, several, or a text such as "0,5,10", "0-23/6" or "all"."""

ExpertCount = int | Literal["all"] | None
"""How many experts; "all" and None both mean all of them."""

LONGEST = 60  # characters of a value that a message quotes


MODEL = "give a folder, a file, a Hub id such as org/name, or demo:upcycled"


def model_name(model: Any, what: str = "the model", hint: str = MODEL) -> str:
    """The name of a model, given as a string or a path; as in `files.as_path`, ~ in a path object does not mean the
    home folder."""
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    if name is not model and isinstance(name, str) and name.startswith("~"):
        name = f".{os.sep}{name}"
    if not isinstance(name, str):
        raise InvalidRequest(f"{what} is {_quote(model)}, which is not a name", hint)
    return name


def path(place: Any, what: str) -> Path:
    """A path on this machine; in a string, ~ is the user's home."""
    return as_path(place if isinstance(place, Path) else model_name(place, what, "give a path"))


def model_names(models: Any) -> list[Any]:
    """Several models as a list, even if only one is given; the entries are not checked."""
    if isinstance(models, str | os.PathLike) or not isinstance(models, Iterable):
        return [models]
    return list(models)


def whole_number(value: Any, what: str, hint: str = "give a whole number", least: int | None = None) -> int:
    """An integer, of Python or NumPy, of at least `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InvalidRequest(f"{what} is {_quote(value)}, which is not a whole number", hint) from None
    if least is not None and number < least:
        raise InvalidRequest(f"{what} must be at least {least}", hint)
    return number


def real_number(value: Any, what: str, hint: str = "give a number") -> float:
    """A number, of Python or NumPy; its range is checked elsewhere."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(f"{what} is {_quote(value)}, which is not a number", hint) from None


def address(dask: Any) -> str:
    """The address of a scheduler."""
    return model_name(dask, "the scheduler", "give its address, such as tcp://host:8786")


def layer_number(layer: Any) -> int | None:
    """The number of one layer, None if none is given."""
    return None if layer is None else whole_number(layer, "the layer", "give its number, or several as layers")


def layer_numbers(layers: Any) -> Sequence[int] | str | None:
    """The numbers of layers, or a string as it is; None if none are given."""
    if layers is None or isinstance(layers, str):
        return layers
    hint = 'give numbers such as [0, 5], or a text such as "0,5,10", "0-23/6" or "all"'
    if not isinstance(layers, Iterable) or isinstance(layers, bytes):
        return (whole_number(layers, "the choice of layers", hint),)
    return tuple(whole_number(layer, "a layer", hint) for layer in layers)


def expert_count(experts: Any) -> int | None:
    """How many experts, None for all."""
    if experts is None or (isinstance(experts, str) and experts == "all"):
        return None
    hint = "give a number, or 'all'"
    return whole_number(experts, "the number of experts", hint, least=1)


def shares(variance: Any) -> tuple[float, ...]:
    """Shares of energy between 0 and 1; a single one may be given without a list."""
    several = isinstance(variance, Iterable) and not isinstance(variance, str | bytes)
    hint = "give a number such as 0.95"
    listed = variance if several else [variance]
    found = tuple(real_number(share, "a share of the variance", hint) for share in listed)
    for share in found:
        if not 0 < share < 1:
            raise InvalidRequest(f"a share of the variance is {share:g}", "give numbers between 0 and 1, such as 0.95")
    return found


def byte_size(size: Any, what: str) -> int:
    """A number of bytes, or a string like 500MB."""
    return parse_size(size, what) if isinstance(size, str) else whole_number(size, what, "write it like 500MB or 20GB")


def _quote(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
