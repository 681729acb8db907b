"""SepMldcTrainer on tiny models: losses, label schedule, learning rates, evaluation, prediction, stopping."""

import inspect
import math

import datasets
import numpy as np
import peft
import pytest
import torch
from tiny_models import tiny_backbone_config, tiny_model, tiny_tokenizer
from tiny_training import NUM_LABELS, batch_of, make_trainer, tiny_documents, trained_trainer
from torch._dynamo.testing import CompileCounter
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

from trainer import SepMldcDataCollator, SepMldcTrainer, SepMldcTrainingArguments
from trainer.losses import document_contrastive_loss, label_contrastive_loss
from trainer.metrics import ranking_metrics


@pytest.mark.parametrize("encoding", ["encoder", "embedding"])
def test_every_parameter_that_should_move_has_moved(tmp_path, encoding):
    trainer = make_trainer(tmp_path, label_encoding=encoding, max_steps=4)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    still = [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])]
    assert still == []


@pytest.mark.parametrize("encoding", ["encoder", "embedding"])
def test_loss_is_classification_plus_weighted_contrastive_terms(tmp_path, encoding):
    trainer = make_trainer(
        tmp_path, label_encoding=encoding, label_loss_weight=0.3, document_loss_weight=0.7, labels_per_step=NUM_LABELS
    )
    trainer.model.train()
    batch = batch_of(trainer)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    rows = outputs.candidate_embeds if encoding == "encoder" else trainer.model.label_embeddings
    expected = (
        outputs.loss
        + 0.3 * label_contrastive_loss(rows, batch["labels"])
        + 0.7 * document_contrastive_loss(outputs.document_embeds, batch["labels"])
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.requires_grad


def test_label_loss_uses_stored_rows_for_labels_that_were_not_encoded(tmp_path):
    trainer = make_trainer(tmp_path, labels_per_step=2, label_loss_weight=1.0, document_loss_weight=0.0)
    model = trainer.model
    model.set_label_embeddings(torch.randn_like(model.label_embeddings))
    batch = batch_of(trainer)
    model.train()
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    trainer.label_schedule.restart()
    indices = trainer.label_schedule.select(batch["labels"], 0)
    assert len(indices) == 2
    rows = model.label_embeddings.detach().index_copy(0, indices, outputs.candidate_embeds.detach())
    expected = outputs.loss + label_contrastive_loss(rows, batch["labels"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_fresh_rows_are_stored_after_backward_and_others_are_kept(tmp_path):
    trainer = make_trainer(tmp_path, labels_per_step=3)
    trainer.create_optimizer_and_scheduler(3)
    trainer.current_gradient_accumulation_steps = 1
    before = trainer.model.label_embeddings.clone()
    picked = []
    compute = trainer.compute_loss

    def spy(*args, **kwargs):
        result = compute(*args, **kwargs)
        assert torch.equal(trainer.model.label_embeddings, before)  # forward never writes
        return result

    def keep(model, candidates, embeds):
        picked.append((candidates, embeds))
        commit(model, candidates, embeds)

    commit, trainer.label_schedule.commit = trainer.label_schedule.commit, keep
    trainer.compute_loss = spy
    trainer.training_step(trainer.model, batch_of(trainer))
    indices, rows = picked[0]
    assert torch.equal(trainer.model.label_embeddings[indices], rows)
    others = [index for index in range(NUM_LABELS) if index not in indices.tolist()]
    assert torch.equal(trainer.model.label_embeddings[others], before[others])


def test_no_label_is_encoded_when_nothing_uses_label_embeddings(tmp_path):
    model = tiny_model(num_labels=NUM_LABELS, label_attention=False, classifier="mlp")
    trainer = make_trainer(tmp_path, model=model, label_loss_weight=0.0)
    model.train()
    loss, outputs = trainer.compute_loss(model, batch_of(trainer), return_outputs=True)
    assert loss.requires_grad and outputs.candidate_embeds is None


def test_label_embeddings_are_refreshed_before_evaluation_and_saving(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    expected = trainer.model.encode_labels(trainer.label_schedule.label_inputs)
    assert not torch.allclose(trainer.model.label_embeddings, expected)
    trainer.evaluate()
    assert torch.allclose(trainer.model.label_embeddings, expected, atol=1e-6)

    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert torch.allclose(saved.label_embeddings, saved.encode_labels(trainer.label_schedule.label_inputs), atol=1e-6)


def test_trained_label_embeddings_are_not_overwritten(tmp_path):
    trainer = make_trainer(tmp_path, label_encoding="embedding")
    trainer.train()
    before = trainer.model.label_embeddings.clone()
    trainer.evaluate()
    assert torch.equal(trainer.model.label_embeddings, before)


def test_head_learning_rate_applies_to_all_but_the_backbone(tmp_path):
    trainer = make_trainer(tmp_path, label_encoding="embedding", head_learning_rate=0.5)
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    names = dict(trainer.model.named_parameters())
    assert len(rates) == len(names)
    assert {rates[id(p)] for name, p in names.items() if name.startswith("backbone.")} == {1e-3}
    assert {rates[id(p)] for name, p in names.items() if not name.startswith("backbone.")} == {0.5}


def test_label_embeddings_and_biases_do_not_decay(tmp_path):
    trainer = make_trainer(tmp_path, label_encoding="embedding", weight_decay=0.1, head_learning_rate=0.5)
    trainer.create_optimizer()
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    names = dict(trainer.model.named_parameters())
    assert decays[id(names["label_embeddings"])] == 0.0
    assert decays[id(names["classifier.bias"])] == 0.0
    assert decays[id(names["classifier.out_proj.weight"])] == 0.1


def test_every_term_is_logged_in_training_and_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.train()
    training = [row for row in trainer.state.log_history if "loss" in row]
    terms = {"classification_loss", "label_contrastive_loss", "document_contrastive_loss", "anchors_with_positive"}
    assert len(training) == 3 and all(terms <= set(row) for row in training)
    for row in training:
        total = row["classification_loss"] + 0.01 * (row["label_contrastive_loss"] + row["document_contrastive_loss"])
        assert row["loss"] == pytest.approx(total, rel=1e-4)
    evaluation = next(row for row in trainer.state.log_history if "eval_loss" in row)
    assert {f"eval_{term}" for term in terms} <= set(evaluation)


def test_gradient_norms_are_those_of_each_term_of_the_loss_over_each_group(tmp_path):
    trainer = make_trainer(
        tmp_path, log_gradient_norms=True, label_encoding="embedding", max_steps=4, logging_steps=2, learning_rate=0.0
    )
    model, seen = trainer.model, []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    compute_loss = trainer.compute_loss

    def keep_batch(model, inputs, *args, **kwargs):
        seen.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = keep_batch
    trainer.train()
    rows = [row for row in trainer.state.log_history if "gradient_norm_encoder_classification" in row]
    assert [row["step"] for row in rows] == [2, 4]
    # No step changes a weight, so that the gradients can be computed again: of the second batch, the first that is logged.
    batch = seen[1]
    outputs = model.train()(**batch)
    losses = {
        "classification": outputs.loss,
        "label_contrastive": 0.01 * label_contrastive_loss(outputs.label_embeds, batch["labels"]),
        "document_contrastive": 0.01 * document_contrastive_loss(outputs.document_embeds, batch["labels"]),
    }
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        squares = {"encoder": 0.0, "label_embeddings": 0.0, "head": 0.0}
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                head = "label_embeddings" if parameter_name == "label_embeddings" else "head"
                group = "encoder" if parameter_name.startswith("backbone.") else head
                squares[group] += parameter.grad.square().sum().item()
        for group, square in squares.items():
            assert rows[0][f"gradient_norm_{group}_{name}"] == pytest.approx(square**0.5, rel=1e-3, abs=1e-6)


def test_no_gradient_norms_are_logged_unless_requested(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert not any("gradient_norm" in name for row in trainer.state.log_history for name in row)


def test_an_evaluation_does_not_depend_on_the_batch_size(tmp_path):
    settings = {"label_encoding": "embedding", "label_loss_weight": 0, "document_loss_weight": 0}
    measured = [make_trainer(tmp_path, per_device_eval_batch_size=size, **settings).evaluate() for size in (1, 8, 10)]
    for name in ("eval_loss", "eval_classification_loss", "eval_ndcg@5"):
        assert [metrics[name] for metrics in measured] == pytest.approx([measured[0][name]] * 3, rel=1e-5)
    assert measured[0]["eval_classification_loss"] == pytest.approx(measured[0]["eval_loss"], rel=1e-5)


def test_evaluation_equals_metrics_of_the_whole_score_matrix(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4, metric_ks=[1, 3])
    metrics = trainer.evaluate()
    trainer.model.eval()
    with torch.no_grad():
        batch = trainer.data_collator(list(trainer.eval_dataset))
        batch.pop("length", None)
        outputs = trainer.model(**batch)
    expected = ranking_metrics(outputs.logits, batch["labels"], ks=(1, 3))
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-6), name
    assert metrics["eval_classification_loss"] > 0


def test_logit_batches_are_the_logits_of_all_documents_in_their_order(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4, dataloader_drop_last=True)
    documents = tiny_documents(11, seed=5)
    trainer.model.label_embeddings.data.zero_()
    trainer.model.train()
    batches = list(trainer.logit_batches(documents))
    assert trainer.model.training and [len(batch.logits) for batch in batches] == [4, 4, 3]
    expected = trainer.data_collator(list(documents))
    with torch.no_grad():
        logits = trainer.model.eval()(expected["input_ids"], expected["attention_mask"]).logits
    torch.testing.assert_close(torch.cat([batch.logits for batch in batches]), logits)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), expected["labels"])
    assert trainer.model.label_embeddings.any(), "the label embeddings were not refreshed"
    ids = [row[mask > 0].tolist() for batch in batches for row, mask in zip(*batch.inputs.values(), strict=True)]
    assert ids == documents["input_ids"]
    gradient_state = trainer.accelerator.gradient_state
    active = gradient_state.active_dataloader
    left_early = trainer.logit_batches(documents.remove_columns("label_indices"))
    unlabeled = next(left_early)
    left_early.close()
    assert unlabeled.labels is None
    assert gradient_state.active_dataloader is active, "the loop seems to run on"
    torch.testing.assert_close(unlabeled.logits, batches[0].logits)


def test_prediction_returns_the_best_labels_in_file_order(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4, prediction_top_k=3)
    documents = tiny_documents(11, seed=5)
    output = trainer.predict(documents)
    scores, indices = output.predictions
    assert scores.shape == indices.shape == (11, 3)
    batch = trainer.data_collator(list(documents))
    with torch.no_grad():
        expected = torch.sigmoid(trainer.model.eval()(**batch).logits).topk(3)
    assert np.array_equal(indices, expected.indices.numpy())
    assert np.allclose(scores, expected.values.numpy(), atol=1e-5)
    assert "test_p@1" in output.metrics


def test_prediction_works_without_labels(tmp_path):
    trainer = make_trainer(tmp_path)
    output = trainer.predict(tiny_documents(5).remove_columns("label_indices"))
    assert output.predictions[0].shape == (5, NUM_LABELS)
    assert "test_p@1" not in output.metrics


def test_models_that_rank_labels_predict_logits_and_assign_no_labels(tmp_path):
    trainer = make_trainer(tmp_path, model=tiny_model(num_labels=NUM_LABELS, classification_loss="softmax"))
    documents = tiny_documents(5)
    output = trainer.predict(documents)
    expected = torch.cat([batch.logits for batch in trainer.logit_batches(documents)]).topk(
        output.predictions[0].shape[1]
    )
    assert np.allclose(output.predictions[0], expected.values, atol=1e-5)
    assert trainer.last_label_sets is None and "test_f1_micro" not in output.metrics


def test_own_compute_metrics_gets_logits_and_labels_batch_by_batch(tmp_path):
    seen = []

    def compute_metrics(prediction, compute_result):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"documents": sum(shape[0] for shape, _ in seen)} if compute_result else {}

    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4)
    trainer.compute_metrics = compute_metrics
    assert trainer.evaluate()["eval_documents"] == 10
    assert seen[0] == ((4, NUM_LABELS), (4, NUM_LABELS))


