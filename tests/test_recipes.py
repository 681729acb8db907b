"""Recommended settings are a pure function of the data and the device, and every one of them is an argument that exists."""

import dataclasses
import inspect

import numpy as np
import pytest
from tiny_models import tiny_backbone, tiny_tokenizer

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification
from trainer import SepMldcTrainer, SepMldcTrainingArguments, recommend_settings
from trainer.recipes import ENOUGH_VALIDATION, FEWEST_STEPS, MANY_LABELS, MOST_EPOCHS, RECIPES
from trainer.training_arguments import SMALL_DATASET


SIZES = [(30, 3), (300, 76), (1110, 10), (3000, 427), (6000, 3201), (22_713, 76), (328_774, 20_559)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_setting_is_an_argument_that_exists_and_has_a_reason(size, recipe, device, tmp_path):
    settings = recommend_settings(*size, device=device, recipe=recipe, num_validation_documents=500)
    config_fields = {field.name for field in dataclasses.fields(SepMldcConfig)}
    named = set(inspect.signature(SepMldcForMultiLabelClassification.from_backbone).parameters)
    assert set(settings.model) <= config_fields | named
    SepMldcConfig(**{name: value for name, value in settings.model.items() if name in config_fields})
    args = SepMldcTrainingArguments(str(tmp_path), use_cpu=True, **{**settings.training, "bf16": False})
    assert args.num_train_epochs >= 1
    assert all(reason for _, _, reason in settings.rows())
    assert recommend_settings(*size, device=device, recipe=recipe, num_validation_documents=500) == settings


@pytest.mark.parametrize(
    "num_documents, num_labels", [(10_000, 2), (10_000, MANY_LABELS - 1), (10_000, MANY_LABELS), (1000, MANY_LABELS)]
)
def test_a_model_and_a_trainer_have_the_recommended_settings_by_default(num_documents, num_labels, tmp_path):
    backbone = tiny_backbone(tmp_path / "encoder")
    labels = [f"label {index}" for index in range(num_labels)]
    known = {"label_counts": [1] * num_labels, "num_train_documents": num_documents}
    model = SepMldcForMultiLabelClassification.from_backbone(backbone, tiny_tokenizer(), labels, **known)
    args = SepMldcTrainer(model, SepMldcTrainingArguments(str(tmp_path), use_cpu=True)).args
    settings = recommend_settings(num_documents, num_labels, num_layers=2, device="cuda")
    given = SepMldcConfig(id2label=dict(enumerate(labels)), num_train_documents=num_documents)
    depends_on_documents = {"encoder_max_length", "num_train_epochs", "per_device_train_batch_size", "logging_steps"}
    depends_on_documents |= {"eval_strategy", "save_strategy", "bf16"}
    assert model.config.backbone_config.hidden_dropout_prob == settings.model["backbone_dropout"]
    for name in set(settings.model) - depends_on_documents - {"backbone_dropout"}:
        assert getattr(model.config, name) == settings[name], name
        assert name == "classifier_bias_init" or getattr(given, name, settings[name]) == settings[name], name
    for name in set(settings.training) - depends_on_documents:
        assert getattr(args, name) == settings[name], name


def test_no_prior_is_used_if_label_frequencies_are_unknown(tmp_path):
    model = SepMldcForMultiLabelClassification.from_backbone(tiny_backbone(tmp_path), tiny_tokenizer(), ["a", "b"])
    assert model.config.classifier_bias_init == "zero" and not model.classifier.bias.any()


def test_more_documents_need_fewer_epochs_and_more_labels_need_more():
    epochs = [recommend_settings(n, 400)["num_train_epochs"] for n in (300, 1000, 3000, 10_000, 100_000, 1_000_000)]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] <= 20 and epochs[-1] == 1
    assert recommend_settings(6000, 3201)["num_train_epochs"] > recommend_settings(6000, 76)["num_train_epochs"]


def test_a_handful_of_documents_is_not_repeated_hundreds_of_times():
    assert recommend_settings(4, 2)["num_train_epochs"] == MOST_EPOCHS


@pytest.mark.parametrize("size", SIZES[1:])
def test_no_run_is_shorter_than_the_fewest_steps(size):
    settings = recommend_settings(*size)
    steps = settings["num_train_epochs"] * size[0] / settings["per_device_train_batch_size"]
    assert steps >= 0.98 * FEWEST_STEPS  # epochs are rounded


def test_the_length_covers_most_documents_within_what_device_and_encoder_can_read():
    lengths = np.arange(1, 101)
    assert recommend_settings(100, 5, document_lengths=lengths)["encoder_max_length"] == 96
    long = 40 * lengths
    assert recommend_settings(100, 5, document_lengths=long)["encoder_max_length"] == 256
    assert recommend_settings(100, 5, document_lengths=long, device="cuda")["encoder_max_length"] == 512
    assert (
        recommend_settings(100, 5, document_lengths=long, device="cuda", max_tokens=128)["encoder_max_length"] == 128
    )


