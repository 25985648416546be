"""How were all these MoEs trained? `MoESurveyService` analyses many models, and saves each answer as soon as it has
it."""

from collections.abc import Iterable
from pathlib import Path

from . import views  # noqa: F401  which registers how reports are shown
from .arguments import (
    ExpertCount,
    Layers,
    ModelName,
    address,
    byte_size,
    expert_count,
    layer_number,
    layer_numbers,
    model_name,
    model_names,
    path,
    whole_number,
)
from .jobs.measure import DEFAULT_EXPERTS
from .progress import Progress
from .provenance.survey import Finished, survey
from .provenance.survey_lists import spell_layers
from .provenance.survey_plan import plan
from .reports import MoESurveyPlan, MoETypeSurvey, SurveyRequest
from .views.survey_folder import SurveyFolder

Models = ModelName | SurveyRequest | Iterable[ModelName | SurveyRequest]


class MoESurveyService:
    """Analyses how each of many models was trained.

    >>> [row.answer.type for row in MoESurveyService.survey(["demo:native", "demo:upcycled"]).rows]
    ['NATIVE', 'UPCYCLED']
    """

    @staticmethod
    def survey(
        models: Models,
        *,
        layer: int | None = None,
        layers: Layers | None = None,
        experts: ExpertCount = DEFAULT_EXPERTS,
        budget: int | str | None = None,
        jobs: int = 1,
        dask: str | None = None,
        file: str | Path | None = None,
        html: str | Path | None = None,
        command: str | None = None,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> MoETypeSurvey:
        """Analyse many models; a model that can't be analysed becomes a row with its error.

        `models` is one or several of: a model as for `MoETypeService.analyze`, a request, a folder of models, a .txt
        file with one model per line, a .toml file with one [[model]] table per model, or "-", the standard input, read
        like a .txt file. A folder of models is one that is not a model itself and has models in subfolders, such as the
        `hub` folder of the Hub's cache. `layer`, `layers` and `experts` apply to every model whose list does not set
        them.

        With a `budget` in bytes ("64MB"), all analyses are quick ones; these use neither a parent nor a number of
        experts, so such settings in lists are ignored. `jobs` models are analysed at the same time, sharing cores and
        memory; with `dask`, the address of a dask.distributed scheduler, as many as it has workers.

        `file` gets each row, as a line of JSON, when it is done; a model whose answer to the same request is already in
        it is not analysed again. `html` names a folder that gets a page of all models, which names the `command` that
        made it, and a page of each; full analyses are kept there too, for when the folder is
        written again. `progress` is called with (what, done, total), and `finished` with each new row. Raises
        InvalidRequest for a list, an option, a file or a folder that can't be used, and ClusterUnusable for a scheduler
        that can't.
        """
        folder = None if html is None else SurveyFolder(path(html, "the folder"))
        report = survey(
            _read(models),
            layer_number(layer),
            layer_numbers(layers),
            expert_count(experts),
            None if budget is None else byte_size(budget, "the budget"),
            whole_number(jobs, "the number of jobs", least=1),
            None if dask is None else address(dask),
            None if file is None else path(file, "the file"),
            progress,
            finished,
            folder.keep if folder else None,
        )
        if folder:
            folder.write(report, command, progress)
        return report

    @staticmethod
    def plan(
        models: Models,
        *,
        layer: int | None = None,
        layers: Layers | None = None,
        experts: ExpertCount = DEFAULT_EXPERTS,
        budget: int | str | None = None,
        progress: Progress | None = None,
    ) -> MoESurveyPlan:
        """Estimate what a survey of the same models with the same options would read, and how long it would take.

        Uses the shapes that .toml lists give, for which nothing is opened, and the headers of all other models; reads
        no weights. A shape is `storage` and `shape = { layers, experts, hidden, intermediate }`, with `gated = false`
        if an expert has two matrices. A model whose headers can't be read gets an error. Raises InvalidRequest.
        """
        return plan(
            _read(models),
            spell_layers(layer_number(layer), layer_numbers(layers)),
            expert_count(experts),
            None if budget is None else byte_size(budget, "the budget"),
            progress,
        )


def _read(models: Models) -> list[str | SurveyRequest]:
    """The models as a list, even if only one is given."""
    asked = [models] if isinstance(models, SurveyRequest) else model_names(models)
    return [model if isinstance(model, SurveyRequest) else model_name(model) for model in asked]
