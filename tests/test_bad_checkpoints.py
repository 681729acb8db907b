"""A checkpoint that is damaged, foreign or dangerous is refused with a one-sentence error."""

import json
import shutil

import pytest
import torch
from hub_client import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from scripts import run_example
from tiny_models import tiny_backbone, tiny_backbone_config, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model = make_model(folder, make_tokenizer(), ["x", "y", "z"], None)
    model.save_pretrained(folder / "whole")
    return folder / "whole"


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint")


@pytest.fixture
def with_lexical(tmp_path):
    tiny_model(num_labels=3, num_lexical_features=4).save_pretrained(tmp_path / "lexical")
    return tmp_path / "lexical"


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_weights_file_is_refused(checkpoint, size):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(OSError, match="checkpoint cannot be read .* truncated or damaged"):
        AutoModel.from_pretrained(checkpoint)


def test_pickled_weights_are_refused_and_the_reason_is_reported(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save(torch.nn.Linear(1, 1).state_dict(), checkpoint / "pytorch_model.bin")
    with pytest.raises(OSError, match="no safetensors weights.*can run any code"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        SepMldcForMultiLabelClassification.from_pretrained(checkpoint, use_safetensors=False)


@pytest.mark.parametrize("name", ["label_embeddings", "classifier.bias", "backbone.embeddings.word_embeddings.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(checkpoint, name, value):
    weights = load_file(checkpoint / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"`{name}` of .* contains NaN or infinite values"):
        AutoModel.from_pretrained(checkpoint)


def test_a_configuration_of_another_number_of_labels_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"]["3"], config["label2id"]["four"] = "four", 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not match its `config.json`.*number of labels"):
        AutoModel.from_pretrained(checkpoint)


def test_a_checkpoint_without_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors|no safetensors weights"):
        AutoModel.from_pretrained(checkpoint)


def test_mismatched_sizes_can_still_be_requested(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"]["3"], config["label2id"]["four"] = "four", 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_pretrained(checkpoint, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 4 and model.label_embeddings.shape[0] == 4


def test_a_whole_checkpoint_loads_with_its_loading_report(checkpoint):
    model, report = SepMldcForMultiLabelClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert not model.label_embeddings.requires_grad and not report["missing_keys"]


def rewrite(checkpoint, change):
    path = checkpoint / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "left_out, named",
    [
        (lambda key: "layer.1." in key, "lack 16 tensors .*`backbone.encoder.layer.1.attention"),
        (lambda key: key == "label_embeddings", "lack 1 tensor .*`label_embeddings`"),
        (lambda key: key.startswith("classifier.out_proj"), "lack 1 tensor .*`classifier.out_proj.weight`"),
        (lambda key: key == "lexical.bias", "lack 1 tensor .*`lexical.bias`"),
    ],
)
@pytest.mark.parametrize("auto_class", [AutoModel, SepMldcForMultiLabelClassification])
def test_a_checkpoint_that_lacks_tensors_is_refused(with_lexical, left_out, named, auto_class):
    rewrite(with_lexical, lambda weights: {key: value for key, value in weights.items() if not left_out(key)})
    with pytest.raises(ValueError, match=f"The weights of .* {named}.*saved together"):
        auto_class.from_pretrained(with_lexical)
    model = auto_class.from_pretrained(with_lexical, ignore_mismatched_sizes=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_a_checkpoint_with_tensors_that_the_model_lacks_is_refused(with_lexical):
    config = json.loads((with_lexical / "config.json").read_text())
    (with_lexical / "config.json").write_text(json.dumps({**config, "num_lexical_features": None}))
    with pytest.raises(ValueError, match="contain 6 tensors that the model of its `config.json` does not have"):
        AutoModel.from_pretrained(with_lexical)


def test_a_checkpoint_of_an_encoder_is_distinguished_from_a_trained_model(tmp_path):
    folder = tiny_backbone(tmp_path)
    with pytest.raises(ValueError, match="use `from_backbone`"):
        SepMldcForMultiLabelClassification.from_pretrained(
            folder, config=SepMldcConfig(backbone_config=tiny_backbone_config(), num_labels=3)
        )


@pytest.mark.parametrize("name", ["lexical.idf", "lexical.feature_weights", "lexical.scale", "lexical.lift"])
def test_buffers_that_are_not_finite_are_refused(with_lexical, name):
    def spoil(weights):
        weights[name].view(-1)[-1] = float("nan")
        return weights

    rewrite(with_lexical, spoil)
    with pytest.raises(ValueError, match=f"`{name}` of .* contains NaN or infinite values"):
        AutoModel.from_pretrained(with_lexical)


@pytest.mark.parametrize("value", [-1, 10**6])
def test_lexical_features_outside_the_vocabulary_are_refused(with_lexical, value):
    def spoil(weights):
        weights["lexical.feature_ids"][0, 0] = value
        return weights

    rewrite(with_lexical, spoil)
    with pytest.raises(ValueError, match="`lexical.feature_ids` of .* outside the vocabulary"):
        AutoModel.from_pretrained(with_lexical)


def test_large_finite_weights_are_not_taken_for_infinite_ones(checkpoint):
    rewrite(checkpoint, lambda weights: {**weights, "classifier.bias": torch.full((3,), 3e38)})
    assert AutoModel.from_pretrained(checkpoint).classifier.bias[0] > 1e38


def test_a_checkpoint_loads_in_little_memory_and_in_half_precision(with_lexical):
    expected = AutoModel.from_pretrained(with_lexical)
    weights = {"config": expected.config, "state_dict": expected.state_dict()}
    for name, options in ((with_lexical, {"device_map": "cpu"}), (None, weights)):
        model = SepMldcForMultiLabelClassification.from_pretrained(name, **options)
        assert torch.equal(model.label_embeddings, expected.label_embeddings)
    assert AutoModel.from_pretrained(with_lexical, dtype=torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("new_size", [200, 90])
def test_a_resized_vocabulary_keeps_the_lexical_scores_and_loads_again(tmp_path, new_size):
    model = tiny_model(num_lexical_features=4)
    size = model.config.backbone_config.vocab_size
    generator = torch.Generator().manual_seed(0)
    lexical = model.lexical
    lexical.idf.copy_(torch.rand(size, generator=generator) + 0.5)
    lexical.feature_ids.copy_(torch.randint(0, size, lexical.feature_ids.shape, generator=generator))
    lexical.feature_weights.normal_(generator=generator)
    lexical.scale.fill_(2.0)
    kept = min(size, new_size)
    tokens = torch.randint(5, kept, (3, 9), generator=generator)
    # Features of removed tokens count for nothing in documents that cannot contain them.
    expected = model(tokens).logits
    model.resize_token_embeddings(new_size)
    torch.testing.assert_close(model(tokens).logits, expected)
    assert (lexical.feature_ids < new_size).all() and len(lexical.idf) == new_size
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path)(tokens).logits, expected)


@pytest.mark.parametrize("program", ["predict", "distill", "export_onnx", "run_mldc"])
def test_a_checkpoint_whose_vocabulary_is_missing_is_refused(checkpoint, tmp_path, program):
    tiny_tokenizer().save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    refused(program, checkpoint, tmp_path, "the file of its vocabulary, such as tokenizer.json, is missing")


@pytest.mark.parametrize("program", ["predict", "distill", "export_onnx"])
def test_programs_distinguish_an_encoder_from_a_trained_model(tmp_path, program):
    tiny_backbone(tmp_path / "encoder")
    refused(program, tmp_path / "encoder", tmp_path, "is a bert model, but a trained sep_mldc model is needed")


@pytest.mark.parametrize("program", ["predict", "distill", "export_onnx"])
def test_a_missing_model_is_a_one_sentence_error(tmp_path, program):
    refused(program, tmp_path / "gone", tmp_path, "cannot be loaded: ")


def refused(program, model, folder, message):
    documents = folder / "documents.jsonl"
    documents.write_text('{"text": "a star", "labels": ["x"]}\n')
    given = {
        "predict": ["--model_name_or_path", model, "--input_file", documents, "--output_file", folder / "out.jsonl"],
        "distill": ["--teacher", model, "--train_file", documents, "--output_dir", folder / "out", "--use_cpu"],
        "export_onnx": [model, folder / "out"],
        "run_mldc": [
            "--model_name_or_path",
            model,
            "--test_file",
            documents,
            "--output_dir",
            folder / "out",
            "--do_predict",
        ],
    }
    done = run_example(program, *given[program])
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr
