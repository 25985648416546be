"""A survey as a folder of pages: index.html, and in `models` a page of each model, with its analysis if that was full.

The folder is whole or not there. While models are analysed, their analyses are kept in FOLDER.partial, where a run that
was interrupted finds them again.
"""

import hashlib
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import InvalidRequest, printable
from ..files import as_path, write_whole
from ..progress import Progress, no_progress
from ..reports import MoETypeAnalysis, MoETypeSurvey, SurveyRow
from . import page
from .survey_page import MARK, to_survey_page

INDEX, MODELS = "index.html", "models"
BACK = f"../{INDEX}"  # from a model's page
LONGEST_NAME = 80  # characters of a file's name


class SurveyFolder:
    """A folder for the pages of a survey; raises InvalidRequest where it can't be written, or holds something else."""

    def __init__(self, folder: str | Path) -> None:
        self._shown = printable(str(folder))
        try:
            self._folder = Path(os.path.realpath(as_path(folder)))
            self._kept = self._folder.with_name(f"{self._folder.name}.partial")
            self._check()
        except (OSError, ValueError) as error:
            raise self._explain(error) from None

    def _check(self) -> None:
        parent = self._folder.parent
        if not parent.is_dir():
            raise InvalidRequest(f"can't write '{self._shown}': there is no folder '{printable(str(parent))}'")
        if not os.access(parent, os.W_OK):
            raise PermissionError(13, "Permission denied")
        index = self._folder / INDEX
        if index.is_file() and MARK not in index.read_text("utf-8", "replace")[:1000]:
            raise InvalidRequest(f"can't write '{self._shown}': its {INDEX} is not of a survey", "give a new folder")
        for place, known in ((self._folder, {INDEX, MODELS}), (self._kept, {MODELS})):
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                raise InvalidRequest(f"can't write '{self._shown}': '{printable(str(place))}' is no folder")
            if place.is_dir() and not set(os.listdir(place)) <= known:
                raise InvalidRequest(
                    f"can't write '{self._shown}': '{printable(str(place))}' has files that are not of a survey",
                    "give a new folder, or that of an earlier survey",
                )

    def keep(self, row: SurveyRow, analysis: MoETypeAnalysis) -> None:
        """Keep a model's analysis until the folder is written; raises InvalidRequest where that can't be."""
        try:
            write_whole(self._kept / MODELS / f"{_name(row)}.json", analysis.model_dump_json().encode())
        except OSError as error:
            raise self._explain(error) from None

    def write(self, survey: MoETypeSurvey, command: str | None, progress: Progress | None) -> None:
        """Write the pages of all models and the index, and put them in the place of an earlier survey's."""
        report = progress or no_progress
        try:
            with tempfile.TemporaryDirectory(prefix=".lazarus-", dir=self._folder.parent) as work:
                new = Path(work, "new")
                (new / MODELS).mkdir(parents=True)
                pages: dict[int, str] = {}
                for number, row in enumerate(survey.rows):
                    report("pages", number, len(survey.rows))
                    if not row.answer:
                        continue
                    pages[number] = f"{MODELS}/{_name(row)}.html"
                    if analysis := self._find(row):
                        (new / MODELS / f"{_name(row)}.json").write_text(analysis.model_dump_json(), "utf-8")
                        text = page.to_page(analysis, survey=BACK)
                    else:
                        text = page.to_answer_page(row, row.answer, BACK)
                    (new / pages[number]).write_text(text, "utf-8")
                (new / INDEX).write_text(to_survey_page(survey, pages, command), "utf-8")
                self._replace(new, Path(work, "old"))
                shutil.rmtree(self._kept, ignore_errors=True)
        except OSError as error:
            raise self._explain(error) from None
        report("pages", len(survey.rows), len(survey.rows))

    def _replace(self, new: Path, old: Path) -> None:
        """Give the folder its name, in the place of the old one, which comes back if that fails."""
        if self._folder.exists():
            self._check()  # somebody may have put something there in the meantime
            os.rename(self._folder, old)
        try:
            os.rename(new, self._folder)
        except OSError:
            if old.exists():
                os.rename(old, self._folder)
            raise

    def _find(self, row: SurveyRow) -> MoETypeAnalysis | None:
        """The analysis that a row is the short of, by this run or an earlier one: what it has cost tells that."""
        for place in (self._kept, self._folder):
            with suppress(OSError, ValueError):
                analysis = MoETypeAnalysis.model_validate_json((place / MODELS / f"{_name(row)}.json").read_bytes())
                if row.answer and analysis.cost == row.answer.cost:
                    return analysis
        return None

    def _explain(self, error: OSError | ValueError) -> InvalidRequest:
        return InvalidRequest(f"can't write '{self._shown}': {getattr(error, 'strerror', None) or error}")


def _name(row: SurveyRow) -> str:
    """The name of a model's files: what can be read of the model's, and a digest of what was asked."""
    digest = hashlib.sha256(row.request.model_dump_json().encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", row.request.model)[-LONGEST_NAME:].strip("-.")
    return f"{readable or 'model'}-{digest[:8]}"
