"""Compiled inner loops."""

from numba import njit


def compiled(function=None, **options):
    """Return a function compiled by numba without the GIL, or a decorator with further `options` of `njit`.

    The machine code is cached on the disk, unless numba can write neither beside the code nor into a folder of the
    user; then each process compiles anew.
    """
    if function is None:
        return lambda function: compiled(function, **options)
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # numba's "no locator available", raised at import
        return njit(nogil=True, **options)(function)
