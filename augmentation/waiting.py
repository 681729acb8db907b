"""How long to wait before another attempt."""

import email.utils
import math
import random
import re
import time
from collections.abc import Mapping
from typing import Any

from tenacity import RetryCallState

from .errors import Adapted, FatalError, TryAgain
from .settings import RequestSettings


MAX_BACKOFF = 60.0  # seconds


def error_of(state: RetryCallState) -> TryAgain:
    """Why the last attempt failed."""
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, TryAgain)
    return error


def seconds_to_wait(state: RetryCallState, settings: RequestSettings, host: str) -> float:
    """
    Seconds until the next attempt: an exponential back-off with jitter, or what the endpoint requests if that is longer.

    Raises:
        FatalError: if the endpoint requests more than `max_wait`.
    """
    error = error_of(state)
    if isinstance(error, Adapted):
        return 0.0
    wait = min(MAX_BACKOFF, settings.initial_backoff * 2 ** min(state.attempt_number - 1, 30)) * random.uniform(
        0.5, 1.5
    )
    asked = error.retry_after or 0.0
    if asked > settings.max_wait:
        raise FatalError(f"{host} asks to wait {asked:.0f} s; run the same command again after that time.")
    return max(wait, asked)


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
