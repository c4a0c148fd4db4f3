"""Scores, with the competition convention as the default and every other one as a named option."""
