"""What a checkpoint records about its run: a resumed run continues as one run, or the error says what does not match."""

import json
import logging
import shutil

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import NUM_LABELS, make_trainer, tiny_documents
from transformers import EarlyStoppingCallback, TrainerCallback

from trainer.checkpoints import MANIFEST_NAME, damaged_files, is_complete, last_complete_checkpoint, write_manifest
from trainer.run_record import read_record


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "label_encoding": "embedding"}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(folder, step=2, callbacks=(), **arguments):
    trainer = make_trainer(folder, callbacks=[*callbacks, StopAt(step)], **{**SAVING, **arguments})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def model_with(labels=None, **settings):
    return tiny_model(num_labels=NUM_LABELS, id2label=dict(enumerate(labels)) if labels else None, **settings)


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_train_loss_after_a_resume_is_that_of_the_whole_run(tmp_path, logging_steps):
    expected = make_trainer(tmp_path / "whole", logging_steps=logging_steps, **SAVING).train()
    interrupted(tmp_path / "cut", logging_steps=logging_steps)
    trainer = make_trainer(tmp_path / "cut", logging_steps=logging_steps, **SAVING)
    found = trainer.train(resume_from_checkpoint=True)
    assert found.training_loss == pytest.approx(expected.training_loss, rel=1e-6)
    assert found.metrics["train_loss"] == found.training_loss
    # With nothing left to train, too; transformers would train a fifth step.
    again = make_trainer(tmp_path / "cut", logging_steps=logging_steps, **SAVING)
    assert again.train(resume_from_checkpoint=True).training_loss == pytest.approx(expected.training_loss, rel=1e-6)
    assert again.state.global_step == 4
    for name, weight in again.model.named_parameters():
        assert torch.equal(weight, trainer.model.get_parameter(name)), name
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if logging_steps == 1:
        assert found.training_loss == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize("restore", [False, True])
def test_early_stopping_keeps_its_count_over_a_resume_and_takes_a_new_patience(tmp_path, restore):
    settings = {
        **SAVING,
        "max_steps": 20,
        "learning_rate": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "ndcg@3",
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": restore,
    }
    stopping = EarlyStoppingCallback(early_stopping_patience=3)
    interrupted(tmp_path / "a", 6, [stopping], **settings)
    assert stopping.early_stopping_patience_counter == 2
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    trainer = make_trainer(tmp_path / "a", callbacks=[EarlyStoppingCallback(3)], **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8, "the count began again"
    if not restore:  # what transformers restores has the former patience
        trainer = make_trainer(tmp_path / "b", callbacks=[EarlyStoppingCallback(5)], **settings)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 12


def test_a_callback_that_the_checkpoint_does_not_know_can_be_added(tmp_path):
    interrupted(tmp_path)
    trainer = make_trainer(
        tmp_path, callbacks=[EarlyStoppingCallback(9)], eval_strategy="epoch", metric_for_best_model="loss", **SAVING
    )
    trainer.train(resume_from_checkpoint=True)
    assert is_complete(tmp_path / "checkpoint-4")


def test_a_resume_with_renamed_or_reordered_labels_is_refused(tmp_path):
    names = [f"label {index}" for index in range(NUM_LABELS)]
    interrupted(tmp_path, model=model_with(names))
    renamed = [*names[:3], "other", *names[4:]]
    swapped = [names[1], names[0], *names[2:]]
    for labels, message in (
        (renamed, "label 3 is 'label 3' there and 'other' here .1 of 6 differ.. Resume with the same labels"),
        (swapped, "label 0 is 'label 0' there and 'label 1' here .2 of 6 differ."),
    ):
        trainer = make_trainer(tmp_path, model=model_with(labels), **SAVING)
        before = trainer.model.classifier.bias.clone()
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=True)
        assert torch.equal(trainer.model.classifier.bias, before), "weights were loaded"
    fewer = tiny_model(num_labels=NUM_LABELS - 1)
    documents = tiny_documents().map(lambda row: {"label_indices": [0]})
    with pytest.raises(ValueError, match="has 6 labels, but this run has 5"):
        make_trainer(tmp_path, model=fewer, documents=documents, **SAVING).train(resume_from_checkpoint=True)


