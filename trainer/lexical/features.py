"""TF-IDF of tokens and of pairs of neighboring tokens, as the model computes it for a batch."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer

from modeling_sep_mldc.lexical_sep_mldc import bigram_ids


# A prime number near 2^17: few of the pairs that occur in two documents or more share a bucket.
NUM_BIGRAMS = 131_071
# Pairs get half the weight, because their tokens are features, too.
BIGRAM_WEIGHT = 0.5


def token_tf_idf(
    documents: Iterable[Sequence[int]], vocab_size: int, special_ids: Sequence[int], num_bigrams: int = 0
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """
    The sparse (N, V + num_bigrams) matrix of what [`~modeling_sep_mldc.lexical_sep_mldc.term_weights`] gives for a batch, and
    the idf (V + num_bigrams,).

    The same as scikit-learn's TF-IDF of token ids with `sublinear_tf=True`, except that special tokens are ignored, tokens that occur in no
    document have an idf of 0, and the idf of pairs is halved, and 0 for buckets that occur in fewer than two documents.

    Args:
        documents (iterable of `N` lists): token ids.
        vocab_size (`int`): V.
        special_ids (`Sequence[int]`): tokens to ignore.
        num_bigrams (`int`, defaults to 0): buckets for pairs of neighboring tokens; 0: tokens alone.
    """
    special: np.ndarray = np.zeros(vocab_size, dtype=bool)
    special[list(special_ids)] = True
    rows = [_terms(np.asarray(ids, dtype=np.int64), special, num_bigrams) for ids in documents]
    offsets = np.cumsum([0] + [len(row) for row in rows])
    terms = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    counts = sparse.csr_matrix((np.ones(len(terms)), terms, offsets), shape=(len(rows), vocab_size + num_bigrams))
    counts.sum_duplicates()
    frequencies = np.bincount(counts.indices, minlength=counts.shape[1])
    transformer = TfidfTransformer(sublinear_tf=True, norm=None).fit(counts)
    idf = np.where(frequencies > 0, transformer.idf_, 0.0)
    idf[vocab_size:] *= BIGRAM_WEIGHT * (frequencies[vocab_size:] > 1)
    np.log(counts.data, out=counts.data)
    counts.data += 1
    matrix = counts @ sparse.diags_array(idf)
    matrix.eliminate_zeros()
    lengths = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    matrix = sparse.diags_array(1 / np.maximum(np.asarray(lengths).ravel(), 1e-9)) @ matrix
    return sparse.csr_matrix(matrix, dtype=np.float32), idf.astype(np.float32)


def _terms(ids: np.ndarray, special: np.ndarray, num_bigrams: int) -> np.ndarray:
    kept = ~special[ids]
    if not num_bigrams:
        return ids[kept]
    tokens = torch.from_numpy(ids)
    pairs = len(special) + bigram_ids(tokens[:-1], tokens[1:], num_bigrams).numpy()
    return np.concatenate([ids[kept], pairs[kept[:-1] & kept[1:]]])
