"""How a model card writes text that others chose (label names, descriptions) and the names of metrics."""

import math
import re
import unicodedata
from collections.abc import Mapping


MAX_CELL_CHARACTERS = 300
# Ranking and classification measures; not losses, speeds and counts.
METRIC = re.compile(r"@\d+|(^|_)(f1|precision|recall|coverage|accuracy|auc|map|lrap|ece)(_|$)")
GROUP = re.compile(r"(^|[_/])(head|body|tail)(?=$|[_/])")
_SPLITS = {"eval": "validation", "test": "test", "predict": "test"}
_ACRONYMS = {
    "p": "P",
    "ndcg": "nDCG",
    "psp": "PSP",
    "psndcg": "PSnDCG",
    "f1": "F1",
    "auc": "AUC",
    "map": "mAP",
    "ece": "ECE",
}


def escape_markdown(text, limit: int = MAX_CELL_CHARACTERS) -> str:
    """
    `text` as the inside of one cell of a markdown table: shown letter by letter, whatever it holds.

    Markup is escaped, line ends become `<br>`, control characters (also those that turn the reading direction) are
    spelt out, right-to-left text is isolated from the cells beside it, and more than `limit` characters are cut.

    Example:

    ```python
    >>> escape_markdown('a|b "*c*"')
    'a\\\\|b "\\\\*c\\\\*"'

    ```
    """
    text = str(text)
    cut = len(text) > limit
    parts, right_to_left = [], False
    for character in text[:limit].replace("\r\n", "\n"):
        if character in "\n\r\v\f\x85\u2028\u2029":
            parts.append("<br>")
        elif unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in (
            "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split()
        ):
            parts.append(" " if character == "\t" else f"\\\\u{ord(character):04x}")
        elif character in r"\`*_{}[]<>|~$&#!":
            parts.append(f"\\{character}")
        else:
            right_to_left = right_to_left or unicodedata.bidirectional(character) in ("R", "AL")
            parts.append(character)
    escaped = "".join(parts) + ("…" if cut else "")
    return f"\u2068{escaped}\u2069" if right_to_left else escaped


def pretty_metric(metric: str) -> str:
    """`"ndcg@5"` → `"nDCG@5"`, `"micro_f1"` → `"Micro F1"`."""
    words = [word.partition("@") for word in re.split("[_/]", metric)]
    pretty = " ".join(_ACRONYMS.get(name, name) + at + k for name, at, k in words)
    return pretty if words[0][0] in _ACRONYMS else pretty[:1].upper() + pretty[1:]


def split_metrics(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """`{"eval_p@1": 0.9, "test_p@1": 0.8}` → `{"validation": {"p@1": 0.9}, "test": {"p@1": 0.8}}`, finite measures only."""
    result = {}
    for key, value in metrics.items():
        prefix, _, name = key.partition("_")
        if prefix not in _SPLITS:
            prefix, name = "eval", key
        if not METRIC.search(name) or isinstance(value, (str, bool)) or name.endswith("loss"):
            continue
        try:
            value = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(value):
            result.setdefault(_SPLITS[prefix], {})[name] = value
    return result
