"""The files of a model's folder that are neither weights nor config: tokenizers, templates, licences, code."""

import re

from ...weights.repositories.source import Repository

LARGEST = 64 * 2**20  # bytes; a larger file is not copied

# what loaders want beside the weights: tokenizers, templates, generation settings, a model's own code; and licences
_WANTED = re.compile(r"[^/]+\.(?:json|jinja|model|txt|tiktoken|py)|(?:LICEN[CS]E|NOTICE)[^/]*")
# these describe the weights as they were, or are written again
_UNWANTED = re.compile(r"config\.json|plan\.json|.*\.index\.json|(?:hf_)?quant(?:ize)?_config\.json")


def read_auxiliary_files(repository: Repository) -> dict[str, bytes]:
    """The content of the files, by name, that a loader wants beside config and weights."""
    contents = {}
    for name in sorted(repository.files):
        if _WANTED.fullmatch(name) and not _UNWANTED.fullmatch(name):
            file = repository.open(name)
            if file.size <= LARGEST:
                contents[name] = file.read(0, file.size)
    return contents
