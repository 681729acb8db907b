"""
Kinds of pseudo-documents: `plain`, `hard` (near misses) and `several` (with several labels, chosen by the model).

In one line of its answer, the model says which labels it has chosen, or whether the near label is correct after all.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


PLAIN, HARD, SEVERAL = "plain", "hard", "several"
# Number of nearest labels that take turns as the near label of near misses.
NEAR_LABELS = 5
# Number of labels that the model may choose from, and number of similar labels from which these are drawn for each pseudo-document.
CANDIDATES, SIMILAR = 8, 20


def kinds(hard_share: float, several_share: float, number: int) -> list[str]:
    """
    The kinds of a label's pseudo-documents, evenly spread. The list for a larger number starts with the list for a smaller one.

    Args:
        hard_share, several_share (`float`): Shares of the two kinds, together at most 1.
        number (`int`): How many pseudo-documents.

    Example:

    ```python
    >>> kinds(0.2, 0.4, 5)
    ['plain', 'several', 'plain', 'several', 'hard']

    ```
    """
    hard, several = (Fraction(share).limit_denominator(1000) for share in (hard_share, several_share))
    special = min(hard + several, Fraction(1))
    found, others, hard_ones = [], 0, 0  # `others` counts kinds other than plain
    for so_far in range(1, number + 1):
        kind = PLAIN
        if math.floor(so_far * special) > others:
            others += 1
            kind = HARD if math.floor(others * hard / (hard + several)) > hard_ones else SEVERAL
            hard_ones += kind == HARD
        found.append(kind)
    return found


@dataclass(frozen=True)
class Reading:
    """
    A parsed answer, without its line about labels.

    Args:
        text (`str`): The pseudo-document.
        further (`tuple[str, ...]`): Labels that the model has chosen.
        marks (`tuple[str, ...]`): `near_label_unchecked` if the answer does not say whether the near label is wrong.
        problem (`str`, *optional*): What is wrong with the labels, as one sentence or two.
    """

    text: str
    further: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    problem: str | None = None


def read_near_miss(answer: str, near: str) -> Reading:
    """
    Reads the text and its last line, `near label: yes` or `near label: no`.

    Example:

    ```python
    >>> read_near_miss("A text.\\nNear label: no", '"b"')
    Reading(text='A text.', further=(), marks=(), problem=None)

    ```
    """
    rest, _, line = answer.rstrip().rpartition("\n")
    found = re.fullmatch(r"[\W_]*near[ _]label\W+(yes|no)\b.*", line, re.I)
    if found is None:
        return Reading(answer, marks=("near_label_unchecked",))
    is_right = found[1].lower() == "yes"
    problem = f"The label {near} is right for that text, but it must be wrong. Take another subject."
    return Reading(rest.rstrip(), problem=problem if is_right else None)


def read_several(answer: str, candidates: Sequence[str], most: int) -> Reading:
    """
    Reads the first line, `labels: 2, 5` or `labels: none`, and the text. At most `most` candidates, numbered from 1, may be chosen.

    Example:

    ```python
    >>> read_several("labels: 2\\nA text.", ["b", "c"], 2)
    Reading(text='A text.', further=('c',), marks=(), problem=None)
    >>> read_several("labels: 3\\nA text.", ["b", "c"], 2).problem
    'The list of further labels has the numbers 1 to 2, but not 3.'

    ```
    """
    line, _, rest = answer.lstrip().partition("\n")
    found = re.fullmatch(r"[\W_]*labels?\W+(none|\d{1,6}(?:(?:[\W_]|and)+\d{1,6})*)[\W_]*", line, re.I)
    if found is None:
        problem = 'The first line must be "labels:" with the numbers of the chosen labels, or "labels: none".'
        return Reading(answer, problem=problem)
    text, numbers = rest.lstrip(), list(dict.fromkeys(map(int, re.findall(r"\d+", found[1]))))
    unknown = [number for number in numbers if not 1 <= number <= len(candidates)]
    if unknown:
        problem = f"The list of further labels has the numbers 1 to {len(candidates)}, but not {unknown[0]}."
        return Reading(text, problem=problem)
    if len(numbers) > most:
        return Reading(text, problem=f"At most {most} further labels may be chosen, but {len(numbers)} are.")
    return Reading(text, tuple(candidates[number - 1] for number in numbers))
