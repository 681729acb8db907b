"""Out-of-fold scores of all documents, from the encoder and from the words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from modeling_sep_mldc.encoder_sep_mldc import limit_tokenizer, set_padding_token
from modeling_sep_mldc.lexical_sep_mldc import LexicalScores

from ..backbones import loading_problem, resolve_backbone
from ..data.collator import SepMldcDataCollator
from ..data.documents import LabeledDocuments
from ..data.near_duplicates import duplicate_groups, signatures
from ..data.tokenization import tokenize
from ..devices import has_accelerator, is_bfloat16_native
from ..distillation import document_embeddings
from ..lexical.features import NUM_BIGRAMS
from ..lexical.fitting import default_num_features, default_solver, fit_classifiers
from ..recipes import recommend_settings
from ..run_needs import available_memory, gib
from ..training_arguments import recommended_head_learning_rate


# Number of (N, L) matrices in float32 that an audit holds at the same time.
SCORE_COPIES = 8
BATCH_SIZE = 64


class OutOfFoldScores(NamedTuple):
    """
    Scores of each document from models that were trained on the other folds.

    Attributes:
        encoder (`np.ndarray` of shape `(N, L)`): logits of a classifier over the frozen encoder, float32.
        lexical (`np.ndarray` of shape `(N, L)`): margins of linear classifiers on the words of the documents, float32.
        folds (`np.ndarray` of shape `(N,)`): the fold of each document.
    """

    encoder: np.ndarray
    lexical: np.ndarray
    folds: np.ndarray


def assign_folds(
    label_indices: Sequence[Sequence[int]], groups: np.ndarray, num_labels: int, num_folds: int = 5, seed: int = 0
) -> np.ndarray:
    """
    Assign documents to folds: near-duplicates go to the same fold, and documents are stratified by their rarest label.

    Args:
        label_indices (`Sequence[Sequence[int]]` of length `N`): label ids of each document.
        groups (`np.ndarray` of shape `(N,)`): number of each document's group of near-duplicates, from 0.
        num_labels (`int`), num_folds (`int`), seed (`int`).

    Returns:
        `np.ndarray` of shape `(N,)`: the fold of each document, from 0.

    Example:

    ```python
    >>> sorted(assign_folds([[0], [0], [1], [1]], np.arange(4), num_labels=2, num_folds=2)[:2].tolist())
    [0, 1]

    ```
    """
    counts = np.bincount(np.concatenate([np.asarray(ids, dtype=int) for ids in label_indices]), minlength=num_labels)
    order = np.argsort(np.argsort(counts, kind="stable"))  # rank of each label, the rarest first
    num_groups = int(groups.max()) + 1
    rarest = np.full(num_groups, num_labels)
    for group, ids in zip(groups.tolist(), label_indices):
        rarest[group] = min(rarest[group], *order[list(ids)]) if len(ids) else rarest[group]
    shuffled = np.random.default_rng(seed).permutation(num_groups)
    dealt = shuffled[np.argsort(rarest[shuffled], kind="stable")]
    of_group: np.ndarray = np.empty(num_groups, dtype=int)
    of_group[dealt] = np.arange(num_groups) % num_folds
    return of_group[groups]


def out_of_fold_scores(
    documents: LabeledDocuments,
    model_name_or_path: str,
    label_descriptions: dict[str, str] | None = None,
    num_folds: int = 5,
    max_length: int | None = None,
    seed: int = 0,
    use_cpu: bool | None = None,
    hide_progress: bool = False,
    groups: np.ndarray | None = None,
) -> OutOfFoldScores:
    """
    Scores of every pair of a document and a label, from models that were trained on the documents of the other folds.

    The encoder stays frozen and reads each document once. One classifier per fold is trained on its embeddings with the settings of
    the recipe `"fast"`, and lexical scores are fitted per fold.

    Args:
        documents ([`LabeledDocuments`]): N documents with L labels.
        model_name_or_path (`str`): Hub name or folder of an encoder.
        label_descriptions (`dict[str, str]`, *optional*): by label name.
        num_folds (`int`, defaults to 5): at least 2.
        max_length (`int`, *optional*): maximum number of tokens per document.
        seed (`int`, defaults to 0): random seed of the folds and of training.
        use_cpu (`bool`, *optional*): whether to use the CPU even if there is an accelerator.
        hide_progress (`bool`, defaults to `False`): whether to hide progress bars.
        groups (`np.ndarray` of shape `(N,)`, *optional*): each document's group of near-duplicates, which is computed if not given.

    Returns:
        [`OutOfFoldScores`].

    Raises:
        ValueError: fewer documents than folds, fewer than two folds or labels, scores of N x L that do not fit into memory, an
            encoder that cannot be loaded, or a trained SEP-MLDC model in its place.
    """
    texts, label_indices = documents.dataset["text"][:], documents.dataset["label_indices"][:]
    num_documents, num_labels = len(texts), len(documents.labels)
    _check_size(num_documents, num_labels, num_folds)
    groups = duplicate_groups(signatures(texts)) if groups is None else groups
    folds = assign_folds(label_indices, groups, num_labels, num_folds, seed)
    heads = HeadTrainer(documents, model_name_or_path, label_descriptions, max_length, seed, use_cpu, hide_progress)
    return score_folds(heads, label_indices, folds)


def score_folds(heads: "HeadTrainer", label_indices: Sequence[Sequence[int]], folds: np.ndarray) -> OutOfFoldScores:
    """
    Scores of the documents of each fold by classifiers that are trained on the other folds.

    Args:
        heads ([`HeadTrainer`]): of N documents.
        label_indices (`Sequence[Sequence[int]]` of length `N`): label ids of each document.
        folds (`np.ndarray` of shape `(N,)`): the fold of each document.
    """
    shape, token_ids = (len(folds), len(heads.labels)), heads.tokenized["input_ids"][:]
    scores = OutOfFoldScores(np.zeros(shape, np.float32), np.zeros(shape, np.float32), folds)
    for fold in tqdm(np.unique(folds), desc="Folds", disable=heads.hide_progress):
        inside, outside = np.flatnonzero(folds != fold).tolist(), np.flatnonzero(folds == fold).tolist()
        known = [label_indices[row] for row in inside]
        heads.train(heads.embeds[inside], known)
        scores.encoder[outside] = heads.logits(heads.embeds[outside])
        lexical = heads.fit_lexical([token_ids[row] for row in inside], known)
        scores.lexical[outside] = heads.margins(lexical, [token_ids[row] for row in outside])
    return scores


def _check_size(num_documents: int, num_labels: int, num_folds: int) -> None:
    if num_folds < 2:
        raise ValueError(f"`num_folds` is {num_folds}, but at least 2 are needed. Use 5.")
    if num_documents < num_folds:
        raise ValueError(
            f"There are {num_documents} documents, but {num_folds} folds need as many. Name more documents, or lower `num_folds`."
        )
    if num_labels < 2:
        raise ValueError(f"There is {num_labels} label, but an audit needs at least 2. Check the label column.")
    needed, free = SCORE_COPIES * 4 * num_documents * num_labels, available_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"The scores of {num_documents:,} documents and {num_labels:,} labels need {gib(needed)} of memory, but {gib(free)} are free. "
            "Audit a part of the documents at a time, or leave rare labels out with a label list file."
        )


class HeadTrainer:
    """
    One frozen encoder, which reads each document once, and new classifiers over its embeddings, with the settings of the recipe
    `"fast"`. The arguments are those of [`out_of_fold_scores`].

    Attributes:
        model ([`SepMldcForMultiLabelClassification`]): with the classifier that was trained last.
        tokenized (`Dataset` of `N` documents): `input_ids`.
        embeds (`torch.Tensor` of shape `(N, d)`): document embeddings, float16, on the CPU.
    """

    def __init__(
        self,
        documents: LabeledDocuments,
        model_name_or_path: str,
        label_descriptions: dict[str, str] | None = None,
        max_length: int | None = None,
        seed: int = 0,
        use_cpu: bool | None = None,
        hide_progress: bool = False,
    ):
        self.labels, self.seed, self.hide_progress = documents.labels, seed, hide_progress
        path, config, self.tokenizer = _load_encoder(model_name_or_path)
        self.max_length = max_length
        self.tokenized = self.tokenize(documents.dataset["text"][:])
        use_cpu = not has_accelerator() if use_cpu is None else use_cpu
        self.bf16 = is_bfloat16_native(use_cpu)
        self.device = torch.device("cpu") if use_cpu else torch.accelerator.current_accelerator()
        self.settings = recommend_settings(
            len(self.tokenized),
            len(documents.labels),
            document_lengths=self.tokenized["length"][:],
            num_layers=config.get_text_config().num_hidden_layers,
            max_tokens=max_length or 512,
            device=self.device.type,
            bf16=self.bf16,
            recipe="fast",
            named={"token_attention": False},  # the embeddings are all that a classifier reads
        )
        set_seed(seed)
        self.model = SepMldcForMultiLabelClassification.from_backbone(
            path,
            self.tokenizer,
            documents.labels,
            label_descriptions,
            **{**self.settings.model, "classifier_bias_init": "zero"},  # `train` knows the frequencies
        ).to(self.device)
        self.start = {
            name: value.clone() for name, value in self.model.state_dict().items() if not name.startswith("backbone.")
        }
        self.embeds = self.encode(self.tokenized)

    def tokenize(self, texts: Sequence[str]) -> Dataset:
        """Token ids of documents."""
        return tokenize(Dataset.from_dict({"text": list(texts)}), self.tokenizer, self.max_length)

    def encode(self, tokenized: Any) -> torch.Tensor:
        """Embeddings (n, d) of tokenized documents."""
        return document_embeddings(
            self.model,
            self.tokenizer,
            tokenized,
            bf16=self.bf16,
            hide_progress=self.hide_progress,
            description="Encoding documents",
        )

    def train(self, embeds: torch.Tensor, label_indices: Sequence[Sequence[int]]) -> None:
        """Train a new classifier on document embeddings (n, d) and the label ids of each document."""
        settings, model = self.settings, self.model
        model.load_state_dict(self.start, strict=False)
        counts = np.bincount([label for ids in label_indices for label in ids], minlength=len(self.labels))
        model.init_prior_bias(torch.from_numpy((counts + 0.5) / (len(label_indices) + 1)).float().to(self.device))
        model.label_embeddings.requires_grad_(True)
        named = {name: p for name, p in model.named_parameters() if not name.startswith("backbone.")}
        kept = [p for name, p in named.items() if p.dim() < 2 or name == "label_embeddings"]
        decayed = [p for name, p in named.items() if p.dim() >= 2 and name != "label_embeddings"]
        groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": kept, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=_head_learning_rate(settings, model, len(embeds)))
        size = settings["per_device_train_batch_size"]
        total = max(1, round(settings["num_train_epochs"] * len(embeds) / size))
        schedule = get_linear_schedule_with_warmup(optimizer, round(settings["warmup_steps"] * total), total)
        generator = torch.Generator().manual_seed(self.seed)
        set_seed(self.seed)
        model.train()
        order = torch.empty(0, dtype=torch.long)
        for _ in tqdm(range(total), desc="Classifier", disable=self.hide_progress, leave=False):
            if len(order) < min(size, len(embeds)):
                order = torch.randperm(len(embeds), generator=generator)
            rows, order = order[:size], order[size:]
            targets = torch.zeros(len(rows), len(self.labels))
            for row, document in enumerate(rows.tolist()):
                targets[row, label_indices[document]] = 1.0
            logits, _ = model.score_documents(embeds[rows].to(self.device, torch.float32))
            loss = model.classification_loss(logits, targets.to(self.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()

    @torch.no_grad()
    def logits(self, embeds: torch.Tensor) -> np.ndarray:
        """Logits (n, L) of document embeddings (n, d) by the classifier that was trained last."""
        parts = [
            self.model.score_documents(part.to(self.device, torch.float32))[0].cpu() for part in embeds.split(1024)
        ]
        return torch.cat(parts).float().numpy()

    def fit_lexical(self, token_ids: Sequence[Sequence[int]], label_indices: Sequence[Sequence[int]]) -> LexicalScores:
        """Linear classifiers on the words of n documents, from the token ids and the label ids of each."""
        num_labels, vocab_size = len(self.labels), self.model.config.get_text_config().vocab_size
        lexical = LexicalScores(vocab_size, num_labels, default_num_features(num_labels), NUM_BIGRAMS)
        solver = default_solver(len(token_ids), num_labels)
        settings = {} if solver == "ridge" else {"num_jobs": None}
        documents = {"input_ids": token_ids, "label_indices": label_indices}
        fit_classifiers(
            lexical, documents, self.tokenizer.all_special_ids, solver, {**settings, "hide_progress": True}
        )
        return lexical

    def margins(self, lexical: LexicalScores, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Margins (n, L) of documents by their words."""
        collator, parts = SepMldcDataCollator(self.tokenizer), []
        for start in range(0, len(token_ids), BATCH_SIZE):
            batch = collator([{"input_ids": ids} for ids in token_ids[start : start + BATCH_SIZE]])
            parts.append(lexical.margins(batch["input_ids"], batch["attention_mask"]))
        return torch.cat(parts).numpy()


def _load_encoder(name: str) -> tuple[str, Any, Any]:
    """Folder or Hub name of an encoder, its configuration and its tokenizer."""
    path = resolve_backbone(name)
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The encoder {name!r} cannot be loaded: {loading_problem(path, error)} Specify a Hub model or a folder with config, weights and "
            "tokenizer."
        ) from error
    if config.model_type == SepMldcConfig.model_type:
        raise ValueError(
            f"{name!r} is a trained SEP-MLDC model, which may have learned the wrong labels of these documents. Specify the encoder that "
            "it was trained from."
        )
    set_padding_token(tokenizer)
    limit_tokenizer(tokenizer, config, None)
    return path, config, tokenizer


def _head_learning_rate(settings: Any, model: Any, num_documents: int) -> float:
    value = settings.get("head_learning_rate")
    if value is not None:
        return value
    return recommended_head_learning_rate(model.config.classifier, False, num_documents)