def test_own_compute_metrics_of_one_argument_is_refused_with_the_remedy_that_works(tmp_path):
    def compute_metrics(prediction):
        return {"documents": len(prediction.predictions), "labels": prediction.label_ids.shape[1]}

    def create(**settings):
        args = SepMldcTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
        return SepMldcTrainer(
            tiny_model(num_labels=NUM_LABELS),
            args,
            eval_dataset=tiny_documents(10, seed=1),
            processing_class=tiny_tokenizer(),
            compute_metrics=compute_metrics,
        )

    with pytest.raises(ValueError, match=r"takes \(prediction\).*Pass `batch_eval_metrics=False`"):
        create()
    metrics = create(batch_eval_metrics=False).evaluate()
    assert metrics["eval_documents"] == 10 and metrics["eval_labels"] == NUM_LABELS


UNTOKENIZED = [{"text": f"document {number}", "label_indices": [number % NUM_LABELS]} for number in range(8)]


class OwnDataset(torch.utils.data.Dataset):
    """Documents in a dataset of the user's own, without columns. Like rows of pandas, it raises a KeyError after the last one."""

    def __init__(self, rows):
        self.rows = dict(enumerate(rows))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def stream(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, list, OwnDataset, stream])
def test_documents_that_are_not_tokenized_are_refused_wherever_they_are_read(tmp_path, kind):
    documents = kind(UNTOKENIZED)
    settings = {"label_encoding": "embedding"}
    match = r"no `input_ids`: the documents are not tokenized. Call `tokenize\(dataset, tokenizer\)` first"
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, documents=documents, **settings).train()
    trainer = make_trainer(tmp_path, **settings)
    for read in (trainer.evaluate, trainer.predict, trainer.tune_thresholds):
        with pytest.raises(ValueError, match=match):
            read(documents)
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, evaluation=documents, **settings).evaluate()


