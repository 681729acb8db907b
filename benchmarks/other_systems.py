"""
The other systems that `defaults.py` compares with `run_mldc.py`, on the same documents.

- `linear`: LinearSVC of scikit-learn on TF-IDF of words, one per label.
- `LibMultiLabel 1-vs-rest`: LibMultiLabel's own linear model with its defaults, on scikit-learn's TF-IDF as it makes it.
- `omikuji Bonsai`: trees with the settings of Bonsai (Khandagale et al., 2020) in omikuji's documentation, on TF-IDF of words and pairs of words.
- `frozen + logistic regression`: sentence embeddings of the encoder and one logistic regression per label, the head of SetFit without its
  contrastive phase.
- `bare encoder`: `AutoModelForSequenceClassification` with a linear head and binary cross-entropy, as in transformers' `run_classification.py`,
  trained with the encoder settings, epochs, batch size, learning rates and checkpoint selection that `run_mldc.py` recommends for these documents.

All of them tune one threshold per label on the validation documents, as `SepMldcTrainer.tune_thresholds` does.

LibMultiLabel: `pip install --no-deps libmultilabel sparsekmeans python-graphblas liblinear-multicore`. Bonsai: `pip install omikuji`. Frozen
embeddings: `pip install sentence-transformers`. PECOS (libpecos 1.2.8) installs, but runs neither with NumPy 2 nor with the SciPy that
transformers 5 comes with.
"""

import contextlib
import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from tasks import Task
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_sep_mldc.encoder_sep_mldc import dropout_settings
from trainer import SepMldcDataCollator, ranking_metrics, recommend_settings
from trainer.backbones import freeze_layers, resolve_backbone
from trainer.baselines import fit_linear_svm
from trainer.data import encode_labels, tokenize
from trainer.devices import has_accelerator, is_bfloat16_native
from trainer.frozen_layers import FrozenLayersCache
from trainer.recipes import RecommendedSettings
from trainer.thresholds.from_batches import WIDE_RANGE, HalvedHistograms
from trainer.thresholds.tuning import choose_shrinkage, tune_thresholds


BATCH_SIZE = 256
TOP = 10
# A score of labels that a system does not score: practically ruled out.
UNSCORED = -30.0


@dataclasses.dataclass
class Settings:
    backbone: str
    seed: int = 0
    work: str | None = None  # a folder for temporary files


# Scores of documents, (n, L), batch by batch and in their order.
Score = Callable[[datasets.Dataset], Iterator[torch.Tensor]]


def fit_linear(task: Task, settings: Settings) -> Score:
    score = fit_linear_svm(task.train["text"], task.indices(task.train), len(task.labels))

    def scores_of(documents):
        for texts in batches_of_texts(documents):
            yield score(texts)

    return scores_of


def fit_libmultilabel(task: Task, settings: Settings) -> Score:
    from libmultilabel import linear

    vectorizer = TfidfVectorizer()
    features = vectorizer.fit_transform(task.train["text"])
    model = linear.train_1vsrest(multi_hot(task).tocsr().astype(np.float32), features, verbose=False)

    def scores_of(documents):
        for texts in batches_of_texts(documents):
            yield torch.from_numpy(np.asarray(linear.predict_values(model, vectorizer.transform(texts)))).float()

    return scores_of


