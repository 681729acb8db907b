"""
Solvers for one linear classifier per label on sparse features: kernel ridge regression for all labels at once, and support vector
machines on all documents or on a shortlist of hard ones per label.
"""

from collections.abc import Sequence

import numpy as np
from joblib import Parallel, delayed
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import strmm
from scipy.linalg.lapack import strtri
from sklearn.svm import LinearSVC
from tqdm.auto import tqdm

from modeling_sep_mldc.lexical_sep_mldc import UNSEEN_MARGIN

from .calibration import CommonLine, fit_common_line, fit_lines, in_steps, log_frequencies


# Default λ of the ridge regressions.
PENALTY = 0.3
# Number of labels solved at a time, and of documents per block of the kernel matrix: a few hundred MB at most.
LABELS_PER_STEP = 256
DOCUMENTS_PER_BLOCK = 1024
# Number of features of a centroid that are used to find its nearest documents.
CENTROID_FEATURES = 100


def kernel_bytes(num_documents: int) -> int:
    """Memory in bytes of the kernel matrix in [`fit_kernel_ridge`]."""
    return 4 * num_documents**2


def fit_kernel_ridge(
    features: sparse.csr_matrix,
    label_indices: Sequence[Sequence[int]],
    num_labels: int,
    num_features: int,
    penalty: float = PENALTY,
    calibrate: bool = False,
    hide_progress: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""
    One ridge regression per label on targets -1 and 1; the `num_features` weights with the largest absolute value are kept.

    With the kernel $K = X X^\top + 1$, all labels share one Cholesky factor of $K + \lambda I$; the constant stands for the bias,
    a constant feature that is penalized like the others. On text, the squared loss ranks as well as the squared hinge (Rifkin and
    Klautau, 2004, In defense of one-vs-all classification, JMLR 5), at a cost that hardly grows with the number of labels.

    The leave-one-out margin of a training document is $y_i - \alpha_i / (K + \lambda I)^{-1}_{ii}$, for
    the dual weights $\alpha = (K + \lambda I)^{-1} y$ (Rifkin and Lippert, 2007, Notes on regularized least squares): all N of them at the cost of
    one inverse. With `calibrate`, weights and bias of each label are transformed by the line from these margins to the label's log-odds,
    see [`~trainer.lexical.calibration.fit_lines`]. This makes the margins of rare labels, which are all close to -1, comparable to those
    of frequent labels.

    Args:
        features (`scipy.sparse.csr_matrix` of shape `(N, V)`): documents, as rows of length 1.
        label_indices (`Sequence[Sequence[int]]` of length `N`): label ids of each document.
        num_labels (`int`), num_features (`int`): L, F.
        penalty (`float`, defaults to 0.3): λ.
        calibrate (`bool`, defaults to `False`): whether margins are log-odds instead of estimates of the targets -1 and 1.
        hide_progress (`bool`, defaults to `False`): no progress bar.

    Returns:
        feature ids (L, F), weights (L, F) and biases (L,); a label without documents, or of all of them, has weights of 0.
    """
    used, compact = _used_columns(features)
    members = _members(label_indices, num_labels)
    token_ids, weights, biases = _no_classifiers(num_labels, num_features)
    num_documents = compact.shape[0]
    # Labels of no documents or of all documents cannot be learned.
    biases[[len(rows) == num_documents for rows in members]] = -UNSEEN_MARGIN
    learned = [index for index, rows in enumerate(members) if 0 < len(rows) < num_documents]
    if not learned or not len(used):
        return token_ids, weights, biases
    kernel = _kernel(compact)
    kernel[np.diag_indices(num_documents)] += penalty
    factor = cho_factor(kernel, lower=True, overwrite_a=True, check_finite=False)
    # Only leave-one-out margins need the inverse of the factor, for the diagonal of the kernel matrix's inverse.
    inverse = _inverse_of_factor(factor[0]) if calibrate else None
    diagonal = None if inverse is None else _diagonal_of_inverse(inverse)

    def duals(labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        targets = np.full((num_documents, len(labels)), -1, dtype=np.float32, order="F")
        for column, index in enumerate(labels):
            targets[members[index], column] = 1
        if inverse is None:
            return cho_solve(factor, targets, check_finite=False), targets
        return strmm(1.0, inverse, strmm(1.0, inverse, targets, lower=1), lower=1, trans_a=1), targets

    def left_out(dual: np.ndarray, targets: np.ndarray) -> np.ndarray:
        assert diagonal is not None
        return targets - dual / diagonal[:, None]

    line = None
    if calibrate:
        line = fit_common_line(lambda labels: left_out(*duals(labels)), members, num_documents)
    transposed = sparse.csr_matrix(compact.T)
    size = min(num_features, len(used))
    with tqdm(total=len(learned), desc="Lexical scores", disable=hide_progress, leave=False) as bar:
        for step in in_steps(learned, LABELS_PER_STEP):
            dual, targets = duals(step)
            slopes: np.ndarray = np.ones(len(step))
            intercepts: np.ndarray = np.zeros(len(step))
            if line is not None:
                slopes, intercepts = fit_lines(left_out(dual, targets), [members[index] for index in step], line)
            biases[step] = slopes * dual.sum(axis=0) + intercepts
            rows = np.ascontiguousarray((transposed @ (dual * np.float32(slopes))).T)
            for index, row in zip(step, rows, strict=True):
                _keep_largest(row, size, used, token_ids[index], weights[index])
            bar.update(len(step))
    if line is not None:
        _place_unlearned(biases, members, num_documents, line, learned)
    return token_ids, weights, biases


def fit_sparse_svms(
    features: sparse.csr_matrix,
    label_indices: Sequence[Sequence[int]],
    num_labels: int,
    num_features: int,
    cost: float = 1.0,
    class_weights: str = "none",
    num_jobs: int | None = None,
    hide_progress: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    One linear SVM (squared hinge loss, scikit-learn's `LinearSVC`) per label; the `num_features` weights with the largest absolute value
    are kept.

    For more documents than fit into memory with [`fit_kernel_ridge`]. Time is proportional to documents x labels.

    Args:
        features, label_indices, num_labels, num_features, hide_progress: as in [`fit_kernel_ridge`].
        cost (`float`, defaults to 1.0): C.
        class_weights (`str`, defaults to `"none"`): with `"balanced"`, as in scikit-learn, C is inversely proportional to the number
            of documents with (or without) a label, so that both groups have the same total weight.
        num_jobs (`int`, *optional*): threads; one if not given.

    Returns:
        feature ids (L, F), weights (L, F) and biases (L,); a label without documents, or of all of them, has weights of 0.
    """
    # Only columns that occur are kept, because their number determines liblinear's time and memory.
    used, compact = _used_columns(features)
    compact = compact.astype(np.float64)
    members = _members(label_indices, num_labels)
    token_ids, weights, biases = _no_classifiers(num_labels, num_features)
    size, balance = min(num_features, max(len(used), 1)), "balanced" if class_weights == "balanced" else None

    def fit(index: int) -> None:
        rows = members[index]
        if not rows or not len(used):
            return
        if len(rows) == compact.shape[0]:
            biases[index] = -UNSEEN_MARGIN  # every document has it
            return
        target = np.zeros(compact.shape[0], dtype=np.int8)
        target[rows] = 1
        svm = LinearSVC(C=cost, class_weight=balance).fit(compact, target)
        _keep_largest(svm.coef_[0], size, used, token_ids[index], weights[index])
        biases[index] = svm.intercept_[0]

    bar = tqdm(range(num_labels), desc="Lexical scores", disable=hide_progress, leave=False)
    # Threads are enough: liblinear releases the GIL, and each label writes only its own rows.
    Parallel(n_jobs=num_jobs or 1, prefer="threads")(delayed(fit)(index) for index in bar)
    return token_ids, weights, biases


def fit_shortlist_svms(
    features: sparse.csr_matrix,
    label_indices: Sequence[Sequence[int]],
    num_labels: int,
    num_features: int,
    cost: float = 1.0,
    class_weights: str = "none",
    num_near: int = 2000,
    num_random: int = 8000,
    num_jobs: int | None = None,
    hide_progress: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    One linear SVM per label, as in [`fit_sparse_svms`], but fitted only on the documents with the label, the other documents nearest to their
    centroid, and random documents.

    For so many documents and labels that SVMs on all documents would take too long: the cost per label is proportional to the number of
    its documents. Most documents are easy negatives (Prabhu et al., 2018, Parabel, WWW). The random documents represent all omitted ones
    and are weighted accordingly, so that margins of different labels are comparable.

    Args:
        features, label_indices, num_labels, num_features, cost, class_weights, num_jobs, hide_progress: as in [`fit_sparse_svms`].
        num_near (`int`, defaults to 2000): number of nearest documents without the label; at least ten times the number of documents
            with the label.
        num_random (`int`, defaults to 8000): number of random documents, the same for all labels.

    Returns:
        feature ids (L, F), weights (L, F) and biases (L,), as [`fit_sparse_svms`].
    """
    used, compact = _used_columns(features)
    num_documents, num_terms = compact.shape
    members = _members(label_indices, num_labels)
    token_ids, weights, biases = _no_classifiers(num_labels, num_features)
    biases[[len(rows) == num_documents for rows in members]] = -UNSEEN_MARGIN
    learned = [index for index, rows in enumerate(members) if 0 < len(rows) < num_documents]
    if not learned or not num_terms:
        return token_ids, weights, biases
    transposed = compact.T.tocsr()
    generator = np.random.default_rng(0)
    shared = generator.choice(num_documents, min(num_random, num_documents), replace=False)

    def fit(index: int, near: np.ndarray, similarity: np.ndarray) -> None:
        size = len(members[index]) + max(num_near, 10 * len(members[index]))
        if len(near) > size:
            near = near[np.argpartition(-similarity, size - 1)[:size]]
        near = np.union1d(near, members[index])
        others = np.setdiff1d(shared, near, assume_unique=True)
        rows = np.concatenate([near, others])
        targets = np.isin(rows, members[index]).astype(np.int8)
        if targets.all():
            biases[index] = -UNSEEN_MARGIN
            return
        counts = np.ones(len(rows))
        counts[len(near) :] = (num_documents - len(near)) / max(len(others), 1)
        if class_weights == "balanced":
            for own in (targets == 1, targets == 0):
                counts[own] *= num_documents / (2 * counts[own].sum())
        columns, part = _used_columns(compact[rows])
        svm = LinearSVC(C=cost).fit(part.astype(np.float64), targets, sample_weight=counts)
        _keep_largest(svm.coef_[0], min(num_features, len(columns)), used[columns], token_ids[index], weights[index])
        biases[index] = svm.intercept_[0]

    with (
        tqdm(total=len(learned), desc="Lexical scores", disable=hide_progress, leave=False) as bar,
        Parallel(n_jobs=num_jobs or 1, prefer="threads") as parallel,
    ):
        for step in in_steps(learned, LABELS_PER_STEP):
            near = compact @ _centroids(transposed, [members[index] for index in step])
            near = near.tocsc()
            parallel(
                delayed(fit)(index, near.indices[slice(*ends)], near.data[slice(*ends)])
                for index, ends in zip(step, zip(near.indptr, near.indptr[1:]), strict=True)
            )
            bar.update(len(step))
    return token_ids, weights, biases


def _centroids(transposed: sparse.csr_matrix, members: list[list[int]]) -> sparse.csc_matrix:
    """The sums of the documents (V, N) of each of n labels, as columns (V, n) with their largest entries only."""
    columns: np.ndarray = np.repeat(np.arange(len(members)), [len(rows) for rows in members])
    ones = np.ones(len(columns), dtype=transposed.dtype)
    chosen = sparse.csc_matrix((ones, (np.concatenate(members), columns)), shape=(transposed.shape[1], len(members)))
    centroids = (transposed @ chosen).tocsc()
    for start, end in zip(centroids.indptr, centroids.indptr[1:]):
        values = centroids.data[start:end]
        if len(values) > CENTROID_FEATURES:
            values[values < np.partition(values, -CENTROID_FEATURES)[-CENTROID_FEATURES]] = 0
    centroids.eliminate_zeros()
    return centroids


def _used_columns(features: sparse.csr_matrix) -> tuple[np.ndarray, sparse.csr_matrix]:
    used = np.flatnonzero(np.bincount(features.indices, minlength=features.shape[1]))
    return used, features[:, used]


def _members(label_indices: Sequence[Sequence[int]], num_labels: int) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in range(num_labels)]
    for row, ids in enumerate(label_indices):
        for index in set(ids):
            members[index].append(row)
    return members


def _no_classifiers(num_labels: int, num_features: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = num_labels, num_features
    return np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.full(num_labels, UNSEEN_MARGIN, np.float32)


def _keep_largest(row: np.ndarray, size: int, used: np.ndarray, token_ids: np.ndarray, weights: np.ndarray) -> None:
    kept = np.argpartition(-np.abs(row), size - 1)[:size]
    token_ids[:size], weights[:size] = used[kept], row[kept]


def _place_unlearned(
    biases: np.ndarray, members: list[list[int]], num_documents: int, line: CommonLine, learned: list[int]
) -> None:
    """
    Log-odds biases of labels of no documents and of labels of all documents: the values of the common line, but not above, or respectively
    below, the bias of any other label.
    """
    counts = np.array([len(rows) for rows in members])
    for count, margin, bound in ((0, UNSEEN_MARGIN, np.minimum), (num_documents, -UNSEEN_MARGIN, np.maximum)):
        slope, intercept = line.at(log_frequencies(np.array([count]), num_documents))
        biases[counts == count] = bound(slope * margin + intercept, bound.reduce(biases[learned]))


def _inverse_of_factor(factor: np.ndarray) -> np.ndarray:
    """Invert a lower Cholesky factor in place; entries above the diagonal are arbitrary."""
    inverse, failed = strtri(factor, lower=1, overwrite_c=1)
    if failed:
        raise ArithmeticError(
            f"The kernel of {len(factor)} documents has no inverse (strtri: {failed}). Raise `penalty`."
        )
    return inverse


def _diagonal_of_inverse(factor: np.ndarray) -> np.ndarray:
    """The diagonal (N,) of the inverse of a matrix, from the inverse of its lower Cholesky factor."""
    diagonal = np.empty(len(factor), dtype=factor.dtype)
    for start in range(0, len(factor), DOCUMENTS_PER_BLOCK):
        columns = slice(start, start + DOCUMENTS_PER_BLOCK)
        block, below = np.tril(factor[columns, columns]), factor[columns.stop :, columns]
        diagonal[columns] = np.einsum("ij,ij->j", block, block) + np.einsum("ij,ij->j", below, below)
    return diagonal


def _kernel(features: sparse.csr_matrix) -> np.ndarray:
    """The lower triangle of X X' + 1, (N, N) in float32; entries above the diagonal are arbitrary."""
    num_documents = features.shape[0]
    kernel = np.empty((num_documents, num_documents), dtype=np.float32, order="F")
    for start in range(0, num_documents, DOCUMENTS_PER_BLOCK):
        end = start + DOCUMENTS_PER_BLOCK
        kernel[start:, start:end] = (features[start:] @ features[start:end].T).toarray()
    kernel += 1
    return kernel
