"""Learns labels that were added to a trained model from their first few documents, in seconds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.added_labels_sep_mldc import fit_cosine_calibration
from modeling_sep_mldc.label_texts_sep_mldc import tokenize_label_texts
from modeling_sep_mldc.lexical_sep_mldc import present_term_weights


# Chosen on debtags with 1, 5 and 20 documents per label: see `benchmarks/new_labels.py`.
PENALTY, LEXICAL_PENALTY = 0.2, 0.2
# Documents with a label are weighted as this share of all documents. In the few documents collected for a label, its share is far too
# high; with its true share, no document would reach the threshold.
POSITIVE_SHARE = 0.1
MAX_LEXICAL_TOKENS = 512
# Maximum numbers of documents and labels for the calibration of cosines.
MAX_SAMPLE_DOCUMENTS, MAX_SAMPLE_LABELS = 1000, 256


def fit_new_labels(
    model: SepMldcForMultiLabelClassification,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Mapping[str, Any]],
    other_documents: Sequence[str] = (),
    batch_size: int = 16,
    hide_progress: bool = False,
) -> dict[str, int]:
    r"""
    Learn labels that were added with `model.add_labels` from their first documents.

    For each label, a logistic regression on the normalized document embedding is shrunk toward the calibrated cosine
    $w_0 \cdot e + b_0$ that the label started from:

    $$\min_w \sum_i c_i \, \ell(w \cdot e_i + b_0, y_i) + \frac{\lambda}{2} \lVert w - w_0 \rVert^2$$

    with the binary cross-entropy ℓ, λ = 0.2, and weights $c_i$ such that documents without the label have nine times the total weight of
    those with it. A model with lexical scores also gets weights for words, shrunk toward 0. The encoder and all other labels do not
    change: the logits of the other labels stay bit-identical. The thresholds of the learned labels are set to the best common threshold
    for all labels. Every call starts from the cosine again, so pass all available documents. With hundreds of documents per label, train
    the model again instead.

    Args:
        model ([`SepMldcForMultiLabelClassification`]): with added labels; changed in place.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        documents (iterable of `dict`): `{"text": str, "labels": list of str}`, such as the rows of a `Dataset`; about five for each label.
            All added labels of a document must be listed: a label that is not listed counts as absent. Other labels are ignored.
        other_documents (`Sequence[str]`, *optional*): texts with none, or hardly any, of the new labels, such as a few hundred training
            documents. They reduce false predictions of new labels, and are required if all `documents` have the same label.
        batch_size (`int`, defaults to 16): documents that are encoded together.
        hide_progress (`bool`, defaults to `False`): no progress bar.

    Returns:
        `dict[str, int]`: the number of documents of each label that was learned. Added labels without documents are still scored by the cosine.

    Raises:
        ValueError: the model has no added labels, a document is not of that form or has a label that the model does not know, or no document
            has an added label.

    Example:

    ```python
    model.add_labels({"cs.QP": "Quantum programming languages and compilers."}, tokenizer)
    fit_new_labels(model, tokenizer, [{"text": "A compiler for quantum circuits.", "labels": ["cs.QP"]}, ...])
    model.save_pretrained("with_new_labels")
    ```
    """
    texts, targets = _checked_documents(model, documents)
    others = _checked_texts(other_documents)
    targets = np.concatenate([targets, np.zeros((len(others), targets.shape[1]), dtype=bool)])
    return fit_encoded_documents(
        model, tokenizer, encode_documents(model, tokenizer, texts + others, batch_size, hide_progress), targets
    )


@torch.no_grad()
def fit_encoded_documents(
    model: SepMldcForMultiLabelClassification,
    tokenizer: PreTrainedTokenizerBase,
    documents: "EncodedDocuments",
    targets: np.ndarray,
) -> dict[str, int]:
    """
    The steps of [`fit_new_labels`] after encoding the documents.

    Args:
        model, tokenizer: as in [`fit_new_labels`].
        documents ([`EncodedDocuments`]): N documents.
        targets (`np.ndarray` of shape `(N, n)`): which of the n added labels they have.
    """
    config, added = model.config, model.added
    trained = config.num_labels - len(added)
    learned = np.flatnonzero(targets.any(axis=0)).tolist()
    all_texts, chosen = config.label_texts, set(learned)
    label_texts = [all_texts[trained + label] for label in learned]
    embeds = model.encode_labels(tokenize_label_texts(tokenizer, label_texts, min(64, config.max_tokens(tokenizer))))
    added.start_from_cosines(learned, embeds)
    start, bias = added.weights.double().cpu().numpy(), added.bias.double().cpu().numpy()
    for label in learned:
        weights, of_terms = _fit(documents, targets[:, label], start[label], bias[label])
        added.weights[label] = torch.from_numpy(weights).to(added.weights)
        if model.lexical is not None:
            _store_term_weights(model.lexical, trained + label, documents.used_terms, of_terms)
    usual = config.usual_threshold
    if config.thresholds is not None:
        config.thresholds = [
            usual if index - trained in chosen else threshold for index, threshold in enumerate(config.thresholds)
        ]
    config.drop_guarantee()
    return {config.id2label[trained + label]: int(targets[:, label].sum()) for label in learned}


class CosineSample:
    """
    Collects cosines of documents and the texts of trained labels, and whether the documents have these labels.

    Args:
        model ([`SepMldcForMultiLabelClassification`]): the model, with its final weights.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): without a tokenizer, nothing is collected.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.label_embeds: torch.Tensor | None = None
        self.labels: list[int] = []
        self.cosines: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []

    def collect(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Yield the batches ([`~trainer.LogitBatch`] with embeddings) unchanged, and record those of the first 1,000 documents."""
        for batch in batches:
            wanted = self.tokenizer is not None and self.model.config.num_added_labels < self.model.config.num_labels
            if wanted and batch.labels is not None and len(self) < MAX_SAMPLE_DOCUMENTS:
                self._add(batch.inputs["document_embeds"], batch.labels)
            yield batch

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.cosines)

    def _add(self, embeds: torch.Tensor, labels: torch.Tensor) -> None:
        config = self.model.config
        if self.label_embeds is None:
            trained = config.num_labels - config.num_added_labels
            self.labels = (
                np.unique(np.linspace(0, trained - 1, min(trained, MAX_SAMPLE_LABELS)).round()).astype(int).tolist()
            )
            chosen = set(self.labels)
            texts = [text for index, text in enumerate(config.label_texts) if index in chosen]
            inputs = tokenize_label_texts(self.tokenizer, texts, min(64, config.max_tokens(self.tokenizer)))
            self.label_embeds = torch.nn.functional.normalize(self.model.encode_labels(inputs), dim=-1, eps=1e-6)
        directions = torch.nn.functional.normalize(embeds.to(self.label_embeds), dim=-1, eps=1e-6)
        self.cosines.append((directions @ self.label_embeds.t()).cpu())
        self.targets.append(labels[:, self.labels].cpu())

    def calibration(self) -> dict[str, float] | None:
        """The value for `config.cosine_calibration`; `None` if no document has any of the labels."""
        if not any(rows.any() for rows in self.targets):
            return None
        return fit_cosine_calibration(torch.cat(self.cosines), torch.cat(self.targets))


@dataclass
class EncodedDocuments:
    """
    Encoded documents from which new labels are learned.

    Attributes:
        directions (`np.ndarray` of shape `(N, d)`): document embeddings of length 1.
        terms (`np.ndarray` of shape `(N, K)`): TF-IDF of the K terms of `used_terms`; K is 0 without lexical scores.
        used_terms (`np.ndarray` of shape `(K,)`): terms of the lexical scores.
    """

    directions: np.ndarray
    terms: np.ndarray
    used_terms: np.ndarray


def encode_documents(
    model: Any, tokenizer: Any, texts: list[str], batch_size: int = 16, hide_progress: bool = False
) -> EncodedDocuments:
    """Encode N texts without gradient and without dropout. Long texts are truncated to what the encoder reads."""
    embeds, terms = [], []
    lexical, limit, training = model.lexical, model.config.max_tokens(tokenizer), model.training
    model.eval()
    try:
        steps = range(0, len(texts), batch_size)
        for start in tqdm(steps, desc="Encoding documents", disable=hide_progress, leave=False):
            batch = tokenizer(
                texts[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=limit if lexical is None else max(limit, MAX_LEXICAL_TOKENS),
                return_tensors="pt",
            ).to(model.device)
            with torch.no_grad():
                found = model.encode(**batch, max_length=limit)[0]
            embeds.append(torch.nn.functional.normalize(found.float(), dim=-1, eps=1e-6).cpu())
            if lexical is not None:
                terms.append(_terms_of(lexical, batch["input_ids"], batch["attention_mask"]))
    finally:
        model.train(training)
    directions = torch.cat(embeds).double().numpy()
    if not terms:
        return EncodedDocuments(directions, np.zeros((len(texts), 0)), np.zeros(0, dtype=np.int64))
    rows = sparse.vstack(terms).tocsr()
    used = np.flatnonzero(np.bincount(rows.indices, minlength=rows.shape[1]))
    return EncodedDocuments(directions, rows[:, used].toarray().astype(np.float64), used)


def _terms_of(lexical: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> sparse.csr_matrix:
    """TF-IDF (B, V + num_bigrams) of documents, as the lexical scores of the model compute it."""
    weights, row_of_term = present_term_weights(input_ids, attention_mask, lexical.idf, lexical.num_bigrams)
    present = row_of_term.nonzero().flatten()
    dense = weights[row_of_term[present].long()].t().double().cpu().numpy()
    documents, columns = dense.nonzero()
    shape = (len(dense), len(row_of_term))
    return sparse.csr_matrix((dense[documents, columns], (documents, present.cpu().numpy()[columns])), shape=shape)


def _fit(
    documents: EncodedDocuments, targets: np.ndarray, start: np.ndarray, bias: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the direction (d,) and of terms (K,) of a label."""
    directions, terms, size = documents.directions, documents.terms, len(start)
    num_without = int((~targets).sum())
    ratio = targets.sum() * (1 - POSITIVE_SHARE) / POSITIVE_SHARE / max(num_without, 1)
    counts = np.where(targets, 1.0, ratio)
    signs: np.ndarray = targets.astype(np.float64)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        moved, of_terms = weights[:size] - start, weights[size:]
        logits = directions @ weights[:size] + terms @ of_terms + bias
        residuals = counts * (expit(logits) - signs)
        value = counts @ (np.logaddexp(0, logits) - signs * logits)
        value += PENALTY / 2 * moved @ moved + LEXICAL_PENALTY / 2 * of_terms @ of_terms
        slope = (directions.T @ residuals + PENALTY * moved, terms.T @ residuals + LEXICAL_PENALTY * of_terms)
        return value, np.concatenate(slope)

    first = np.concatenate([start, np.zeros(terms.shape[1])])
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return found[:size], found[size:]


def _store_term_weights(lexical: Any, label: int, used_terms: np.ndarray, of_terms: np.ndarray) -> None:
    """Keep the largest weights of a label, divided by the scale of the lexical scores, with which margins are multiplied."""
    width, scale = lexical.feature_ids.shape[1], float(lexical.scale)
    kept = np.argsort(-np.abs(of_terms), kind="stable")[:width]
    ids, weights = np.zeros(width, dtype=np.int32), np.zeros(width, dtype=np.float32)
    if scale > 0:
        ids[: len(kept)], weights[: len(kept)] = used_terms[kept], of_terms[kept] / scale
    lexical.feature_ids[label] = torch.from_numpy(ids).to(lexical.feature_ids)
    lexical.feature_weights[label] = torch.from_numpy(weights).to(lexical.feature_weights)


def _checked_documents(model: Any, documents: Any) -> tuple[list[str], np.ndarray]:
    """Texts, and which of the n added labels each of them has, (N, n)."""
    config = model.config
    if getattr(model, "added", None) is None:
        raise ValueError(
            "The model has no added labels, so there is nothing to fit. Call `model.add_labels` first; labels that it was trained with "
            "are learned by training."
        )
    trained, texts, found = config.num_labels - config.num_added_labels, [], []
    for number, document in enumerate(documents):
        text = document.get("text") if isinstance(document, Mapping) else None
        names = document.get("labels") if isinstance(document, Mapping) else None
        if not isinstance(text, str) or not text.strip() or isinstance(names, str) or not isinstance(names, Sequence):
            raise ValueError(
                f"Document {number} is {document!r:.200}, but a text and a list of label names are needed. Pass "
                '{"text": "...", "labels": ["..."]}.'
            )
        ids = []
        for name in names:
            index = config.label2id.get(normalize("NFC", name) if isinstance(name, str) else name)
            if index is None:
                raise ValueError(
                    f"Document {number} has the label {name!r}, which the model does not have. Add it with `model.add_labels`, or "
                    "correct its name."
                )
            ids.append(index - trained)
        texts.append(text)
        found.append([label for label in ids if label >= 0])
    if not any(found):
        raise ValueError(
            f"None of the {len(texts)} documents has one of the {config.num_added_labels} added labels "
            f"({config.id2label[trained]!r}, ...). Pass documents that have them."
        )
    targets: np.ndarray = np.zeros((len(texts), config.num_added_labels), dtype=bool)
    for row, labels in enumerate(found):
        targets[row, labels] = True
    return texts, targets


def _checked_texts(documents: Any) -> list[str]:
    texts = [documents] if isinstance(documents, str) else list(documents)
    if isinstance(documents, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`other_documents` is {documents!r:.200}, but a list of texts is needed. Pass strings.")
    return texts
