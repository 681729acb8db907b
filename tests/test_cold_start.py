"""Models without training documents: label texts alone, documents without labels, pseudo-documents."""

import json
import sys

import pytest
import torch
from scripts import load_example
from tiny_models import tiny_backbone, tiny_batch, tiny_model, tiny_tokenizer

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from trainer import load_pipeline
from trainer.cold_start import cardinality_threshold, labels_without_documents, read_texts, start_from_cosines


pytestmark = pytest.mark.numeric

run_mldc = load_example("run_mldc", "run_mldc_cold")
LABELS = {"markets": "market price data", "robots": "robot vision speech", "stars": "star stars galaxy"}
TEXTS = [f"{' '.join(list(LABELS.values())[i % 3].split()[: 1 + i % 3])} the model" for i in range(12)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_backbone(folder / "encoder")
    rows = [{"text": text, "labels": [list(LABELS)[i % 3]]} for i, text in enumerate(TEXTS)]
    (folder / "labels.csv").write_text(
        "label,description\n" + "".join(f"{name},{text}\n" for name, text in LABELS.items())
    )
    (folder / "names.txt").write_text("\n".join(LABELS) + "\n")
    (folder / "unlabeled.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name in ("pseudo", "validation", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(monkeypatch, files, output_dir, **values):
    values = {
        "model_name_or_path": files / "encoder",
        "output_dir": output_dir,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "metric_ks": "1,3",
        **values,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["run_mldc.py", *words])
    run_mldc.main()


def run(monkeypatch, files, output_dir, **values):
    command(monkeypatch, files, output_dir, **values)
    return SepMldcForMultiLabelClassification.from_pretrained(output_dir)


def batch():
    return {name: value for name, value in tiny_batch().items() if name != "labels"}


def cosines_of(model):
    with torch.no_grad():
        output = model(**batch())
    directions = torch.nn.functional.normalize(output.document_embeds, dim=-1)
    return directions @ torch.nn.functional.normalize(model.label_embeddings, dim=-1).t(), output.logits


# ---- The classifier ----


@pytest.mark.parametrize("classifier", ["similarity", "mlp+similarity"])
@pytest.mark.parametrize("label_attention", [True, False])
@pytest.mark.parametrize("token_attention", [True, False])
def test_logits_are_scaled_cosines(classifier, label_attention, token_attention):
    model = tiny_model(classifier=classifier, label_attention=label_attention, token_attention=token_attention)
    start_from_cosines(model, tiny_tokenizer(), TEXTS)
    cosines, logits = cosines_of(model)
    scale, bias = model.classifier.similarity_scale.item(), model.classifier.bias[0].item()
    torch.testing.assert_close(logits, scale * cosines + bias, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("requested", [1.0, 2.5])
def test_documents_get_the_requested_number_of_labels_on_average(requested):
    model, tokenizer = tiny_model(num_labels=8, classifier="similarity"), tiny_tokenizer()
    start_from_cosines(model, tokenizer, TEXTS, labels_per_document=requested)
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    probabilities = model.probabilities(logits)
    assert probabilities.sum(dim=1).mean().item() == pytest.approx(requested, rel=0.01)
    counts = (probabilities >= torch.tensor(model.config.thresholds) - 1e-6).sum().item()
    assert counts == pytest.approx(requested * len(TEXTS), abs=2)


def test_without_documents_a_model_only_ranks():
    model = tiny_model(classifier="mlp+similarity", thresholds=[0.5] * 5)
    start_from_cosines(model, tiny_tokenizer())
    cosines, logits = cosines_of(model)
    assert model.config.is_ranking and model.config.thresholds is None
    assert torch.equal(logits.argsort(dim=1), cosines.argsort(dim=1))


def test_training_starts_from_the_cosine_and_moves_every_part():
    model = tiny_model(classifier="mlp+similarity", token_attention=True)
    start_from_cosines(model, tiny_tokenizer(), TEXTS)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(2):  # what is behind output weights of 0 moves after them
        optimizer.zero_grad()
        model(**tiny_batch()).loss.backward()
        optimizer.step()
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert [name for name in still if "backbone" not in name] == ["label_embeddings"]


def test_the_threshold_for_a_cardinality():
    batches = [torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([[0.7, 0.6]])]
    assert cardinality_threshold(batches, 1.0) == pytest.approx(0.7)
    assert cardinality_threshold(batches, 4 / 3) == pytest.approx(0.6)


# ---- The command ----


def test_label_descriptions_alone_give_a_checkpoint_that_ranks(monkeypatch, files, tmp_path, capsys):
    model = run(monkeypatch, files, tmp_path, label_descriptions_file=files / "labels.csv")
    assert model.config.labels == sorted(LABELS) and model.config.label_descriptions == LABELS
    assert "Nothing was trained" in capsys.readouterr().out
    assert "**Nothing was trained.**" in (tmp_path / "README.md").read_text()
    assert model.config.is_ranking and model.token_attention is None
    cosines, logits = cosines_of(model)
    assert torch.equal(logits.argsort(dim=1), cosines.argsort(dim=1))
    answers = load_pipeline(tmp_path)("star stars galaxy", top_k=1)
    assert len(answers) == 1 and answers[0]["label"] in LABELS


def test_a_checkpoint_that_ranks_gives_the_logits_of_the_pipeline_and_assigns_nothing(
    monkeypatch, files, tmp_path, capsys
):
    run(monkeypatch, files, tmp_path / "model", label_descriptions_file=files / "labels.csv")
    command(
        monkeypatch,
        files,
        tmp_path,
        model_name_or_path=tmp_path / "model",
        test_file=files / "test.jsonl",
        do_predict=True,
        prediction_top_k=2,
    )
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (files / "test.jsonl").read_text().splitlines()]
    assert not any({"assigned", "abstained"} & set(row) for row in rows)
    for row, answer in zip(rows, load_pipeline(tmp_path / "model")(texts, top_k=2), strict=True):
        assert [entry["label"] for entry in row["labels"]] == [entry["label"] for entry in answer]
        assert [entry["score"] for entry in row["labels"]] == pytest.approx(
            [entry["score"] for entry in answer], rel=1e-2
        )
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  -> ")]
    assert shown and not any("threshold" in line for line in shown)


def test_documents_without_labels_give_thresholds(monkeypatch, files, tmp_path):
    model = run(
        monkeypatch,
        files,
        tmp_path,
        label_list_file=files / "names.txt",
        unlabeled_file=files / "unlabeled.jsonl",
        labels_per_document=1.5,
    )
    assert model.config.labels == list(LABELS) and model.config.label_descriptions is None
    assert not model.config.is_ranking and len(set(model.config.thresholds)) == 1
    found = [len(answer) for answer in load_pipeline(tmp_path)(TEXTS)]
    assert 1.2 <= sum(found) / len(found) <= 1.8


def test_validation_documents_give_tuned_thresholds_and_metrics(monkeypatch, files, tmp_path):
    model = run(
        monkeypatch,
        files,
        tmp_path,
        label_descriptions_file=files / "labels.csv",
        validation_file=files / "validation.jsonl",
        test_file=files / "test.jsonl",
        do_eval=True,
        do_predict=True,
    )
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"eval_p@1", "test_p@1"} <= results.keys()
    assert model.config.threshold_info["num_documents"] == len(TEXTS) and not model.config.is_ranking
    assert "train_loss" not in results


def test_pseudo_documents_alone_are_trained_on(monkeypatch, files, tmp_path):
    model = run(
        monkeypatch,
        files,
        tmp_path,
        label_descriptions_file=files / "labels.csv",
        pseudo_documents_file=files / "pseudo.jsonl",
        test_file=files / "test.jsonl",
        do_train=True,
        do_predict=True,
        baselines=True,
        max_steps=4,
    )
    untrained = SepMldcForMultiLabelClassification.from_backbone(
        str(files / "encoder"), tiny_tokenizer(), sorted(LABELS), LABELS, classifier="mlp+similarity"
    )
    start_from_cosines(untrained, tiny_tokenizer(), TEXTS)
    assert not torch.equal(model.classifier.similarity_proj.weight, untrained.classifier.similarity_proj.weight)
    moved = model.classifier.similarity_proj.weight - untrained.classifier.similarity_proj.weight
    assert moved.abs().max() < 0.5  # from the identity on
    assert model.config.label_counts is None and model.config.num_train_documents is None
    assert model.config.threshold_info["objective"] == "1 labels per document"
    card = (tmp_path / "README.md").read_text()
    assert "Nothing was trained" not in card


def test_training_continues_from_a_cold_checkpoint(monkeypatch, files, tmp_path):
    settings = {"label_descriptions_file": files / "labels.csv", "unlabeled_file": files / "unlabeled.jsonl"}
    cold = run(monkeypatch, files, tmp_path / "cold", **settings)
    settings = {"model_name_or_path": tmp_path / "cold", "train_file": files / "test.jsonl", "do_train": True}
    trained = run(monkeypatch, files, tmp_path / "trained", **settings, max_steps=3, validation_split=0)
    moved = (trained.classifier.similarity_proj.weight - cold.classifier.similarity_proj.weight).abs().max()
    assert 0 < moved < 0.5 and trained.config.labels == cold.config.labels


# ---- Bad input ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_eval": True, "validation_file": "validation.jsonl"}, "training documents or label texts"),
        ({}, "There is nothing to do"),
        ({"label_descriptions_file": "labels.csv", "do_train": True}, "needs training documents"),
        ({"label_descriptions_file": "labels.csv", "labels_per_document": 0}, "must be above 0"),
        (
            {"label_descriptions_file": "labels.csv", "unlabeled_file": "unlabeled.jsonl", "labels_per_document": 3},
            "below 3, the number of labels",
        ),
        ({"label_descriptions_file": "labels.csv", "classifier": "mlp"}, "compares label texts"),
        ({"label_descriptions_file": "numbers.json"}, "`description` is 1, but a text is needed"),
        ({"label_descriptions_file": "labels.csv", "unlabeled_file": "names.csv"}, "no text in 'text'"),
        ({"train_file": "test.jsonl", "do_train": True, "labels_per_document": 2}, "without training documents"),
    ],
)
def test_bad_input_is_explained_and_nothing_is_written(monkeypatch, files, tmp_path, values, message):
    (files / "numbers.json").write_text('{"stars": 1}')
    (files / "names.csv").write_text("title\nstars\n")
    values = {name: files / value if name.endswith("_file") else value for name, value in values.items()}
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, files, tmp_path / "new" / "out", **values)
    assert not (tmp_path / "new").exists()


def test_a_model_is_not_replaced_by_one_that_was_not_trained(monkeypatch, files, tmp_path):
    run(monkeypatch, files, tmp_path, label_descriptions_file=files / "labels.csv")
    former = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="already contains a model"):
        run(monkeypatch, files, tmp_path, label_list_file=files / "names.txt")
    assert (tmp_path / "config.json").read_bytes() == former
    with pytest.raises(ValueError, match="nothing to do"):
        run(monkeypatch, files, tmp_path, model_name_or_path=tmp_path, label_descriptions_file=files / "labels.csv")
    model = run(monkeypatch, files, tmp_path, label_list_file=files / "names.txt", overwrite_output_dir=True)
    assert model.config.labels == list(LABELS)


def test_labels_come_from_the_list_or_else_from_the_descriptions(files):
    assert labels_without_documents(None, files / "labels.csv") == sorted(LABELS)
    assert labels_without_documents(files / "names.txt", files / "labels.csv") == list(LABELS)


def test_texts_are_read_up_to_a_limit(files):
    assert read_texts([str(files / "unlabeled.jsonl")], ["text"], limit=3) == TEXTS[:3]
