"""Checks of arguments, before anything is read or sent."""

import math
from typing import Any

from .errors import AugmentationError


def check_number(
    name: str,
    value: Any,
    minimum: float = 0.0,
    maximum: float = math.inf,
    above: bool = False,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """
    Checks that an argument is a finite number within its range.

    Args:
        name (`str`): Name of the argument, for the message.
        value: What was given.
        minimum, maximum (`float`): The range, both ends included.
        above (`bool`): Exclude `minimum` itself.
        integer (`bool`): Only integers of type `int`.
        optional (`bool`): Also accept `None`.

    Raises:
        AugmentationError: if it is not (NaN and infinity never are).

    Example:

    ```python
    >>> check_number("max_cost", float("nan"))
    Traceback (most recent call last):
    ...
    augmentation.errors.AugmentationError: `max_cost` is nan, but must be a number of at least 0; correct it.

    ```
    """
    if value is None and optional:
        return
    kinds = (int,) if integer else (int, float)
    valid = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not minimum <= value <= maximum or (above and value == minimum):
        rule = f"{'an integer' if integer else 'a number'} {'above' if above else 'of at least'} {minimum:g}"
        rule += f" and at most {maximum:g}" if maximum < math.inf else ""
        raise AugmentationError(f"`{name}` is {value!r}, but must be {rule}; correct it.")
