"""The one exception that bittern raises for a mistake that its user can mend, and foreign ones in one line."""


class BitternError(Exception):
    """Bad input, a refused combination or a failed check.

    The message is one line that names the tensor, file or option, what was expected and what was
    found. The command line prints it without a traceback and exits with 1.
    """


def first_line(error: BaseException) -> str:
    """The first line of a foreign exception's message, for an error that must fit on one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
