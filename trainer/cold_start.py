"""Models without labeled documents: the cosine similarity of document and label text as the classifier."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_sep_mldc import SepMldcForMultiLabelClassification

from .data.encoding import read_label_list
from .data.label_files import read_described_labels
from .data.readers import expand_files, read_records
from .data.text_lines import DataFileError


# Product of the scale and the standard deviation of the cosines of documents and labels. For MiniLM, 1.0 to 1.3 is best on the
# validation documents of debtags and arxiv_mlc.
SCALE_IN_DEVIATIONS = 1.2
# The scale without documents.
USUAL_SCALE = 12.0
MAX_DOCUMENTS = 1000


@torch.no_grad()
def start_from_cosines(
    model: SepMldcForMultiLabelClassification,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str] = (),
    labels_per_document: float = 1.0,
    batch_size: int = 16,
    hide_progress: bool = False,
) -> None:
    r"""
    Initialize an untrained model to score labels by the cosine similarity of document and label text, $a \cos(e_x, e_l) + b$.

    The projection of the similarity classifier becomes the identity on the document embedding, and the output weights of the MLP and of token
    attention become 0. Training can start from there.

    With (unlabeled) documents, a and b are chosen so that the expected number of labels per document is `labels_per_document`, and one
    threshold for all labels so that documents get that many labels on average. Without documents, the scale of the cosines is unknown:
    the model then only ranks labels (`config.is_ranking`) and has no probabilities.

    Args:
        model ([`SepMldcForMultiLabelClassification`]): new, from `from_backbone`, with `classifier="similarity"` or `"mlp+similarity"`; changed in
            place.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        documents (`Sequence[str]`, *optional*): texts like those that the model will read; at most the first 1,000 are used.
        labels_per_document (`float`, defaults to 1.0): average number of labels per document.
        batch_size (`int`, defaults to 16): documents that are encoded together.
        hide_progress (`bool`, defaults to `False`): no progress bar.

    Raises:
        ValueError: the model has no similarity classifier, or `labels_per_document` is not between 0 and the number of labels.

    Example:

    ```python
    model = SepMldcForMultiLabelClassification.from_backbone("roberta-base", tokenizer, labels, label_descriptions)
    start_from_cosines(model, tokenizer, documents=texts, labels_per_document=2.5)
    ```
    """
    config, classifier = model.config, model.classifier
    check_labels_per_document(labels_per_document, config.num_labels)
    if not classifier.uses_label_embeds:
        raise ValueError(
            f'`classifier` is {config.classifier!r}, but a model without training documents compares label texts. Use "similarity" or '
            '"mlp+similarity".'
        )
    documents = list(documents)[:MAX_DOCUMENTS]
    scale, bias, threshold = USUAL_SCALE, 0.0, None
    if documents:
        cosines = _cosines(model, tokenizer, documents, batch_size, hide_progress)
        scale, bias = _expecting(cosines, labels_per_document)
        threshold = cardinality_threshold([torch.sigmoid(scale * cosines + bias)], labels_per_document)
    classifier.start_from_similarities()
    classifier.similarity_scale.fill_(scale)
    classifier.bias.fill_(bias)
    if hasattr(classifier, "out_proj"):
        classifier.out_proj.weight.zero_()
    if model.token_attention is not None:
        model.token_attention.weights.zero_()
    if threshold is None:
        config.classification_loss = "decoupled_softmax"
        config.thresholds = config.threshold_info = None
    else:
        set_cardinality_threshold(config, threshold, labels_per_document, len(documents))


def labels_without_documents(
    label_list_file: str | os.PathLike | None, label_descriptions_file: str | os.PathLike | None
) -> list[str]:
    """
    Label names of a label list, or of the label descriptions where there is no list.

    Raises:
        ValueError: neither is given, or a file is invalid.
    """
    if label_list_file is not None:
        return read_label_list(label_list_file)
    if label_descriptions_file is None:
        raise ValueError(
            "There are no labels. They come from training documents or label texts: specify training documents with `--train_file`, or labels "
            "with `--label_descriptions_file` or `--label_list_file`."
        )
    (path,) = expand_files(label_descriptions_file)
    return sorted(read_described_labels(path))


def read_texts(files: Sequence[str], text_columns: Sequence[str], limit: int = MAX_DOCUMENTS) -> list[str]:
    """
    The first texts of files of documents without labels.

    Raises:
        DataFileError: a file cannot be read, or a row has no text. It is a `ValueError`.
    """
    texts: list[str] = []
    for path in expand_files(list(files)):
        for where, record in read_records(path):
            parts = [record.get(column) for column in text_columns]
            text = " ".join(part for part in parts if isinstance(part, str)).strip()
            if not text:
                raise DataFileError(
                    f"{where}: there is no text in {', '.join(map(repr, text_columns))}; the columns are {', '.join(record)}. Specify the "
                    "columns of the text with `--text_columns`."
                )
            texts.append(text)
            if len(texts) == limit:
                return texts
    return texts


def check_labels_per_document(labels_per_document: float, num_labels: int | None = None) -> None:
    """
    Raises:
        ValueError: it is not above 0, or not below the number of labels.
    """
    if not labels_per_document > 0 or (
        num_labels is not None and num_labels > 1 and labels_per_document >= num_labels
    ):
        limit = "" if num_labels is None else f" and below {num_labels}, the number of labels"
        raise ValueError(
            f"`labels_per_document` is {labels_per_document:g}, but it must be above 0{limit}. Use 1 if it is not known."
        )


def cardinality_threshold(probabilities: Iterable[torch.Tensor], labels_per_document: float) -> float:
    """
    The common threshold that, on average, `labels_per_document` labels of a document reach.

    Args:
        probabilities (iterable of `torch.Tensor` of shape `(B, L)`): of all labels, in batches.
        labels_per_document (`float`): c.
    """
    scores = torch.cat([batch.float().cpu() for batch in probabilities])
    count = min(max(round(labels_per_document * len(scores)), 1), scores.numel())
    return float(scores.flatten().topk(count).values[-1])


def set_cardinality_threshold(config: Any, threshold: float, labels_per_document: float, num_documents: int) -> None:
    """Store one threshold for all labels, and where it comes from."""
    config.thresholds = [threshold] * config.num_labels
    config.threshold_info = {
        "objective": f"{labels_per_document:g} labels per document",
        "num_unlabeled_documents": num_documents,
        "global_threshold": threshold,
    }


def _cosines(model: Any, tokenizer: Any, documents: list[str], batch_size: int, hide_progress: bool) -> torch.Tensor:
    """Cosines (N, L) of documents and label texts."""
    labels, rows = F.normalize(model.label_embeddings.float(), dim=-1, eps=1e-6), []
    limit = model.config.max_tokens(tokenizer)
    training = model.training
    model.eval()
    try:
        steps = range(0, len(documents), batch_size)
        for start in tqdm(steps, desc="Encoding documents", disable=hide_progress, leave=False):
            texts = documents[start : start + batch_size]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            embeds = model.encode(**batch.to(model.device))[0]
            rows.append((F.normalize(embeds, dim=-1, eps=1e-6) @ labels.t()).cpu())
    finally:
        model.train(training)
    return torch.cat(rows)


def _expecting(cosines: torch.Tensor, labels_per_document: float) -> tuple[float, float]:
    """Scale and bias for cosines (N, L) so that the expected number of labels per document is as given."""
    scale = SCALE_IN_DEVIATIONS / max(float(cosines.std()), 1e-3) if cosines.numel() > 1 else USUAL_SCALE
    scaled = scale * cosines.double()
    share = min(labels_per_document / cosines.shape[1], 0.99)
    low, high = -float(scaled.max()) - 40, -float(scaled.min()) + 40
    return scale, brentq(lambda bias: float(torch.sigmoid(scaled + bias).mean()) - share, low, high)
