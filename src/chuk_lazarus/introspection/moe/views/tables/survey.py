"""Many models, as a table."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...reports import (
    MoESurveyPlan,
    MoETypeSurvey,
    PlannedModel,
    SurveyAnswer,
    SurveyError,
    SurveyRequest,
    SurveyRow,
)
from ...text import format_bytes, format_count, format_markdown, format_seconds, whole_percent
from ..words import RATED, count_noun, count_outcomes, format_bits, format_ratio
from .grid import LEFT, ORIGIN_STYLES, Fact, draw_facts, draw_note, draw_table, paint, stack

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

# columns of the terminal that a name has before others make room for it, and those that it leaves to others beyond that
LEAST_MODEL, BESIDE_MODEL = 32, 40
GAP = 2  # columns between two columns of a table
TEXT_COLUMNS = ("Model", "Revision", "Family", "Storage", "Stated", "Type", "Kind")
# in this order columns make room
LEAVE = (
    "Revision",
    "Time",
    "Read",
    "Pays",
    "Overlay",
    "Cosine",
    "Rank",
    "Family",
    "Storage",
    "Experts",
    "Stated",
    "Weights",
    "Kind",
    "Saved",
    "Parent",
    "Conf.",
    "Shared",
)
MARKDOWN = ("Model", "Type", "Conf.", "Kind", "Experts", "Storage", "Weights", "Shared", "Saved", "Error")
LEGEND = {
    "Conf.": f"Confidences are {RATED}.",
    "Weights": "Weights: those of all routed experts.",
    "Rank": "Rank: that of the gate deltas (up if there is no gate), of the largest possible.",
    "Shared": "Shared: neurons with a close match in another expert.",
    "Parent": "Parent: neurons with a match in the dense model.",
    "Saved": "Saved: bits per weight that a shared base saves.",
}


@dataclass(frozen=True, slots=True)
class SurveyTable:
    """A survey for `rich.print`, laid out for the width of the terminal."""

    survey: MoETypeSurvey

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        yield _render_survey(self.survey, options.max_width)


@dataclass(frozen=True, slots=True)
class PlanTable:
    """The plan of a survey for `rich.print`, laid out for the width of the terminal."""

    plan: MoESurveyPlan

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        yield _render_plan(self.plan, options.max_width)


def name_model(request: SurveyRequest) -> str:
    """The model as a table names it: one in a folder of the Hub's cache by its id."""
    match = re.fullmatch(r"(?:.*/)?models--([^/]+)/?", request.model)
    return match[1].replace("--", "/", 1) if match else request.model


def _render_survey(survey: MoETypeSurvey, width: int) -> "RenderableType":
    """A line for each model with as many figures as there is room for; then the models that failed."""
    cells = [_survey_cells(row, row.answer) for row in survey.rows if row.answer]
    used = [heading for heading in (cells[0] if cells else ()) if any(row[heading] for row in cells)]
    room = _fit(used, cells, width, LEAVE) if cells else {}
    blocks: list[RenderableType] = [paint(count_types(survey))]
    if cells:
        blocks.append(_draw(cells, room))
        blocks.append(draw_note(" ".join(text for heading, text in LEGEND.items() if heading in room)))
        if left_out := [heading for heading in used if heading not in room and heading != "Revision"]:
            blocks.append(draw_note(f"No room for {', '.join(left_out)}: widen the terminal, or use --format csv."))
    if errors := [row.error for row in survey.rows if row.error]:
        blocks += [paint("\nFailed, with their exit codes", "bold"), draw_facts(map(_describe_error, errors))]
    return stack("MOE TYPE SURVEY", *blocks)


def _fit(
    headings: Sequence[str], rows: Sequence[Mapping[str, str]], width: int, leave: Sequence[str]
) -> dict[str, int]:
    """The columns that fit into a width, each with its own; names of models take what is left.

    Those in `leave` make room, in that order.
    """
    from rich.cells import cell_len

    wanted = {heading: max(map(cell_len, (heading, *(row[heading] for row in rows)))) for heading in headings}
    room = {**wanted, "Model": min(wanted["Model"], max(LEAST_MODEL, width - BESIDE_MODEL))}
    for heading in leave:
        if sum(room.values()) + GAP * len(room) > width and heading in room:
            del room[heading]
    left = width - sum(room.values()) - GAP * len(room)
    room["Model"] += max(min(left, wanted["Model"] - room["Model"]), 8 - room["Model"])  # a part of the name, at least
    return room


def _draw(
    rows: Sequence[Mapping[str, str]], room: Mapping[str, int], total: Mapping[str, str] | None = None
) -> "RenderableType":
    """The table, a line for each of the rows, with the columns that there is room for."""
    return draw_table(
        list(room),
        [[_paint_cell(heading, row[heading], room[heading]) for heading in room] for row in rows],
        {heading: LEFT for heading in room if heading in TEXT_COLUMNS},
        [total[heading] for heading in room] if total else [],
    )


def _paint_cell(heading: str, text: str, width: int) -> "Text":
    """A cell that fits: a name's end says which of several models it is."""
    from rich.cells import cell_len

    if heading == "Model" and cell_len(text) > width:
        while cell_len(text) >= width:
            text = text[1:]
        text = f"…{text}"
    cell = paint(text, ORIGIN_STYLES.get(text, "") if heading == "Type" else "")  # type: ignore[call-overload]
    if cell.cell_len > width:
        cell.truncate(width, overflow="ellipsis")
    return cell


