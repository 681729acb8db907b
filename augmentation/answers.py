"""Extracts the text of an answer from any of its formats."""

import json
import re
from typing import Any

from .texts import clean


_REFUSAL = re.compile(
    r"\A\W*(as an? (ai|artificial|large language|language model)\b"
    r"|i('m| am) (sorry|unable|not able)|i (cannot|can't|can not|won't) (help|assist|provide|write|create|generate|fulfill)"
    r"|i apologi[sz]e\b|unfortunately, i\b|sorry, (but )?i\b)",
    re.I,
)


def is_refusal(text: str) -> bool:
    """Whether an answer begins as a refusal does."""
    return bool(_REFUSAL.match(text))


def answer_text(entry: dict[str, Any], *fields: str) -> tuple[str, bool]:
    """
    The text of an answer in the form of JSON, truncated JSON, a Markdown fence or plain text.

    Args:
        entry (`dict`): The journal entry.
        fields: Candidate names of the JSON field that contains the text; the first one that exists is used.

    Returns:
        The text, and whether the answer was cut off by its token limit.
    """
    content = re.sub(r"<think>.*?(</think>|\Z)", "", entry["content"], flags=re.S).strip()
    content = re.sub(r"\A```\w*\s*\n(.*?)\n?```\Z", r"\1", content, flags=re.S).strip()
    cut = entry.get("finish_reason") == "length"
    if content.startswith("{"):
        unescaped = re.sub(r"\\(u[0-9a-fA-F]{0,3})?\Z", "", content)  # a string may be cut within an escape sequence
        for text, whole in ((content, True), (unescaped + '"}', False), (content + "}", False)):
            try:
                value, _ = json.JSONDecoder(strict=False).raw_decode(text)
            except (ValueError, RecursionError):
                continue
            for name in fields:
                if isinstance(value, dict) and isinstance(value.get(name), str):
                    return clean(value[name]), cut or not whole
    return clean(content), cut