def test_a_resume_with_other_descriptions_or_model_settings_is_refused(tmp_path):
    interrupted(tmp_path)
    described = tiny_model(num_labels=NUM_LABELS, label_descriptions={"label 1": "stars"})
    with pytest.raises(ValueError, match="different label descriptions"):
        make_trainer(tmp_path, model=described, **SAVING).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="`classification_loss` 'bce' then, 'softmax' now"):
        model = tiny_model(num_labels=NUM_LABELS, classification_loss="softmax")
        make_trainer(tmp_path, model=model, **SAVING).train(resume_from_checkpoint=True)


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trainer.run_record"), "propagate", True)
    return caplog


def test_changed_documents_and_arguments_are_reported_and_equal_ones_are_not(tmp_path, warnings_of):
    interrupted(tmp_path)
    shutil.copytree(tmp_path, tmp_path.parent / "copy")
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2" not in warnings_of.text
    trainer = make_trainer(
        tmp_path.parent / "copy", documents=tiny_documents(seed=9), **{**SAVING, "learning_rate": 5e-4, "seed": 3}
    )
    trainer.train(resume_from_checkpoint=True)
    assert "`seed` 42 then, 3 now, `learning_rate` 0.001 then, 0.0005 now" in warnings_of.text
    assert "was trained on different documents" in warnings_of.text


def test_a_resume_from_another_stream_is_reported_by_its_label_counts(tmp_path, warnings_of):
    def resume(folder, counts):
        model = tiny_model(num_labels=NUM_LABELS, label_counts=counts, num_train_documents=24)
        make_trainer(folder, model=model, documents=documents, **SAVING).train(resume_from_checkpoint=True)

    documents = tiny_documents().to_iterable_dataset()
    model = tiny_model(num_labels=NUM_LABELS, label_counts=[4] * NUM_LABELS, num_train_documents=24)
    interrupted(tmp_path / "same", model=model, documents=documents)
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    resume(tmp_path / "same", [4] * NUM_LABELS)
    assert "other documents" not in warnings_of.text
    resume(tmp_path / "other", [5] * NUM_LABELS)
    assert "was trained on different documents" in warnings_of.text


def test_a_checkpoint_without_a_record_can_be_resumed(tmp_path):
    interrupted(tmp_path)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunRecord"]
    path.write_text(json.dumps(state))
    write_manifest(tmp_path / "checkpoint-2")
    assert read_record(tmp_path / "checkpoint-2") == {}
    make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert is_complete(tmp_path / "checkpoint-4")


def test_damaged_contents_are_recognized_and_the_last_whole_checkpoint_is_taken(tmp_path):
    make_trainer(tmp_path, **SAVING).train()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    path = tmp_path / "checkpoint-4" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit; the size stays
    path.write_bytes(content)
    assert damaged_files(tmp_path / "checkpoint-4") == ["optimizer.pt"]
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-4 is damaged: optimizer.pt .* Resume from .*checkpoint-2"):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and is_complete(tmp_path / "checkpoint-4")


def test_a_manifest_of_sizes_alone_is_still_read(tmp_path):
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"files": {"weights": 3}}))
    assert is_complete(tmp_path)
    (tmp_path / "weights").write_bytes(b"ab")
    assert damaged_files(tmp_path) == ["weights"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"files": ["weights"]}))
    assert damaged_files(tmp_path) == [MANIFEST_NAME]


def test_older_checkpoints_go_only_when_the_new_one_is_whole_and_the_arguments_keep_the_limit(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append((args.save_total_limit, sorted(path.name for path in tmp_path.glob("checkpoint-*"))))

    trainer = make_trainer(tmp_path, callbacks=[Look()], save_total_limit=1, **{**SAVING, "max_steps": 6})
    save = trainer.save_model

    def fails(output_dir=None, _internal_call=False):
        save(output_dir, _internal_call)
        assert trainer.args.save_total_limit is None
        if trainer.state.global_step == 6:
            raise OSError("the disk is full")

    trainer.save_model = fails
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    assert seen == [(1, ["checkpoint-2"]), (1, ["checkpoint-4"])]
    assert trainer.args.save_total_limit == 1
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    stored = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert stored.save_total_limit == 1 and not hasattr(stored, "_postponed_limit")
