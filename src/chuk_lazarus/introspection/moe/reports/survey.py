"""Many models: what is asked of each, and what was found."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..terms import Origin
from ..text import format_csv
from .report import Cost, Identity, Report, Row, as_details, as_markdown, as_rows

if TYPE_CHECKING:
    from rich.console import RenderableType


class SurveyRequest(Report):
    """What a survey asks of one model: the options of an analysis. `layers` is written as on the command line, null for
    the default; `experts` is null for all; `budget` is the bytes of a quick analysis, null for a full one."""

    model: str
    parent: str | None = None
    layers: str | None = None
    experts: int | None = 8
    budget: int | None = None


class SurveyAnswer(Identity):
    """An analysis in short: its verdict, and the evidence as means over the analysed layers.

    `kept`, `close` and `chance` are those of Lineage, `shared` and `strong` those of Sharing (null in rows of older
    versions, as are `bits_saved` and `parameters`), and `parent_kept` is that of ParentMatch, null without a parent;
    the rest is as in MoETypeAnalysis. In a quick analysis ranks, cosine and overlay are null; `reach`, as in
    MoEQuickAnalysis, is null in all others.
    """

    layers: tuple[int, ...]
    parameters: int | None = None
    type: Origin
    confidence: float
    kind: str | None
    rank_projection: Literal["gate", "up"] | None = None
    rank_ratio: float | None = None
    cosine: float | None = None
    kept: float
    close: float
    chance: float
    shared: float | None = None
    strong: float | None = None
    reach: float | None = None
    parent_kept: float | None = None
    overlay_ratio: float | None = None
    compressible: bool | None = None
    bits_saved: float | None = None
    notes: tuple[str, ...]
    cost: Cost


class SurveyError(Report):
    """Why there is no answer: the exit code of the analysis, and its error message and hint."""

    code: int
    message: str
    hint: str


class SurveyRow(Report):
    """One model of a survey: either `answer` or `error` is null. `stated` is the origin that the list gives."""

    schema_: Literal["moe-type-survey-row/1"] = Field(default="moe-type-survey-row/1", alias="schema")
    request: SurveyRequest
    stated: str | None
    answer: SurveyAnswer | None
    error: SurveyError | None

    def describe(self) -> str:
        """For instance "demo:native: NATIVE (93%), read 401.6 kB, of which 0 B over the network, in 0.1 s"."""
        if self.answer:
            verdict = f"{self.answer.type} ({self.answer.confidence:.0%})"
            return f"{self.request.model}: {verdict}, {self.answer.cost.describe()}"
        return self.error.message if self.error else ""


class Records(Report):
    """A report with one row per model."""

    def records(self) -> list[Row]:
        """Plain values by column, one row per model: for `pandas.DataFrame(report.records())`, and whatever else takes
        rows."""
        return as_rows(self)

    def to_csv(self) -> str:
        """The records as CSV with a header line; null is an empty field."""
        return format_csv(self.records())

    def to_markdown(self) -> str:
        """A table in Markdown, for an issue or a comment."""
        return as_markdown(self)


class MoETypeSurvey(Records):
    """The rows of many models, in the order in which they were given."""

    schema_: Literal["moe-type-survey/1"] = Field(default="moe-type-survey/1", alias="schema")
    rows: tuple[SurveyRow, ...]

    def summary(self) -> "RenderableType":
        """How many models are of which type, and the range of their figures, as a table for `rich.print`."""
        return as_details(self)


class PlannedModel(Report):
    """What the analysis of one model of a survey would cost, from the shape in its list or else from the headers of its
    files.

    `layer_bytes` and `stored_bytes` are those of the routed experts as stored, of one layer and of all; a shape does
    not include biases. `analysis_bytes` of them would be read, in roughly `seconds`; both leave out a parent. `source`
    says where the sizes come from. All five are null if there is an `error`.
    """

    request: SurveyRequest
    stated: str | None
    source: Literal["list", "headers"] | None = None
    layer_bytes: int | None = None
    stored_bytes: int | None = None
    analysis_bytes: int | None = None
    seconds: float | None = None
    error: SurveyError | None = None


class MoESurveyPlan(Records):
    """What a survey would cost, without reading weights; the sums are over the models without an error."""

    schema_: Literal["moe-survey-plan/1"] = Field(default="moe-survey-plan/1", alias="schema")
    models: tuple[PlannedModel, ...]
    layer_bytes: int
    stored_bytes: int
    analysis_bytes: int = 0
    seconds: float = 0.0
