"""Formatting for model cards: escaping of untrusted text (label names, descriptions) and names of metrics."""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence


MAX_CELL_CHARACTERS = 200
# Ranking and classification measures; not losses, speeds and counts.
METRIC = re.compile(r"@\d+|(^|_)(f1|precision|recall|coverage|accuracy|auc|map|lrap|ece)(_|$)")
GROUP = re.compile(r"(^|[_/])(head|body|tail)(?=$|[_/])")
_SPLITS = {"test": "test", "predict": "test", "eval": "validation"}
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


def escape_markdown(text: object, limit: int = MAX_CELL_CHARACTERS) -> str:
    """
    `text` as the inside of one cell of a markdown table: shown literally.

    Markup is escaped, line breaks become `<br>`, control characters (including those that change the text direction) are spelled out,
    right-to-left text is isolated from neighboring cells, and the text is truncated after `limit` characters.

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
    """`"ndcg@5"` → `"nDCG@5"`, `"f1_micro"` → `"Micro F1"`."""
    metric = re.sub("^f1_(micro|macro|sample)$", r"\1_f1", metric)
    words = [word.partition("@") for word in re.split("[_/]", metric)]
    pretty = " ".join(_ACRONYMS.get(name, name) + at + k for name, at, k in words)
    return pretty if words[0][0] in _ACRONYMS else pretty[:1].upper() + pretty[1:]


def split_metrics(metrics: Mapping[str, float], evaluation_sets: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """
    Metrics by split, the test split first.

    Args:
        metrics (`dict[str, float]`): as the trainer logs them, `eval_...` and `test_...`; losses, speeds and values that are not
            finite are left out.
        evaluation_sets (`list[str]`, *optional*): names of several evaluation sets (`eval_NAME_...`); each is a split.

    Example:

    ```python
    >>> split_metrics({"eval_p@1": 0.9, "test_p@1": 0.8})
    {'test': {'p@1': 0.8}, 'validation': {'p@1': 0.9}}

    ```
    """
    result: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        prefix, _, name = key.partition("_")
        if prefix not in _SPLITS:
            prefix, name = "eval", key
        split = _SPLITS[prefix]
        # The longest name first: "mail_new" before "mail".
        for evaluation_set in sorted(evaluation_sets, key=len, reverse=True):
            if prefix == "eval" and name.startswith(f"{evaluation_set}_"):
                split, name = f"validation ({evaluation_set})", name.removeprefix(f"{evaluation_set}_")
                break
        if not METRIC.search(name) or isinstance(value, (str, bool)) or name.endswith("loss"):
            continue
        try:
            value = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(value):
            result.setdefault(split, {})[name] = value
    return dict(sorted(result.items(), key=lambda item: not item[0].startswith("test")))


def headline_metrics(names: Iterable[str]) -> list[str]:
    """
    The eight metrics by which models are compared, as far as they are available: P@1, P@3, P@k, nDCG@k, PSP@1, PSP@k, micro and
    macro F1, where k is 5, or the largest k that was measured below it.

    Example:

    ```python
    >>> headline_metrics(["p@1", "p@3", "ndcg@3", "recall@3", "f1_micro", "head_f1_macro"])
    ['p@1', 'p@3', 'ndcg@3', 'f1_micro']

    ```
    """
    names = list(names)
    ks = [int(name.removeprefix("p@")) for name in names if re.fullmatch(r"p@\d+", name)]
    k = max([k for k in ks if k <= 5], default=max(ks, default=1))
    wanted = ["p@1", "p@3", f"p@{k}", f"ndcg@{k}", "psp@1", f"psp@{k}", "f1_micro", "f1_macro"]
    return [name for name in dict.fromkeys(wanted) if name in names]
