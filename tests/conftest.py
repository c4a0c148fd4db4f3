"""Which tests of a parallel run share a process (pytest-xdist, --dist loadfile)."""

import pytest


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay together, and so do the files of a solution, which look at one finished run."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class BySolution(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return file.rpartition("/")[0] if file.startswith("tests/solutions/") else file

    return BySolution(config, log)