@pytest.mark.parametrize("kind", [list, OwnDataset, stream])
def test_documents_of_any_kind_of_dataset_are_read(tmp_path, kind):
    documents = kind([dict(row) for row in tiny_documents()])
    trainer = make_trainer(tmp_path, documents=documents, evaluation=documents, eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert trainer.evaluate()["eval_p@1"] == trainer.evaluate(tiny_documents())["eval_p@1"]
    assert trainer.predict(documents).predictions[0].shape == (24, NUM_LABELS)


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, list, OwnDataset])
def test_a_dataset_without_documents_is_refused(tmp_path, kind):
    empty = tiny_documents().select([]) if kind is datasets.Dataset.from_list else kind([])
    match = "has 0 documents, but at least one is needed"
    with pytest.raises(ValueError, match=f"`train_dataset` {match}"):
        make_trainer(tmp_path, documents=empty).train()
    with pytest.raises(ValueError, match=f"`eval_dataset` 'mail' {match}"):
        make_trainer(tmp_path, evaluation={"mail": empty}, eval_strategy="steps", eval_steps=1).train()
    trainer = make_trainer(tmp_path, evaluation=empty)
    for read in (trainer.evaluate, trainer.predict, trainer.tune_thresholds):
        with pytest.raises(ValueError, match=f"The dataset {match}"):
            read(empty)
    with pytest.raises(ValueError, match=f"The dataset {match}"):
        trainer.evaluate()
    with pytest.raises(ValueError, match=f"`eval_dataset` 'mail' {match}"):
        make_trainer(tmp_path, evaluation={"mail": empty}).evaluate()