def _describe_error(error: SurveyError) -> Fact:
    code = paint(str(error.code), "bold red")
    code.justify = "right"
    return code, f"{error.message} ({error.hint})" if error.hint else error.message


def _survey_cells(row: SurveyRow, answer: SurveyAnswer) -> dict[str, str]:
    """What is shown of a model, in the order of the columns; nothing where something is not known."""
    return {
        "Model": name_model(row.request),
        "Revision": (answer.revision or "")[:12],
        "Family": answer.family,
        "Experts": str(answer.experts),
        "Storage": answer.storage,
        "Weights": "" if answer.parameters is None else format_count(answer.parameters),
        "Stated": row.stated or "",
        "Type": answer.type,
        "Conf.": "" if answer.type == "UNDETERMINED" else f"{answer.confidence:.0%}",
        "Kind": answer.kind or "",
        "Rank": "" if answer.rank_ratio is None else whole_percent(answer.rank_ratio),
        "Cosine": "" if answer.cosine is None else f"{answer.cosine:.3f}",
        "Shared": "" if answer.shared is None else whole_percent(answer.shared),
        "Parent": "" if answer.parent_kept is None else whole_percent(answer.parent_kept),
        "Saved": "" if answer.bits_saved is None else format_bits(answer.bits_saved),
        "Overlay": "" if answer.overlay_ratio is None else format_ratio(answer.overlay_ratio),
        "Pays": {None: "", True: "yes", False: "no"}[answer.compressible],
        "Read": format_bytes(answer.cost.bytes_read),
        "Time": f"{answer.cost.seconds:.1f} s",
    }


def survey_to_markdown(survey: MoETypeSurvey) -> str:
    """A row for each model as a table in Markdown, in the order given; what failed says why."""
    rows = []
    for row in survey.rows:
        named = {"Model": name_model(row.request), "Error": row.error.message if row.error else ""}
        rows.append((_survey_cells(row, row.answer) if row.answer else {"Type": "failed"}) | named)
    used = [heading for heading in MARKDOWN if heading != "Error" or any(row["Error"] for row in rows)]
    cells = [[row.get(heading, "") for heading in used] for row in rows]
    return format_markdown(used, cells, {*TEXT_COLUMNS, "Error"})


def count_types(survey: MoETypeSurvey) -> str:
    """For instance "5 models: 3 UPCYCLED, 1 NATIVE, 1 failed"."""
    return count_outcomes([row.answer.type if row.answer else "failed" for row in survey.rows])


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
    table = draw_table(
        [headings[place] for place in used],
        [[row[place] for place in used] for row in rows],
        {"Type": LEFT},
        leave=("Overlay", "Rank", "Bits saved", "Cosine"),
    )
    return stack("\nBy type", table)


def _format_range(figures: Iterable[float | None], template: str, unit: str = "", scale: int = 1) -> str:
    """For instance "0.01 to 0.42", "7.9x" where there is one value, or nothing where there is none."""
    values = [scale * figure for figure in figures if figure is not None]
    if not values:
        return ""
    low, high = (template.format(round(value, 2) + 0.0) for value in (min(values), max(values)))  # no -0.00
    return (low if low == high else f"{low} to {high}") + unit


def _render_plan(plan: MoESurveyPlan, width: int) -> "RenderableType":
    """A row for each model: the bytes of its experts, those that are read, and about how long that takes."""
    cells, total = [_plan_cells(model) for model in plan.models], _sum_plan(plan)
    used = [heading for heading in total if heading != "Stated" or any(row["Stated"] for row in cells)]
    room = _fit(used, [*cells, total], width, ("Stated", "One layer", "All layers", "Time"))
    assumed = "a guess for this machine's cores, with 1 Gbit/s from the Hub"
    blocks: list[RenderableType] = [
        paint("Bytes of the experts as stored, from headers or from the list; no weight was read"),
        _draw(cells, room, total),
        draw_note(f"To read: what the analysis reads of them. Time: {assumed}."),
    ]
    if errors := [model.error for model in plan.models if model.error]:
        blocks += [paint("\nFailed, with their exit codes", "bold"), draw_facts(map(_describe_error, errors))]
    return stack("MOE SURVEY PLAN", *blocks)


def _plan_cells(model: PlannedModel) -> dict[str, str]:
    sizes = (model.layer_bytes, model.stored_bytes, model.analysis_bytes)
    one, every, read = ("?" if size is None else format_bytes(size) for size in sizes)
    time = "?" if model.seconds is None else format_seconds(model.seconds)
    names = {"Model": name_model(model.request), "Stated": model.stated or ""}
    return {**names, "One layer": one, "All layers": every, "To read": read, "Time": time}


def _sum_plan(plan: MoESurveyPlan) -> dict[str, str]:
    sizes = map(format_bytes, (plan.layer_bytes, plan.stored_bytes, plan.analysis_bytes))
    names = {"Model": count_noun(len(plan.models), "model"), "Stated": ""}
    figures = zip(("One layer", "All layers", "To read"), sizes, strict=True)
    return {**names, **dict(figures), "Time": format_seconds(plan.seconds)}


def plan_to_markdown(plan: MoESurveyPlan) -> str:
    """A row for each model as a table in Markdown, and the sums."""
    rows = [{**_plan_cells(model), "Error": model.error.message if model.error else ""} for model in plan.models]
    used = ["Model", "One layer", "All layers", "To read", "Time"]
    used += ["Error"] if any(row["Error"] for row in rows) else []
    total = _sum_plan(plan) | {"Error": ""}
    cells = [[row[heading] for heading in used] for row in [*rows, total]]
    return format_markdown(used, cells, {"Model", "Error"})
