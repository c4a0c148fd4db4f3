"""What the tests of ChestX-ray14 share."""

import pytest

from tests.solutions.chestxray14.folders import folder, job  # noqa: F401 - fixtures

PLAIN = ["--views", "whole", "--whole.attention", "False", "--whole.weighting", "False"]


@pytest.fixture
def plain(tiny):
    """Options of a run that needs no lungs, which take longest."""
    return [*tiny, *PLAIN]
