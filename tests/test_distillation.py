"""Students: a static encoder that learns the answers of a trained model."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from answers import assert_same_answers
from scripts import load_example, run_example
from tiny_models import tiny_batch, tiny_tokenizer
from tiny_training import NUM_LABELS, tiny_documents, trained_trainer
from transformers import AutoModel, AutoModelForSequenceClassification

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline, SepMldcForMultiLabelClassification
from modeling_sep_mldc.static_encoder_sep_mldc import StaticEncoder, StaticEncoderConfig
from trainer import FastLabeler, distill
from trainer.distillation import binary_divergence, distillation_arguments, document_embeddings, new_student


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    trainer = trained_trainer(tmp_path_factory.mktemp("teacher"), classifier="mlp+similarity")
    trainer.fit_lexical_scores(tiny_documents(120), tiny_documents(60, seed=1), num_features=8)
    trainer.tune_thresholds(tiny_documents(60, seed=1))
    return trainer.model.eval()


def arguments(folder, **overrides):
    settings = {
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 20,
        "learning_rate": 5e-3,
    }
    return distillation_arguments(str(folder), **{**settings, **overrides})


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    documents = tiny_documents(400, seed=2).remove_columns("label_indices")
    folder = tmp_path_factory.mktemp("student")
    return distill(teacher, tiny_tokenizer(), documents, tiny_documents(60, seed=1), arguments(folder))


@pytest.fixture(scope="module")
def saved(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "student"
    student.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def batch_of(documents):
    ids = [torch.tensor(document["input_ids"]) for document in documents]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask}


def test_a_static_embedding_is_the_weighted_mean_of_the_embeddings_of_its_tokens():
    torch.manual_seed(0)
    encoder = StaticEncoder(StaticEncoderConfig(vocab_size=20, hidden_size=3, initializer_range=1.0)).eval()
    torch.nn.init.normal_(encoder.token_log_weights)
    ids, mask = torch.tensor([[4, 5, 5, 0], [7, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    with torch.no_grad():
        found, states = encoder.mean_embeds(ids, mask), encoder(ids, mask).last_hidden_state
        for row, length in enumerate((3, 1)):
            weights = encoder.token_log_weights[ids[row, :length]].exp()
            expected = (weights[:, None] * encoder.token_embeddings.weight[ids[row, :length]]).sum(0) / weights.sum()
            torch.testing.assert_close(found[row], expected)
            torch.testing.assert_close(states[row, :length].mean(0), expected)


def test_a_student_scores_a_document_in_one_pass_as_through_the_states_of_its_tokens(student):
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    with torch.no_grad():
        logits, through_states = student(**batch).logits, student(**batch, output_hidden_states=True)
    torch.testing.assert_close(logits, through_states.logits)
    # Padding on the left changes nothing.
    left = {
        name: torch.stack(
            [torch.roll(row, int((mask == 0).sum())) for row, mask in zip(value, batch["attention_mask"])]
        )
        for name, value in batch.items()
    }
    with torch.no_grad():
        torch.testing.assert_close(student(**left).logits, logits)


def test_a_new_student_has_the_classifier_of_its_teacher(teacher):
    documents = tiny_documents(80, seed=2)
    embeds = document_embeddings(teacher, tiny_tokenizer(), documents, hide_progress=True)
    with torch.no_grad():
        expected = teacher.encode(**batch_of(documents), max_length=128)[0]
    torch.testing.assert_close(embeds.float(), expected, atol=2e-3, rtol=2e-3)
    start = new_student(teacher, tiny_tokenizer(), documents["input_ids"], embeds, hide_progress=True)
    with torch.no_grad():
        torch.testing.assert_close(start.score_documents(expected)[0], teacher.score_documents(expected)[0])
        found = start.encode(**batch_of(documents), max_length=128)[0]
    explained = 1 - (found - expected).square().sum() / (expected - expected.mean(0)).square().sum()
    assert explained > 0.5
    # In fewer dimensions the classifier gives the same answers for embeddings that lie within them.
    small = new_student(teacher, tiny_tokenizer(), documents["input_ids"], embeds, hidden_size=31, hide_progress=True)
    assert small.backbone.token_embeddings.weight.shape[1] == small.label_embeddings.shape[1] == 31
    with torch.no_grad():
        logits = small(**batch_of(documents)).logits
        torch.testing.assert_close(logits, start(**batch_of(documents)).logits, atol=0.2, rtol=0.1)


def test_a_student_learns_the_answers_of_its_teacher_on_documents_without_labels(teacher, student):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    unseen = batch_of(tiny_documents(100, seed=3))
    with torch.no_grad():
        wanted = teacher.score_documents(teacher.encode(**unseen)[0])[0]
        found = student.score_documents(student.encode(**unseen)[0])[0]
        start = new_student(
            teacher,
            tiny_tokenizer(),
            tiny_documents(400, seed=2)["input_ids"],
            document_embeddings(teacher, tiny_tokenizer(), tiny_documents(400, seed=2), hide_progress=True),
            hide_progress=True,
        )
        untrained = start.score_documents(start.encode(**unseen)[0])[0]
    assert binary_divergence(found, wanted) < 0.7 * binary_divergence(untrained, wanted)
    assert (found.argmax(1) == wanted.argmax(1)).float().mean() > 0.8
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_student_keeps_labels_and_lexical_scores_and_gets_thresholds_of_its_own(teacher, student):
    assert student.config.labels == teacher.config.labels
    assert torch.equal(student.lexical.feature_weights, teacher.lexical.feature_weights)
    assert len(student.config.thresholds) == NUM_LABELS and student.config.thresholds != teacher.config.thresholds
    assert student.config.lexical_info["num_documents"] == 120


def test_every_parameter_of_a_student_is_trained(teacher, student):
    documents = tiny_documents(400, seed=2)
    embeds = document_embeddings(teacher, tiny_tokenizer(), documents, hide_progress=True)
    start = new_student(teacher, tiny_tokenizer(), documents["input_ids"], embeds, hide_progress=True)
    trained = dict(student.named_parameters())
    same = [name for name, value in start.named_parameters() if torch.equal(value, trained[name])]
    assert not same


def test_a_student_is_loaded_like_any_checkpoint(student, saved):
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    with torch.no_grad():
        expected = student(**batch).logits
        for auto_class in (AutoModel, AutoModelForSequenceClassification, SepMldcForMultiLabelClassification):
            torch.testing.assert_close(auto_class.from_pretrained(saved)(**batch).logits, expected)
    classify = MultiLabelDocumentClassificationPipeline(
        model=AutoModel.from_pretrained(saved), tokenizer=tiny_tokenizer()
    )
    found = classify("the search ranking model " * 100, return_explanation=True, top_k=2)
    assert len(found["labels"]) == 2


def test_labels_and_vocabulary_of_a_student_are_edited_like_those_of_any_model(student):
    edited = copy.deepcopy(student)
    edited.add_labels({"robots": "robot code"}, tiny_tokenizer())
    edited.resize_token_embeddings(len(tiny_tokenizer()) + 3)
    assert len(edited.backbone.token_log_weights) == len(tiny_tokenizer()) + 3
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    with torch.no_grad():
        assert edited(**batch).logits.shape == (4, NUM_LABELS + 1)
        torch.testing.assert_close(edited.encode(**batch)[0], student.encode(**batch)[0])


def test_a_student_and_its_bare_encoder_load_without_the_package(student, saved, tmp_path):
    student.backbone.save_pretrained(tmp_path / "encoder")
    code = """
