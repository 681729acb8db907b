"""Editing the labels of a model: encoding and storing label embeddings; adding, removing and renaming labels."""

from collections.abc import Callable, Sequence
from typing import Any
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .added_labels_sep_mldc import BIAS_PRIOR, SCALE_PRIOR, SMALLEST_SCALE, AddedLabelScores, fit_cosine_calibration
from .hierarchy_sep_mldc import check_label_parents, without_labels
from .label_sets_sep_mldc import constraints_without
from .label_texts_sep_mldc import label_text, pad_label_inputs, tokenize_label_texts


logger = logging.get_logger(__name__)

# Maximum number of existing labels that a new label starts from.
NUM_NEIGHBORS = 5
# Maximum numbers of documents and labels on which cosines are calibrated, and the batch size.
MAX_CALIBRATION_DOCUMENTS, MAX_CALIBRATION_LABELS, CALIBRATION_BATCH = 256, 256, 16


def neighbor_weights(embeds: torch.Tensor, others: torch.Tensor, num_neighbors: int = NUM_NEIGHBORS) -> torch.Tensor:
    """
    Weights of the nearest `others` of each embedding, proportional to how far their cosine exceeds the mean cosine to all others, because
    the cosines of an encoder's embeddings lie in a narrow range far from zero.

    Args:
        embeds (`torch.Tensor` of shape `(n, d)`): embeddings.
        others (`torch.Tensor` of shape `(m, d)`): embeddings to choose neighbors from.
        num_neighbors (`int`, *optional*, defaults to 5): maximum number of positive weights per row.

    Returns:
        `torch.Tensor` of shape `(n, m)`: non-negative weights; each row sums to 1.
    """
    cosines = F.normalize(embeds.float(), dim=-1) @ F.normalize(others.float(), dim=-1).t()
    best, indices = cosines.topk(min(num_neighbors, len(others)), dim=-1)
    # The smallest positive number avoids 0/0 if all cosines of a row are equal, as for a single label.
    above = (best - cosines.mean(dim=-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.zeros_like(cosines).scatter_(1, indices, above / above.sum(dim=-1, keepdim=True))


class LabelEditingMixin:
    """Label embeddings and label names of [`SepMldcForMultiLabelClassification`]."""

    config: Any
    training: bool
    label_embeddings: Any
    classifier: Any
    token_attention: Any
    lexical: Any
    added: Any
    probabilities: Any
    encode: Any
    train: Any
    eval: Any

    @torch.no_grad()
    def encode_labels(
        self, label_inputs: dict[str, Any], batch_size: int = 64, progress: Callable[[int], Any] | None = None
    ) -> torch.Tensor:
        """
        Encode tokenized label texts, without gradient and without dropout, in batches of similar length.

        Args:
            label_inputs (`dict`): n label texts, as [`tokenize_label_texts`] returns them.
            batch_size (`int`, *optional*, defaults to 64): number of texts per batch.
            progress (`Callable[[int], Any]`, *optional*): called after each batch with the number of its texts.

        Returns:
            `torch.Tensor` of shape `(n, d)`: embeddings in float32.
        """
        ids = label_inputs["input_ids"]
        rows = torch.empty(len(ids), self.config.hidden_size, device=self.label_embeddings.device)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        training = self.training
        self.eval()
        try:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                batch = pad_label_inputs(label_inputs, chunk, rows.device)
                rows[torch.tensor(chunk, device=rows.device)] = self.encode(**batch)[0]
                if progress is not None:
                    progress(len(chunk))
        finally:
            self.train(training)
        return rows

    @torch.no_grad()
    def set_label_embeddings(self, rows: torch.Tensor, indices: torch.Tensor | None = None) -> None:
        """
        Store label embeddings. Do not call it between a forward pass and its backward pass.

        Args:
            rows (`torch.Tensor` of shape `(L, d)` or `(C, d)`): embeddings of all labels, or of the labels `indices`.
            indices (`torch.LongTensor` of shape `(C,)`, *optional*): which labels the rows are for.
        """
        if indices is None:
            self.label_embeddings.copy_(rows)
        else:
            self.label_embeddings.index_copy_(0, indices, rows.to(self.label_embeddings.dtype))

    @torch.no_grad()
    def add_labels(
        self,
        labels: dict[str, str | None],
        tokenizer: PreTrainedTokenizerBase,
        max_label_length: int = 64,
        documents: Sequence[str] | None = None,
        label_parents: dict[str, str | list[str]] | None = None,
    ) -> None:
        r"""
        Add labels that the model can score before any training on them (zero-shot).

        The logit of a new label is a calibrated cosine of the document embedding and the embedding of the label's text (Eq. 1-2, 5):
        $a \cos(e_x, e_l) + b$ (see [`AddedLabelScores`]). a and b are fitted so that the cosine of a trained label predicts the
        probability that the model gives it; new labels thus score neither higher nor lower than trained ones. They are fitted on
        `documents`, if given; otherwise, they are `config.cosine_calibration`, which `SepMldcTrainer.tune_thresholds` measures on the
        validation documents. If neither is available, they are fitted on the texts of the trained labels; these differ from documents, so
        new labels then score too low. The threshold of a new label is the best common threshold for all labels, if known, or the median
        of all thresholds.

        Scores of the other labels do not change, because label attention (Eq. 16-17) does not use new labels. Create trainers and
        optimizers afterward: the extended weights are new parameters. To learn new labels from their first documents, see
        `trainer.fit_new_labels`.

        Args:
            labels (`dict[str, str]`): label description by new label name; `None` or `""` for labels without one.
            tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
            max_label_length (`int`, *optional*, defaults to 64): maximum number of tokens per label text.
            documents (`Sequence[str]`, *optional*): unlabeled documents like those that the model will read. A hundred are
                enough; at most the first 256 are read.
            label_parents (`dict[str, str | list[str]]`, *optional*): parents of new labels, which may be new labels too.

        Raises:
            ValueError: there are no labels, a name is blank or taken, a description is not a string, `documents` are not texts, or
                parents are wrong (see [`check_label_parents`]).

        Example:

        ```python
        model.add_labels({"cs.QP": "Quantum programming languages and compilers."}, tokenizer)
        ```
        """
        config = self.config
        labels = _checked_new_labels(labels, config.labels)
        documents = _checked_texts(documents)
        descriptions = {**(config.label_descriptions or {}), **{name: text for name, text in labels.items() if text}}
        names = [*config.labels, *labels]
        parents = _with_parents(config.label_parents, label_parents, labels, names)
        texts = [label_text(name, parents if config.parents_in_label_texts else {}, descriptions) for name in labels]
        old = self.label_embeddings.detach().float()
        max_label_length = min(max_label_length, config.max_tokens(tokenizer))
        encoded = self.encode_labels(tokenize_label_texts(tokenizer, texts, max_label_length))
        scale, bias = self._cosine_logits(tokenizer, max_label_length, documents)
        new = encoded + self._moves_of_neighbors(encoded, old, tokenizer, max_label_length)

        def extend(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([rows, rows.new_zeros(len(labels), *rows.shape[1:])])

        self._replace_label_rows(extend, new)
        if self.added is None:
            self.added = AddedLabelScores(0, config.hidden_size).to(self.classifier.bias)
        former = len(self.added)
        self.added.change_label_rows(list(range(former)), len(labels))
        self.added.prior[former:] = self.added.prior.new_tensor([scale, bias])
        self.added.start_from_cosines(list(range(former, len(self.added))), encoded)
        config.num_added_labels = len(self.added)
        if config.thresholds is not None:
            config.thresholds = [*config.thresholds, *[config.usual_threshold] * len(labels)]
        config.drop_guarantee("labels were added")
        if config.label_counts is not None:
            config.label_counts = [*config.label_counts, *[0] * len(labels)]
        self._set_label_names(names, descriptions)
        config.label_parents = parents or None

    def _moves_of_neighbors(
        self, encoded: torch.Tensor, old: torch.Tensor, tokenizer: PreTrainedTokenizerBase, max_label_length: int
    ) -> torch.Tensor:
        """How far training has moved the stored embeddings of the closest labels away from their encoded texts, (n, d)."""
        weights = neighbor_weights(encoded, old)
        used = weights.any(dim=0).nonzero().flatten()
        texts = self.config.label_texts
        inputs = tokenize_label_texts(tokenizer, [texts[index] for index in used.tolist()], max_label_length)
        return weights[:, used] @ (old[used] - self.encode_labels(inputs))

    def _cosine_logits(
        self, tokenizer: PreTrainedTokenizerBase, max_label_length: int, documents: Sequence[str] | None
    ) -> tuple[float, float]:
        """Scale and bias that map the cosine of a document and a label text to an uncalibrated logit."""
        config = self.config
        calibration = config.cosine_calibration
        if documents is None and calibration is None:
            logger.warning(
                "The cosines of documents and labels are not calibrated, so new labels score low. Pass some `documents` to `add_labels`, or "
                "tune thresholds with `SepMldcTrainer.tune_thresholds` first."
            )
        if documents is not None or calibration is None:
            calibration = self._measure_cosines(tokenizer, max_label_length, documents)
        scale, bias = config.logit_calibration
        return calibration["scale"] / scale, (calibration["bias"] - bias) / scale

    def _measure_cosines(
        self, tokenizer: PreTrainedTokenizerBase, max_label_length: int, documents: Sequence[str] | None
    ) -> dict[str, float]:
        """Calibrate cosines with the scores of trained labels on documents or, without documents, on label texts."""
        config, trained = self.config, self.config.num_labels - self.config.num_added_labels
        if not trained:
            return {"scale": SCALE_PRIOR[0], "bias": BIAS_PRIOR[0]}
        chosen = torch.linspace(0, trained - 1, min(trained, MAX_CALIBRATION_LABELS)).round().long().unique().tolist()
        label_texts = config.label_texts
        texts = [label_texts[index] for index in chosen]
        label_embeds = self.encode_labels(tokenize_label_texts(tokenizer, texts, max_label_length))
        documents = texts if documents is None else documents[:MAX_CALIBRATION_DOCUMENTS]
        training, cosines, targets = self.training, [], []
        model: Any = self
        self.eval()
        try:
            for start in range(0, len(documents), CALIBRATION_BATCH):
                batch = tokenizer(
                    list(documents[start : start + CALIBRATION_BATCH]),
                    padding=True,
                    truncation=True,
                    max_length=config.max_tokens(tokenizer),
                    return_tensors="pt",
                ).to(label_embeds.device)
                output = model(**batch, return_label_embeds=False)
                scores = output.logits[:, chosen].float()
                if not config.is_ranking:
                    scores = self.probabilities(scores)
                targets.append(scores)
                cosines.append(F.normalize(output.document_embeds, dim=-1) @ F.normalize(label_embeds, dim=-1).t())
        finally:
            self.train(training)
        fit = _fit_line if config.is_ranking else fit_cosine_calibration
        return fit(torch.cat(cosines), torch.cat(targets))

    @torch.no_grad()
    def remove_labels(self, labels: list[str]) -> None:
        """
        Remove labels and everything that the model stores about them. The other labels keep their order. Children of a removed label
        get its parents. Removed labels are also dropped from label constraints.

        Scores of the remaining labels change only through label attention, which can no longer select a removed label. Create
        trainers and optimizers afterward: the shortened weights are new parameters.

        Args:
            labels (`list[str]`): names of labels of the model.

        Raises:
            ValueError: no labels are given, one is unknown, or no label would remain.
        """
        config = self.config
        if isinstance(labels, str) or not labels:
            raise ValueError(
                f"`labels` is {labels!r}, but a list of label names is needed. Pass the labels to remove."
            )
        removed_ids = {self._index_of(name) for name in labels}
        kept = [index for index in range(config.num_labels) if index not in removed_ids]
        if not kept:
            raise ValueError(
                f"`labels` names all {config.num_labels} labels, but at least one must remain. Leave one out."
            )
        labels_before = config.labels
        names = [labels_before[index] for index in kept]
        index = torch.tensor(kept, device=self.label_embeddings.device)
        self._replace_label_rows(lambda rows: rows.index_select(0, index))
        if self.added is not None:
            trained = config.num_labels - len(self.added)
            self.added.change_label_rows([index - trained for index in kept if index >= trained])
            config.num_added_labels = len(self.added)
            if not config.num_added_labels:
                self.added = None
        for field in ("thresholds", "label_counts"):
            values = getattr(config, field)
            if values is not None:
                setattr(config, field, [values[index] for index in kept])
        config.drop_guarantee("labels were removed")
        removed = set(labels_before) - set(names)
        self._set_label_names(names, config.label_descriptions)
        config.label_parents = without_labels(config.label_parents or {}, removed) or None
        config.label_constraints = constraints_without(config.label_constraints or [], removed) or None
        if config.label_parents is None:
            config.hierarchy = None

    def rename_label(self, label: str, new_name: str) -> None:
        """
        Rename a label. Scores do not change: the stored embedding is kept until label texts are encoded again, as in training.

        Args:
            label (`str`): name of a label of the model.
            new_name (`str`): its new name.

        Raises:
            ValueError: `label` is unknown, or `new_name` is blank or taken.
        """
        config = self.config
        index = self._index_of(label)
        names = config.labels
        label = names[index]
        new_name = _new_name(new_name, set(names) - {label})
        names[index] = new_name
        descriptions = {
            new_name if name == label else name: text for name, text in (config.label_descriptions or {}).items()
        }
        self._set_label_names(names, descriptions)

        def renamed(others: list[str]) -> list[str]:
            return [new_name if name == label else name for name in others]

        if config.label_parents is not None:
            changed = zip(renamed(list(config.label_parents)), map(renamed, config.label_parents.values()))
            config.label_parents = dict(changed)
        if config.label_constraints is not None:
            config.label_constraints = [
                {**group, "labels": renamed(group["labels"])} for group in config.label_constraints
            ]

    def _index_of(self, label: str) -> int:
        index = self.config.label2id.get(normalize("NFC", label) if isinstance(label, str) else label)
        if index is None:
            raise ValueError(
                f"The model has no label {label!r} among its {self.config.num_labels}. Use a name from `model.config.labels`."
            )
        return index

    def _replace_label_rows(
        self, change: Callable[[torch.Tensor], torch.Tensor], new_embeddings: torch.Tensor | None = None
    ) -> None:
        """Apply `change` to every parameter with one row per label; `new_embeddings` are appended to the stored ones."""
        table = self.label_embeddings
        if new_embeddings is None:
            self.label_embeddings = _like(table, change(table.detach()))
        else:
            self.label_embeddings = _like(table, torch.cat([table.detach(), new_embeddings.to(table.dtype)]))
        classifier = self.classifier
        classifier.bias = _like(classifier.bias, change(classifier.bias.detach()))
        if hasattr(classifier, "out_proj"):
            classifier.out_proj.weight = _like(classifier.out_proj.weight, change(classifier.out_proj.weight.detach()))
            classifier.out_proj.out_features = len(classifier.out_proj.weight)
        if self.token_attention is not None:
            queries = change(self.token_attention.queries.detach())
            if new_embeddings is not None:
                queries[-len(new_embeddings) :] = self.token_attention.queries_of(new_embeddings).detach()
            self.token_attention.queries = _like(self.token_attention.queries, queries)
            weights = self.token_attention.weights
            self.token_attention.weights = _like(weights, change(weights.detach()))
        if self.lexical is not None:
            rows = change(torch.arange(len(table), device=table.device).unsqueeze(1)).flatten()
            added = 0 if new_embeddings is None else len(new_embeddings)
            self.lexical.change_label_rows(rows[: len(rows) - added].long(), added)

    def _set_label_names(self, names: list[str], descriptions: dict[str, str] | None) -> None:
        config = self.config
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.label_descriptions = {
            name: text for name, text in (descriptions or {}).items() if name in config.label2id
        } or None


def _fit_line(cosines: torch.Tensor, scores: torch.Tensor) -> dict[str, float]:
    """Scale and bias of a least-squares fit of scores on cosines, for models whose scores are not calibrated logits."""
    cosines, scores = cosines.flatten().double(), scores.flatten().double()
    deviations = cosines - cosines.mean()
    scale = float((deviations * scores).sum() / deviations.square().sum().clamp_min(1e-9))
    scale = max(scale, SMALLEST_SCALE)
    return {"scale": scale, "bias": float(scores.mean() - scale * cosines.mean())}


def _checked_new_labels(labels: Any, former: list[str]) -> dict[str, str | None]:
    """Descriptions of new labels by their names in Unicode normalization form NFC."""
    if not isinstance(labels, dict) or not labels:
        raise ValueError(
            f"`labels` is {labels!r}, but new labels are needed. Pass {{name: description}}, with `None` for a "
            "label without description."
        )
    taken = set(former)
    for name, description in labels.items():
        taken.add(_new_name(name, taken))
        if description is not None and not isinstance(description, str):
            raise ValueError(
                f"The description of label {name!r} is {description!r}, but a text is needed. Pass a string, or None."
            )
    return {normalize("NFC", name): text for name, text in labels.items()}


def _checked_texts(documents: Any) -> list[str] | None:
    if documents is None:
        return None
    texts = None if isinstance(documents, str) else list(documents)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"`documents` is {documents if isinstance(documents, str) else texts!r:.80}, but a list of texts is needed. Pass strings, or leave it "
            "out."
        )
    return texts


def _like(parameter: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _with_parents(
    former: dict[str, list[str]] | None, added: dict[str, str | list[str]] | None, new: Any, names: list[str]
) -> dict[str, list[str]]:
    """The checked parents of all labels of a model to which `new` labels are added."""
    added = {} if added is None else added
    old = [name for name in added if normalize("NFC", name) not in new] if isinstance(added, dict) else []
    if old:
        raise ValueError(
            f"`label_parents` names parents of {old[0]!r}, which is not a new label. Name parents of new labels only."
        )
    return {**(former or {}), **check_label_parents(added, names)}


def _new_name(name: str, taken: set[str]) -> str:
    """A label name in the Unicode form that all label names have."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"A new label is called {name!r}, but a label needs a name. Pass a string that is not blank.")
    name = normalize("NFC", name)
    if name in taken:
        raise ValueError(f"The model already has a label {name!r}. Choose another name, or leave it out.")
    return name
