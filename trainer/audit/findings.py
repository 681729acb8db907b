"""Labels that are likely wrong or missing, and suspicious documents and labels, in the order in which to review them."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from ..data.documents import LabeledDocuments
from ..data.near_duplicates import duplicate_groups, signatures
from .scores import OutOfFoldScores, out_of_fold_scores


WRONG, MISSING, DUPLICATES = "wrong label", "missing label", "near-duplicates"
TOGETHER, RARE = "always together", "too rare"
KINDS = (WRONG, MISSING, DUPLICATES, TOGETHER, RARE)
REMOVE, ADD, DROP = "remove", "add", "drop"
CHANGES = (REMOVE, ADD, DROP)
# Number of characters of a document that a finding quotes.
EXCERPT = 400
# Minimum Jaccard similarity of the document sets of two labels that are "always together".
ALWAYS = 0.95
# Maximum number of document-label pairs on which `fuse_scores` fits its three coefficients.
MAX_PAIRS = 2_000_000
# Number of labels that are passed to cleanlab at a time.
LABELS_PER_STEP = 64


@dataclass(frozen=True)
class Finding:
    """
    One row of a findings file.

    Attributes:
        number (`int`): from 1, in the order of the list.
        kind (`str`): one of `KINDS`.
        change (`str`): what accepting the finding does: `"remove"` the label from the document, `"add"` it to the document, or `"drop"` it
            from all documents.
        label (`str`): its name.
        score (`float`): in [0, 1]; within a kind, and for wrong and missing labels together, higher is more certain.
        reason (`str`): a sentence.
        row (`int`, *optional*): position of the document in the files, from 1; `None` if the finding is about all documents of the label.
        id (`str`, *optional*): id of the document.
        text (`str`): the beginning of the document.
        decision (`str`): `"accept"`, `"reject"`, or `""` if not decided yet.
    """

    number: int
    kind: str
    change: str
    label: str
    score: float
    reason: str
    row: int | None = None
    id: str | None = None
    text: str = ""
    decision: str = ""


@dataclass
class LabelAudit:
    """
    What [`audit_labels`] returns; `print` shows it on one page.

    Attributes:
        findings (`list[Finding]`): those about documents first, the most certain first; then those about labels.
        num_documents (`int`), num_labels (`int`), num_assignments (`int`): N, L, and the total number of labels assigned to the documents.
        num_suspicious (`int`): document-label pairs that seem wrong or missing, whether listed or not.
        probabilities (`np.ndarray` of shape `(N, L)`): out-of-fold probabilities of the labels, float32.
    """

    findings: list[Finding]
    num_documents: int
    num_labels: int
    num_assignments: int
    num_suspicious: int
    probabilities: np.ndarray = field(repr=False)

    def __str__(self) -> str:
        counts = Counter(finding.kind for finding in self.findings)
        lines = [
            f"{self.num_documents:,} documents, {self.num_labels:,} labels, {self.num_assignments:,} assignments",
            "",
            *(f"  {kind:<16}{counts[kind]:>7,}  {MEANINGS[kind]}" for kind in KINDS),
        ]
        listed = counts[WRONG] + counts[MISSING] + counts[DUPLICATES]
        if self.num_suspicious > listed:
            lines.append(f"  The first {listed:,} of {self.num_suspicious:,} suspicious assignments are listed.")
        for kind in KINDS:
            best = [finding for finding in self.findings if finding.kind == kind][:3]
            lines += ["", f"{kind}:"] if best else []
            for finding in best:
                where = "" if finding.row is None else f"row {finding.row}: "
                lines.append(f"  {finding.score:.2f}  {where}{finding.change} {finding.label!r}: {finding.reason}")
                lines += [f"        {finding.text[:90]}..."] if finding.text else []
        most = Counter(f.label for f in self.findings if f.row is not None).most_common(5)
        if most:
            lines += ["", "Labels with the most findings: " + ", ".join(f"{name!r} ({n})" for name, n in most)]
        return "\n".join(lines)


MEANINGS = {
    WRONG: "a document has a label that does not fit it",
    MISSING: "a document lacks a label that fits it",
    DUPLICATES: "nearly the same documents have different labels",
    TOGETHER: "two labels almost always occur together",
    RARE: "a label has too few documents to learn it",
}


def audit_labels(
    documents: LabeledDocuments,
    model_name_or_path: str,
    label_descriptions: dict[str, str] | None = None,
    num_folds: int = 5,
    max_findings: int = 1000,
    min_documents: int = 5,
    max_length: int | None = None,
    seed: int = 0,
    use_cpu: bool | None = None,
    hide_progress: bool = False,
) -> LabelAudit:
    """
    Find likely errors in the labels of documents.

    Every document is scored by models that were trained on the others ([`out_of_fold_scores`]). Among all document-label pairs,
    cleanlab's confident learning (Northcutt et al., 2021, JAIR 70) selects the suspicious ones; [`suspicion`] ranks them.
    Near-duplicates with different labels, labels that always occur together, and labels with few documents are listed as well.

    Args:
        documents ([`LabeledDocuments`]): what [`load_documents`] returns: N documents with L labels.
        model_name_or_path (`str`): Hub name or folder of an encoder. It is not trained.
        label_descriptions (`dict[str, str]`, *optional*): by label name.
        num_folds (`int`, defaults to 5): at least 2.
        max_findings (`int`, defaults to 1000): maximum number of findings about documents; findings about labels are all listed.
        min_documents (`int`, defaults to 5): a label with fewer documents is "too rare": it is never reported as wrong, and is not
            compared with other labels.
        max_length (`int`, *optional*): maximum number of tokens per document.
        seed (`int`, defaults to 0): random seed of the folds and of training.
        use_cpu (`bool`, *optional*): whether to use the CPU even if there is an accelerator.
        hide_progress (`bool`, defaults to `False`): whether to hide progress bars.

    Returns:
        [`LabelAudit`].

    Raises:
        ImportError: cleanlab is not installed.
        ValueError: a number below its minimum, fewer documents than folds, fewer than two labels, scores of N x L that do not fit
            into memory, or an encoder that cannot be loaded.

    Example:

    ```python
    documents = load_documents("train.csv", text_columns=["title", "body"], label_column="tags", label_delimiter=";")
    audit = audit_labels(documents, "roberta-base")
    print(audit)
    ```
    """
    import_cleanlab()  # before minutes of work
    for name, value in (("max_findings", max_findings), ("min_documents", min_documents)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}, but it must be at least 1. Leave it out.")
    groups = duplicate_groups(signatures(documents.dataset["text"][:]))
    scores = out_of_fold_scores(
        documents, model_name_or_path, label_descriptions, num_folds, max_length, seed, use_cpu, hide_progress, groups
    )
    return rank_findings(documents, scores, groups, max_findings, min_documents, hide_progress)


def rank_findings(
    documents: LabeledDocuments,
    scores: OutOfFoldScores,
    groups: np.ndarray,
    max_findings: int = 1000,
    min_documents: int = 5,
    hide_progress: bool = False,
) -> LabelAudit:
    """
    The findings about scored documents.

    Args:
        documents, max_findings, min_documents, hide_progress: as in [`audit_labels`].
        scores ([`OutOfFoldScores`]): of the N documents.
        groups (`np.ndarray` of shape `(N,)`): each document's group of near-duplicates.
    """
    label_indices = documents.dataset["label_indices"][:]
    labels = multi_hot(label_indices, len(documents.labels))
    probabilities = fuse_scores(scores, labels)
    suspicious = chosen_by_cleanlab(label_indices, probabilities, hide_progress)
    # Rare labels always get low scores, so they would look wrong everywhere.
    suspicious &= ~labels | (np.asarray(documents.label_counts) >= min_documents)
    found = _of_documents(documents, labels, probabilities, suspicious, groups)
    listed = found[:max_findings] + [*_together(documents, labels, min_documents), *_rare(documents, min_documents)]
    listed = [replace(finding, number=number) for number, finding in enumerate(listed, start=1)]
    return LabelAudit(listed, len(labels), len(documents.labels), int(labels.sum()), len(found), probabilities)


def multi_hot(label_indices: Sequence[Sequence[int]], num_labels: int) -> np.ndarray:
    """Label ids of N documents as a Boolean matrix (N, L)."""
    labels: np.ndarray = np.zeros((len(label_indices), num_labels), dtype=bool)
    for row, ids in enumerate(label_indices):
        labels[row, ids] = True
    return labels


def fuse_scores(scores: OutOfFoldScores, labels: np.ndarray) -> np.ndarray:
    """
    Probabilities (N, L) of the given labels, float32: a logistic regression on the logits, the margins and the label frequency; for each
    fold, it is fitted on the other folds.

    Args:
        scores ([`OutOfFoldScores`]): of N documents.
        labels (`np.ndarray` of shape `(N, L)`): multi-hot.
    """
    means, spreads = zip(*((float(part.mean()), max(float(part.std()), 1e-6)) for part in scores[:2]))

    found: np.ndarray = np.zeros(labels.shape, np.float32)
    rng = np.random.default_rng(0)
    for fold in np.unique(scores.folds):
        inside, outside = np.flatnonzero(scores.folds != fold), np.flatnonzero(scores.folds == fold)
        most = max(1, MAX_PAIRS // labels.shape[1])
        inside = rng.choice(inside, most, replace=False) if len(inside) > most else inside
        counts = labels[scores.folds != fold].sum(axis=0)
        prior = np.log((counts + 1) / (len(labels) - counts + 1))

        def features(rows: np.ndarray, prior: np.ndarray = prior) -> np.ndarray:
            parts = [(part[rows] - mean) / spread for part, mean, spread in zip(scores[:2], means, spreads)]
            return np.stack([*parts, np.broadcast_to(prior, parts[0].shape)], axis=-1).reshape(-1, 3)

        targets = labels[inside].reshape(-1)
        if targets.all() or not targets.any():
            found[outside] = targets.mean()
            continue
        fused = LogisticRegression().fit(features(inside), targets)
        found[outside] = fused.predict_proba(features(outside))[:, 1].reshape(len(outside), -1)
    return found


def suspicion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    r"""
    How likely each label is wrong (if the document has it) or missing (if not), (N, L) in [0, 1].

    By Bayes' rule, the odds that a label is missing are $\rho \frac{p}{1-p}$, and the odds that a given one is wrong are
    $\epsilon \frac{1-p}{p}$, where ρ is the share of true labels that are missing and ε the share of other labels that were added. If
    equally many were lost and added, $\epsilon / \rho = \frac{\pi}{1-\pi}$ for the share π of given labels among all pairs. Only this
    ratio matters for the ranking:
    the score is $\sigma(\text{logit}(p))$ for missing and $\sigma(\text{logit}(\pi) - \text{logit}(p))$ for wrong labels.

    Args:
        probabilities (`np.ndarray` of shape `(N, L)`): see [`fuse_scores`].
        labels (`np.ndarray` of shape `(N, L)`): multi-hot.

    Example:

    ```python
    >>> suspicion(np.array([[0.9, 0.01], [0.1, 0.01]]), np.array([[False, True], [False, False]])).round(2).tolist()
    [[0.9, 0.97], [0.1, 0.01]]

    ```
    """
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    share = np.clip(labels.mean(), 1e-7, 1 - 1e-7)
    wrong = share * (1 - p) / (share * (1 - p) + (1 - share) * p)
    return np.where(labels, wrong, p)


def chosen_by_cleanlab(
    label_indices: Sequence[Sequence[int]], probabilities: np.ndarray, hide_progress: bool = False
) -> np.ndarray:
    """
    Which labels of which documents cleanlab considers wrong or missing, (N, L).

    Args:
        label_indices (`Sequence[Sequence[int]]` of length `N`): label ids of each document.
        probabilities (`np.ndarray` of shape `(N, L)`): out of sample.
        hide_progress (`bool`, defaults to `False`): no progress bar.
    """
    find = import_cleanlab()
    num_documents, num_labels = probabilities.shape
    labels = multi_hot(label_indices, num_labels)
    chosen: np.ndarray = np.zeros(labels.shape, dtype=bool)
    counts = labels.sum(axis=0)
    examined = np.flatnonzero((counts > 0) & (counts < num_documents))
    with tqdm(total=len(examined), desc="cleanlab", disable=hide_progress, leave=False) as bar:
        for start in range(0, len(examined), LABELS_PER_STEP):
            part = examined[start : start + LABELS_PER_STEP]
            lists = [np.flatnonzero(row).tolist() for row in labels[:, part]]
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # warnings about labels with few documents, which are findings of their own
                chosen[:, part] = find(lists, probabilities[:, part].astype(np.float64), n_jobs=1)
            bar.update(len(part))
    return chosen


def import_cleanlab() -> Any:
    """
    cleanlab's function that examines the labels one by one.

    Raises:
        ImportError: cleanlab is not installed.
    """
    try:
        from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "cleanlab":
            raise
        raise ImportError(
            'The audit needs cleanlab, which is not installed. Run `pip install "sep-mldc[audit]"`, or `pip install "cleanlab>=2.7"`.'
        ) from None
    return find_multilabel_issues_per_class


def _of_documents(
    documents: LabeledDocuments,
    labels: np.ndarray,
    probabilities: np.ndarray,
    suspicious: np.ndarray,
    groups: np.ndarray,
) -> list[Finding]:
    """Findings about documents, the most certain first."""
    data, names = documents.dataset, documents.labels
    ids = data["id"] if "id" in data.column_names else None
    certainties, share = suspicion(probabilities, labels), labels.mean(axis=0)
    reasons: dict[tuple[int, int], tuple[str, float, str]] = {}
    for row, label in np.argwhere(suspicious).tolist():
        kind = WRONG if labels[row, label] else MISSING
        reason = f"models of the other folds give it {_percent(float(probabilities[row, label]))}; {_percent(float(share[label]))} of all documents have it"
        reasons[row, label] = kind, float(certainties[row, label]), reason
    for row, label, certainty, reason in _differing_duplicates(labels, probabilities, groups):
        former = reasons.get((row, label))
        certainty = max(certainty, former[1]) if former else certainty
        reasons[row, label] = DUPLICATES, certainty, f"{reason}; {former[2]}" if former else reason
    texts = data["text"][:]
    found = [
        Finding(
            number=0,
            kind=kind,
            change=REMOVE if labels[row, label] else ADD,
            label=names[label],
            score=score,
            reason=reason,
            row=row + 1,
            id=None if ids is None or ids[row] is None else str(ids[row]),
            text=" ".join(texts[row][: 4 * EXCERPT].split())[:EXCERPT],
        )
        for (row, label), (kind, score, reason) in reasons.items()
    ]
    return sorted(found, key=lambda finding: (-finding.score, finding.row, finding.label))


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if 0.1 <= share <= 0.9 else f"{100 * share:.1f}%"


def _differing_duplicates(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray
) -> Iterator[tuple[int, int, float, str]]:
    """
    Row, label, score and reason for each document that differs from most of its near-duplicates. If as many have the label as not, the
    models' probabilities decide.
    """
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if len(rows) == 1:
            continue
        having = labels[rows].sum(axis=0)
        for label in np.flatnonzero((having > 0) & (having < len(rows))):
            has = labels[rows, label]
            share = has.mean()
            keep = share > 0.5 or (share == 0.5 and probabilities[rows, label].mean() >= 0.5)
            others = ", ".join(str(row + 1) for row in rows[has == keep][:3])
            verb = "have" if keep else "lack"
            for row in rows[has != keep]:
                reason = f"{int((has == keep).sum())} of {len(rows)} documents that are nearly the same {verb} it: row {others}"
                yield int(row), int(label), float(max(share, 1 - share)), reason


def _together(documents: LabeledDocuments, labels: np.ndarray, min_documents: int) -> list[Finding]:
    """Labels that almost always occur together with another one, each with the most similar preceding label."""
    counts = labels.sum(axis=0)
    matrix = sparse.csr_matrix(labels.astype(np.int32))
    both = sparse.triu(matrix.T @ matrix, k=1).tocoo()
    union = counts[both.row] + counts[both.col] - both.data
    similarity = both.data / np.maximum(union, 1)
    kept = (similarity >= ALWAYS) & (np.minimum(counts[both.row], counts[both.col]) >= min_documents)
    best: dict[int, tuple[float, int]] = {}
    for first, second, value in zip(both.row[kept].tolist(), both.col[kept].tolist(), similarity[kept].tolist()):
        best[second] = max(best.get(second, (0.0, -1)), (value, -first))
    names = documents.labels
    found = [
        Finding(
            number=0,
            kind=TOGETHER,
            change=DROP,
            label=names[second],
            score=value,
            reason=f"of {int(labels[:, [-first, second]].any(axis=1).sum())} documents with it or {names[-first]!r}, "
            f"{int(labels[:, [-first, second]].all(axis=1).sum())} have both: one of the two labels may be enough",
        )
        for second, (value, first) in best.items()
    ]
    return sorted(found, key=lambda finding: (-finding.score, finding.label))


def _rare(documents: LabeledDocuments, min_documents: int) -> list[Finding]:
    """Labels with fewer documents than are needed."""
    return [
        Finding(
            number=0,
            kind=RARE,
            change=DROP,
            label=documents.labels[label],
            score=1 - documents.label_counts[label] / min_documents,
            reason=f"{documents.label_counts[label]} {'document has' if documents.label_counts[label] == 1 else 'documents have'} it, and "
            f"{min_documents} are needed: add documents or drop it",
        )
        for label in np.argsort(documents.label_counts, kind="stable").tolist()
        if documents.label_counts[label] < min_documents
    ]
