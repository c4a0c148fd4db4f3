"""The error for unusable input, and the exit statuses."""

STOPPED = 3  # saved and stopped on purpose, the same command continues
PARTIAL = 4  # done, but some inputs could not be used


class InputError(ValueError):
    """Unusable input from outside; the message names the file, row or option in one line, all that is printed.

    Any other exception is a bug and keeps its traceback.
    """


def check(holds, message):
    """Raise InputError with the message unless the condition holds."""
    if not holds:
        raise InputError(message)
