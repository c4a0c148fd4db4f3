"""Submission files: written atomically and validated row by row."""
