"""Speed of the tests: plots are drawn only in tests that look at them, and garbage collection skips imported modules."""

import gc
import sys

import pytest


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # the imported modules stay; every full collection would walk through their million objects


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """
    As if matplotlib were not installed, unless a test has the marker `pictures`: a training run writes its model card several times, and
    most of a tiny run would be drawing.
    """
    if request.node.get_closest_marker("pictures") is None:
        for name in ("matplotlib", "matplotlib.figure"):
            monkeypatch.setitem(sys.modules, name, None)
