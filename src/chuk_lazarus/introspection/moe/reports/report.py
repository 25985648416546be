"""What all reports have in common."""

from functools import singledispatch
from io import StringIO
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ..errors import InvalidRequest
from ..text import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.console import RenderableType

Row = dict[str, Any]


@singledispatch
def as_rich(report: Any) -> "RenderableType":
    """The report for a terminal; `views` registers how each kind of report looks."""
    from rich.pretty import Pretty

    return Pretty(report)


@singledispatch
def as_details(report: Any) -> "RenderableType":
    """More of the report; `views` registers it for the reports that have more."""
    raise TypeError(f"{type(report).__name__} has no details")


@singledispatch
def as_html(report: Any) -> str:
    """The report for a notebook: as in a terminal, unless `views` registers something better."""
    from rich.console import Console

    console = Console(record=True, width=100, file=StringIO(), force_jupyter=False)
    console.print(report)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.3">{code}</pre>')


@singledispatch
def as_text(report: Any) -> str:
    """The report in a few lines of plain text; "" if `views` registers none."""
    return ""


@singledispatch
def as_rows(report: Any) -> list[Row]:
    """The report as rows of plain values; `views` registers how. Raises InvalidRequest if it has none."""
    raise InvalidRequest(f"{type(report).__name__} is not a table", "use its fields, or model_dump()")


@singledispatch
def as_markdown(report: Any) -> str:
    """The report as a table in Markdown; `views` registers how. Raises InvalidRequest if it has none."""
    raise InvalidRequest(f"{type(report).__name__} is not a table", "use its fields, or model_dump()")


@singledispatch
def as_figure(report: Any, **options: Any) -> "Figure":
    """The report drawn; `views` registers how. Raises InvalidRequest for a report that has no figure."""
    raise InvalidRequest(f"{type(report).__name__} has no figure", "analyses, comparisons and estimates have one")


class Report(BaseModel):
    """A frozen result that validates its own JSON, and is shown in a notebook as in a terminal.

    All numbers are finite. `print` shows a few lines of it, `rich.print` its tables.
    """

    model_config = ConfigDict(
        frozen=True, serialize_by_alias=True, validate_by_name=True, extra="forbid", allow_inf_nan=False
    )

    def __str__(self) -> str:
        return as_text(self) or super().__str__()

    def __repr__(self) -> str:
        first = as_text(self).partition("\n")[0]
        return f"<{type(self).__name__} {first}>" if first else super().__repr__()

    def to_frame(self) -> "DataFrame":
        """The report as a pandas.DataFrame, with one row per layer, model or size, depending on the report.

        Raises InvalidRequest if pandas is not installed, and for a report that is not a table.
        """
        rows = as_rows(self)
        try:
            import pandas
        except ImportError:
            raise InvalidRequest("a DataFrame needs pandas, which is not installed", "pip install pandas") from None
        return pandas.DataFrame(rows)

    def plot(self, ax: Any = None, *, caption: bool = False, dark: bool = False) -> "Figure":
        """The report as a matplotlib figure, or on `ax`: the main panel on a single one, all panels on several.

        With a `caption`, a line below the figure says what it shows and of which model; `dark` is for dark backgrounds.
        Raises InvalidRequest if matplotlib is not installed, and for a report that has no figure.
        """
        try:
            return as_figure(self, ax=ax, caption=caption, dark=dark)
        except ImportError:
            raise InvalidRequest(
                "a figure needs matplotlib, which is not installed", "pip install matplotlib"
            ) from None

    def __rich__(self) -> "RenderableType":
        return as_rich(self)

    def _repr_html_(self) -> str:
        return as_html(self)


class Cost(Report):
    """What the analysis took: bytes read from the model's files, of which `bytes_fetched` came over the network, and
    seconds."""

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
