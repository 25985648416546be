"""The templates of pages, which lie beside this module: HTML in which all text is escaped."""

import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


@cache
def load_template(name: str) -> "Template":
    """The template in a file of this package; every name in it must be given."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def load(file: str) -> str:
        return files(__package__).joinpath(file).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(load), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False
    }  # which also keeps the keys in the report's order
    environment.filters["glue"] = _glue
    environment.filters["pieces"] = _pieces
    return environment.get_template(name)


def _glue(text: str) -> str:
    """Text in which a number and what it counts stay together."""
    return re.sub(r"(?<=\d) (?=%|[kMGT]?B\b|UPCYCLED|NATIVE|UNDETERMINED|failed)", "\u00a0", str(text))


def _pieces(text: str) -> list[str]:
    """The parts of a text between which a line may end: after a slash, a dash and the like, as in long names."""
    return re.split(r"(?<=[-/_.:])(?=[^-/_.:\s\d])", str(text))
