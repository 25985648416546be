"""What a model's folder holds beside its weights, and where it lies."""

import re

from ...weights.repositories.source import Repository

SMALL = 64 * 2**20  # bytes of a file beside the weights that is copied

# What loaders want beside the weights: tokenizers, templates, generation settings, a model's own code; and licences.
_WANTED = re.compile(r"[^/]+\.(?:json|jinja|model|txt|tiktoken|py)|(?:LICEN[CS]E|NOTICE)[^/]*")
_UNWANTED = re.compile(r"config\.json|plan\.json|.*\.index\.json|(?:hf_)?quant(?:ize)?_config\.json")


def small_files(repository: Repository) -> dict[str, bytes]:
    """The files that a loader wants beside config and weights."""
    result = {}
    for name in sorted(repository.files):
        if _WANTED.fullmatch(name) and not _UNWANTED.fullmatch(name):
            file = repository.open(name)
            if file.size <= SMALL:
                result[name] = file.read(0, file.size)
    return result