def fit_omikuji(task: Task, settings: Settings) -> Score:
    import omikuji

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    features = vectorizer.fit_transform(task.train["text"])
    parameters = omikuji.Model.default_hyper_param()
    parameters.cluster_balanced, parameters.cluster_k, parameters.max_depth = False, 100, 3
    with tempfile.TemporaryDirectory(dir=settings.work) as folder:
        path = Path(folder) / "train.txt"
        with path.open("w", encoding="utf-8") as file:  # the format of the Extreme Classification Repository
            file.write(f"{features.shape[0]} {features.shape[1]} {len(task.labels)}\n")
            for row, ids in zip(features, task.indices(task.train), strict=True):
                pairs = (f"{column}:{value:.6g}" for column, value in zip(row.indices, row.data, strict=True))
                file.write(f"{','.join(map(str, ids))} {' '.join(pairs)}\n")
        model = omikuji.Model.train_on_data(str(path), parameters, n_threads=torch.get_num_threads())

    def scores_of(documents):
        for texts in batches_of_texts(documents):
            # Probabilities of the best labels, as logits.
            scores = torch.full((len(texts), len(task.labels)), UNSCORED)
            for position, row in enumerate(vectorizer.transform(texts)):
                row.sort_indices()
                for label, score in model.predict(list(zip(row.indices.tolist(), row.data.tolist())), top_k=100):
                    scores[position, label] = torch.tensor(score).clamp(1e-9, 1 - 1e-7).logit()
            yield scores

    return scores_of


def fit_frozen(task: Task, settings: Settings) -> Score:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(resolve_backbone(settings.backbone))
    encoder.max_seq_length = recommended_for(task, settings)[0]["encoder_max_length"]

    def embed(texts):
        return encoder.encode(list(texts), batch_size=64, show_progress_bar=False, normalize_embeddings=True)

    head = OneVsRestClassifier(LogisticRegression(C=10.0, max_iter=300)).fit(
        embed(task.train["text"]), multi_hot(task)
    )

    def scores_of(documents):
        for texts in batches_of_texts(documents):
            yield torch.from_numpy(head.decision_function(embed(texts)))

    return scores_of


def fit_bare(task: Task, settings: Settings) -> Score:
    backbone = resolve_backbone(settings.backbone)
    recommended, tokenizer = recommended_for(task, settings)
    length = recommended["encoder_max_length"]
    set_seed(settings.seed)
    config = AutoConfig.from_pretrained(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone,
        num_labels=len(task.labels),
        problem_type="multi_label_classification",
        # Without dropout in the encoder, as `run_mldc.py`; the head keeps it.
        **dropout_settings(config, recommended["backbone_dropout"])
        | {"classifier_dropout": getattr(config, "hidden_dropout_prob", 0.1)},
    )
    train, validation = (
        tokenize(encode_labels(documents, task.label2id), tokenizer, length)
        for documents in (task.train, task.validation)
    )
    freeze_layers(model.base_model, recommended["freeze_layers"])
    head = [parameter for name, parameter in model.named_parameters() if not name.startswith(model.base_model_prefix)]
    body = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
    ours = recommended.training
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": ours["learning_rate"]}, {"params": head, "lr": ours["head_learning_rate"]}],
        weight_decay=ours["weight_decay"],
    )
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    k = min(5, len(task.labels))
    best = f"ndcg@{k}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=settings.work)))
        if recommended["freeze_layers"]:
            cache = FrozenLayersCache(folder / "states", model.base_model)
            for documents in (train, validation):
                cache.fill(documents["input_ids"], hide_progress=True)
            stack.enter_context(cache.attached())
        trainer = Trainer(
            model,
            TrainingArguments(
                **{name: value for name, value in ours.items() if name in theirs},
                output_dir=str(folder),
                per_device_eval_batch_size=64,
                train_sampling_strategy="group_by_length",
                metric_for_best_model=best if ours.get("load_best_model_at_end") else None,
                greater_is_better=True,
                seed=settings.seed,
                use_cpu=not has_accelerator(),
                remove_unused_columns=False,
                disable_tqdm=True,
                report_to=[],
            ),
            optimizers=(optimizer, None),
            data_collator=SepMldcDataCollator(tokenizer, len(task.labels)),
            train_dataset=train,
            eval_dataset=validation,
            compute_metrics=lambda found: ranking_metrics(found.predictions, found.label_ids, ks=(k,)),
        )
        trainer.train()

    def scores_of(documents):
        tokenized = tokenize(encode_labels(documents, task.label2id), tokenizer, length)
        yield torch.from_numpy(trainer.predict(tokenized).predictions).float()

    return scores_of


