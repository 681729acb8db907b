"""Answers of models are compared up to rounding: processors, and even addresses of weights, differ in the last digits."""

import pytest


def assert_same_answers(found, expected, abs=1e-5):
    """The same lists and dictionaries, with the same texts and counts, and numbers that differ by `abs` at most."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_answers(found[name], value, abs)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same_answers(one, other, abs)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=abs)
    else:
        assert found == expected
