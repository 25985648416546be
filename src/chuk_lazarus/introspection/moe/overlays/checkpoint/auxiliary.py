"""The files of a model's folder that are neither weights nor config: tokenizers, templates, licences, code."""

import re
from collections.abc import Iterator

from ...errors import ModelUnreadable, printable
from ...weights.checkpoint import Checkpoint
from ...weights.repositories.source import CONFIG, ByteSource, Repository
from .model_file import MODEL_FILE

NAMED = 5  # of the files that are left out
LARGEST = 64 * 2**20  # bytes; a larger file is not copied

# what loaders want beside the weights: tokenizers, templates, generation settings, a model's own code; and licences
_WANTED = re.compile(
    r"(?:.*/)?[^/]+\.(?:json|jinja|model|txt|tiktoken|py)|(?:.*/)?tokenizer\.model\.[^/]+|(?:LICEN[CS]E|NOTICE)[^/]*"
)
# these describe the weights as they were, or are written again
_UNWANTED = re.compile(
    r"config\.json|plan\.json|.*\.index\.json|(?:hf_)?quant(?:ize|ization)?_config\.json|quant_model_description.*\.json"
    rf"|{re.escape(MODEL_FILE)}"
)


def read_auxiliary_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The content of the files, by name, that a loader wants beside config and weights; those in subfolders, too.

    Raises ModelUnreadable where one of them, the config or the weights is a link that leads elsewhere.
    """
    repository = checkpoint.repository
    for name in {CONFIG} & repository.files | checkpoint.files:
        _check_copy(repository, name)
    return {name: file.read(0, file.size) for name, file in _open_wanted(repository)}


def _open_wanted(repository: Repository) -> Iterator[tuple[str, ByteSource]]:
    """The files that are copied, in the order of their names, each opened when its turn comes."""
    for name in sorted(repository.list_files()):
        if _WANTED.fullmatch(name) and not _UNWANTED.fullmatch(name):
            _check_copy(repository, name)
            file = repository.open(name)
            if file.size <= LARGEST:
                yield name, file


def left_out_note(checkpoint: Checkpoint) -> list[str]:
    """A note that names the files of a model which are not copied with it; [] if there are none.

    Files about the old weights, model cards (a new one is written) and hidden files are not named.
    """
    repository = checkpoint.repository
    copied = {name for name, _ in _open_wanted(repository)}
    names = sorted(
        name
        for name in repository.list_files() - checkpoint.files - copied
        if not (name.rpartition("/")[2].startswith(".") or name.endswith(".md") or _UNWANTED.fullmatch(name))
    )
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"not copied: {', '.join(map(printable, names[:NAMED]))}{more}"] if names else []


def _check_copy(repository: Repository, name: str) -> None:
    """Raise ModelUnreadable where a file, which is to be copied into another folder, is a link that leads elsewhere."""
    if not repository.may_copy(name):
        raise ModelUnreadable(
            f"{name} links to a file outside the model's folder, whose contents would be copied",
            "put the file itself there if you trust the model",
        )
