"""What may have been meant by a word that is no command, or by an option that is none."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

MODEL = re.compile(r"demo:.*|https?://.*|.*\.(safetensors|gguf)|\.{0,2}/.*|[\w.-]+/[\w.-]+(@.*)?")
NEAR = 0.65  # how alike an option must be


def command_meant(word: str, root: Any) -> str:
    """The command line that `word` may have been meant for, "" where none is near: the nearest of all levels.

    A model in the place of a command is meant to be analysed.
    """
    if MODEL.fullmatch(word):
        return f"lazarus analyze {word}"
    if word in ("help", "version"):
        return f"lazarus --{word}"
    paths = dict(reversed(list(_paths(root, "lazarus"))))  # of two with one name the first
    ends = [name for name in paths if name.endswith(f"-{word}")]
    nearest = [word] if word in paths else ends or get_close_matches(word.lower(), paths, n=1)
    return paths[nearest[0]] if nearest else ""


def option_meant(word: str, options: Sequence[str]) -> str:
    """The option that `word` may have been meant for, "" where none is near: one that ends in it, or is like it."""
    names = {option.lstrip("-"): option for option in options}
    name = word.lstrip("-")
    ends = [each for each in names if each.endswith(f"-{name}")]
    nearest = ends or get_close_matches(name, names, n=1, cutoff=NEAR)
    return names[nearest[0]] if nearest else ""


def _paths(group: Any, path: str) -> Iterator[tuple[str, str]]:
    """The name of each command below, and how it is called."""
    for name, command in group.commands.items():
        yield name, f"{path} {name}"
        if hasattr(command, "commands"):
            yield from _paths(command, f"{path} {name}")
