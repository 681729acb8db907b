"""Finds near-duplicate texts with MinHash, verifying each candidate with the exact Jaccard similarity."""

import re
from collections.abc import Sequence

from datasketch import MinHash, MinHashLSH


WORDS = 3  # in a shingle
THRESHOLD = 0.6  # Jaccard similarity of the shingles of two texts; about nine of ten words are in shared runs
PERMUTATIONS = 64
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation; a Chinese or Japanese character counts as a word."""
    return _WORD.findall(text.lower())


def shingles(text: str, size: int = WORDS) -> set[str]:
    """All runs of `size` words; the whole text where it is shorter."""
    found = words(text)
    return {" ".join(found[i : i + size]) for i in range(max(1, len(found) - size + 1))} if found else set()


class NearDuplicateIndex:
    """
    Finds a near-duplicate among the texts added so far.

    Args:
        threshold (`float`, defaults to 0.6): Jaccard similarity of the sets of three-word shingles from which on two
            texts are near-duplicates.

    Example:

    ```python
    >>> index = NearDuplicateIndex()
    >>> index.add("a", "the quick brown fox jumps over the lazy dog and runs away")
    >>> index.find("The quick brown fox jumps over the lazy dog and runs.")
    'a'
    >>> index.find("something else altogether") is None
    True

    ```
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self.threshold = threshold
        # finds more candidates than needed, because they are verified exactly
        self._lsh = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=PERMUTATIONS, weights=(0.2, 0.8))
        self._texts: list[tuple[str, str]] = []
        self._exact: dict[str, str] = {}

    def _hash(self, found: set[str]) -> MinHash:
        signature = MinHash(num_perm=PERMUTATIONS, seed=1)
        signature.update_batch([run.encode() for run in sorted(found)])
        return signature

    def add(self, name: str, text: str) -> None:
        """Adds a text under a name, which need not be unique; a text without words is not added."""
        found = shingles(text)
        if not found:
            return
        self._exact.setdefault(" ".join(words(text)), name)
        self._lsh.insert(len(self._texts), self._hash(found), check_duplication=False)
        self._texts.append((name, text))

    def find_exact(self, text: str) -> str | None:
        """The name of a text with the same words, or None."""
        return self._exact.get(" ".join(words(text)))

    def find(self, text: str) -> str | None:
        """The name of the most similar text at or above the threshold, or None."""
        exact = self.find_exact(text)
        if exact is not None:
            return exact
        found = shingles(text)
        if not found:
            return None
        best, name = 0.0, None
        for candidate in sorted(self._lsh.query(self._hash(found))):
            other = shingles(self._texts[candidate][1])
            similarity = len(found & other) / len(found | other)
            if similarity >= self.threshold and similarity > best:
                best, name = similarity, self._texts[candidate][0]
        return name


def index_of(named_texts: Sequence[tuple[str, str]], threshold: float = THRESHOLD) -> NearDuplicateIndex:
    """An index of (name, text) pairs."""
    index = NearDuplicateIndex(threshold)
    for name, text in named_texts:
        index.add(name, text)
    return index
