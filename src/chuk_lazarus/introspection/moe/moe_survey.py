"""How were all these MoEs trained? `MoESurveyService` asks it of many models, and keeps every answer as it comes."""

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
    """Tells of many models how they were trained.

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
        """Analyse many models; a model that can't be analysed is a row with its error.

        `models` are a model or several, as for `MoETypeService.analyze`, requests, folders of models, or lists:
        names of .txt files with a model a line, or of .toml files with a [[model]] table each, or "-", the standard
        input, as a .txt file. A folder of models has none of its own, and models in folders below, as the `hub`
        folder of the Hub's cache has. `layer`, `layers` and `experts` hold for every model whose list does not say
        otherwise. With a `budget` of bytes ("64MB") all analyses are quick ones, which know neither parents nor
        numbers of experts: what lists say of those is passed over. `jobs` models are analysed side by side, sharing
        cores and memory, or as many as the dask.distributed scheduler at the address `dask` has workers. `file`
        gets each row, as a line of JSON, when it is there; a model for which it already has an answer to the same
        request is not analysed again. `html` names a folder that gets a page of all models, which says that
        `command` made it, and one of each; full analyses are kept there, too, for when the folder is written
        again. `progress` is told (what, done, total), and `finished` each new row. Raises
        InvalidRequest for a list, an option, a file or a folder that can't be used, and ClusterUnusable for a
        scheduler.
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
        """What a survey of the same models with the same options would read, and about how long it would take.

        Told by the shapes that .toml lists give, for which nothing is opened, and by headers of all other models; no
        weight is read. A shape is `storage` and `shape = { layers, experts, hidden, intermediate }`, with `gated =
        false` where an expert has two matrices. A model whose headers can't be read has an error. Raises
        InvalidRequest.
        """
        return plan(
            _read(models),
            spell_layers(layer_number(layer), layer_numbers(layers)),
            expert_count(experts),
            None if budget is None else byte_size(budget, "the budget"),
            progress,
        )


def _read(models: Models) -> list[str | SurveyRequest]:
    """What is asked for: a single model, which is no list, too."""
    asked = [models] if isinstance(models, SurveyRequest) else model_names(models)
    return [model if isinstance(model, SurveyRequest) else model_name(model) for model in asked]
