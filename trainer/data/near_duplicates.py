"""Finds near-duplicate documents with MinHash, in linear time and with 256 bytes per document."""

import re
import zlib
from collections.abc import Iterable

import numpy as np


NUM_HASHES = 64
ROWS_PER_BAND = 4
# Two documents are near-duplicates if the estimated Jaccard similarity of their sets of three-word shingles is at least this: in a text
# of 100 words, about five words differ.
THRESHOLD = 0.7
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+")  # a Chinese or Japanese character counts as a word
_random = np.random.default_rng(0)
_FACTORS = _random.integers(1, 2**63, NUM_HASHES, dtype=np.uint64) | np.uint64(1)
_SHIFTS = _random.integers(0, 2**63, NUM_HASHES, dtype=np.uint64)
_RUN = _random.integers(1, 2**63, 3, dtype=np.uint64) | np.uint64(1)


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def text_key(text: str) -> int:
    """A 64-bit hash that is the same for texts with the same words, regardless of case, whitespace and punctuation."""
    joined = " ".join(words(text)).encode("utf-8", "surrogatepass")
    return zlib.crc32(joined) << 32 | zlib.crc32(joined[::-1])


def signature(text: str) -> np.ndarray:
    """
    MinHash of the three-word runs of a text; the share of equal values of two texts estimates their Jaccard similarity.

    Returns:
        `np.ndarray` of shape `(NUM_HASHES,)`, uint32.
    """
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words(text)], dtype=np.uint64)
    if len(hashes) == 0:
        return np.full(NUM_HASHES, 2**32 - 1, dtype=np.uint32)
    if len(hashes) < 3:
        hashes = np.pad(hashes, (0, 3 - len(hashes)))
    runs = hashes[:-2] * _RUN[0] + hashes[1:-1] * _RUN[1] + hashes[2:] * _RUN[2]
    runs = np.unique(runs ^ (runs >> np.uint64(31)))
    smallest: np.ndarray = np.full(NUM_HASHES, 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(runs), 4096):  # a long document needs no more memory than a short one
        part = runs[start : start + 4096]
        np.minimum(smallest, (part[:, None] * _FACTORS + _SHIFTS).min(axis=0), out=smallest)
    return (smallest >> np.uint64(32)).astype(np.uint32)


def signatures(texts: Iterable[str]) -> np.ndarray:
    """[`signature`] of each text, `(N, NUM_HASHES)`."""
    rows = [signature(text) for text in texts]
    return np.stack(rows) if rows else np.zeros((0, NUM_HASHES), dtype=np.uint32)


def duplicate_groups(signatures: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """
    Groups of near-duplicates: two documents are in one group if a chain of near-duplicates leads from one to the other.

    Args:
        signatures (`np.ndarray` of shape `(N, NUM_HASHES)`): see [`signature`].
        threshold (`float`): estimated similarity from which two documents are near-duplicates.

    Returns:
        `np.ndarray` of shape `(N,)`, the number of each document's group, from 0.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(signatures)
    empty = (signatures == 2**32 - 1).all(axis=1)
    firsts: list[np.ndarray] = [np.zeros(0, dtype=int)]
    seconds: list[np.ndarray] = [np.zeros(0, dtype=int)]
    for band in range(0, NUM_HASHES, ROWS_PER_BAND):
        first, second = _candidates(signatures[:, band : band + ROWS_PER_BAND])
        for start in range(0, len(first), 100_000):
            a, b = first[start : start + 100_000], second[start : start + 100_000]
            near = ((signatures[a] == signatures[b]).mean(axis=1) >= threshold) & ~empty[a]
            firsts.append(a[near])
            seconds.append(b[near])
    a, b = np.concatenate(firsts), np.concatenate(seconds)
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _candidates(band: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidate pairs of documents with the same band: each document with the next and with the first one of its bucket, so that the number
    of pairs stays linear."""
    keys = np.ascontiguousarray(band).view([("", band.dtype)] * band.shape[1]).ravel()
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    starts = np.maximum.accumulate(np.where(np.r_[False, same], 0, np.arange(len(order)))) if len(order) else order
    later: np.ndarray = np.flatnonzero(same) + 1
    first = np.concatenate([order[later - 1], order[starts[later]]])
    return first, np.concatenate([order[later], order[later]])
