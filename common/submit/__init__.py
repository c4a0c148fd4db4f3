"""Submission files: written whole, validated row by row."""
