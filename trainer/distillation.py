"""Distillation: trains a student without layers, a static table of token embeddings, to reproduce the predictions of a trained model."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from modeling_sep_mldc.static_encoder_sep_mldc import StaticEncoderConfig

from .data.collator import SepMldcDataCollator
from .data.word_cache import special_tokens_around
from .lexical import weigh_lexical_scores
from .sep_mldc_trainer import SepMldcTrainer
from .training_arguments import SepMldcTrainingArguments


logger = logging.get_logger(__name__)

# The constant a of the SIF weights a / (a + p) (Arora et al., 2017, ICLR).
SIF = 1e-3
# Weight of special tokens, which are uninformative because they occur in every document.
SPECIAL_WEIGHT = 1e-4
# Ridge penalty of the map from mean token embeddings to document embeddings, relative to the mean variance of the token embeddings.
ALIGNMENT_PENALTY = 0.01
CLASSIFIER_DROPOUT = 0.1
# Number of documents that are summed together.
CHUNK = 4096
DEFAULTS = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "learning_rate": 3e-3,
    "head_learning_rate": 5e-4,
    "weight_decay": 0.01,
    "warmup_steps": 0.05,
    "label_loss_weight": 0.0,
    "document_loss_weight": 0.0,
    "label_encoding": "embedding",
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
}


def distillation_arguments(output_dir: str = "outputs/student", **overrides: Any) -> SepMldcTrainingArguments:
    """
    [`SepMldcTrainingArguments`] for [`distill`], with more epochs and a higher learning rate than for a transformer, and no contrastive
    losses. `overrides` are any training arguments.
    """
    return SepMldcTrainingArguments(output_dir, **{**DEFAULTS, **overrides})


def distill(
    teacher: SepMldcForMultiLabelClassification,
    tokenizer: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    args: SepMldcTrainingArguments | None = None,
    hidden_size: int | None = None,
) -> SepMldcForMultiLabelClassification:
    r"""
    Train a student model, whose encoder is a table of token embeddings, to reproduce the predictions of `teacher`. It keeps the labels,
    the classifier, the lexical scores and the tokenizer of the teacher, and is saved, loaded and used like any other checkpoint.

    1. The table is initialized as in model2vec (https://github.com/MinishLab/model2vec): with the output of the teacher's encoder for
       each single token; a token with frequency p gets the weight a / (a + p). A linear map, fitted by ridge regression, maps the means
       over documents to the document embeddings of the teacher, so that the teacher's classifier works from the start.
    2. The table, the token weights and the classifier are trained with binary cross-entropy, summed over labels. The targets are the
       teacher's probabilities without lexical scores.
    3. With `eval_dataset`, the weight of the lexical scores and the thresholds are tuned again. Without it, both are kept, but a
       guarantee of the thresholds is removed.

    Args:
        teacher ([`SepMldcForMultiLabelClassification`]): a trained model; it is not changed.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        train_dataset (`Dataset`): tokenized documents (`input_ids`). Labels are not used, so the documents can be unlabeled.
            Preferably, the teacher was not trained on them. At least a few thousand are needed; the more, the better.
        eval_dataset (`Dataset`, *optional*): tokenized documents with `label_indices` that were not used in training.
        args ([`SepMldcTrainingArguments`], *optional*): [`distillation_arguments`] if not given.
        hidden_size (`int`, *optional*): size of the embeddings; that of the teacher if not given. A smaller one keeps the
            directions in which document and label embeddings of the teacher are largest (PCA without centering).

    Returns:
        [`SepMldcForMultiLabelClassification`]: the student, in evaluation mode.

    Raises:
        ValueError: there are no documents, they are streamed, or `hidden_size` is out of range.

    Example:

    ```python
    teacher = SepMldcForMultiLabelClassification.from_pretrained("outputs/aapd")
    tokenizer = AutoTokenizer.from_pretrained("outputs/aapd")
    documents = tokenize(load_documents("unlabeled.jsonl", label_column=None).dataset, tokenizer)
    student = distill(teacher, tokenizer, documents)
    student.save_pretrained("outputs/student")
    tokenizer.save_pretrained("outputs/student")
    ```
    """
    trainer = DistillationTrainer(teacher, tokenizer, train_dataset, eval_dataset, args, hidden_size)
    trainer.train()
    if eval_dataset is not None:
        trainer.tune_scores()
    return trainer.model.eval()


class DistillationTrainer(SepMldcTrainer):
    """
    The trainer behind [`distill`]: takes the same arguments, creates the student (`trainer.model`), and trains it to reproduce the
    teacher's probabilities. Everything else is as in [`SepMldcTrainer`]: `evaluate`, `save_model`, `push_to_hub`, several processes.
    """

    further_columns: tuple[str, ...] = ("label_indices", "document_index")

    def __init__(
        self,
        teacher: SepMldcForMultiLabelClassification,
        tokenizer: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        args: SepMldcTrainingArguments | None = None,
        hidden_size: int | None = None,
        **kwargs: Any,
    ):
        _check_documents(train_dataset)
        args = distillation_arguments() if args is None else args
        device, hidden = args.device, args.disable_tqdm
        self.teacher = teacher.to(device).eval()
        self._logits_folder: tempfile.TemporaryDirectory | None = None
        logits: np.ndarray | None = None
        if teacher.token_attention is not None:
            # These logits cannot be computed from the embeddings alone. With many labels, they are too large to be stored.
            self._logits_folder = tempfile.TemporaryDirectory()
            shape = (len(train_dataset), teacher.config.num_labels)
            logits = np.memmap(Path(self._logits_folder.name, "logits.bin"), np.float16, "w+", shape=shape)
        embeds = document_embeddings(
            teacher, tokenizer, train_dataset, bf16=args.bf16, hide_progress=hidden, logits=logits
        )
        model = new_student(teacher, tokenizer, train_dataset["input_ids"], embeds, hidden_size, hide_progress=hidden)
        columns = {"input_ids", "attention_mask", "length"} & set(train_dataset.column_names)
        documents = train_dataset.select_columns(sorted(columns))
        documents = documents.add_column("document_index", list(range(len(documents))))
        super().__init__(model, args, None, documents, eval_dataset, processing_class=tokenizer, **kwargs)
        self.data_collator: Any = _Collator(self.data_collator, embeds, logits)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy with the teacher's probabilities, summed over labels, minus their entropy, so that the minimum is 0."""
        embeds, target_logits = inputs.pop("teacher_embeds", None), inputs.pop("teacher_logits", None)
        if embeds is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if target_logits is None:
            with torch.no_grad():
                target_logits = self.teacher.score_documents(embeds.float())[0]
        target_logits = target_logits.float()
        outputs = model(**inputs, return_label_embeds=False)
        loss = binary_divergence(outputs["logits"].float(), target_logits)
        self._terms.add({"divergence": loss.detach()})
        return (loss, outputs) if return_outputs else loss

    def tune_scores(self) -> None:
        """Tune the weight of the teacher's lexical scores and the thresholds for the student on the evaluation documents."""
        model = self.bare_model()
        if model.lexical is not None:
            kept = ("solver", "penalty", "calibrate", "cost", "num_documents")
            info = {name: value for name, value in (model.config.lexical_info or {}).items() if name in kept}
            batches = self.logit_batches(description="Weighting lexical scores")
            weigh_lexical_scores(model, model.lexical, batches, info=info)
        self.tune_thresholds()


class _Collator:
    """Wraps a collator to add the teacher's document embeddings and, if they are stored, its logits to the batch."""

    def __init__(self, collator: Any, embeds: torch.Tensor, logits: np.ndarray | None):
        self.collator, self.embeds, self.logits = collator, embeds, logits

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(features)
        if "document_index" in features[0]:
            rows = [feature["document_index"] for feature in features]
            batch["teacher_embeds"] = self.embeds[rows]
            if self.logits is not None:
                batch["teacher_logits"] = torch.from_numpy(self.logits[rows])
        return batch


def binary_divergence(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    r"""
    $\sum_l \text{KL}(\sigma(z'_l) \| \sigma(z_l))$ of logits z and target logits z', both (B, L), averaged over documents.

    Example:

    ```python
    >>> targets = torch.tensor([[2.0, -3.0]])
    >>> round(binary_divergence(targets, targets).item(), 6), round(binary_divergence(-targets, targets).item(), 3)
    (0.0, 4.239)

    ```
    """
    target = target_logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(target_logits, target, reduction="none")
    return (cross - entropy).sum(dim=-1).mean()


@torch.no_grad()
def document_embeddings(
    teacher: SepMldcForMultiLabelClassification,
    tokenizer: Any,
    dataset: Any,
    batch_size: int = 64,
    bf16: bool = False,
    hide_progress: bool = False,
    logits: np.ndarray | None = None,
    description: str = "Encoding with the teacher",
) -> torch.Tensor:
    """
    A teacher's document embeddings (N, d) for a tokenized dataset, in its order; float16, on the CPU. If `logits` (N, L) is given, the
    logits without lexical scores and calibration are written into it. `description` is shown in the progress bar.
    """
    collator = SepMldcDataCollator(tokenizer)
    documents = dataset["input_ids"]
    limit = teacher.config.encoder_max_length
    lengths = np.array([len(ids) for ids in documents])
    order = np.argsort(-lengths, kind="stable")  # the longest first, so that out-of-memory errors occur immediately
    embeds = torch.zeros(len(order), teacher.config.hidden_size, dtype=torch.float16)
    with tqdm(total=len(order), desc=description, disable=hide_progress, unit="document") as bar:
        for rows in np.array_split(order, range(batch_size, len(order), batch_size)):
            batch = collator([{"input_ids": documents[int(row)]} for row in rows])
            batch = {name: batch[name].to(teacher.device) for name in ("input_ids", "attention_mask")}
            with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16):
                found, output, mask = teacher.encode_tokens(
                    **batch, max_length=limit, with_states=teacher.token_attention is not None
                )
                if logits is not None:
                    logits[rows] = teacher.score_texts(found, output, mask)[0].half().cpu().numpy()
            embeds[torch.from_numpy(rows)] = found.to(embeds)
            bar.update(len(rows))
    return embeds


@torch.no_grad()
def token_embeddings(
    teacher: SepMldcForMultiLabelClassification, tokenizer: Any, batch_size: int = 1024, hide_progress: bool = False
) -> torch.Tensor:
    """Embeddings (V, d) of all single tokens by the teacher's encoder."""
    size = teacher.get_input_embeddings().num_embeddings
    table = torch.zeros(size, teacher.config.hidden_size, device=teacher.device)
    before, after = special_tokens_around(tokenizer)
    for start in tqdm(range(0, size, batch_size), desc="Embedding tokens", disable=hide_progress, unit="batch"):
        ids = torch.arange(start, min(start + batch_size, size), device=teacher.device)
        texts = [torch.full_like(ids, special) for special in before] + [ids]
        texts += [torch.full_like(ids, special) for special in after]
        table[ids] = teacher.encode(torch.stack(texts, dim=1))[0]
    return table


@torch.no_grad()
def new_student(
    teacher: SepMldcForMultiLabelClassification,
    tokenizer: Any,
    documents: Sequence[Sequence[int]],
    embeds: torch.Tensor,
    hidden_size: int | None = None,
    hide_progress: bool = False,
) -> SepMldcForMultiLabelClassification:
    """
    The student before training (step 1 of [`distill`]).

    Args:
        teacher, tokenizer, hidden_size: as in [`distill`].
        documents (`N` lists of token ids): the documents.
        embeds (`torch.Tensor` of shape `(N, d)`): document embeddings of the teacher.
    """
    dimensions = teacher.config.hidden_size
    hidden_size = dimensions if hidden_size is None else hidden_size
    if not 1 <= hidden_size <= dimensions:
        raise ValueError(
            f"`hidden_size` is {hidden_size}, but it must be from 1 to {dimensions}, the size of the teacher's embeddings. Leave "
            "it out."
        )
    table = token_embeddings(teacher, tokenizer, hide_progress=hide_progress)
    log_weights = sif_weights(documents, len(table), tokenizer.all_special_ids).log().to(table.device)
    config = _student_config(teacher.config, len(table), hidden_size, tokenizer.pad_token_id)
    config.drop_guarantee("the scores of a student differ from those of its teacher")
    student = SepMldcForMultiLabelClassification(config).to(table.device).eval()
    encoder = student.backbone
    encoder.token_log_weights.copy_(log_weights)
    basis = None
    if hidden_size < dimensions:
        label_embeds = teacher.label_embeddings.float()
        products = label_embeds.t() @ label_embeds
        for chunk in embeds.split(CHUNK):
            rows = chunk.to(products)
            products += rows.t() @ rows
        basis = torch.linalg.eigh(products).eigenvectors[:, -hidden_size:]
    limit = teacher.config.max_tokens()
    aligned = _align(table, log_weights, documents, embeds, limit)
    encoder.token_embeddings.weight.copy_(aligned if basis is None else aligned @ basis)
    _copy_head(teacher, student, basis)
    if teacher.lexical is not None:
        student.lexical.load_state_dict(teacher.lexical.state_dict())
    return student


def sif_weights(documents: Sequence[Sequence[int]], vocab_size: int, special_ids: Sequence[int]) -> torch.Tensor:
    """
    Weights a / (a + p) of all tokens, (V,), for frequencies p in the documents; special tokens get a weight close to 0.

    Example:

    ```python
    >>> [round(weight, 4) for weight in sif_weights([[0, 1, 1, 1], [0, 2]], vocab_size=4, special_ids=[0]).tolist()]
    [0.0001, 0.0013, 0.004, 1.0]

    ```
    """
    counts = torch.zeros(vocab_size)
    for ids in documents:
        counts += torch.bincount(torch.as_tensor(ids, dtype=torch.long), minlength=vocab_size)[:vocab_size]
    special = [index for index in special_ids if index < vocab_size]
    counts[special] = 0
    weights = SIF / (SIF + counts / counts.sum().clamp_min(1))
    weights[special] = SPECIAL_WEIGHT
    return weights


def _student_config(
    config: SepMldcConfig, vocab_size: int, hidden_size: int, pad_token_id: int | None
) -> SepMldcConfig:
    values = config.to_dict()
    encoder = StaticEncoderConfig(vocab_size=vocab_size, hidden_size=hidden_size, pad_token_id=pad_token_id)
    encoder._name_or_path = getattr(config.backbone_config, "_name_or_path", "")
    values |= {
        "backbone_config": encoder,
        "pooling": "mean",
        "token_attention": False,  # slower than the rest of a student; the student learns its effect from the teacher's logits
        "token_attention_size": None,
        "classifier_dropout": CLASSIFIER_DROPOUT,
        "classifier_hidden_size": config.classifier_hidden_size or config.hidden_size,
        "encoder_max_length": config.max_tokens(),
    }
    for name in ("architectures", "auto_map", "custom_pipelines", "transformers_version", "dtype", "_name_or_path"):
        values.pop(name, None)
    return SepMldcConfig.from_dict(values)


def _align(
    table: torch.Tensor,
    log_weights: torch.Tensor,
    documents: Sequence[Sequence[int]],
    embeds: torch.Tensor,
    limit: int,
) -> torch.Tensor:
    """The table (V, d), mapped linearly so that its weighted means over documents are as close as possible to `embeds` (N, d)."""
    columns = table.shape[1]
    gram, cross = table.new_zeros(2, columns, columns, dtype=torch.float64)
    means, targets = table.new_zeros(2, columns, dtype=torch.float64)
    for start in range(0, len(documents), CHUNK):
        rows = torch.stack(
            [_weighted_mean(table, log_weights, ids[:limit]) for ids in documents[start : start + CHUNK]]
        )
        rows, aligned = rows.double(), embeds[start : start + CHUNK].to(table.device).double()
        gram += rows.t() @ rows
        cross += rows.t() @ aligned
        means += rows.sum(dim=0) / len(documents)
        targets += aligned.sum(dim=0) / len(documents)
    gram -= len(documents) * torch.outer(means, means)
    cross -= len(documents) * torch.outer(means, targets)
    gram.diagonal().add_(ALIGNMENT_PENALTY * gram.diagonal().mean().clamp_min(1e-12))
    mapping = torch.linalg.solve(gram, cross)
    return ((table - means) @ mapping + targets).to(table.dtype)


def _weighted_mean(table: torch.Tensor, log_weights: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    rows = torch.as_tensor(ids, dtype=torch.long, device=table.device)
    return log_weights[rows].softmax(dim=0) @ table[rows]


def _copy_head(
    teacher: SepMldcForMultiLabelClassification,
    student: SepMldcForMultiLabelClassification,
    basis: torch.Tensor | None,
) -> None:
    """The teacher's classifier and label embeddings, in the coordinates of the student."""

    def project(rows: torch.Tensor) -> torch.Tensor:  # (n, d) or, for the concatenation of Eq. 18, (n, 2 d)
        if basis is None:
            return rows
        return torch.cat([block @ basis for block in rows.split(len(basis), dim=1)], dim=1)

    student.set_label_embeddings(project(teacher.label_embeddings.float()))
    source, target = teacher.classifier, student.classifier
    target.bias.copy_(source.bias)
    if hasattr(source, "dense"):
        target.dense.weight.copy_(project(source.dense.weight))
        target.dense.bias.copy_(source.dense.bias)
        target.out_proj.weight.copy_(source.out_proj.weight)
    if hasattr(source, "similarity_proj"):
        weight, bias = project(source.similarity_proj.weight), source.similarity_proj.bias
        target.similarity_proj.weight.copy_(weight if basis is None else basis.t() @ weight)
        target.similarity_proj.bias.copy_(bias if basis is None else basis.t() @ bias)
        target.similarity_scale.copy_(source.similarity_scale)
    if teacher.added is not None:
        student.added.weights.copy_(project(teacher.added.weights))
        student.added.bias.copy_(teacher.added.bias)
        student.added.prior.copy_(teacher.added.prior)


def _check_documents(dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None) or []
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset) or "input_ids" not in columns:
        raise ValueError(
            f"`train_dataset` is {dataset!r}, but a student learns from tokenized documents that fit in memory. Pass a dataset with "
            "a column `input_ids`, as `tokenize` returns it."
        )
