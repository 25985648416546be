"""A survey as HTML: a table of all models that sorts and filters, and a small figure of each."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from chuk_lazarus import __version__

from ..errors import printable
from ..reports import MoETypeSurvey, SurveyAnswer, SurveyRow
from ..text import format_count, whole_percent
from .tables.survey import count_types, name_model
from .templates import load_template
from .words import format_bits

MARK = '<meta name="generator" content="chuk-lazarus survey">'  # by which a folder of pages is known again
FAILED = "failed"
HEADINGS = (
    "Confidence",
    "Kind",
    "Stated",
    "Experts",
    "Storage",
    "Weights",
    "Shared",
    "Strongly",
    "Bits saved",
)
MEANINGS = (
    (
        "Verdict and confidence",
        "How the experts were trained, and the probability that this is right, calibrated on tiny models of known "
        "history. For NATIVE it never comes near 100 %: a model whose experts were all re-initialised looks the same.",
    ),
    (
        "Shared",
        "The share of an expert's neurons that have a close match in another expert; the mean over all experts of the "
        "analysed layers.",
    ),
    ("Strongly", "The share of neurons whose match has a mean cosine of at least 0.8."),
    ("Weights", "Those of all routed experts, if all layers are like the analysed ones."),
    ("Bits saved", "How many bits per weight a shared base saves. Empty: not measured."),
)


class Cell(NamedTuple):
    """A figure of a model: as it is read, and as it is sorted."""

    text: str
    value: float | str = ""


class Bar(NamedTuple):
    """A share in a small figure."""

    name: str
    text: str
    share: float


class Model(NamedTuple):
    """A model of the table: its name, the address of its page if it has one, its outcome, and its figures or its
    error."""

    name: str
    page: str | None
    outcome: str
    cells: tuple[Cell, ...]
    error: str
    bars: tuple[Bar, ...]


def to_survey_page(survey: MoETypeSurvey, pages: Mapping[int, str], command: str | None = None) -> str:
    """The survey as one HTML page that needs nothing else, its JSON inside.

    `pages` are the addresses of models' own pages, by their places in the survey; `command` is what made it.
    """
    unused = set() if any(row.stated for row in survey.rows) else {"Stated"}
    headings = [heading for heading in HEADINGS if heading not in unused]
    models = [_describe(row, pages.get(place), headings) for place, row in enumerate(survey.rows)]
    return load_template("survey.html").render(
        mark=MARK,
        models=models,
        headings=headings,
        words={"Kind", "Stated", "Storage"},
        outcomes=sorted({model.outcome for model in models}),
        counts=count_types(survey),
        meanings=MEANINGS,
        command=command and printable(command),
        data=survey.model_dump(mode="json"),
        version=__version__,
    )


def _describe(row: SurveyRow, page: str | None, headings: Sequence[str]) -> Model:
    name, answer = name_model(row.request), row.answer
    if not answer:
        error = row.error.message if row.error else ""
        hint = f" ({row.error.hint})" if row.error and row.error.hint else ""
        return Model(name, page, FAILED, (), error + hint, ())
    cells = {
        "Confidence": _share(None if answer.type == "UNDETERMINED" else answer.confidence),
        "Kind": _text(answer.kind),
        "Stated": _text(row.stated),
        "Experts": Cell(str(answer.experts), answer.experts),
        "Storage": _text(answer.storage),
        "Weights": Cell("") if answer.parameters is None else Cell(format_count(answer.parameters), answer.parameters),
        "Shared": _share(answer.shared),
        "Strongly": _share(answer.strong),
        "Bits saved": Cell("")
        if answer.bits_saved is None
        else Cell(format_bits(answer.bits_saved), answer.bits_saved),
    }
    return Model(name, page, answer.type, tuple(cells[heading] for heading in headings), "", _bars(answer))


def _bars(answer: SurveyAnswer) -> tuple[Bar, ...]:
    shares = (("shared", answer.shared), ("strongly", answer.strong))
    return tuple(Bar(name, whole_percent(share), share) for name, share in shares if share is not None)


def _text(text: str | None) -> Cell:
    return Cell(text or "", (text or "").lower())


def _share(share: float | None) -> Cell:
    return Cell("") if share is None else Cell(whole_percent(share), share)
