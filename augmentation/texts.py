"""Cleans texts before they are sent."""

import re


def clean(text: str) -> str:
    """Removes what cannot be sent: control characters but tab and newline, and lone surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]", " ", text).strip()