def test_a_stream_without_documents_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is a stream without documents after step 0 of 3"):
        make_trainer(tmp_path, documents=stream([])).train()
    trainer = make_trainer(tmp_path, evaluation=stream([]))
    for read in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="The dataset has 0 documents, but at least one is needed"):
            read(stream([]))
    with pytest.raises(ValueError, match="no documents to tune thresholds on"):
        trainer.tune_thresholds()


def test_a_stream_that_ends_before_the_last_step_begins_again(tmp_path):
    trainer = make_trainer(tmp_path, documents=stream([dict(row) for row in tiny_documents(8)]))
    assert trainer.train().global_step == trainer.train().global_step == 3


def test_without_a_tokenizer_only_padded_documents_with_multi_hot_labels_are_read(tmp_path):
    def create(documents):
        args = SepMldcTrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, save_strategy="no"
        )
        return SepMldcTrainer(tiny_model(num_labels=NUM_LABELS), args, train_dataset=documents)

    with pytest.raises(
        ValueError, match="must be padded, but the trainer has no tokenizer.*`processing_class=tokenizer`"
    ):
        create(tiny_documents()).train()
    same = [{"input_ids": [2, 10, 3], "attention_mask": [1, 1, 1], "label_indices": [0]} for _ in range(8)]
    with pytest.raises(ValueError, match="`label_indices`.*`processing_class=tokenizer`"):
        create(datasets.Dataset.from_list(same)).train()
    rows = [{**row, "labels": [1.0] + [0.0] * (NUM_LABELS - 1)} for row in same]
    for row in rows:
        del row["label_indices"]
    assert create(datasets.Dataset.from_list(rows)).train().global_step == 1


