"""How long an endpoint asks to wait."""

import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import Any


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """
    Seconds that the headers `retry-after-ms` or `Retry-After` (seconds or a date) ask to wait, or None.

    A date is measured against the response's own `Date`: the clocks of two machines need not agree.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None:
        return seconds
    moment = _moment(value)
    if moment is None:
        return None
    now = _moment(headers.get("date"))
    return max(0.0, moment - (time.time() if now is None else now))


def _number(value: Any) -> float | None:
    if not isinstance(value, str) or not re.fullmatch(r"\s*\d+(\.\d+)?\s*", value, re.ASCII):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _moment(value: Any) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError):
        return None
