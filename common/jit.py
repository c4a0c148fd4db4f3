"""Compiled inner loops."""

from numba import njit


def compiled(function=None, **options):
    """Return a function compiled by numba, or a decorator with `options`; cached if numba finds a writable folder."""
    if function is None:
        return lambda function: compiled(function, **options)
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # numba's "no locator available", raised at import
        return njit(nogil=True, **options)(function)