def test_best_model_is_selected_on_any_metric_and_early_stopping_stops(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=20,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="ndcg@3",
        greater_is_better=True,
        label_encoding="embedding",
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 6  # the first evaluation is the best; two more without improvement end the run
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_range_and_no_checkpoint(tmp_path, value):
    trainer = make_trainer(tmp_path, max_steps=8, logging_steps=3, save_strategy="steps", save_steps=2)
    compute = trainer.compute_loss

    def broken(model, inputs, **kwargs):
        loss = compute(model, inputs, **kwargs)
        return loss * value if trainer.state.global_step == 3 else loss

    trainer.compute_loss = broken
    with pytest.raises(FloatingPointError, match=r"between steps 4 and 4.*resume from .*checkpoint-2"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()


def test_label_set_batches_give_more_anchors_a_positive(tmp_path):
    documents = tiny_documents(160)
    shares = []
    for group in (False, True):
        trainer = make_trainer(tmp_path, documents=documents, group_by_label_set=group, max_steps=20, logging_steps=20)
        trainer.train()
        shares.append(next(row["anchors_with_positive"] for row in trainer.state.log_history if "loss" in row))
    assert shares[1] > shares[0] + 0.2


def test_gradient_accumulation_equals_the_mean_of_its_batches(tmp_path):
    """Two micro-batches of 4 give the gradient of the mean of the two losses."""
    gradients = {}

    for name, size, steps in (("accumulated", 4, 2), ("single", 4, 1)):
        torch.manual_seed(0)
        model = tiny_model(num_labels=NUM_LABELS, classifier_dropout=0.0)
        trainer = make_trainer(
            tmp_path,
            model=model,
            documents=tiny_documents(8),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            label_encoding="embedding",
        )
        total = {}

        class Spy(torch.optim.SGD):
            def step(self, closure=None, total=total, model=model):
                total.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        trainer.optimizer = Spy(model.parameters(), lr=0.1)
        trainer.train()
        gradients[name] = (total, model)

    accumulated, model = gradients["accumulated"]
    trainer = make_trainer(tmp_path, model=model, documents=tiny_documents(8), label_encoding="embedding")
    model.zero_grad()
    model.train()
    for start in (0, 4):
        (trainer.compute_loss(model, batch_of(trainer, range(start, start + 4))) / 2).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, accumulated[name], atol=1e-5), name


def test_collator_makes_multi_hot_rows_of_label_ids():
    collator = SepMldcDataCollator(tiny_tokenizer(), num_labels=4)
    features = [
        {"input_ids": [2, 5, 3], "attention_mask": [1, 1, 1], "label_indices": [0, 3], "length": 3},
        {"input_ids": [2, 3], "attention_mask": [1, 1], "label_indices": [], "length": 2},
    ]
    batch = collator(features)
    assert batch["labels"].tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"} | set(batch) & {"token_type_ids"}
    dense = collator([{**f, "labels": [0, 1, 0, 0]} for f in [{"input_ids": [2], "attention_mask": [1]}]])
    assert dense["labels"].tolist() == [[0, 1, 0, 0]]
    with pytest.raises(ValueError, match="contains 4, but the labels are 0 to 3"):
        collator([{**features[0], "label_indices": [4]}])
    with pytest.raises(ValueError, match="num_labels=..."):
        SepMldcDataCollator(tiny_tokenizer())(features)


def test_collator_makes_float_labels_for_other_losses_and_the_trainer_a_byte_a_label(tmp_path):
    trainer = make_trainer(tmp_path)
    features = list(trainer.train_dataset)[:8]
    floats, small = SepMldcDataCollator(tiny_tokenizer(), NUM_LABELS)(features), trainer.data_collator(features)
    assert floats["labels"].dtype == torch.float32 and small["labels"].dtype == torch.uint8
    assert torch.equal(small["labels"].float(), floats["labels"])
    trainer.model.train()
    losses = []
    for batch in (floats, small):
        trainer.label_schedule.restart()  # the same labels are encoded
        losses.append(trainer.compute_loss(trainer.model, batch))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("encoding", ["encoder", "embedding"])
def test_a_batch_without_any_label_has_a_finite_loss_and_gradient(tmp_path, encoding):
    trainer = make_trainer(tmp_path, label_encoding=encoding)
    trainer.model.train()
    batch = batch_of(trainer)
    batch["labels"].zero_()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(loss, outputs.loss)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters() if p.grad is not None)


def test_pad_to_multiple_of_bounds_the_lengths_and_so_the_compiled_graphs_of_training(tmp_path):
    documents = datasets.Dataset.from_list(
        [
            {"input_ids": [2] * n, "attention_mask": [1] * n, "label_indices": [0], "length": n}
            for n in np.random.default_rng(0).integers(3, 129, size=10).tolist()
        ]
    )
    trainer = make_trainer(
        tmp_path,
        tiny_model(num_labels=NUM_LABELS, backbone_config=tiny_backbone_config(num_hidden_layers=1)),
        documents,
        pad_to_multiple_of=64,
        label_encoding="embedding",
        per_device_train_batch_size=1,
        max_steps=len(documents),
    )
    lengths = {batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()}
    assert len(set(documents["length"])) > 8 and lengths == {64, 128}
    torch.compiler.reset()
    counter = CompileCounter()
    # Without dynamic shapes each length is a graph of its own.
    trainer.model.compile(backend=counter, dynamic=False)
    trainer.train()
    assert counter.frame_count == 2


def test_wrong_set_ups_are_refused(tmp_path):
    model = tiny_model(num_labels=NUM_LABELS)
    with pytest.raises(ValueError, match="k = 7, but there are only 6 labels"):
        make_trainer(tmp_path, metric_ks=[1, 7])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        SepMldcTrainer(
            model=model, args=SepMldcTrainingArguments(str(tmp_path), label_encoding="encoder", use_cpu=True)
        )
    args = SepMldcTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="`model` is 'outputs', but a SepMldcForMultiLabelClassification is needed"):
        SepMldcTrainer("outputs", args)
    with pytest.raises(ValueError, match="`model` is a BertModel"):
        SepMldcTrainer(model.backbone, args)
    with pytest.raises(ValueError, match="needs SepMldcTrainingArguments"):
        SepMldcTrainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True))
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="have no `labels` or `label_indices`"):
        trainer.compute_loss(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)


