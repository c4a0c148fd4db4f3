"""Which tests of a parallel run share a process (pytest-xdist, --dist loadfile)."""

import re

import pytest

from solutions.__main__ import NAMES


def pytest_collection_modifyitems(config, items):
    """Begin a parallel run with the solutions, whose long groups of tests would otherwise be waited for at its end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith("tests/solutions/"))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file together, and all tests of a solution, which use one finished run."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # the order is that of the collection, not by the number of tests
    solution = re.compile("/({0})/|\\[.*({0})".format("|".join(NAMES)))

    class BySolution(LoadFileScheduling):
        def _split_scope(self, nodeid):
            found = solution.search(nodeid) if nodeid.startswith("tests/solutions/") else None
            return found[1] or found[2] if found else super()._split_scope(nodeid)

    return BySolution(config, log)
