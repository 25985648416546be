"""The templates of pages, which lie beside this module: HTML in which all text is escaped."""

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
    environment.filters["glue"] = lambda text: str(text).replace(" %", "\u00a0%")  # a number and its sign stay together
    return environment.get_template(name)
