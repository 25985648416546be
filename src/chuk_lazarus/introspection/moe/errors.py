"""Errors for the user, one class per exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

LONGEST = 2000  # characters of a message


def printable(text: str) -> str:
    """`text` with every control character escaped: names come from files and must not reach a terminal raw."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shorten(text: str) -> str:
    """`text`, or only its beginning and end if it is longer than LONGEST: what it quotes may have any length."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 205]} ... {text[-200:]}"


class MoEError(Exception):
    """An error that the user can act on: `message` says what is wrong, `hint` what to do; both are printable."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = shorten(printable(shorten(message)))
        self.hint = shorten(printable(shorten(hint)))
        super().__init__(f"{self.message} ({self.hint})" if hint else self.message)


class InvalidRequest(MoEError):
    """The request does not fit the model: a layer that does not exist, an option out of range."""

    exit_code = 2


class LibraryMissing(InvalidRequest, ImportError):
    """The request needs libraries of one of this package's extras, which are not installed."""

    @classmethod
    def of(cls, extra: str, message: str) -> Self:
        """The error that says how to install an extra."""
        return cls(message, f'run: pip install "chuk-lazarus[{extra}]"')


class ModelUnreadable(MoEError):
    """The model can't be found or read: missing, gated, corrupt, truncated, or the network failed."""

    exit_code = 3


class NotMoE(MoEError):
    """The checkpoint was read, but it has no routed experts."""

    exit_code = 4


class UnknownFormat(MoEError):
    """The checkpoint has experts in a layout or a storage format that is not in our tables."""

    exit_code = 4


@contextmanager
def name_model(model: str) -> Iterator[None]:
    """Prefix the model's name to the message of an error that does not mention it."""
    try:
        yield
    except LibraryMissing:  # with any model
        raise
    except MoEError as error:
        if printable(model) in error.message:
            raise
        raise type(error)(f"{model}: {error.message}", error.hint) from None
