"""The one exception that bittern raises for a mistake that its user can mend, and foreign ones in one line."""

import os
import re

_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_MAX_CHARACTERS = 2000


class BitternError(Exception):
    """Bad input, a refused combination or a failed check.

    The message is one line that names the tensor, file or option, what was expected and what was
    found. The command line prints it without a traceback and exits with 1. What it quotes may come from
    a hostile file: line breaks become spaces, control characters are shown as escapes, and the middle of
    an endless message is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class AlsoFailed(BitternError):
    """Raised in a process of torchrun when another has failed and says why: the command line says nothing then."""


def check_utf8(what: str, name: str | os.PathLike[str]) -> None:
    """Refuse a file's name that no manifest can hold: the system's bytes that are no UTF-8 come as lone surrogates.

    Raises:
        BitternError: naming what it is the name of.
    """
    try:
        os.fspath(name).encode()
    except UnicodeEncodeError as error:
        raise BitternError(f"{what} {os.fspath(name)!r}: expected a name in UTF-8") from error


def printable(text: str, whole: bool = False) -> str:
    """A text that a terminal shows as one line and that cannot command the terminal; cut short unless ``whole``."""
    if len(text) > _MAX_CHARACTERS and not whole:
        text = f"{text[: _MAX_CHARACTERS // 2]} ... {text[-_MAX_CHARACTERS // 2 :]}"
    text = _BREAKS.sub(" ", text)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of a foreign exception's message, for an error that must fit on one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def describe(error: BaseException) -> str:
    """Any exception in one line, with the notes that it was given on its way."""
    if isinstance(error, BitternError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory: {error}"
    else:
        text = f"{type(error).__name__}: {error} (unexpected; --verbose shows where)"
    return "; ".join([text, *notes_of(error)])


def notes_of(error: BaseException | None) -> list[str]:
    """What was added to an exception on its way, such as how to go on after it."""
    return list(getattr(error, "__notes__", ()))
