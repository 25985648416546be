"""Many models: what is asked of each, and what was found."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..terms import Origin
from .report import Cost, Identity, Report, as_details

if TYPE_CHECKING:
    from rich.console import RenderableType


class SurveyRequest(Report):
    """What a survey asks of one model: the options of an analysis, `layers` as on the command line, null for the usual
    ones; `experts` null for all; `budget` the bytes of a quick analysis, null for a full one."""

    model: str
    parent: str | None = None
    layers: str | None = None
    experts: int | None = 8
    budget: int | None = None


class SurveyAnswer(Identity):
    """An analysis in short: its verdict, and the evidence over the analysed layers as means.

    `kept`, `close` and `chance` are those of Lineage, `shared` and `strong` those of Sharing (null in rows of older
    versions, as `bits_saved`), `parent_kept` that of ParentMatch, null without a parent; the rest is as in
    MoETypeAnalysis. A quick analysis has no ranks, cosine and overlay: they are null, and `reach`, as in
    MoEQuickAnalysis, is null of all others.
    """

    layers: tuple[int, ...]
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
    """Why there is no answer: the exit code that an analysis ends with, and its line."""

    code: int
    message: str
    hint: str


class SurveyRow(Report):
    """One model of a survey: either `answer` or `error` is null. `stated` is the origin that the list states."""

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


class MoETypeSurvey(Report):
    """The rows of many models, in the order in which they were given."""

    schema_: Literal["moe-type-survey/1"] = Field(default="moe-type-survey/1", alias="schema")
    rows: tuple[SurveyRow, ...]

    def summary(self) -> "RenderableType":
        """How many models are of which type, and the range of their figures, as a table for `rich.print`."""
        return as_details(self)


class PlannedModel(Report):
    """What a model of a survey would cost, by the shape that its list gives; null where it gives none.

    Bytes of the routed experts as stored, headers and biases not among them: of one layer, and of all.
    """

    request: SurveyRequest
    stated: str | None
    layer_bytes: int | None
    stored_bytes: int | None


class MoESurveyPlan(Report):
    """What a survey would cost, without reading anything; the sums are over the models whose shape is given."""

    schema_: Literal["moe-survey-plan/1"] = Field(default="moe-survey-plan/1", alias="schema")
    models: tuple[PlannedModel, ...]
    layer_bytes: int
    stored_bytes: int
