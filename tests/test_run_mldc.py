"""examples/run_mldc.py on tiny encoders: one run end to end, and every kind of bad input before any training."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_backbone

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from trainer.backbones import freeze_layers, resolve_backbone


ROOT = Path(__file__).parents[1]
TOPICS = {"stars": "galaxy stars star image", "robots": "robot robots vision speech", "markets": "market price data"}


def load_script():
    spec = importlib.util.spec_from_file_location("run_mldc", ROOT / "examples" / "run_mldc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_mldc = load_script()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny encoder, documents of three topics, expansions and pseudo-documents."""
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
    (folder / "expansions.json").write_text(json.dumps({"stars": "Things that shine.", "robots": "Machines."}))
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


def test_a_run_leaves_a_checkpoint_results_predictions_and_a_table(monkeypatch, files, tmp_path, capsys):
    run(
        monkeypatch,
        files,
        tmp_path,
        id_column="id",
        label_descriptions_file=files / "expansions.json",
        pseudo_documents_file=files / "pseudo.jsonl",
        baselines=True,
        learning_rate=1e-3,
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
    assert model.config.num_train_documents == 24
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


def test_arguments_can_stand_in_one_file_and_be_changed_on_the_command_line(monkeypatch, files, tmp_path):
    values = arguments(files, tmp_path / "unused", do_predict=False, num_train_epochs=5)
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    changed = ["--output_dir", str(tmp_path / "used"), "--num_train_epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["run_mldc.py", str(tmp_path / "run.yaml"), *changed])
    run_mldc.main()
    assert (tmp_path / "used" / "model.safetensors").exists() and not (tmp_path / "unused").exists()
    state = json.loads((tmp_path / "used" / "trainer_state.json").read_text())
    assert state["epoch"] == 1


def test_joined_labels_and_several_text_columns_are_read_from_csv(monkeypatch, files, tmp_path):
    monkeypatch.setattr(run_mldc, "SepMldcTrainer", None)  # reading is what this test is about
    options = arguments(files, tmp_path, train_file=files / "train.csv", label_delimiter=";", do_predict=False)
    options["text_columns"] = "title"
    flat = [word for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["run_mldc.py", *flat, "--validation_file", str(files / "train.csv")])
    settings = run_mldc.read_settings(sys.argv[1:])
    settings.data.text_columns, settings.data.test_file = ["title", "text"], None
    documents = run_mldc.load_documents(settings)
    assert documents["train"][0]["text"].startswith("a title galaxy stars")
    assert documents["train"][0]["labels"] == ["stars", "robots"]


def test_streamed_training_documents_give_the_model_that_loaded_ones_give(monkeypatch, files, tmp_path):
    same = {"max_steps": 5, "num_train_epochs": None, "do_predict": False, "learning_rate": 1e-3}
    # A stream has neither; with bfloat16 a cache rounds differently.
    same |= {"cache_frozen_layers": False, "lexical_scores": False}
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
    # Shuffled, a stream gives other batches.
    run(monkeypatch, files, tmp_path / "shuffled", streaming=True, **same)
    history = json.loads((tmp_path / "shuffled" / "trainer_state.json").read_text())["log_history"]
    assert [row["loss"] for row in history if "loss" in row] != pytest.approx(losses, rel=1e-5)


def broken(files, tmp_path, content):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    return {"train_file": path}


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
    "a stream without end": (lambda f, t: {"streaming": True}, "Say how long to train with `--max_steps`"),
    "a stream and baselines": (
        lambda f, t: {"streaming": True, "max_steps": 2, "baselines": True},
        "`--baselines` needs all training documents at once",
    ),
    "a stream and pairs": (
        lambda f, t: {"streaming": True, "max_steps": 2, "group_by_label_set": True},
        "`--group_by_label_set` needs all training documents at once",
    ),
    "a stream and lexical scores": (
        lambda f, t: {"streaming": True, "max_steps": 2, "lexical_scores": True},
        "`--lexical_scores` needs all training documents at once",
    ),
    "lexical scores without validation documents": (
        lambda f, t: {"lexical_scores": True, "validation_file": None, "do_eval": False},
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
    "no validation documents": (lambda f, t: {"validation_file": None}, "`--do_eval` needs validation documents"),
}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_ends_in_one_clear_error_before_any_training(monkeypatch, files, tmp_path, case):
    changes, message = BAD_INPUT[case]
    monkeypatch.setattr(run_mldc.SepMldcTrainer, "train", lambda *args, **kwargs: pytest.fail("training started"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(monkeypatch, files, tmp_path / "out", **changes(files, tmp_path))
    assert len(str(caught.value)) < 500


def test_duplicate_names_in_a_label_list_are_refused(monkeypatch, files, tmp_path):
    (tmp_path / "labels.txt").write_text("stars\nrobots\nstars\n")
    with pytest.raises(ValueError, match="label 'stars' already stands in line 1"):
        run(monkeypatch, files, tmp_path / "out", label_list_file=tmp_path / "labels.txt")


def test_an_expansion_for_an_unknown_label_warns_with_the_closest_name(files, caplog):
    import logging

    from trainer.data import load_label_descriptions

    path = files / "unknown.json"
    path.write_text(json.dumps({"star": "Typing error."}))
    with caplog.at_level(logging.WARNING):
        assert load_label_descriptions(path, list(TOPICS)) == {}
    assert "'star'" in caplog.text and "'stars'" in caplog.text


def test_an_output_folder_with_a_run_is_not_written_over(monkeypatch, files, tmp_path):
    run(monkeypatch, files, tmp_path, do_predict=False)
    before = (tmp_path / "all_results.json").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        run(monkeypatch, files, tmp_path)
    assert (tmp_path / "all_results.json").read_bytes() == before
    run(monkeypatch, files, tmp_path, overwrite_output_dir=True, do_predict=False)


def test_the_script_says_one_sentence_instead_of_a_stack_of_frames(files, tmp_path):
    words = [w for n, v in arguments(files, tmp_path, labels_per_step=0).items() for w in (f"--{n}", v)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "run_mldc.py"), *words], capture_output=True, text=True, timeout=120
    )
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
