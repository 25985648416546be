"""Many models, as a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...reports import MoESurveyPlan, MoETypeSurvey, SurveyAnswer, SurveyError, SurveyRow
from ...text import format_bytes, whole_percent
from ..words import RATED, count_noun, format_bits, format_ratio, identify
from .grid import CUT, LEFT, ORIGIN_STYLES, WHOLE, Fact, draw_facts, draw_table, paint, stack

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

ONE_LINE = 160  # columns of a terminal from which a survey shows a model on a line
TEXT_COLUMNS = ("Model", "Family", "Storage", "Stated", "Type", "Kind")


@dataclass(frozen=True, slots=True)
class SurveyTable:
    """A survey for `rich.print`, laid out for the width of the terminal."""

    survey: MoETypeSurvey

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        yield _render_survey(self.survey, options.max_width)


def _render_survey(survey: MoETypeSurvey, width: int) -> "RenderableType":
    """A row for each model, with more below its name where a line has no room; then the models that failed."""
    is_wide = width >= ONE_LINE
    answers = [row.answer for row in survey.rows if row.answer]
    is_full = any(answer.rank_ratio is not None for answer in answers)
    columns = ["Model", "Type", *(["Rank", "Cosine"] if is_full else []), "Shared"]
    columns += ["Parent"] if any(answer.parent_kept is not None for answer in answers) else []
    columns += ["Bits saved"] if any(answer.bits_saved is not None for answer in answers) else []
    if is_wide:
        stated = ["Stated"] if any(row.stated for row in survey.rows) else []
        columns[1:2] = ["Family", "Experts", "Storage", *stated, "Type", "Conf.", "Kind"]
        columns += [*(["Overlay", "Pays"] if is_full else []), "Read", "Time"]
    rows = []
    for row in survey.rows:
        if row.answer:
            cells = _survey_cells(row, row.answer)
            if not is_wide:
                cells["Model"].append(_describe_answer(row, row.answer), style="dim")
                cells["Type"].append(f"\n{cells['Conf.']}", style="default")
            rows.append([cells[heading] for heading in columns])
    legend = "Rank: of the gate deltas (up without a gate), over the greatest possible. " if is_full else ""
    legend += "Shared: an expert's neurons that its best partner has, too."
    legend += " Parent: those that the dense model has." if "Parent" in columns else ""
    legend += " Bits saved: a weight, by a base for what experts share." if "Bits saved" in columns else ""
    legend += f" Confidences are {RATED}."
    blocks: list[RenderableType] = [paint(_count_types(survey))]
    if answers:
        options = {**dict.fromkeys(TEXT_COLUMNS, LEFT), "Type": {**LEFT, "no_wrap": True}}
        blocks += [draw_table(columns, rows, options, padding=(0, 1), collapse_padding=True), paint(legend, "dim")]
    if errors := [row.error for row in survey.rows if row.error]:
        blocks += [paint("\nFailed, with their exit codes", "bold"), draw_facts(map(_describe_error, errors))]
    return stack("MOE TYPE SURVEY", *blocks)


def _describe_error(error: SurveyError) -> Fact:
    code = paint(str(error.code), "bold red")
    code.justify = "right"
    return code, f"{error.message} ({error.hint})" if error.hint else error.message


def _survey_cells(row: SurveyRow, answer: SurveyAnswer) -> dict[str, "Text"]:
    cells = {
        "Model": identify(answer),
        "Family": answer.family,
        "Experts": str(answer.experts),
        "Storage": answer.storage,
        "Stated": row.stated or "",
        "Type": answer.type,
        "Conf.": "" if answer.type == "UNDETERMINED" else f"{answer.confidence:.0%}",
        "Kind": answer.kind or "",
        "Rank": "" if answer.rank_ratio is None else whole_percent(answer.rank_ratio),
        "Cosine": "" if answer.cosine is None else f"{answer.cosine:.3f}",
        "Shared": "" if answer.shared is None else whole_percent(answer.shared),
        "Parent": "" if answer.parent_kept is None else whole_percent(answer.parent_kept),
        "Bits saved": "" if answer.bits_saved is None else format_bits(answer.bits_saved),
        "Overlay": "" if answer.overlay_ratio is None else format_ratio(answer.overlay_ratio),
        "Pays": {None: "", True: "yes", False: "no"}[answer.compressible],
        "Read": format_bytes(answer.cost.bytes_read),
        "Time": f"{answer.cost.seconds:.1f} s",
    }
    return {key: paint(text, ORIGIN_STYLES[answer.type] if key == "Type" else "") for key, text in cells.items()}


def _describe_answer(row: SurveyRow, answer: SurveyAnswer) -> str:
    """What does not fit into 80 columns, in lines below the model's name."""
    lines = [f"{answer.family}, {answer.experts} experts, {answer.storage}"]
    lines += [f"stated {row.stated}"] if row.stated else []
    lines += [answer.kind] if answer.kind else []
    overlay = ""
    if answer.overlay_ratio is not None:
        overlay = f"overlay {format_ratio(answer.overlay_ratio)}{' pays' if answer.compressible else ''}; "
    lines += [f"{overlay}{format_bytes(answer.cost.bytes_read)} in {answer.cost.seconds:.1f} s"]
    return "".join(f"\n{line}" for line in lines)


