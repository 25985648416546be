"""What every result has in common."""

from functools import singledispatch
from io import StringIO
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ..text import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType


@singledispatch
def as_rich(report: Any) -> "RenderableType":
    """The report for a terminal; `views` registers how each kind of report looks."""
    from rich.pretty import Pretty

    return Pretty(report)


@singledispatch
def as_details(report: Any) -> "RenderableType":
    """More of the report, for those who ask; `views` registers it for the reports that have more."""
    raise TypeError(f"{type(report).__name__} has no details")


@singledispatch
def as_html(report: Any) -> str:
    """The report for a notebook: as in a terminal, where `views` registers nothing better."""
    from rich.console import Console

    console = Console(record=True, width=100, file=StringIO(), force_jupyter=False)
    console.print(report)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.3">{code}</pre>')


class Report(BaseModel):
    """A frozen result that validates its own JSON, and shows itself in a notebook as it does in a terminal.

    Its numbers are finite.
    """

    model_config = ConfigDict(
        frozen=True, serialize_by_alias=True, validate_by_name=True, extra="forbid", allow_inf_nan=False
    )

    def __rich__(self) -> "RenderableType":
        return as_rich(self)

    def _repr_html_(self) -> str:
        return as_html(self)


class Cost(Report):
    """What the analysis took: bytes asked of the model's files, of which `bytes_fetched` came over the network."""

    bytes_read: int
    bytes_fetched: int
    seconds: float

    def describe(self) -> str:
        """For instance "read 805.3 MB, of which 0 B over the network, in 1.6 s"."""
        read, fetched = format_bytes(self.bytes_read), format_bytes(self.bytes_fetched)
        return f"read {read}, of which {fetched} over the network, in {self.seconds:.1f} s"


class Identity(Report):
    """Which model a report is about; `revision` is the commit on the Hub, `family` the layout's name.

    `experts` is the number of experts of the first layer, `experts_range` the fewest and the most where layers differ.
    """

    model: str
    revision: str | None
    family: str
    model_type: str | None
    storage: str
    experts: int
    experts_range: tuple[int, int] | None = None
