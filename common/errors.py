"""The one error that a user is meant to read."""


class InputError(ValueError):
    """Input from outside that cannot be used; its message names the file, row or option in one line.

    The command line prints the message alone and exits with status 2. Everything else that escapes is a defect
    of ours and keeps its traceback.
    """
