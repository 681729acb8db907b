"""Labels with similar texts, as candidates for near misses and for co-occurring labels; and broader and narrower labels."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

from .near_duplicates import words


BLOCK = 256  # labels that are compared with all others at the same time


def similar_labels(texts: Mapping[str, str], targets: Iterable[str], number: int) -> dict[str, list[str]]:
    """
    The other labels with the most similar texts, by the cosine of TF-IDF vectors of words.

    Ties, such as labels that share no word, are broken in an order that differs between labels but is the same in each run.

    Args:
        texts (`Mapping[str, str]`): The text of every label: its name, with its description where there is one.
        targets (`Iterable[str]`): The labels to find similar labels for.
        number (`int`): How many, at most.

    Returns:
        The most similar other labels of each of the `targets`, best first.

    Example:

    ```python
    >>> texts = {"a": "rings of numbers", "b": "fields of numbers", "c": "trade with fish"}
    >>> similar_labels(texts, ["a"], 1)
    {'a': ['b']}

    ```
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    labels = sorted(texts)
    places = {label: place for place, label in enumerate(labels)}
    targets = list(targets)
    try:
        vectors = TfidfVectorizer(analyzer=words, sublinear_tf=True).fit_transform([texts[label] for label in labels])
    except ValueError:  # no text has a word
        return {label: _order(label, labels, [0.0] * len(labels), number) for label in targets}
    found: dict[str, list[str]] = {}
    for start in range(0, len(targets), BLOCK):
        block = targets[start : start + BLOCK]
        similarities = (vectors[[places[label] for label in block]] @ vectors.T).toarray()
        for label, row in zip(block, similarities):
            found[label] = _order(label, labels, row, number)
    return found


def relatives(label_parents: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """
    The broader and the narrower labels of each label, on all levels. They are not near misses: a document with a label also has its broader
    labels, and may have narrower ones.

    Args:
        label_parents (`Mapping[str, Iterable[str]]`): Parents of labels, without cycles.

    Example:

    ```python
    >>> found = relatives({"genetics": ["biology"], "biology": ["science"]})
    >>> {label: sorted(found[label]) for label in sorted(found)}
    {'biology': ['genetics', 'science'], 'genetics': ['biology', 'science'], 'science': ['biology', 'genetics']}

    ```
    """
    found: defaultdict[str, set[str]] = defaultdict(set)
    for label in label_parents:
        above = list(label_parents[label])
        for parent in above:  # grows as it goes
            if parent not in found[label]:
                found[label].add(parent)
                found[parent].add(label)
                above.extend(label_parents.get(parent, ()))
    return dict(found)


def _order(label: str, labels: list[str], similarities: Iterable[float], number: int) -> list[str]:
    # rounded, because prompts, and so the keys of the journal, must not depend on the last bits
    pairs = [(round(float(value), 6), other) for value, other in zip(similarities, labels) if other != label]
    lowest = sorted((value for value, _ in pairs), reverse=True)[:number][-1:]
    kept = [pair for pair in pairs if pair[0] >= lowest[0]] if lowest else []
    kept.sort(key=lambda pair: (-pair[0], hashlib.sha256(f"{label}\n{pair[1]}".encode()).digest()))
    return [other for _, other in kept[:number]]
