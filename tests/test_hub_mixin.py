"""The card of each saved folder describes the weights next to it."""

import pickle
from concurrent.futures import Future

import pytest
from hub_client import make_model, make_tokenizer, make_trainer
from huggingface_hub import ModelCard
from transformers import BertConfig
from transformers.utils import PushInProgress

from modeling_sep_mldc import SepMldcConfig
from trainer.hub import mixin as hub_mixin
from trainer.hub.mixin import _arguments_with_folder, _base_model
from trainer.training_arguments import SepMldcTrainingArguments


def results(folder):
    card = ModelCard.load(folder / "README.md")
    return card, {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results or []}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer whose best checkpoint is not its last one."""
    folder, tokenizer = tmp_path_factory.mktemp("run"), make_tokenizer()
    model = make_model(folder, tokenizer)
    model.config.label_counts, model.config.num_train_documents = [9, 5, 3, 2, 1, 0], 9
    # The loss falls, so the "best" step by the largest loss is the first one.
    trainer = make_trainer(
        folder, tokenizer, model, "out", push_to_hub=False, hub_token=None, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2
    return trainer, folder / "out"


def logged(trainer, step, name):
    return next(entry[name] for entry in trainer.state.log_history if entry["step"] == step and name in entry)


@pytest.mark.parametrize("step", [2, 4])
def test_the_card_of_a_checkpoint_has_the_measures_of_its_step(run, step):
    trainer, folder = run
    card, measured = results(folder / f"checkpoint-{step}")
    assert measured["validation", "psp@1"] == logged(trainer, step, "eval_psp@1")
    assert f"measured at step {step}" in card.text and (folder / f"checkpoint-{step}" / "decile_recall.png").exists()


@pytest.mark.pictures
def test_the_card_of_the_best_model_has_the_measures_of_the_best_step(run, tmp_path):
    trainer, _ = run
    trainer.save_model(tmp_path)
    card, measured = results(tmp_path)
    assert measured["validation", "psp@1"] == logged(trainer, 2, "eval_psp@1")
    assert "measured at step 2" in card.text and (tmp_path / "decile_recall.png").exists()


@pytest.mark.pictures
def test_test_results_are_in_the_card_next_to_validation_results_and_the_picture_stays(run, tmp_path):
    trainer, _ = run
    evaluated = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset, metric_key_prefix="test").metrics
    trainer.save_model(tmp_path)
    card, measured = results(tmp_path)
    assert measured["test", "p@1"] == predicted["test_p@1"]
    assert f"| {100 * predicted['test_psp@1']:.2f} | {100 * evaluated['eval_psp@1']:.2f} |" in card.text
    assert (tmp_path / "decile_recall.png").exists() and "measured after training" in card.text
    # Documents without labels add no metrics and remove none.
    trainer.predict(trainer.eval_dataset.remove_columns("label_indices"))
    trainer.save_model(tmp_path)
    assert results(tmp_path)[1] == measured and (tmp_path / "decile_recall.png").exists()


def test_what_the_trainer_cannot_know_is_taken_from_model_card_kwargs(run, tmp_path):
    trainer, folder = run
    output = trainer.predict(trainer.eval_dataset, metric_key_prefix="test")
    trainer.model_card_kwargs = {"license": "mit", "metrics": output.metrics, "pseudo_document_provenance": ()}
    trainer.create_model_card(language="en", dataset="user/documents", tags="law")
    card, measured = results(folder)
    assert measured["test", "p@1"] == output.metrics["test_p@1"] and {split for split, _ in measured} == {"test"}
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["user/documents"])
    assert "law" in card.data.tags and "None were used." in card.text


def test_saving_beside_a_readme_of_the_user_keeps_it(run, tmp_path):
    trainer, _ = run
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer.save_model(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "shown"), [("user/encoder", "user/encoder"), ("folder", "./folder"), ("", None)])
def test_only_a_hub_name_of_the_encoder_becomes_its_base_model(name, shown):
    backbone = BertConfig(num_hidden_layers=1)
    backbone._name_or_path = name
    assert _base_model(SepMldcConfig(backbone_config=backbone, num_labels=2)) == shown


def test_a_push_that_fails_while_the_next_one_starts_is_told_too(run, tmp_path, monkeypatch, caplog):
    trainer, folder = run
    first, second = Future(), Future()

    class Api:
        def upload_folder(self, **kwargs):
            first.set_exception(ConnectionError("cut"))  # after the look at earlier pushes, before the new one is kept
            return second

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    monkeypatch.setattr(trainer, "push_in_progress", PushInProgress([first]), raising=False)
    monkeypatch.setattr(trainer.args, "hub_always_push", True)
    monkeypatch.setattr(hub_mixin.logger, "propagate", True, raising=False)
    trainer._push_from_checkpoint(str(folder / "checkpoint-4"))
    second.set_result(None)
    trainer._finish_current_push()
    trainer._finish_current_push()
    assert [record.message for record in caplog.records if "failed (cut)" in record.message] == [caplog.messages[0]]
    assert trainer.push_in_progress.jobs == [] and not list(folder.glob("_push-*"))


# Last: each makes arguments of its own, which resets the state of accelerate that the trainer above uses.


def test_each_of_several_evaluation_sets_is_in_the_card(tmp_path):
    tokenizer = make_tokenizer()
    trainer = make_trainer(
        tmp_path, tokenizer, make_model(tmp_path, tokenizer), "out", push_to_hub=False, hub_token=None
    )
    trainer.eval_dataset = {"mail": trainer.eval_dataset, "web": trainer.eval_dataset.select(range(3))}
    trainer.train()
    trainer.save_model()
    card, measured = results(tmp_path / "out")
    for name in ("mail", "web"):
        assert measured[f"validation ({name})", "p@1"] == logged(trainer, 4, f"eval_{name}_p@1")


def test_a_push_during_training_keeps_the_folder_of_the_run_in_its_arguments(tmp_path):
    args = SepMldcTrainingArguments(str(tmp_path / "run"), hub_token="hf_secret", report_to=[])
    moved = _arguments_with_folder(args, tmp_path / "staged")
    assert moved.output_dir == str(tmp_path / "staged") and moved.hub_token == "hf_secret"
    saved = pickle.loads(pickle.dumps(moved))
    assert type(saved) is SepMldcTrainingArguments
    assert saved.output_dir == str(tmp_path / "run") and saved.hub_token is None