def test_positional_arguments_are_in_the_order_of_transformers(tmp_path):
    own, theirs = (list(inspect.signature(kind.__init__).parameters) for kind in (SepMldcTrainer, Trainer))
    named = own[: own.index("more")]
    assert named == theirs[: len(named)] and len(named) > 8
    args = SepMldcTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    train, evaluation = tiny_documents(), tiny_documents(5)
    trainer = SepMldcTrainer(tiny_model(num_labels=NUM_LABELS), args, None, train, evaluation, tiny_tokenizer())
    assert trainer.train_dataset is train and trainer.eval_dataset is evaluation
    assert trainer.processing_class is not None and isinstance(trainer.data_collator, SepMldcDataCollator)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    rest = (None, None, None, None, (optimizer, None))
    assert SepMldcTrainer(trainer.model, args, None, train, evaluation, None, *rest).optimizer is optimizer


def test_a_loss_of_ones_own_takes_the_place_of_the_classification_loss(tmp_path):
    def squared(outputs, labels, num_items_in_batch=None):
        return (outputs.logits.sigmoid() - labels).pow(2).mean()

    trainer = make_trainer(tmp_path, label_encoding="embedding", label_loss_weight=0.5)
    trainer.compute_loss_func = squared
    trainer.current_gradient_accumulation_steps = 2
    batch = batch_of(trainer)
    for training, share in ((True, 0.5), (False, 1.0)):
        trainer.model.train(training)
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        contrastive = 0.5 * label_contrastive_loss(trainer.model.label_embeddings, batch["labels"])
        contrastive = contrastive + 0.01 * document_contrastive_loss(outputs.document_embeds, batch["labels"])
        # transformers does not divide such a loss by the number of accumulated batches.
        expected = squared(outputs, batch["labels"]) + share * contrastive
        torch.testing.assert_close(loss, expected)
    given = SepMldcTrainer(
        tiny_model(num_labels=NUM_LABELS), trainer.args, train_dataset=tiny_documents(), compute_loss_func=squared
    )
    assert given.compute_loss_func is squared


@pytest.mark.parametrize(
    ("arguments", "patience", "message"),
    [
        (
            {"metric_for_best_model": "ndcg5"},
            None,
            r"`metric_for_best_model` is 'ndcg5', but .* ndcg@1, ndcg@3, ndcg@5",
        ),
        ({"metric_for_best_model": "eval_psp@1"}, None, "measures only"),  # nothing is known of label frequencies
        ({}, 2, "Early stopping is on, but `metric_for_best_model` is not given"),
        ({"eval_strategy": "no", "metric_for_best_model": "loss"}, 2, "`eval_strategy` is not given"),
        ({"metric_for_best_model": "loss", "dictionary": True}, None, "only mail_loss, mail_classification_loss"),
    ],
)
def test_unknown_metrics_and_early_stopping_without_one_are_found_before_training(
    tmp_path, arguments, patience, message
):
    evaluation = {"mail": tiny_documents(4)} if arguments.pop("dictionary", False) else None
    arguments = {"eval_strategy": "steps", "eval_steps": 1, **arguments}
    callbacks = [EarlyStoppingCallback(patience)] if patience else None
    trainer = make_trainer(tmp_path, evaluation=evaluation, callbacks=callbacks, **arguments)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("with_counts", [False, True])
def test_the_metrics_that_are_announced_are_those_that_are_measured(tmp_path, with_counts):
    counts = {"label_counts": [9, 8, 7, 3, 2, 1], "num_train_documents": 30} if with_counts else {}
    trainer = make_trainer(tmp_path, model=tiny_model(num_labels=NUM_LABELS, **counts))
    measured = {name.removeprefix("eval_") for name in trainer.evaluate()}
    speed = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch"}
    assert set(trainer.metric_names()) == measured - speed


def test_several_evaluation_sets_are_measured_and_tuned_on_by_name(tmp_path):
    sets = {"mail": tiny_documents(8), "web": tiny_documents(9, seed=4)}
    trainer = make_trainer(
        tmp_path, evaluation=sets, eval_strategy="steps", eval_steps=3, metric_for_best_model="web_ndcg@3"
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_mail_ndcg@3", "eval_web_ndcg@3"} <= set(metrics)
    for method in (trainer.tune_thresholds, trainer.fit_lexical_scores, lambda: next(trainer.logit_batches())):
        with pytest.raises(ValueError, match=r"several datasets \(mail, web\), but one is needed"):
            method()
    assert trainer.tune_thresholds("web")["num_documents"] == 9
    assert trainer.tune_thresholds(sets["mail"])["num_documents"] == 8
    with pytest.raises(ValueError, match="`dataset` is 'news', but documents are needed"):
        trainer.tune_thresholds("news")


@pytest.mark.parametrize("arguments", [{"dataloader_drop_last": True}, {"train_sampling_strategy": "group_by_length"}])
def test_evaluation_and_prediction_lose_no_document_and_keep_their_order(tmp_path, arguments):
    documents = tiny_documents(11, seed=5)
    expected = make_trainer(tmp_path, train_sampling_strategy="random").predict(documents)
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4, **arguments)
    output = trainer.predict(documents)
    assert np.array_equal(output.predictions[1], expected.predictions[1])
    assert output.metrics["test_p@1"] == pytest.approx(expected.metrics["test_p@1"])
    trainer.evaluate(documents)
    assert trainer.last_metrics.num_seen == 11
    name, value = next(iter(arguments.items()))
    assert getattr(trainer.args, name) == value


