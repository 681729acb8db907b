"""The lines of a journal: answers and notes, each with a digest of itself."""

import hashlib
import json
from typing import Any


DIGEST = "digest"

_TEXT, _NUMBER = (str,), (int,)
_ANSWER: dict[str, tuple[type, ...]] = {
    "key": _TEXT,
    "content": _TEXT,
    "finish_reason": (str, type(None)),
    "model": _TEXT,
    "requested_model": _TEXT,
    "endpoint": _TEXT,
    "parameters": (dict,),
    "usage": (dict,),
    "time": _TEXT,
    "batch": (bool,),
    "messages": (list,),
    "template": _TEXT,
    "template_hash": _TEXT,
}
_MORE = {"structured", "seconds"}  # written, but not read
_NOTES: dict[str, dict[str, tuple[type, ...]]] = {
    "batch_intent": {"token": _TEXT, "keys": (list,), "dialect": (dict,), "endpoint": _TEXT},
    "batch": {"token": _TEXT, "id": _TEXT},
    "batch_done": {"token": _TEXT},
    "lost_answer": {"model": _TEXT, "prompt_tokens": _NUMBER, "completion_tokens": _NUMBER},
}
_DIALECT: dict[str, tuple[type, ...]] = {"structured": (bool,), "token_parameter": _TEXT, "dropped": (list,)}


class JournalLineError(ValueError):
    """A line is damaged, was modified or has an unknown format."""


def encode_line(entry: dict[str, Any]) -> bytes:
    """An answer or a note as one line, with its digest; a lone surrogate stays a JSON escape."""
    body = _canonical(entry)
    return body[:-1] + _tail(body)


def decode_line(line: bytes) -> dict[str, Any]:
    """
    The answer or note of a line. Lines without a digest are those of version 0.1.

    Raises:
        JournalLineError: if the line is truncated, is not JSON, was changed, or has missing fields or fields of the wrong type.
    """
    if not line.endswith(b"\n"):
        raise JournalLineError("it is cut off")
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise JournalLineError("it is not JSON") from None
    if not isinstance(entry, dict):
        raise JournalLineError("it is not a JSON object")
    stored = entry.pop(DIGEST, None)
    if stored is not None and not _matches(line, entry, stored):
        raise JournalLineError("it does not match its digest")
    problem = _problem(entry, strict=stored is None)
    if problem is not None:
        raise JournalLineError(problem)
    return entry


def _canonical(entry: dict[str, Any]) -> bytes:
    """The bytes to digest, independent of spaces between the fields."""
    text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def _digest(body: bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(body).hexdigest()[:16]


def _tail(body: bytes) -> bytes:
    """What follows the fields of a line."""
    return f',"{DIGEST}":"{_digest(body)}"}}\n'.encode()


def _matches(line: bytes, entry: dict[str, Any], stored: Any) -> bool:
    """Whether a line has the original content. The bytes may differ if another program has saved the file."""
    size = len(_tail(b""))
    body = line[:-size] + b"}"
    return line[-size:] == _tail(body) or stored == _digest(_canonical(entry))


def _problem(entry: dict[str, Any], strict: bool) -> str | None:
    """What is wrong with the fields of a line; `strict` if there is no digest to verify them."""
    if "note" in entry:
        form = _NOTES.get(entry["note"]) if isinstance(entry["note"], str) else None
        if form is None:
            return f"the note {str(entry['note'])[:40]!r} is not known"
        found = _wrong_field(entry, form)
        if found is None and "dialect" in form:
            found = _wrong_field(entry["dialect"], _DIALECT)
        if found is None and "keys" in form and not all(isinstance(key, str) for key in entry["keys"]):
            found = "keys"
    else:
        found = _wrong_field(entry, _ANSWER)
        if found is None and not all(
            _is_count(entry["usage"].get(name)) for name in ("prompt_tokens", "completion_tokens")
        ):
            found = "usage"
        if found is None and not all(map(_is_message, entry["messages"])):
            found = "messages"
        unknown = sorted(entry.keys() - _ANSWER.keys() - _MORE) if strict else []
        if unknown:
            return f"the field `{unknown[0]}` is not known"
    return None if found is None else f"`{found}` is missing or of another type"


def _wrong_field(entry: dict[str, Any], form: dict[str, tuple[type, ...]]) -> str | None:
    return next((name for name, types in form.items() if not isinstance(entry.get(name), types)), None)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
