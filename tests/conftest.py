"""Which tests of a parallel run share a process (pytest-xdist, --dist loadgroup)."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before the mark is read
def pytest_collection_modifyitems(items):
    """A file's tests stay together, and so do the files of a solution that look at its one finished run."""
    sharing = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}
    for item in items:
        group = item.path.parent if item.path in sharing else item.path
        item.add_marker(pytest.mark.xdist_group(group.relative_to(item.config.rootpath).as_posix()))
