"""Submission files: written atomically, validated row by row."""