import sys
for name in ("modeling_sep_mldc", "trainer"):
    sys.modules[name] = None
import torch
from transformers import AutoModel
ids = torch.tensor([[2, 9, 10, 3]])
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
encoder = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
with torch.no_grad():
    print(model(input_ids=ids).logits.tolist())
    print((encoder(ids).last_hidden_state.mean(1) - model.encode(ids)[0]).abs().max().item())
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(saved), str(tmp_path / "encoder")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    logits, difference = done.stdout.splitlines()
    with torch.no_grad():
        expected = student(input_ids=torch.tensor([[2, 9, 10, 3]])).logits
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected)
    assert float(difference) < 1e-5


@pytest.mark.parametrize(
    "change, message",
    [({"hidden_size": 33}, "`hidden_size` is 33, .* 1 to 32"), ({"train_dataset": None}, "tokenized")],
)
def test_models_that_cannot_have_a_student_are_refused(teacher, tmp_path, change, message):
    given = {"train_dataset": tiny_documents(4), "args": arguments(tmp_path), **change}
    with pytest.raises(ValueError, match=message):
        distill(teacher, tiny_tokenizer(), **given)


def test_the_prediction_command_labels_with_a_student_as_the_pipeline_does(student, saved, tmp_path, monkeypatch):
    texts = ["search ranking", "", "graph image " * 300, "star cell graph"]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    read = []
    logits = FastLabeler._logits
    monkeypatch.setattr(FastLabeler, "_logits", lambda *args: read.extend(args[1]) or logits(*args))
    files = ("--input_file", tmp_path / "in.jsonl", "--output_file", tmp_path / "out.jsonl")
    done = run_example("predict", "--model_name_or_path", saved, *files, "--device", "cpu", "--top_k", 2)
    assert done.returncode == 0, done.stderr
    assert len(read) > 4  # the third text is longer than a window
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    classify = MultiLabelDocumentClassificationPipeline(model=student, tokenizer=tiny_tokenizer(), device="cpu")
    assert_same_answers([line["labels"] for line in lines], classify(texts, top_k=2), abs=2e-6)
    assert any(line["labels"] for line in lines)