def test_workers_that_persist_read_the_dataset_that_is_requested(tmp_path):
    trainer = make_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    trainer.evaluate()
    trainer.evaluate(tiny_documents(7, seed=2))
    assert trainer.last_metrics.num_seen == 7


def test_the_last_metrics_are_kept_after_a_prediction_without_labels(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="Nothing has been evaluated yet"):
        _ = trainer.last_metrics
    trainer.evaluate()
    trainer.predict(tiny_documents(5).remove_columns("label_indices"))
    assert trainer.last_metrics.num_seen == 10
    trainer.predict(tiny_documents(5))
    assert trainer.last_metrics.num_seen == 5


def test_tuned_thresholds_are_stored_and_used_and_beat_one_half(tmp_path):
    trainer = trained_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.classifier.bias -= 3.0  # badly calibrated: nearly nothing reaches one half
    validation, test = tiny_documents(150, seed=8), tiny_documents(150, seed=9)
    before = trainer.predict(test).metrics
    info = trainer.tune_thresholds(validation)
    after = trainer.predict(test).metrics
    config = trainer.model.config
    assert len(config.thresholds) == NUM_LABELS and all(0 < value < 0.5 for value in config.thresholds)
    assert config.threshold_info == info and info["num_documents"] == 150
    assert after["test_f1_macro"] > before["test_f1_macro"] + 0.2
    assert info["f1_macro"] > info["f1_macro_at_0.5"] + 0.2
    assert after["test_f1_macro"] == pytest.approx(info["f1_macro"], abs=0.15)  # cross-fitted: no surprise on new data
    assert trainer.last_metrics.per_label()["threshold"].tolist() == config.thresholds
    assert after["test_p@1"] == before["test_p@1"]


def test_thresholds_are_tuned_on_uncalibrated_logits_however_often(tmp_path):
    trainer = trained_trainer(tmp_path, classification_loss="softmax")
    documents = tiny_documents(150, seed=8)
    trainer.tune_thresholds(documents)
    config = trainer.model.config
    first = (config.thresholds, config.score_calibration)
    assert config.score_calibration["scale"] != 1
    trainer.tune_thresholds(documents)
    assert (config.thresholds, config.score_calibration) == first
    with pytest.raises(ValueError):
        trainer.tune_thresholds(documents.remove_columns("label_indices"))
    assert config.score_calibration == first[1]


def test_softmax_models_get_platt_scaling_with_their_thresholds(tmp_path):
    trainer = trained_trainer(tmp_path, classification_loss="softmax")
    info = trainer.tune_thresholds(tiny_documents(150, seed=8))
    assert info["calibration"] == "platt"
    assert info["expected_calibration_error"] < info["expected_calibration_error_before"]
    assert trainer.model.config.score_calibration["scale"] > 0
    metrics = trainer.predict(tiny_documents(100, seed=9)).metrics
    assert metrics["test_f1_micro"] > 0.5


@pytest.mark.parametrize("loss", ["bce", "softmax"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"calibration": "cold"}, "`calibration` is 'cold'"),
        ({"objective": "best"}, "`objective` is 'best'"),
        ({"objective": "precision:2"}, "`objective` is 'precision:2'"),
        ({"shrinkage": float("nan")}, "`shrinkage` is nan"),
    ],
)
def test_wrong_settings_of_thresholds_are_refused_before_a_document_is_read(tmp_path, loss, wrong, message):
    trainer = make_trainer(tmp_path, model=tiny_model(num_labels=NUM_LABELS, classification_loss=loss))
    with pytest.raises(ValueError, match=message):
        trainer.tune_thresholds(dataset="no documents are looked for", **wrong)


