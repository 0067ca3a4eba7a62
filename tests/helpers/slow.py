"""Parameters of tests of which some are for the slow suite."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast(values: Iterable[Any], num: int = 1) -> list[Any]:
    """All values as parameters of a test, those after the first ones marked as slow.

    Args:
        values: values of one parameter, or sets of ``pytest.param``.
        num: number of values that stay in the fast suite.
    """
    sets = [value if isinstance(value, type(pytest.param())) else pytest.param(value) for value in values]
    return [*sets[:num], *(pytest.param(*each.values, marks=[*each.marks, pytest.mark.slow]) for each in sets[num:])]
