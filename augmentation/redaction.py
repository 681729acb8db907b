"""Keeps keys out of everything that is stored or shown."""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote


MASK = "***"
MIN_SECRET = 8  # characters; shorter keys are placeholders ("EMPTY", "dummy") that also occur as words in answers
FRAGMENT = 8  # number of consecutive characters that count as a part of a key
MIN_FRAGMENTED = 20  # characters; parts of shorter keys ("no-key-required") also occur as words in answers

_USER_INFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # of an address, such as a proxy's


class Redactor:
    """
    Replaces secrets, and parts of them, by `***`.

    Args:
        secrets (`str`): Keys. One of fewer than 8 characters counts as a placeholder. Of one with 20 or more, any 8
            consecutive characters are masked, too, because a message may contain a truncated key.

    Example:

    ```python
    >>> redact = Redactor("sk-0123456789abcdefghij")
    >>> redact({"error": ["refused: sk-0123456789abc"]})
    {'error': ['refused: ***']}

    ```
    """

    def __init__(self, *secrets: str) -> None:
        forms = {form for secret in secrets if len(secret) >= MIN_SECRET for form in (secret, quote(secret, safe=""))}
        self._parts = {form for form in forms if len(form) < MIN_FRAGMENTED}
        for form in forms - self._parts:
            self._parts.update(form[start : start + FRAGMENT] for start in range(len(form) - FRAGMENT + 1))

    @classmethod
    def of_environment(cls, *names: str) -> "Redactor":
        """The redactor of the keys in these environment variables."""
        return cls(*(os.environ.get(name, "").strip() for name in names))

    def __call__(self, value: Any) -> Any:
        """The value without secrets: a string, or dictionaries and lists of any depth that hold strings."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {self(name): self(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(item) for item in value]
        return value

    def line(self, value: Any, width: int = 500) -> str:
        """One line of at most `width` characters for a message; secrets are masked before it is truncated."""
        text = " ".join(_USER_INFO.sub(MASK, self._text(str(value))).split())
        return text if len(text) <= width else text[: width - 3] + "..."

    def _text(self, text: str) -> str:
        found = [part for part in self._parts if part in text]
        if not found:
            return text
        spans = sorted((match.start(), match.start() + len(part)) for part in found for match in _each(part, text))
        pieces: list[str] = []
        end = 0
        for start, stop in spans:
            if start > end or not pieces:
                pieces.append(text[end:start] + MASK)
            end = max(end, stop)
        return "".join(pieces) + text[end:]


def _each(part: str, text: str) -> Iterator[re.Match[str]]:
    return re.finditer(f"(?={re.escape(part)})", text)