def test_the_command_makes_a_student_and_compares_it_with_its_teacher(teacher, tmp_path):
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    words = ["search", "ranking", "graph", "image", "star", "cell"]
    lines = [{"text": f"{words[i % 6]} {words[i % 5]}", "labels": [f"label {i % 6}"]} for i in range(40)]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    documents = str(tmp_path / "documents.jsonl")
    files = {"teacher": folder, "train_file": documents, "validation_file": documents, "test_file": documents}
    settings = {"output_dir": tmp_path / "out", "num_train_epochs": 1, "use_cpu": True, "disable_tqdm": True}
    done = run_example(
        "distill", *(word for name, value in (files | settings).items() for word in (f"--{name}", value))
    )
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "static_encoder_sep_mldc.py", "README.md", "tokenizer.json"} <= set(
        os.listdir(tmp_path / "out")
    )
    rows = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert set(rows) == {"teacher", "student"} and "ndcg@5" in done.stdout
    model = AutoModel.from_pretrained(tmp_path / "out")
    # By name: a test that loads a checkpoint with its code registers that copy of the class in this process.
    assert type(model.backbone).__name__ == StaticEncoder.__name__ and model.config.thresholds is not None


def test_the_command_never_replaces_the_teacher(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    before = sorted(os.listdir(tmp_path))
    given = ("--teacher", tmp_path, "--train_file", "nothing.jsonl", "--output_dir", f"{tmp_path}/")
    done = run_example("distill", *given)
    assert done.returncode == 2 and "the folder of the teacher" in done.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_a_refused_run_leaves_no_folder(teacher, tmp_path):
    given = ("--teacher", tmp_path / "none", "--train_file", "nothing.jsonl", "--output_dir", tmp_path / "new" / "out")
    done = run_example("distill", *map(str, given))
    assert done.returncode and "cannot be loaded" in done.stderr and not (tmp_path / "new").exists()


def test_the_command_closes_the_labels_of_documents_as_the_teacher_does(teacher, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "search", "labels": ["label 1"]}) + "\n")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "search"}) + "\n")
    command = load_example("distill")
    files = {f"{split}_file": [str(tmp_path / f"{split}.jsonl")] for split in ("train", "test")}
    for hierarchy, expected in ((None, [1]), ("closure", [0, 1]), ("leaves", [0, 1])):
        config = copy.deepcopy(teacher.config)
        config.label_parents, config.hierarchy = {"label 1": ["label 0"]}, hierarchy
        found = command.read_documents(command.DistillArguments(**files), config, tiny_tokenizer())
        assert sorted(found["test"]["label_indices"][0]) == expected


def test_the_command_names_labels_that_the_teacher_does_not_know(teacher, tmp_path, monkeypatch):
    distill_command = load_example("distill")
    for name, label in (("train", "label 1"), ("validation", "unheard of")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "search", "labels": ["label 0", label]}) + "\n")
    files = {f"{split}_file": [str(tmp_path / f"{split}.jsonl")] for split in ("train", "validation")}
    told = []
    monkeypatch.setattr("trainer.data.encoding.logger.warning", told.append)
    found = distill_command.read_documents(distill_command.DistillArguments(**files), teacher.config, tiny_tokenizer())
    assert found["validation"]["label_indices"][:] == [[0]]
    assert len(told) == 1 and "validation: 1 labels" in told[0] and "unheard of" in told[0]
