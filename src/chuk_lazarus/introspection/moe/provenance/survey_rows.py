"""The file of a survey: every row as a line of JSON, written as soon as it is done."""

import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from ..reports import SurveyRequest, SurveyRow

MAX_NUMBER = 2**63  # no number in a row is larger
LINE_START = b'{"schema": "moe-type-survey-row/1"'


def read_rows(path: Path) -> dict[SurveyRequest, SurveyRow]:
    """The rows already in a file; of several for the same request, the last.

    An incomplete last line, of a survey that was killed while writing it, is cut off. Raises InvalidRequest for a file
    with anything else in it.
    """
    rows, number = {}, 0
    try:
        data = path.read_bytes() if path.is_file() else b""
        *lines, rest = data.split(b"\n")
        for number, line in enumerate([*lines, rest], 1):
            if number <= len(lines):
                row = SurveyRow.model_validate_json(line)
                _check_plain(row.model_dump())
                rows[row.request] = row
            elif line[: len(LINE_START)] != LINE_START[: len(line)]:
                raise ValueError("not the beginning of a row")
        if rest:
            os.truncate(path, len(data) - len(rest))
    except OSError as error:
        raise InvalidRequest(f"can't continue '{path}': {error.strerror}") from None
    except ValueError:
        raise InvalidRequest(f"line {number} of '{path}' is not a row of a survey", "give another file") from None
    return rows


def _check_plain(value: Any) -> None:
    """Raise ValueError where a string can't be shown, or a number is larger than any that we write."""
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_plain(inner)
    elif not (value.isprintable() if isinstance(value, str) else abs(value or 0) <= MAX_NUMBER):
        raise ValueError("not a row of a survey")


def open_rows(path: Path | None) -> FileIO:
    """The file to append to, unbuffered; raises InvalidRequest."""
    try:
        return FileIO(path or os.devnull, "ab")
    except OSError as error:
        raise InvalidRequest(f"can't write '{path}': {error.strerror}") from None


def append_row(file: FileIO, row: SurveyRow) -> None:
    """Write one row as a line; raises InvalidRequest where the disk does not take it."""
    line = (json.dumps(row.model_dump(mode="json"), ensure_ascii=False) + "\n").encode()
    try:
        while line:  # a disk that is nearly full takes a part
            line = line[file.write(line) or 0 :]
    except OSError as error:
        raise InvalidRequest(f"can't write '{file.name}': {error.strerror}") from None
