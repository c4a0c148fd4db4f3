"""The error for unusable input."""


class InputError(ValueError):
    """Unusable input from outside; the message names the file, row or option in one line.

    The command line prints only the message and exits with status 2. Any other exception is a bug and keeps its
    traceback.
    """