SYSTEMS: dict[str, Callable[[Task, Settings], Score]] = {
    "linear": fit_linear,
    "LibMultiLabel 1-vs-rest": fit_libmultilabel,
    "omikuji Bonsai": fit_omikuji,
    "frozen + logistic regression": fit_frozen,
    "bare encoder": fit_bare,
}
# Results of the others do not depend on the seed.
RANDOM = ("bare encoder",)


def run_system(task: Task, system: str, settings: Settings) -> dict:
    """
    Train a system, tune its thresholds on the validation documents, and predict the test documents.

    Returns:
        `dict`: `top`, the best labels of each test document; `assigned`, their label sets; `cpu_seconds` of training and prediction, without
        the validation documents; and `peak_mib`, the peak memory of this process.
    """
    start = time.process_time()
    scores_of = SYSTEMS[system](task, settings)
    trained = time.process_time()
    thresholds = np.clip(tuned_thresholds(task, scores_of(task.validation)), 1e-7, 1 - 1e-7)
    cut = np.log(thresholds / (1 - thresholds))
    top: list[list[int]] = []
    assigned: list[list[int]] = []
    tuned = time.process_time()
    for scores in scores_of(task.test):
        top += scores.topk(min(TOP, scores.shape[1]), dim=1).indices.tolist()
        assigned += [np.flatnonzero(row >= cut).tolist() for row in scores.numpy()]
    return {
        "top": top,
        "assigned": assigned,
        "cpu_seconds": trained - start + time.process_time() - tuned,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def tuned_thresholds(task: Task, batches: Iterator[torch.Tensor]) -> np.ndarray:
    """A probability threshold per label, (L,), for the sigmoid of scores; tuned on scores of the validation documents, batch by batch."""
    halves = HalvedHistograms(len(task.labels), histogram_range=WIDE_RANGE)
    gold = task.indices(task.validation)
    for scores in batches:
        at = halves.num_seen
        halves.update(scores, label_indices=gold[at : at + len(scores)])
    even, odd = halves.histograms()
    both = (even[0] + odd[0], even[1] + odd[1], even[2])
    return tune_thresholds(*both, shrinkage=choose_shrinkage(even, odd))


def recommended_for(task: Task, settings: Settings) -> tuple[RecommendedSettings, Any]:
    """What `run_mldc.py` recommends for these documents and an MLP classifier, and the tokenizer."""
    backbone = resolve_backbone(settings.backbone)
    tokenizer, config = AutoTokenizer.from_pretrained(backbone), AutoConfig.from_pretrained(backbone)
    use_cpu = not has_accelerator()
    limit = min(tokenizer.model_max_length, 512)
    lengths = tokenize(task.train, tokenizer, limit)["length"]
    recommended = recommend_settings(
        len(task.train),
        len(task.labels),
        document_lengths=np.asarray(lengths),
        num_validation_documents=len(task.validation),
        num_layers=config.num_hidden_layers,
        max_tokens=limit,
        device="cpu" if use_cpu else "cuda",
        bf16=is_bfloat16_native(use_cpu=use_cpu),
        named={"classifier": "mlp", "token_attention": False},
    )
    return recommended, tokenizer


def batches_of_texts(documents: datasets.Dataset) -> Iterator[list[str]]:
    texts = list(documents["text"])
    for at in range(0, len(texts), BATCH_SIZE):
        yield texts[at : at + BATCH_SIZE]


def multi_hot(task: Task) -> sparse.csc_matrix:
    """The labels of the training documents, (N, L)."""
    gold = task.indices(task.train)
    rows = np.repeat(np.arange(len(gold)), [len(ids) for ids in gold])
    columns = np.concatenate([np.asarray(ids, dtype=int) for ids in gold])
    return sparse.csc_matrix((np.ones(len(rows), dtype=int), (rows, columns)), shape=(len(gold), len(task.labels)))
