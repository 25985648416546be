"""The files of a model's folder that are neither weights nor config: tokenizers, templates, licences, code."""

import re

from ...errors import ModelUnreadable
from ...weights.repositories.source import Repository

LARGEST = 64 * 2**20  # bytes; a larger file is not copied

# what loaders want beside the weights: tokenizers, templates, generation settings, a model's own code; and licences
_WANTED = re.compile(
    r"(?:.*/)?[^/]+\.(?:json|jinja|model|txt|tiktoken|py)|(?:.*/)?tokenizer\.model\.[^/]+|(?:LICEN[CS]E|NOTICE)[^/]*"
)
# these describe the weights as they were, or are written again
_UNWANTED = re.compile(
    r"config\.json|plan\.json|.*\.index\.json|(?:hf_)?quant(?:ize|ization)?_config\.json|quant_model_description.*\.json"
)


def read_auxiliary_files(repository: Repository) -> dict[str, bytes]:
    """The content of the files, by name, that a loader wants beside config and weights; those in subfolders, too.

    Raises ModelUnreadable where one is a link that leads elsewhere.
    """
    contents = {}
    for name in sorted(repository.list_files()):
        if _WANTED.fullmatch(name) and not _UNWANTED.fullmatch(name):
            check_copy(repository, name)
            file = repository.open(name)
            if file.size <= LARGEST:
                contents[name] = file.read(0, file.size)
    return contents


def check_copy(repository: Repository, name: str) -> None:
    """Raise ModelUnreadable where a file, which is to be copied into another folder, is a link that leads elsewhere."""
    if not repository.may_copy(name):
        raise ModelUnreadable(
            f"{name} is a link out of the model's folder, to a file of another kind, and would be copied",
            "put the file itself there if you trust the model",
        )
