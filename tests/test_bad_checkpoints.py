"""A checkpoint that is damaged, foreign or dangerous is refused in one clear sentence."""

import json
import shutil

import pytest
import torch
from hub_client import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from modeling_sep_mldc import SepMldcForMultiLabelClassification


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model = make_model(folder, make_tokenizer(), ["x", "y", "z"], None)
    model.save_pretrained(folder / "whole")
    return folder / "whole"


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_cut_weights_file_is_refused(checkpoint, size):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(OSError, match="checkpoint cannot be read .* cut or damaged"):
        AutoModel.from_pretrained(checkpoint)


def test_pickled_weights_are_refused_and_the_reason_is_told(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save(torch.nn.Linear(1, 1).state_dict(), checkpoint / "pytorch_model.bin")
    with pytest.raises(OSError, match="no weights in safetensors.*can run any code"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        SepMldcForMultiLabelClassification.from_pretrained(checkpoint, use_safetensors=False)


@pytest.mark.parametrize("name", ["label_embeddings", "classifier.bias", "backbone.embeddings.word_embeddings.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(checkpoint, name, value):
    weights = load_file(checkpoint / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"`{name}` of .* holds NaN or infinite values"):
        AutoModel.from_pretrained(checkpoint)


def test_a_configuration_of_another_number_of_labels_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"]["3"], config["label2id"]["four"] = "four", 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fit its `config.json`.*number of labels"):
        AutoModel.from_pretrained(checkpoint)


def test_a_checkpoint_without_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors|no weights in safetensors"):
        AutoModel.from_pretrained(checkpoint)


def test_mismatched_sizes_can_still_be_asked_for(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"]["3"], config["label2id"]["four"] = "four", 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_pretrained(checkpoint, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 4 and model.label_embeddings.shape[0] == 4


def test_a_whole_checkpoint_loads_with_its_loading_report(checkpoint):
    model, report = SepMldcForMultiLabelClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert not model.label_embeddings.requires_grad and not report["missing_keys"]
