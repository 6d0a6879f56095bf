"""The one exception that bittern raises for a mistake that its user can mend."""


class BitternError(Exception):
    """Bad input, a refused combination or a failed check.

    The message is one line that names the tensor, file or option, what was expected and what was
    found. The command line prints it without a traceback and exits with 1.
    """
