"""examples/run_mldc.py on tiny encoders: one run end to end, and every kind of bad input before any training."""

import csv
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import load_example, run_example
from tiny_models import tiny_backbone

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from trainer import run_data, run_outputs, run_plan, run_report
from trainer.backbones import freeze_layers, loading_problem, resolve_backbone
from trainer.frozen_layers import FOLDER, SPARE_BYTES
from trainer.run_needs import RunNeeds


ROOT = Path(__file__).parents[1]
TOPICS = {"stars": "galaxy stars star image", "robots": "robot robots vision speech", "markets": "market price data"}


run_mldc = load_example("run_mldc")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny encoder, documents of three topics, label descriptions and pseudo-documents."""
    folder = tmp_path_factory.mktemp("files")
    tiny_backbone(folder / "encoder")
    names = list(TOPICS)
    rows = []
    for number in range(36):
        labels = [names[number % 3]] + ([names[(number + 1) % 3]] if number % 4 == 0 else [])
        text = " ".join(TOPICS[label] for label in labels) + f" number {number}"
        rows.append({"id": f"doc{number}", "text": text, "labels": labels})
    for split, part in (("train", rows[:24]), ("validation", rows[24:30]), ("test", rows[30:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with open(folder / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "text", "labels"])
        writer.writerows(["a title", row["text"], ";".join(row["labels"])] for row in rows[:24])
    (folder / "descriptions.json").write_text(json.dumps({"stars": "Things that shine.", "robots": "Machines."}))
    (folder / "pseudo.jsonl").write_text(json.dumps({"text": "a market of stars", "labels": ["markets"]}) + "\n")
    return folder


def arguments(files, output_dir, **changes):
    values = {
        "model_name_or_path": files / "encoder",
        "train_file": files / "train.jsonl",
        "validation_file": files / "validation.jsonl",
        "test_file": files / "test.jsonl",
        "output_dir": output_dir,
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        "metric_ks": "1,3",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def run(monkeypatch, files, output_dir, **changes):
    flat = [word for name, value in arguments(files, output_dir, **changes).items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["run_mldc.py", *flat])
    run_mldc.main()


def test_lexical_scores_are_fitted_after_training_and_raise_the_test_results(monkeypatch, files, tmp_path):
    settings = {"learning_rate": 1e-5, "max_length": 16, "encoder_max_length": 3, "backbone_dropout": 0.0}
    results = {}
    for name in ("without", "with"):
        run(monkeypatch, files, tmp_path / name, lexical_scores=name == "with", num_lexical_features=20, **settings)
        results[name] = json.loads((tmp_path / name / "all_results.json").read_text())
        results[name, "model"] = SepMldcForMultiLabelClassification.from_pretrained(tmp_path / name)
    assert results["with"]["test_ndcg@3"] > results["without"]["test_ndcg@3"]
    assert results["without", "model"].lexical is None and results["with", "model"].lexical.scale > 0
    config = results["with", "model"].config
    assert (
        config.num_lexical_features == 20 and config.encoder_max_length == 3 and config.score_calibration is not None
    )
    assert config.backbone_config.hidden_dropout_prob == config.backbone_config.attention_probs_dropout_prob == 0
    card = (tmp_path / "with" / "README.md").read_text()
    assert "lexical scores, token weights per label" in card


@pytest.mark.pictures
def test_a_run_writes_a_checkpoint_results_predictions_and_a_table(monkeypatch, files, tmp_path, capsys):
    run(
        monkeypatch,
        files,
        tmp_path,
        id_column="id",
        label_descriptions_file=files / "descriptions.json",
        pseudo_documents_file=files / "pseudo.jsonl",
        baselines=True,
        learning_rate=1e-3,
        class_weights="effective",
    )
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {
        "train_loss",
        "eval_p@1",
        "test_p@1",
        "test_ndcg@3",
        "test_psp@1",
        "test_f1_micro",
        "test_f1_macro",
    } <= set(results)
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in predictions] == [f"doc{number}" for number in range(30, 36)]
    assert [sorted(item["label"] for item in row["labels"]) for row in predictions] == [sorted(TOPICS)] * 6
    assert all(row["labels"] == sorted(row["labels"], key=lambda item: -item["score"]) for row in predictions)
    table = list(csv.DictReader(open(tmp_path / "per_label_metrics.csv")))
    assert [row["label"] for row in table] == sorted(TOPICS)
    assert [int(float(row["train_count"])) for row in table] == [10, 10, 10]  # the pseudo-document does not count
    model = SepMldcForMultiLabelClassification.from_pretrained(tmp_path)
    assert model.config.labels == sorted(TOPICS)
    assert model.config.label_descriptions == {"stars": "Things that shine.", "robots": "Machines."}
    assert model.config.num_train_documents == 24 and model.config.class_weights == "effective"
    card = (tmp_path / "README.md").read_text()
    assert (tmp_path / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "(recipe best)" in card and "specified by the user |" in card  # the table of settings
    shown = capsys.readouterr().out
    for word in ("SEP-MLDC", "TF-IDF + LinearSVC", "majority labels", "p@1", "f1_macro", "->"):
        assert word in shown
    baselines = json.loads((tmp_path / "baseline_results.json").read_text())
    assert baselines["TF-IDF + LinearSVC"]["p@1"] > baselines["majority labels"]["p@1"]


def test_a_trained_checkpoint_can_be_evaluated_and_run_alone(monkeypatch, files, tmp_path):
    run(monkeypatch, files, tmp_path / "first")
    first = json.loads((tmp_path / "first" / "all_results.json").read_text())
    weights = {"label_loss_weight": 0.0, "document_loss_weight": 0.0}
    run(monkeypatch, files, tmp_path / "second", model_name_or_path=tmp_path / "first", do_train=False, **weights)
    second = json.loads((tmp_path / "second" / "all_results.json").read_text())
    assert second["test_ndcg@3"] == pytest.approx(first["test_ndcg@3"])
    assert second["test_loss"] == pytest.approx(first["test_loss"], rel=1e-4)


def test_arguments_can_be_in_one_file_and_be_overridden_on_the_command_line(monkeypatch, files, tmp_path):
    values = arguments(files, tmp_path / "unused", do_predict=False, num_train_epochs=5)
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    changed = ["--output_dir", str(tmp_path / "used"), "--num_train_epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["run_mldc.py", str(tmp_path / "run.yaml"), *changed])
    run_mldc.main()
    assert (tmp_path / "used" / "model.safetensors").exists() and not (tmp_path / "unused").exists()
    state = json.loads((tmp_path / "used" / "trainer_state.json").read_text())
    assert state["epoch"] == 1


def test_joined_labels_and_several_text_columns_are_read_from_csv(monkeypatch, files, tmp_path):
    options = arguments(files, tmp_path, train_file=files / "train.csv", label_delimiter=";", do_predict=False)
    options["text_columns"] = "title"
    flat = [word for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["run_mldc.py", *flat, "--validation_file", str(files / "train.csv")])
    settings = run_mldc.read_settings(sys.argv[1:])
    settings.data.text_columns, settings.data.test_file = ["title", "text"], None
    documents = run_data.read_documents(settings)
    assert documents["train"][0]["text"].startswith("a title galaxy stars")
    assert documents["train"][0]["labels"] == ["stars", "robots"]


def test_streamed_training_documents_give_the_model_that_loaded_ones_give(monkeypatch, files, tmp_path):
    same = {"max_steps": 5, "num_train_epochs": None, "do_predict": False, "learning_rate": 1e-3}
    same["cache_frozen_layers"] = False  # a stream has none, and with bfloat16 it rounds differently
    run(monkeypatch, files, tmp_path / "loaded", train_sampling_strategy="sequential", **same)
    run(monkeypatch, files, tmp_path / "streamed", streaming=True, shuffle_buffer_size=0, **same)
    loaded, streamed = (
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        for name in ("loaded", "streamed")
    )
    losses = [row["loss"] for row in loaded if "loss" in row]
    assert len(losses) == 5 and [row["loss"] for row in streamed if "loss" in row] == pytest.approx(losses, rel=1e-5)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("loaded", "streamed")]
    assert configs[0] == configs[1] and configs[0]["num_train_documents"] == 24
    assert configs[1]["lexical_info"]["num_documents"] == 24
    # Shuffled, a stream gives other batches.
    run(monkeypatch, files, tmp_path / "shuffled", streaming=True, **same)
    history = json.loads((tmp_path / "shuffled" / "trainer_state.json").read_text())["log_history"]
    assert [row["loss"] for row in history if "loss" in row] != pytest.approx(losses, rel=1e-5)


def broken(files, tmp_path, content):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    return {"train_file": path}


def written(tmp_path, content):
    return broken(None, tmp_path, content)["train_file"]


def label_list(tmp_path, *names):
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(names))
    return path


def blocked(tmp_path, name, make):
    (tmp_path / "blocked").mkdir()
    make(tmp_path / "blocked" / name)
    return {"output_dir": tmp_path / "blocked"}


BAD_INPUT = {
    "no such file": (lambda f, t: {"train_file": t / "none.jsonl"}, "none.jsonl"),
    "no such column": (lambda f, t: {"text_columns": "abstract"}, "abstract"),
    "no such backbone": (lambda f, t: {"model_name_or_path": t / "none"}, "There is no folder"),
    "no such package": (
        lambda f, t: {"model_name_or_path": "package:no_such_encoder/model"},
        "pip install no-such-encoder",
    ),
    "an empty file": (lambda f, t: broken(f, t, ""), "broken.jsonl"),
    "a malformed line": (lambda f, t: broken(f, t, '{"text": "a", "labels": ["x"]}\n{"text": \n'), "line 2"),
    "a document without text": (lambda f, t: broken(f, t, '{"text": " ", "labels": ["x"]}\n'), "line 1"),
    "labels of the wrong type": (lambda f, t: broken(f, t, '{"text": "a", "labels": 3}\n'), "line 1"),
    "k above L": (lambda f, t: {"metric_ks": "1,5"}, "k = 5, but there are only 3 labels"),
    "labels per step below one": (lambda f, t: {"labels_per_step": 0}, "`labels_per_step` is 0"),
    "no training documents": (lambda f, t: {"train_file": None}, "training documents|train documents"),
    "no validation documents beside a stream": (
        lambda f, t: {"streaming": True, "max_steps": 2, "validation_file": None},
        "Specify them with `--validation_file`, or remove the flag",
    ),
    "a stream without end": (lambda f, t: {"streaming": True}, "Set the length of training with `--max_steps`"),
    "a stream and baselines": (
        lambda f, t: {"streaming": True, "max_steps": 2, "baselines": True},
        "`--baselines` needs all training documents at once",
    ),
    "a stream and pairs": (
        lambda f, t: {"streaming": True, "max_steps": 2, "group_by_label_set": True},
        "`--group_by_label_set` needs all training documents at once",
    ),
    "lexical scores without validation documents": (
        lambda f, t: {"lexical_scores": True, "validation_file": None, "validation_split": 0, "do_eval": False},
        "`--lexical_scores` needs validation documents",
    ),
    "a stream with pseudo-documents": (
        lambda f, t: {"streaming": True, "max_steps": 2, "pseudo_documents_file": f / "pseudo.jsonl"},
        "write the pseudo-documents into the training files",
    ),
    "a stream and a negative buffer": (
        lambda f, t: {"streaming": True, "max_steps": 2, "shuffle_buffer_size": -1},
        "`--shuffle_buffer_size` is -1",
    ),
    "a malformed line of a stream": (
        lambda f, t: {
            **broken(f, t, '{"text": "a", "labels": ["x"]}\n{"text": \n'),
            "streaming": True,
            "max_steps": 2,
        },
        "line 2",
    ),
    "no validation documents": (
        lambda f, t: {"validation_file": None, "validation_split": 0},
        "`--do_eval` needs validation documents",
    ),
    "a split beside a file": (
        lambda f, t: {"validation_split": 0.2},
        "`--validation_split` is 0.2, but `--validation_file` specifies documents",
    ),
    "a split of everything": (
        lambda f, t: {"validation_file": None, "validation_split": 1},
        "`--validation_split` is 1.0",
    ),
    "validation documents with unknown labels": (
        lambda f, t: {"validation_file": written(t, '{"text": "a star", "labels": ["x"]}\n')},
        "None of the 1 validation documents has one of the 3 labels of the model",
    ),
    "validation documents without labels": (
        lambda f, t: {"validation_file": written(t, '{"text": "a star", "labels": []}\n')},
        "None of the 1 validation documents has one of the 3 labels of the model",
    ),
    "test documents with unknown labels": (
        lambda f, t: {"test_file": written(t, '{"text": "a star", "labels": ["x"]}\n'), "do_predict": True},
        "None of the 1 test documents has one of the 3 labels of the model.*`predict.py`",
    ),
    "no validation documents for a trained checkpoint": (
        lambda f, t: {"validation_file": None, "do_train": False},
        "Specify them with `--validation_file`, or remove the flag",
    ),
    "too few validation documents for a guarantee of recall": (
        lambda f, t: {
            "validation_file": written(
                t, '{"text": "a star", "labels": ["stars"]}\n' * 8 + '{"text": "b", "labels": []}\n'
            ),
            "threshold_objective": "recall:0.9",
        },
        "'recall:0.9', which needs at least 9 validation documents with labels, but there are only 8",
    ),
    "too few validation documents for a guarantee of false discoveries": (
        lambda f, t: {
            "validation_file": written(t, '{"text": "a star", "labels": ["stars"]}\n' * 3),
            "threshold_objective": "fdr:0.2",
        },
        "'fdr:0.2', which needs at least 4 validation documents, but there are only 3",
    ),
    "a guarantee without validation documents": (
        lambda f, t: {
            "validation_file": None,
            "validation_split": 0,
            "do_eval": False,
            "threshold_objective": "recall:0.9",
        },
        "`--threshold_objective` needs validation documents",
    ),
    "a guarantee that is none": (
        lambda f, t: {"threshold_objective": "recall:1.5"},
        "`objective` is 'recall:1.5', but recall must be a number between 0 and 1",
    ),
    "adapters for frozen layers alone": (
        lambda f, t: {"recipe": "fast", "lora_rank": 2, "dry_run": True},
        "`--lora_rank` is 2, but `--recipe fast` freezes all 2 layers.*`--recipe best`",
    ),
    "adapters of rank zero": (lambda f, t: {"lora_rank": 0}, "`--lora_rank` is 0"),
    "a refit without training": (lambda f, t: {"refit_on_all": True, "do_train": False}, "`--do_train` is missing"),
    "a refit without validation documents": (
        lambda f, t: {"refit_on_all": True, "validation_file": None, "validation_split": 0, "do_eval": False},
        "`--refit_on_all` needs validation documents",
    ),
    "class weights without binary cross-entropy": (
        lambda f, t: {"class_weights": "balanced", "classification_loss": "softmax"},
        "`--class_weights` is balanced, but `--classification_loss softmax` has no binary cross-entropy",
    ),
    "an objective of thresholds that are not tuned": (
        lambda f, t: {"tune_thresholds": False, "threshold_objective": "macro"},
        "`--threshold_objective` is macro, but `--tune_thresholds false` disables tuning",
    ),
    "a calibration that is not tuned": (
        lambda f, t: {"tune_thresholds": False, "score_calibration": "platt"},
        "`--score_calibration` is platt, but `--tune_thresholds false` disables tuning",
    ),
    "a cache without frozen layers": (
        lambda f, t: {"cache_frozen_layers": True, "freeze_layers": 0},
        "`--cache_frozen_layers` requests a cache, but no layer is frozen",
    ),
    "a cache that is not read": (
        lambda f, t: {"cache_frozen_layers": True, "freeze_layers": 1, "torch_compile": True},
        "`--cache_frozen_layers` requests a cache, but `--torch_compile` cannot use it",
    ),
    "a stream and a cache": (
        lambda f, t: {"streaming": True, "max_steps": 2, "cache_frozen_layers": True},
        "`--cache_frozen_layers` needs all training documents at once",
    ),
    "class weights to choose without validation documents": (
        lambda f, t: {"class_weights": "auto", "validation_file": None, "validation_split": 0, "do_eval": False},
        "`--class_weights` needs validation documents",
    ),
    "a stream and class weights to choose": (
        lambda f, t: {"streaming": True, "max_steps": 2, "class_weights": "auto"},
        "`--class_weights` needs all training documents at once",
    ),
    "an unknown metric of the best model": (
        lambda f, t: {
            "load_best_model_at_end": True,
            "metric_for_best_model": "ndcg5",
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
        },
        "`--metric_for_best_model` is 'ndcg5', but an evaluation reports loss, .*ndcg@3",
    ),
    "a label list without any label of the documents": (
        lambda f, t: {"label_list_file": label_list(t, "C1", "C2", "C3")},
        "no training document has one of them",
    ),
    "documents without a token of their text": (
        lambda f, t: {"max_length": 2},
        "`--max_length` is 2, but a document has 2 special tokens .* Use at least 3",
    ),
    "an encoder that reads no token of the text": (
        lambda f, t: {"encoder_max_length": 1},
        "`--encoder_max_length` is 1, but a document has 2 special tokens",
    ),
    "a checkpoint to resume from that is not there": (
        lambda f, t: {"resume_from_checkpoint": t / "nowhere"},
        "`--resume_from_checkpoint` is '.*nowhere', but there is no such folder.*last",
    ),
    "adapters for layers that the user freezes": (
        lambda f, t: {"freeze_layers": 2, "lora_rank": 4},
        "`--lora_rank` is 4, but `--freeze_layers 2` freezes all 2 layers.*Freeze fewer",
    ),
    "more frozen layers than there are": (
        lambda f, t: {"freeze_layers": 3},
        "`--freeze_layers` is 3, but the encoder has 2 layers. Choose 0 to 2",
    ),
    "an encoder folder without a model": (
        lambda f, t: {"model_name_or_path": blocked(t, "cold", os.mkdir)["output_dir"] / "cold"},
        "cannot be loaded: the folder holds no config.json, so it is not a model. Specify a Hub model",
    ),
    "an output folder that is a file": (lambda f, t: {"output_dir": f / "pseudo.jsonl"}, "is a file"),
    "an output that is a folder": (lambda f, t: blocked(t, "predictions.jsonl", os.mkdir), "is a folder, but a file"),
    "an output that is a pipe": (lambda f, t: blocked(t, "all_results.json", os.mkfifo), "is a device or a pipe"),
    "a weight file that is a pipe": (lambda f, t: blocked(t, "model.safetensors", os.mkfifo), "a device or a pipe"),
}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_ends_in_one_clear_error_before_any_training(monkeypatch, files, tmp_path, case):
    changes, message = BAD_INPUT[case]
    monkeypatch.setattr(run_mldc.SepMldcTrainer, "train", lambda *args, **kwargs: pytest.fail("training started"))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        run(monkeypatch, files, **{"output_dir": tmp_path / "out", **changes(files, tmp_path)})
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir())


def test_duplicate_names_in_a_label_list_are_refused(monkeypatch, files, tmp_path):
    (tmp_path / "labels.txt").write_text("stars\nrobots\nstars\n")
    with pytest.raises(ValueError, match="label 'stars' already appears in line 1"):
        run(monkeypatch, files, tmp_path / "out", label_list_file=tmp_path / "labels.txt")


def test_a_description_of_an_unknown_label_warns_with_the_closest_name(files, caplog):
    import logging

    from trainer.data import load_label_descriptions

    path = files / "unknown.json"
    path.write_text(json.dumps({"star": "Typing error."}))
    with caplog.at_level(logging.WARNING):
        assert load_label_descriptions(path, list(TOPICS)) == {}
    assert "'star'" in caplog.text and "'stars'" in caplog.text


def test_an_output_folder_with_a_run_is_not_overwritten(monkeypatch, files, tmp_path):
    run(monkeypatch, files, tmp_path, do_predict=False)
    before = (tmp_path / "all_results.json").read_bytes()
    with pytest.raises(ValueError, match="already contains a run"):
        run(monkeypatch, files, tmp_path)
    assert (tmp_path / "all_results.json").read_bytes() == before
    (tmp_path / "all_results.json").unlink()  # a model alone, as `save_pretrained` leaves it
    with pytest.raises(ValueError, match="already contains a run"):
        run(monkeypatch, files, tmp_path, model_name_or_path=str(tmp_path))
    run(monkeypatch, files, tmp_path, overwrite_output_dir=True, do_predict=False)


def test_the_script_prints_one_sentence_instead_of_a_traceback(files, tmp_path):
    words = [w for n, v in arguments(files, tmp_path, labels_per_step=0).items() for w in (f"--{n}", v)]
    done = run_example("run_mldc", *words)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("run_mldc.py: `labels_per_step` is 0")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_frozen_layers_and_embeddings_do_not_train(tmp_path, kind):
    from tiny_models import tiny_model

    model = tiny_model(kind=kind)
    freeze_layers(model.backbone, 1)
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert trained and not any("embeddings" in name for name in trained)
    assert any(".1." in name for name in trained) and not any(
        ".0." in f".{name}" and "layer" in name for name in trained
    )
    with pytest.raises(ValueError, match="`freeze_layers` is 9, but the encoder has 2 layers"):
        freeze_layers(model.backbone, 9)


def test_a_backbone_inside_a_package_is_found():
    assert Path(resolve_backbone("package:trainer/.")).name in (".", "trainer")
    assert resolve_backbone("roberta-base") == "roberta-base"
    assert resolve_backbone("user/model") == "user/model"
    with pytest.raises(ValueError, match="no folder 'none'"):
        resolve_backbone("package:trainer/none")


HUB_ERROR = "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them.\nCheck your connection."
TOKENIZER_ERROR = (
    "Couldn't instantiate the backend tokenizer from one of: \n(1) a `tokenizers` file, \n(2) a slow one."
)


@pytest.mark.parametrize(
    ("name", "error", "problem"),
    [
        ("o/nope", HUB_ERROR, "there is no such folder, and it was not found on the Hub (We couldn't connect to "),
        ("o/p/nope", "Repo id must be in another form.", "there is no such folder."),
        ("/nope", "Repo id must be in another form.", "there is no such folder."),
        ("empty", TOKENIZER_ERROR, "the folder holds no config.json, so it is not a model."),
        ("model", TOKENIZER_ERROR, "the folder holds no tokenizer, such as a file tokenizer.json."),
        ("model", "The config is no JSON.\n\nSee " + 200 * "x", "The config is no JSON."),
    ],
)
def test_why_a_model_cannot_be_loaded_is_one_sentence(monkeypatch, tmp_path, name, error, problem):
    monkeypatch.chdir(tmp_path)
    for folder in ("o", "empty", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    found = loading_problem(name, OSError(error))
    assert found.startswith(problem) and found.endswith(".") and "\n" not in found
    assert found == problem or HUB_ERROR.splitlines()[0][:-1] in found


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "examples" / "configs").glob("*.json")))
def test_every_recipe_is_made_of_arguments_that_exist(monkeypatch, tmp_path, config):
    output = ["--output_dir", str(tmp_path), "--use_cpu", "True"]
    monkeypatch.setattr(sys, "argv", ["run_mldc.py", str(ROOT / "examples" / "configs" / config), *output])
    settings = run_mldc.read_settings(sys.argv[1:])
    model_args, data_args, args = settings.model, settings.data, settings.args
    assert args.do_train and data_args.train_file and model_args.model_name_or_path
    if config != "quickstart.json":  # the settings of the paper
        assert (args.learning_rate, args.contrastive_temperature, model_args.classifier_dropout) == (5e-5, 0.1, 0.5)
        assert args.label_loss_weight == args.document_loss_weight == 0.01


# ---- What must not be lost ----


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_truncated_results_file_does_not_stop_a_resume(monkeypatch, files, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "do_eval": False}
    run(monkeypatch, files, tmp_path, **settings)
    for content in (b"", b'{"a": ', b"[1]", b"\xff"):
        (tmp_path / "all_results.json").write_bytes(content)
        run(monkeypatch, files, tmp_path, resume_from_checkpoint="last", **settings)
        assert {"train_loss", "test_p@1"} <= set(json.loads((tmp_path / "all_results.json").read_text()))


@pytest.mark.parametrize("part", ["fit_lexical_scores", "tune_thresholds", "predict"])
def test_a_trained_model_is_saved_before_anything_that_can_fail(monkeypatch, files, tmp_path, part):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(run_mldc.SepMldcTrainer, part, fail)
    with pytest.raises(OSError, match="No space left"):
        run(monkeypatch, files, tmp_path, lexical_scores=True)
    model = SepMldcForMultiLabelClassification.from_pretrained(tmp_path)
    assert model.config.labels == sorted(TOPICS) and (tmp_path / "train_results.json").exists()


def test_a_failed_save_leaves_the_former_model_whole(monkeypatch, files, tmp_path):
    run(monkeypatch, files, tmp_path, do_predict=False)
    former = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".json")}

    def half(self, folder, **kwargs):
        os.makedirs(folder, exist_ok=True)
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(SepMldcForMultiLabelClassification, "save_pretrained", half)
    with pytest.raises(OSError, match="No space left"):
        run(monkeypatch, files, tmp_path, overwrite_output_dir=True, do_predict=False)
    assert {name: (tmp_path / name).read_bytes() for name in former} == former
    assert not (tmp_path / "_unfinished_model").exists()


def test_a_readme_of_the_user_and_links_stay_unchanged(monkeypatch, files, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere.jsonl"
    out.mkdir()
    (out / "README.md").write_text("# Mine\n")
    (out / "predictions.jsonl").symlink_to(elsewhere)
    run(monkeypatch, files, out)
    assert (out / "README.md").read_text() == "# Mine\n"
    assert (out / "predictions.jsonl").is_symlink() and len(lines(elsewhere)) == 6


def test_labels_that_are_not_learned_are_reported(monkeypatch, files, tmp_path, caplog):
    monkeypatch.setattr(run_data.logger, "propagate", True)
    run(monkeypatch, files, tmp_path / "out", label_list_file=label_list(tmp_path, "stars", "robots"), metric_ks="1")
    assert "'markets' (10)" in caplog.text and "labels.txt" in caplog.text
    # A trained checkpoint and a file with a label that it does not know.
    caplog.clear()
    run(
        monkeypatch, files, tmp_path / "again", model_name_or_path=tmp_path / "out", metric_ks="1", validation_file=None, validation_split=0,
        do_eval=False, do_predict=False,
    )  # fmt: skip
    assert "'markets' (10)" in caplog.text and "model.add_labels" in caplog.text


def test_the_revision_applies_to_the_checkpoint_too(monkeypatch, files, tmp_path):
    asked = []
    original = run_mldc.AutoConfig.from_pretrained

    def recorded(*args, **kwargs):
        asked.append(kwargs.get("revision"))
        return original(*args, **kwargs)

    monkeypatch.setattr(run_mldc.AutoConfig, "from_pretrained", recorded)
    run(monkeypatch, files, tmp_path, model_revision="v2", do_eval=False, do_predict=False)
    assert asked and set(asked) == {"v2"}


def test_pseudo_documents_with_odd_provenance_do_not_matter(monkeypatch, files, tmp_path):
    row = {"text": "a market of stars", "labels": ["markets"], "provenance": "an LLM"}
    (tmp_path / "pseudo.jsonl").write_text(json.dumps(row) + "\n")
    run(monkeypatch, files, tmp_path / "out", pseudo_documents_file=tmp_path / "pseudo.jsonl", do_predict=False)
    assert "1 of the training documents" in (tmp_path / "out" / "README.md").read_text()


# ---- One file, one page, one report ----


def test_one_file_is_enough(monkeypatch, files, tmp_path, capsys):
    (tmp_path / "all.jsonl").write_text("".join((files / f"{s}.jsonl").read_text() for s in ("train", "test")))
    arguments = {"train_file": tmp_path / "all.jsonl", "validation_file": None, "test_file": None, "id_column": "id"}
    for name in ("first", "second"):
        run(monkeypatch, files, tmp_path / name, test_split=0.2, **arguments)
    first, second = (lines(tmp_path / name / "predictions.jsonl") for name in ("first", "second"))
    assert [row["id"] for row in first] == [row["id"] for row in second] and len(first) == 6
    shown = capsys.readouterr().out
    assert "6 of 30 training documents are set aside for test" in shown and "set aside for validation" in shown
    config = SepMldcForMultiLabelClassification.from_pretrained(tmp_path / "first").config
    assert config.thresholds is not None and config.num_train_documents < 24 and min(config.label_counts) >= 1


def test_a_dry_run_prints_a_report_and_writes_nothing(monkeypatch, files, tmp_path, capsys):
    monkeypatch.setattr(run_mldc.SepMldcTrainer, "__init__", lambda *args, **kwargs: pytest.fail("a trainer was made"))
    named = {"recipe": "paper", "lexical_scores": True, "learning_rate": 5e-5}
    run(monkeypatch, files, tmp_path / "out", dry_run=True, num_train_epochs=2, **named)
    shown = capsys.readouterr().out
    assert (
        "training documents per label" in shown
        and "specified by the user" in shown
        and "Will train for 6 steps (" in shown
    )
    assert "Specified by you instead of by the recipe 'paper': lexical_scores, " in shown
    assert "learning_rate," not in shown.split("Specified by you instead of")[1]
    assert "of memory (" in shown and "of disk space (" in shown
    assert not (tmp_path / "out").exists()


def test_evaluations_are_spread_over_the_steps_that_the_run_has(monkeypatch, tmp_path, capsys):
    config = str(ROOT / "examples" / "configs" / "quickstart.json")
    monkeypatch.chdir(ROOT)
    changes = ["--dry_run", "True", "--use_cpu", "True", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["run_mldc.py", config, *changes])
    run_mldc.main()
    shown = capsys.readouterr().out
    steps = int(re.search(r"Will train for (\d+) steps", shown)[1])
    assert re.search(r"eval_steps +(\d+) +6 evaluations", shown)[1] == str(math.ceil(steps / 6))


def test_a_run_that_does_not_fit_on_the_disk_is_refused_before_training(monkeypatch, files, tmp_path):
    monkeypatch.setattr(run_plan, "free_disk_space", lambda folder: 1000)
    with pytest.raises(ValueError, match="of disk space, but 0.00 GiB are free"):
        run(monkeypatch, files, tmp_path)
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("cached", [None, True])
def test_a_cache_of_frozen_layers_leaves_space_for_the_model(monkeypatch, files, tmp_path, cached, caplog):
    changes = {
        "freeze_layers": 1,
        "cache_frozen_layers": cached,
        "num_train_epochs": 2,
        "do_eval": False,
        "do_predict": False,
    }
    needed = 10 * 2**20  # checkpoint and model of the tiny encoder, not its states, take less
    monkeypatch.setattr(run_plan, "estimate_needs", lambda *given: RunNeeds(1, 1, 1, 1, needed, cache_bytes=needed))
    monkeypatch.setattr(run_plan, "free_disk_space", lambda folder: 2 * needed - 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=needed + SPARE_BYTES)
    monkeypatch.setattr("trainer.frozen_layers.shutil.disk_usage", lambda folder: usage)
    if cached:
        with pytest.raises(
            ValueError, match="states of the frozen layers need 0.01 GiB of disk space in addition to 0.01 GiB"
        ):
            run(monkeypatch, files, tmp_path, **changes)
        assert not list(tmp_path.glob("*.safetensors"))
    else:
        run(monkeypatch, files, tmp_path, **changes)
        assert "which is not available: they are not cached" in caplog.text


def test_validation_documents_are_measured_while_the_states_of_frozen_layers_are_stored(monkeypatch, files, tmp_path):
    stored, evaluate = [], run_mldc.evaluate_validation
    folder = tmp_path / "out" / FOLDER
    monkeypatch.setattr(
        run_mldc, "evaluate_validation", lambda *given: stored.append(folder.exists()) or evaluate(*given)
    )
    run(monkeypatch, files, tmp_path / "out", freeze_layers=1, cache_frozen_layers=True, do_predict=False)
    assert stored == [True] and not folder.exists()


def test_lexical_scores_that_do_not_fit_into_memory_are_refused_before_training(monkeypatch, files, tmp_path):
    monkeypatch.setattr(run_plan, "kernel_bytes", lambda num_documents: 2**50)
    with pytest.raises(ValueError, match="Lexical scores need 1048576.0 GiB of memory after training"):
        run(monkeypatch, files, tmp_path, lexical_scores=True)
    assert not list(tmp_path.glob("*.safetensors"))


def test_settings_that_a_trained_checkpoint_contradicts_are_refused(monkeypatch, files, tmp_path):
    run(monkeypatch, files, tmp_path / "first", do_eval=False, do_predict=False, classifier="mlp")
    given = {"model_name_or_path": tmp_path / "first", "do_train": False, "do_predict": False}
    with pytest.raises(ValueError, match="`--classifier` is similarity, but the trained checkpoint has mlp"):
        run(monkeypatch, files, tmp_path / "second", classifier="similarity", **given)
    run(monkeypatch, files, tmp_path / "second", classifier="mlp", **given)


def test_class_weights_are_chosen_and_printed_before_training(monkeypatch, files, tmp_path, capsys):
    found = {kind: {"f1_micro": 0.5, "f1_macro": 0.25} for kind in ("none", "balanced", "effective")}
    given = {}
    monkeypatch.setattr(
        run_plan, "choose_class_weights", lambda **values: given.update(values) or ("effective", found)
    )
    run(monkeypatch, files, tmp_path, class_weights="auto", lexical_scores=True, lexical_class_weights="auto")
    shown = capsys.readouterr().out
    assert "First, class weights are chosen: 30 documents are encoded once more" in shown
    assert "Class weights 'effective': chosen on the validation documents" in shown
    config = SepMldcForMultiLabelClassification.from_pretrained(tmp_path).config
    assert config.class_weights == "effective" and (config.lexical_info or {"solver": "svm"})["solver"] == "svm"
    assert len(given["train"].dataset) == 24 and sum(given["validation"].label_counts) >= 6
    assert "effective" in (tmp_path / "README.md").read_text()


def test_invalid_rows_can_be_skipped(monkeypatch, files, tmp_path):
    content = (files / "train.jsonl").read_text() + '{"text": "a star"}\n'
    changes = broken(files, tmp_path, content)
    with pytest.raises(ValueError, match="Or leave such rows out: `--on_bad_rows skip`"):
        run(monkeypatch, files, tmp_path / "out", do_predict=False, **changes)
    run(monkeypatch, files, tmp_path / "out", on_bad_rows="skip", do_predict=False, **changes)
    assert len(lines(tmp_path / "out" / "bad_rows.jsonl")) == 1


def test_predictions_hold_scores_decisions_and_the_right_labels(monkeypatch, files, tmp_path):
    run(monkeypatch, files, tmp_path, prediction_top_k=1)
    thresholds = SepMldcForMultiLabelClassification.from_pretrained(tmp_path).config.thresholds
    rows, documents = lines(tmp_path / "predictions.jsonl"), lines(files / "test.jsonl")
    assert [sorted(row["gold"]) for row in rows] == [sorted(document["labels"]) for document in documents]
    names = sorted(TOPICS)
    for row in rows:
        (best,) = row["labels"]
        assert (best["label"] in row["assigned"]) is (best["score"] >= thresholds[names.index(best["label"])])
        assert set(row["assigned"]) <= set(names)
        assert row["abstained"] is (row["assigned"] == [])
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["test_share_abstained"] == pytest.approx(sum(row["abstained"] for row in rows) / len(rows))
    kept = results["test_f1_of_kept"]
    assert [row["share_kept"] for row in kept] == [1.0, 0.95, 0.9, 0.8, 0.7, 0.5]
    assert kept[0]["f1_micro"] == pytest.approx(results["test_f1_micro"]) and kept[0]["num_documents"] == len(rows)
    assert "| Documents kept | `min_expected_f1` | Micro F1 |" in (tmp_path / "README.md").read_text()


def test_the_report_counts_abstained_documents(monkeypatch, files, tmp_path, capsys):
    run(monkeypatch, files, tmp_path, threshold_objective="fdr:0.2", do_eval=False)
    shown = capsys.readouterr().out
    assert re.search(r"The model (does not abstain on any document|abstains on \d+ of 6 documents)", shown)
    assert re.search(r"documents kept +100% +95% +90% +80% +70% +50%\n +micro F1", shown)


def test_baselines_are_trained_by_default_where_they_are_cheap(monkeypatch, files, tmp_path, capsys):
    for share, shown in ((1e9, True), (0, False)):
        monkeypatch.setattr(run_report, "BASELINE_SHARE", share)
        run(monkeypatch, files, tmp_path / str(share))
        assert ("TF-IDF + LinearSVC" in capsys.readouterr().out) is shown
        assert (tmp_path / str(share) / "baseline_results.json").exists() is shown


def test_the_report_gives_intervals_worst_labels_and_next_steps(monkeypatch, files, tmp_path, capsys):
    run(
        monkeypatch, files, tmp_path, baselines=True, learning_rate=1e-9, head_learning_rate=1e-9, lexical_scores=False
    )
    shown = capsys.readouterr().out
    for part in ("95% confidence interval", "Labels with the lowest F1", "Next steps:\n1. "):
        assert part in shown
    compared = json.loads((tmp_path / "comparison.json").read_text())
    for name, metrics in compared["intervals"].items():
        for metric, (low, high) in metrics.items():
            assert low - 1e-9 <= compared["metrics"][name][metric] <= high + 1e-9
    worst = list(csv.DictReader(open(tmp_path / "worst_labels.csv")))
    assert worst and float(worst[0]["f1"]) < 1 and worst[0]["why"]


def test_output_folders_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(OSError, match="is a file"):
        (tmp_path / "file").write_text("")
        run_outputs.check_output_folder(tmp_path / "file")
    with pytest.raises(OSError, match="cannot be written"):
        run_outputs.check_output_folder("/proc/none")


# ---- Training again on all documents ----


def test_a_refitted_model_keeps_what_was_tuned_and_knows_more_documents(monkeypatch, files, tmp_path, capsys):
    saved = {}
    save = run_mldc.save_model_atomically

    def recorded(trainer):
        save(trainer)
        saved[len(saved)] = SepMldcForMultiLabelClassification.from_pretrained(trainer.args.output_dir)

    monkeypatch.setattr(run_mldc, "save_model_atomically", recorded)
    pseudo = files / "pseudo.jsonl"
    named = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    named |= {"load_best_model_at_end": True, "metric_for_best_model": "ndcg@3", "learning_rate": 1e-2}
    run(monkeypatch, files, tmp_path, refit_on_all=True, baselines=False, pseudo_documents_file=pseudo, **named)
    _, tuned, final = saved.values()
    assert (tuned.config.num_train_documents, final.config.num_train_documents) == (24, 30)
    assert final.config.label_counts == [13, 13, 12]
    assert tuned.config.thresholds and final.config.thresholds == tuned.config.thresholds
    assert final.config.score_calibration == tuned.config.score_calibration
    assert (final.lexical is None) is (tuned.lexical is None)
    assert not torch.equal(final.classifier.out_proj.weight, tuned.classifier.out_proj.weight)
    results = json.loads((tmp_path / "all_results.json").read_text())
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert results["refit_documents"] == 30 and results["refit_steps"] == state["best_global_step"]
    assert {"eval_p@1", "test_p@1"} <= set(results) and not (tmp_path / "refit").exists()
    assert "that was trained again on training and validation documents" in capsys.readouterr().out
    assert "refit_on_all" in (tmp_path / "README.md").read_text().replace("\\", "")


def test_a_refit_that_was_stopped_leaves_the_tuned_model_and_continues_from_its_checkpoint(
    monkeypatch, files, tmp_path
):
    named = {
        "refit_on_all": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "do_predict": False,
        "num_train_epochs": 2,
    }
    run(monkeypatch, files, tmp_path / "whole", **named)
    train = run_mldc.SepMldcTrainer.training_step

    def stopped(self, *args):
        if self.args.output_dir.endswith("refit") and self.state.global_step == 4:
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(run_mldc.SepMldcTrainer, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, files, tmp_path / "out", **named)
    tuned = SepMldcForMultiLabelClassification.from_pretrained(tmp_path / "out").config
    assert tuned.num_train_documents == 24 and tuned.thresholds
    steps = []

    def counted(self, *args):
        steps.append(self.args.output_dir)
        return train(self, *args)

    monkeypatch.setattr(run_mldc.SepMldcTrainer, "training_step", counted)
    run(monkeypatch, files, tmp_path / "out", resume_from_checkpoint="last", **named)
    assert steps == [str(tmp_path / "out" / "refit")] * 2  # of 6
    first, second = (SepMldcForMultiLabelClassification.from_pretrained(tmp_path / name) for name in ("whole", "out"))
    assert second.config.num_train_documents == 30
    torch.testing.assert_close(second.state_dict(), first.state_dict())


def test_adapters_are_trained_and_saved_merged(monkeypatch, files, tmp_path, capsys):
    run(monkeypatch, files, tmp_path, lora_rank=2, freeze_layers=1, do_eval=False)
    model, report = SepMldcForMultiLabelClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys"))
    encoder = load_file(files / "encoder" / "model.safetensors")
    changed = {
        name for name, value in encoder.items() if not torch.equal(value, model.backbone.state_dict().get(name, value))
    }
    assert changed and all("layer.1." in name and name.endswith("weight") for name in changed)
    assert "LoRA adapters need a higher learning rate" in capsys.readouterr().out
