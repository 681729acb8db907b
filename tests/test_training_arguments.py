"""SepMldcTrainingArguments: invalid values are refused in one sentence, former forms still work, no secret is saved."""

import math
import pickle

import pytest
import torch
from transformers import HfArgumentParser

from trainer import SepMldcTrainingArguments


def arguments(tmp_path, **values):
    return SepMldcTrainingArguments(str(tmp_path), use_cpu=True, **values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label_loss_weight": -1.0}, "`label_loss_weight` is -1.0, but it must be a number of at least 0. Use 0"),
        ({"contrastive_temperature": 0.0}, "`contrastive_temperature` is 0.0, but it must be a number above 0"),
        ({"contrastive_weighting": "cosine"}, "`contrastive_weighting` is 'cosine'"),
        ({"label_encoding": "both"}, "`label_encoding` is 'both'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "must be one of group_by_length, random, sequential"),
        ({"labels_per_step": 0}, "`labels_per_step` is 0, but it must be an integer of at least 1"),
        ({"labels_per_step": 2.5}, "`labels_per_step` is 2.5"),
        ({"max_label_length": 0}, "`max_label_length` is 0"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` is 0"),
        ({"prediction_top_k": 0}, "`prediction_top_k` is 0"),
        ({"prediction_top_k": -1}, "`prediction_top_k` is -1"),
        ({"prediction_threshold": 1.0}, "a probability between 0 and 1"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0"),
        ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` is 0"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0"),
        ({"num_train_epochs": -1}, "`num_train_epochs` is -1, but it must be a number above 0. .* `max_steps`"),
        ({"num_train_epochs": 0}, "`num_train_epochs` is 0"),
        ({"max_steps": -3}, "`max_steps` is -3"),
        ({"max_steps": 0}, "`max_steps` is 0"),
        ({"logging_nan_inf_filter": True}, "`logging_nan_inf_filter`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1, but .* `compute_loss_func`"),
        ({"group_by_label_set": True, "train_sampling_strategy": "sequential"}, "`group_by_label_set` is True, but"),
        ({"metric_ks": "1,x"}, "`metric_ks` is '1,x'"),
        ({"metric_ks": []}, r"`metric_ks` is \[\], but it must be a list of integers"),
        ({"metric_ks": [0, 1]}, "`metric_ks` is"),
        ({"metric_ks": [1.5]}, "`metric_ks` is"),
        ({"metric_ks": [True]}, "`metric_ks` is"),
    ],
)
def test_wrong_arguments_are_refused_with_value_rule_and_remedy(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **wrong)


@pytest.mark.parametrize(
    "name",
    [
        "label_loss_weight",
        "document_loss_weight",
        "contrastive_temperature",
        "head_learning_rate",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "prediction_threshold",
        "num_train_epochs",
        "labels_per_step",
        "prediction_top_k",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5])
def test_nan_infinite_and_negative_numbers_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}, but it must be"):
        arguments(tmp_path, **{name: value})


def parse(*texts):
    (args,) = HfArgumentParser(SepMldcTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", *texts]
    )
    return args


def test_ks_are_a_list_and_the_default_fits_the_number_of_labels(tmp_path):
    assert parse("--metric_ks", "5", "1", "1").metric_ks == [1, 5]
    assert parse().metric_ks is None
    assert [parse().cutoffs(size) for size in (1, 2, 4, 100)] == [(1,), (1,), (1, 3), (1, 3, 5)]
    assert arguments(tmp_path, metric_ks=[3, 1]).cutoffs(3) == (1, 3)
    with pytest.raises(ValueError, match="k = 5, but there are only 3 labels"):
        arguments(tmp_path, metric_ks=[1, 5]).cutoffs(3)


def test_ks_joined_by_commas_work_with_a_warning(tmp_path):
    with pytest.warns(FutureWarning, match="Pass a list of ints"):
        assert arguments(tmp_path, metric_ks="1,3").metric_ks == [1, 3]
    with pytest.warns(FutureWarning, match="--metric_ks 1 3 5"):
        assert parse("--metric_ks", "1,3").metric_ks == [1, 3]
    assert arguments(tmp_path, metric_ks=4).metric_ks == [4]


def test_saved_arguments_hold_no_secret(tmp_path):
    args = arguments(
        tmp_path,
        hub_token="hf_secret",
        run_name="hf_abcdefghijklmnopqrstuv",
        lr_scheduler_kwargs={"api_key": "k-123", "power": 2},
    )
    torch.save(args, tmp_path / "training_args.bin")
    content = (tmp_path / "training_args.bin").read_bytes()
    for secret in (b"hf_secret", b"hf_abcdefghijklmnop", b"k-123"):
        assert secret not in content and secret not in pickle.dumps(args)
    assert args.hub_token == "hf_secret" and args.lr_scheduler_kwargs["api_key"] == "k-123"
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.lr_scheduler_kwargs == {"api_key": None, "power": 2} and loaded.learning_rate == 1e-4
    assert loaded.cutoffs(2) == (1,)


def test_every_argument_of_this_project_has_a_help_text():
    own = [
        f
        for f in SepMldcTrainingArguments.__dataclass_fields__.values()
        if f.name in SepMldcTrainingArguments.__annotations__
    ]
    assert len(own) > 15 and all(f.metadata.get("help", "").endswith(".") for f in own)
