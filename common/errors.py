"""The error for unusable input, the exit statuses, and the log that all modules write to."""

import logging

log = logging.getLogger("common")  # see common.runs.start_log
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