def test_threshold_objectives_and_bad_arguments(tmp_path):
    trainer = trained_trainer(tmp_path)
    validation = tiny_documents(150, seed=8)
    strict = trainer.tune_thresholds(validation, objective="precision:0.95", shrinkage=0)
    assert strict["objective"] == "precision:0.95"
    calibrated = trainer.tune_thresholds(validation, objective="micro", calibration="temperature")
    assert calibrated["expected_calibration_error"] <= calibrated["expected_calibration_error_before"] + 1e-6
    with pytest.raises(ValueError, match="these have none"):
        trainer.tune_thresholds(validation.remove_columns("label_indices"))
    with pytest.raises(ValueError, match="None of the documents has a label"):
        trainer.tune_thresholds([{**validation[0], "label_indices": []}])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "labels",
            ["label 0", "label 1"],
            r"`labels` is \['label 0', 'label 1'\], but a multi-hot row is needed: 6 numbers",
        ),
        ("labels", [0, 2], "a multi-hot row is needed"),
        ("labels", [0, 1, 2, 3, 4, 5], "Put label ids into a column `label_indices`"),
        ("labels", [0, 1, 0, 0, 0, float("nan")], "a multi-hot row is needed"),
        ("labels", None, "`labels` is None"),
        ("label_indices", ["label 0"], r"`label_indices` is \['label 0'\], but a list of label ids is needed"),
        ("label_indices", "label 0", "Convert label names to ids with `trainer.encode_labels`"),
        ("label_indices", [0.5], "a list of label ids is needed"),
        ("label_indices", None, "a document without labels has an empty list"),
        ("label_indices", [0, -1], "contains -1, but the labels are 0 to 5"),
    ],
)
@pytest.mark.parametrize("group", [False, True])
def test_names_and_wrong_ids_are_refused_in_one_sentence(tmp_path, column, value, message, group):
    rows = [dict(row) for row in tiny_documents(8)]
    for row in rows:
        row["labels" if column == "labels" else "label_indices"] = value
        if column == "labels":
            del row["label_indices"]
    trainer = make_trainer(
        tmp_path, documents=datasets.Dataset.from_list(rows), group_by_label_set=group, label_encoding="embedding"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_an_adapter_scores_after_loading_as_after_training_and_a_changing_label_table_is_refused(tmp_path):
    def adapted():
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type=peft.TaskType.SEQ_CLS)
        return peft.get_peft_model(type(base).from_pretrained(tmp_path / "base"), config)

    base = tiny_model(num_labels=NUM_LABELS)
    base.save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path, model=adapted(), label_encoding="embedding", learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    batch = batch_of(trainer)
    trained, before = (model.eval()(**batch).logits for model in (trainer.model, base))
    torch.testing.assert_close(loaded(**batch).logits, trained)
    assert not torch.allclose(trained, before, atol=1e-3)
    with pytest.raises(ValueError, match="which a PEFT adapter does not save"):
        make_trainer(tmp_path, model=adapted(), label_encoding="encoder")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "eval_ndcg@5"),
        ({"metric_ks": [1, 3]}, "eval_ndcg@3"),
        ({"metric_for_best_model": "eval_f1_macro"}, "eval_f1_macro"),
        ({"metric_for_best_model": "p@1"}, "eval_p@1"),
    ],
)
def test_a_search_maximizes_one_metric_by_default(tmp_path, arguments, expected):
    trainer = make_trainer(tmp_path, **arguments)
    metrics = trainer.evaluate()
    assert trainer.compute_objective(metrics) == metrics[expected]


def test_a_search_over_several_sets_maximizes_their_mean(tmp_path):
    trainer = make_trainer(tmp_path, evaluation={"a": tiny_documents(6), "b": tiny_documents(6, seed=3)})
    metrics = trainer.evaluate()
    expected = (metrics["eval_a_ndcg@5"] + metrics["eval_b_ndcg@5"]) / 2
    assert trainer.compute_objective(metrics) == pytest.approx(expected)


class OneQuestion:
    """A search backend in the place of optuna: asks for the objective once."""

    default_hp_space = staticmethod(lambda trial: {})
    asked: list = []

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        metrics = {"eval_loss": 9.0, "eval_classification_loss": 8.0, "eval_ndcg@5": 0.25}
        self.asked.append((n_trials, direction, trainer.compute_objective(metrics)))


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        ({}, {}, ("maximize", 0.25)),
        ({}, {"metric_for_best_model": "loss"}, ("minimize", 9.0)),
        ({"compute_objective": lambda metrics: 7.0}, {}, ("minimize", 7.0)),
        ({"compute_objective": lambda metrics: 7.0, "direction": "maximize"}, {}, ("maximize", 7.0)),
    ],
)
def test_the_direction_of_a_search_fits_its_objective(tmp_path, monkeypatch, given, arguments, expected):
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, OneQuestion)
    trainer = make_trainer(tmp_path, **arguments)
    trainer.model_init = lambda: tiny_model(num_labels=NUM_LABELS)
    trainer.hyperparameter_search(n_trials=2, backend="optuna", **given)
    assert OneQuestion.asked.pop() == (2, *expected)
    assert trainer.compute_objective({"eval_ndcg@5": 0.5, "eval_loss": 3.0}) in (0.5, 3.0)
