"""The cost of a survey: the bytes that it would read and a guess at the time, without reading weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import name_model
from ..jobs.measure import bytes_to_measure
from ..jobs.model import OpenedModel, evenly_spaced
from ..jobs.parts import EXPERTS, LAYERS, further_budget, further_bytes, quick_bytes
from ..jobs.resources import Resources
from ..progress import Progress
from ..reports import MoESurveyPlan, PlannedModel, SurveyRequest
from ..weights.experts import parse_layers
from ..weights.repositories.find import is_on_hub
from .survey import explain_failure
from .survey_lists import Entry, Shape, read_entries

# Processor seconds, rounded from the analyses in docs/scale.md ("What a unit costs"): of an eigenvalue problem for
# each n^3, of a delta's product with itself for each n^2 m (n the shorter side of a matrix, m the longer), and of all
# else for each weight that is read
EIGENVALUES, PRODUCTS, WEIGHTS = 2.2e-11, 5e-12, 4e-9
QUICK_SECONDS = 0.6
START = 1.0  # seconds until the process of a model is at work
NETWORK = 125e6  # bytes a second that are guessed of the network: 1 Gbit/s


@dataclass(frozen=True, slots=True)
class Work:
    """What an analysis of one model does: bytes of weights that it reads, and processor seconds."""

    layer_bytes: int
    stored_bytes: int
    analysis_bytes: int
    cpu_seconds: float


def plan(
    models: Iterable[str | SurveyRequest],
    layers: str | None,
    experts: int | None,
    budget: int | None,
    progress: Progress | None,
) -> MoESurveyPlan:
    """The bytes that a survey would read, from the shapes that lists give, and from the headers of all other models."""
    entries, planned = read_entries(models, layers, experts, budget), []
    for number, entry in enumerate(entries):
        if progress:
            progress("headers", number, len(entries))
        planned.append(_plan_model(entry))
    if progress:
        progress("headers", len(entries), len(entries))
    return MoESurveyPlan(
        models=tuple(planned),
        **{
            figure: sum(getattr(model, figure) or 0 for model in planned)
            for figure in ("layer_bytes", "stored_bytes", "analysis_bytes", "seconds")
        },
    )


def _plan_model(entry: Entry) -> PlannedModel:
    request, shown = entry.request, PlannedModel(request=entry.shown, stated=entry.stated)
    try:
        with name_model(request.model):
            work = _work_by_shape(entry.shape, request) if entry.shape else _work_by_headers(request)
    except Exception as error:
        return shown.model_copy(update={"error": explain_failure(error, entry.shown)})
    fetched = work.analysis_bytes if is_on_hub(request.model) else 0
    return shown.model_copy(
        update={
            "source": "list" if entry.shape else "headers",
            "layer_bytes": work.layer_bytes,
            "stored_bytes": work.stored_bytes,
            "analysis_bytes": work.analysis_bytes,
            "seconds": START + work.cpu_seconds / Resources.current().threads + fetched / NETWORK,
        }
    )


def _work_by_headers(request: SurveyRequest) -> Work:
    """The work from the headers of a model's files; layers that are not analysed are assumed to be like those that
    are."""
    samples = LAYERS if request.budget else None
    opened = OpenedModel(request.model, None, request.layers, purpose="compare it with", samples=samples)
    experts, first = opened.experts, opened.layers[0]
    stored = sum(layer.stored_bytes for layer in opened.layers) * len(experts.layers) // len(opened.layers)
    if request.budget:
        read, seconds = quick_bytes(first, len(opened.layers), request.budget), QUICK_SECONDS
    else:
        read, seconds = 0, 0.0
        for layer in opened.layers:
            chosen = evenly_spaced(layer.count, request.experts)
            read += bytes_to_measure(layer, chosen, opened.resources)
            read += layer.stored_bytes // layer.count if len(opened.layers) > 1 else 0  # of an unrelated one
            seconds += _cpu_seconds(layer.count, len(chosen), [layer.shape(role) for role in layer.roles])
        read += further_bytes(first, experts.layers, read) if request.layers is None else 0
    return Work(first.stored_bytes, stored, read, seconds)


def _work_by_shape(shape: Shape, request: SurveyRequest) -> Work:
    """The work from the shape that a list gives, assuming that all layers are alike."""
    layer, stored = shape.layer_bytes, shape.stored_bytes
    if request.budget:
        looked_into = min(LAYERS, shape.layers) * layer * min(EXPERTS, shape.experts) // shape.experts
        return Work(layer, stored, min(request.budget, looked_into), QUICK_SECONDS)
    count = 1 if request.layers is None else shape.layers
    if request.layers not in (None, "all"):
        count = min(count, len(parse_layers(request.layers)))
    read = count * layer + (count * layer // shape.experts if count > 1 else 0)
    if request.layers is None and shape.layers > 1:
        read += further_budget(layer)
    matrices = [(shape.intermediate, shape.hidden)] * shape.matrices
    seconds = _cpu_seconds(shape.experts, len(evenly_spaced(shape.experts, request.experts)), matrices)
    return Work(layer, stored, read, count * seconds)


def _cpu_seconds(experts: int, sampled: int, shapes: Sequence[tuple[int, int]]) -> float:
    """Processor seconds that an analysis of a layer takes, give or take a third: a guess."""
    seconds = 0.0
    for shape in shapes:
        short, long = sorted(map(float, shape))
        seconds += sampled * (EIGENVALUES * short**3 + PRODUCTS * short**2 * long) + experts * WEIGHTS * short * long
    return seconds
