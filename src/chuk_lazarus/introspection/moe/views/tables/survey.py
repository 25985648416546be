"""Many models, as a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...reports import MoESurveyPlan, MoETypeSurvey, SurveyAnswer, SurveyRow
from ...text import format_bytes, whole_percent
from .grid import VERDICT_STYLES, count_things, number_table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

ONE_LINE = 160  # columns from which a survey shows a model on a line


@dataclass(frozen=True, slots=True)
class SurveyTable:
    """A survey for `rich.print`, laid out for the width of the terminal."""

    survey: MoETypeSurvey

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        yield _render_survey(self.survey, options.max_width)


def _render_survey(survey: MoETypeSurvey, width: int) -> "RenderableType":
    """A row a model, with more of it below its name where a line has no room; then those that failed."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    is_wide = width >= ONE_LINE
    answers = [row.answer for row in survey.rows if row.answer]
    is_full = any(answer.rank_ratio is not None for answer in answers)
    columns = ["Model", "Type", *(["Rank", "Cosine"] if is_full else []), "Found"]
    columns += ["Parent"] if any(answer.parent_kept is not None for answer in answers) else []
    if is_wide:
        stated = ["Stated"] if any(row.stated for row in survey.rows) else []
        columns[1:2] = ["Family", "Experts", "Storage", *stated, "Type", "Conf.", "Kind"]
        columns += [*(["Overlay", "Pays"] if is_full else []), "Read", "Time"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for heading in columns:
        is_text = heading in ("Model", "Family", "Storage", "Stated", "Type", "Kind")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold", no_wrap=heading == "Type")
    for row in survey.rows:
        if row.answer:
            cells = _survey_cells(row, row.answer)
            if not is_wide:
                cells["Model"].append(_describe(row, row.answer), style="dim")
                cells["Type"].append(f"\n{cells['Conf.']}", style="default")
            table.add_row(*(cells[heading] for heading in columns))
    legend = "Rank: of the gate deltas (up without a gate), over the greatest possible. " if is_full else ""
    legend += "Found: neurons in another expert"
    legend += ", closely if the analysis was quick" if any(answer.reach is not None for answer in answers) else ""
    legend += ", Parent: in the dense model." if "Parent" in columns else "."
    blocks: list[Any] = [Text("MOE TYPE SURVEY", style="bold"), Text(_count_types(survey))]
    if answers:
        blocks += [table, Text(legend, style="dim")]
    if failed := [row.error for row in survey.rows if row.error]:
        errors = Table.grid(padding=(0, 2))
        errors.add_column(justify="right", no_wrap=True)
        errors.add_column(overflow="fold")
        for error in failed:
            said = f"{error.message} ({error.hint})" if error.hint else error.message
            errors.add_row(Text(str(error.code), style="bold red"), Text(said))
        blocks += [Text("\nFailed, with their exit codes", style="bold"), errors]
    return Group(*blocks)


def _survey_cells(row: SurveyRow, answer: SurveyAnswer) -> dict[str, "Text"]:
    from rich.text import Text

    cells = {
        "Model": answer.model + (f" @ {answer.revision[:12]}" if answer.revision else ""),
        "Family": answer.family,
        "Experts": str(answer.experts),
        "Storage": answer.storage,
        "Stated": row.stated or "",
        "Type": answer.type,
        "Conf.": "" if answer.type == "UNDETERMINED" else f"{answer.confidence:.0%}",
        "Kind": answer.kind or "",
        "Rank": "" if answer.rank_ratio is None else whole_percent(answer.rank_ratio),
        "Cosine": "" if answer.cosine is None else f"{answer.cosine:.3f}",
        "Found": whole_percent(_found(answer)),
        "Parent": "" if answer.parent_kept is None else whole_percent(answer.parent_kept),
        "Overlay": "" if answer.overlay_ratio is None else f"{answer.overlay_ratio:.1f}x",
        "Pays": {None: "", True: "yes", False: "no"}[answer.compressible],
        "Read": format_bytes(answer.cost.bytes_read),
        "Time": f"{answer.cost.seconds:.1f} s",
    }
    return {key: Text(text, style=VERDICT_STYLES[answer.type] if key == "Type" else "") for key, text in cells.items()}


def _found(answer: SurveyAnswer) -> float:
    """The share of the neurons that are found again; closely, where only a part of them was looked at."""
    return answer.kept if answer.reach is None else answer.close


def _describe(row: SurveyRow, answer: SurveyAnswer) -> str:
    """What 80 columns have no room for, in lines below the model's name."""
    lines = [f"{answer.family}, {answer.experts} experts, {answer.storage}"]
    lines += [f"stated {row.stated}"] if row.stated else []
    lines += [answer.kind] if answer.kind else []
    overlay = ""
    if answer.overlay_ratio is not None:
        overlay = f"overlay {answer.overlay_ratio:.1f}x{' pays' if answer.compressible else ''}; "
    lines += [f"{overlay}{format_bytes(answer.cost.bytes_read)} in {answer.cost.seconds:.1f} s"]
    return "".join(f"\n{line}" for line in lines)


def _count_types(survey: MoETypeSurvey) -> str:
    """For instance "5 models: 3 UPCYCLED, 1 NATIVE, 1 failed"."""
    found = [row.answer.type if row.answer else "failed" for row in survey.rows]
    counts = (f"{found.count(what)} {what}" for what in [*VERDICT_STYLES, "failed"] if what in found)
    return f"{count_things(len(found), 'model')}: {', '.join(counts)}"


def render_survey_summary(survey: MoETypeSurvey) -> "RenderableType":
    """A row a type: how many models, and from where to where their figures go."""
    from rich.console import Group
    from rich.text import Text

    def span(figures: Iterable[float | None], form: str, unit: str = "", scale: int = 1) -> str:
        values = [scale * figure for figure in figures if figure is not None]
        if not values:
            return ""
        low, high = (form.format(round(value, 2) + 0.0) for value in (min(values), max(values)))  # no -0.00
        return (low if low == high else f"{low} to {high}") + unit

    rows = []
    for origin in VERDICT_STYLES:
        if found := [row.answer for row in survey.rows if row.answer and row.answer.type == origin]:
            rows.append(
                [
                    origin,
                    str(len(found)),
                    span([answer.rank_ratio for answer in found], "{:.0f}", " %", 100),
                    span([answer.cosine for answer in found], "{:.2f}"),
                    span([_found(answer) for answer in found], "{:.0f}", " %", 100),
                    span([answer.overlay_ratio for answer in found], "{:.1f}", "x"),
                ]
            )
    headings = ["Type", "Models", "Rank", "Cosine", "Found", "Overlay"]
    used = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    table = number_table([headings[place] for place in used], [[row[place] for place in used] for row in rows])
    return Group(Text("\nBy type", style="bold"), table)


def render_survey_plan(plan: MoESurveyPlan) -> "RenderableType":
    """A row a model: what is stated of it, and the bytes of its experts."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("Model", footer=f"{count_things(len(plan.models), 'model')}", overflow="fold")
    table.add_column("Stated")
    table.add_column("One layer", footer=format_bytes(plan.layer_bytes), justify="right", no_wrap=True)
    table.add_column("All layers", footer=format_bytes(plan.stored_bytes), justify="right", no_wrap=True)
    for one in plan.models:
        costs = (one.layer_bytes, one.stored_bytes)
        figures = ("?" if cost is None else format_bytes(cost) for cost in costs)
        table.add_row(Text(one.request.model), Text(one.stated or ""), *figures)
    unknown = sum(one.layer_bytes is None for one in plan.models)
    note = (
        [Text(f"?: the list gives no shape for {count_things(unknown, 'model')}; the sums are without.")]
        if unknown
        else []
    )
    return Group(Text("MOE SURVEY PLAN", style="bold"), Text("Bytes of the experts as stored"), table, *note)