def _count_types(survey: MoETypeSurvey) -> str:
    """For instance "5 models: 3 UPCYCLED, 1 NATIVE, 1 failed"."""
    outcomes = [row.answer.type if row.answer else "failed" for row in survey.rows]
    counts = (f"{outcomes.count(outcome)} {outcome}" for outcome in [*ORIGIN_STYLES, "failed"] if outcome in outcomes)
    return f"{count_noun(len(outcomes), 'model')}: {', '.join(counts)}"


def render_survey_summary(survey: MoETypeSurvey) -> "RenderableType":
    """A row for each type: how many models, and the range of each of their figures."""
    rows = []
    for origin in ORIGIN_STYLES:
        if answers := [row.answer for row in survey.rows if row.answer and row.answer.type == origin]:
            rows.append(
                [
                    origin,
                    str(len(answers)),
                    _format_range([answer.rank_ratio for answer in answers], "{:.0f}", " %", 100),
                    _format_range([answer.cosine for answer in answers], "{:.2f}"),
                    _format_range([answer.shared for answer in answers], "{:.0f}", " %", 100),
                    _format_range([answer.bits_saved for answer in answers], "{:.1f}"),
                    _format_range([answer.overlay_ratio for answer in answers], "{:.1f}", "x"),
                ]
            )
    headings = ["Type", "Models", "Rank", "Cosine", "Shared", "Bits saved", "Overlay"]
    used = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    table = draw_table([headings[place] for place in used], [[row[place] for place in used] for row in rows])
    return stack("\nBy type", table)


def _format_range(figures: Iterable[float | None], template: str, unit: str = "", scale: int = 1) -> str:
    """For instance "0.01 to 0.42", "7.9x" where there is one value, or nothing where there is none."""
    values = [scale * figure for figure in figures if figure is not None]
    if not values:
        return ""
    low, high = (template.format(round(value, 2) + 0.0) for value in (min(values), max(values)))  # no -0.00
    return (low if low == high else f"{low} to {high}") + unit


def render_survey_plan(plan: MoESurveyPlan) -> "RenderableType":
    """A row for each model: what is stated of it, and the bytes of its experts."""
    rows = [
        [
            model.request.model,
            model.stated or "",
            *("?" if cost is None else format_bytes(cost) for cost in (model.layer_bytes, model.stored_bytes)),
        ]
        for model in plan.models
    ]
    table = draw_table(
        ["Model", "Stated", "One layer", "All layers"],
        rows,
        {"Model": LEFT, "Stated": CUT, "One layer": WHOLE, "All layers": WHOLE},
        [count_noun(len(plan.models), "model"), "", format_bytes(plan.layer_bytes), format_bytes(plan.stored_bytes)],
    )
    blocks: list[RenderableType] = [paint("Bytes of the experts as stored"), table]
    if unknown := sum(model.layer_bytes is None for model in plan.models):
        blocks.append(paint(f"?: the list gives no shape for {count_noun(unknown, 'model')}; the sums are without."))
    return stack("MOE SURVEY PLAN", *blocks)