def test_the_classifier_and_what_goes_with_it_follow_the_number_of_labels():
    names = ("classifier", "classifier_dropout", "head_learning_rate")
    for num_documents, similarity in ((1000, ("similarity", 0.2, 5e-4)), (3000, ("similarity", 0.5, 1e-3))):
        few, many = (recommend_settings(num_documents, number) for number in (MANY_LABELS - 1, MANY_LABELS))
        assert tuple(few[name] for name in names) == ("mlp+similarity", 0.5, 1e-3)
        # Token attention goes with the settings of the other classifiers.
        assert tuple(many[name] for name in names) == similarity
    named = {"token_attention": False}
    for num_documents, rate in ((SMALL_DATASET, 5e-4), (SMALL_DATASET + 1, 3e-3)):
        settings = recommend_settings(num_documents, MANY_LABELS, named=named)
        assert tuple(settings[name] for name in names) == ("similarity", 0.2, rate)


def test_layers_are_frozen_on_a_cpu_and_all_of_them_in_the_fast_recipe():
    assert recommend_settings(3000, 76, num_layers=6)["freeze_layers"] == 4
    assert recommend_settings(3000, 76, num_layers=6, device="cuda")["freeze_layers"] == 0
    assert recommend_settings(3000, 76, num_layers=6, device="cuda", recipe="fast")["freeze_layers"] == 6


def test_few_validation_documents_choose_no_checkpoint():
    few = recommend_settings(3000, 76, num_validation_documents=ENOUGH_VALIDATION - 1)
    assert few["eval_strategy"] == "no" and "load_best_model_at_end" not in few
    enough = recommend_settings(3000, 76, num_validation_documents=ENOUGH_VALIDATION)
    assert enough["load_best_model_at_end"] and enough["eval_steps"] == enough["save_steps"]


@pytest.mark.parametrize(
    "more, every",
    [
        ({}, 67),  # 2 epochs of 200 batches
        ({"num_pseudo_documents": 640}, 74),
        ({"num_devices": 4, "named": {"num_train_epochs": 2, "per_device_train_batch_size": 32}}, 17),
        ({"named": {"num_train_epochs": 2, "gradient_accumulation_steps": 3}}, 23),
    ],
)
def test_the_number_of_evaluations_does_not_depend_on_how_documents_become_steps(more, every):
    known = {"num_validation_documents": 1000, "named": {"num_train_epochs": 2}} | more
    assert recommend_settings(6400, 76, **known)["eval_steps"] == every


@pytest.mark.parametrize("devices, per_device", [(1, 32), (2, 16), (3, 11), (4, 8), (8, 8)])
def test_devices_share_a_batch(devices, per_device):
    settings = recommend_settings(6400, 76, num_devices=devices)
    assert settings["per_device_train_batch_size"] == per_device
    one, more = (recommend_settings(200, 20, num_devices=n)["num_train_epochs"] for n in (1, devices))
    assert (more > one) == (devices > 2)  # more than 16 documents per batch: more epochs for as many steps


def test_the_recipe_of_the_paper_has_its_settings():
    paper = recommend_settings(10_000, 54, recipe="paper", device="cuda")
    assert paper["classifier"] == "mlp" and paper["classifier_dropout"] == 0.5 and paper["learning_rate"] == 5e-5
    assert paper["label_loss_weight"] == paper["document_loss_weight"] == pytest.approx(0.54)  # 0.01 per label
    assert not paper["token_attention"]
    assert not paper["lexical_scores"] and paper["freeze_layers"] == 0


def test_settings_of_the_user_take_precedence_and_dependent_settings_follow():
    named = {"learning_rate": 3e-5, "classifier": "similarity", "num_train_epochs": 1, "use_cpu": True}
    named["token_attention"] = False
    settings = recommend_settings(6400, 76, num_validation_documents=1000, named=named)
    rows = {name: (value, why) for name, value, why in settings.rows()}
    assert rows["learning_rate"] == ("3e-05", "specified by the user") and settings["head_learning_rate"] == 3e-3
    assert settings["classifier_dropout"] == 0.2 and settings["eval_steps"] == 34 and settings["logging_steps"] == 4
    assert "use_cpu" not in settings
    limited = recommend_settings(6400, 76, num_validation_documents=1000, named={"max_steps": 60})
    assert limited["eval_steps"] == 10 and limited["max_steps"] == 60 and "num_train_epochs" not in limited
    own = recommend_settings(6400, 76, num_validation_documents=1000, named={"eval_strategy": "epoch"})
    assert not {"eval_strategy", "save_strategy", "load_best_model_at_end"} & set(own)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_documents": 0}, "`num_documents` is 0"),
        ({"num_labels": 0}, "`num_labels` is 0"),
        ({"num_layers": 0}, "`num_layers` is 0"),
        ({"recipe": "quick"}, "`recipe` is 'quick', but it must be one of 'best', 'fast', 'paper'"),
    ],
)
def test_impossible_sizes_and_unknown_recipes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        recommend_settings(**{"num_documents": 100, "num_labels": 5, **wrong})
