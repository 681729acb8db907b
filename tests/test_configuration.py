"""Configurations whose values would make a model's answers meaningless are refused, when made, loaded and overridden."""

import json
import re
import unicodedata

import pytest
from tiny_models import tiny_backbone_config, tiny_model

from modeling_sep_mldc import SepMldcConfig


NAN = float("nan")
WRONG = [
    ({"thresholds": [0.5, 0.5, 1.2]}, "`thresholds` contains 1.2, but thresholds are probabilities"),
    ({"thresholds": [0.5, 0.5, -0.1]}, "`thresholds` contains -0.1"),
    ({"thresholds": [0.5, NAN, 0.5]}, "`thresholds` contains nan"),
    ({"thresholds": [0.5]}, "`thresholds` has 1 values for 3 labels"),
    ({"score_calibration": {"scale": 0.0, "bias": 0.0}}, "`score_calibration` is {'scale': 0.0"),
    ({"score_calibration": {"scale": 1.0, "bias": NAN}}, "finite numbers and a scale above 0"),
    ({"score_calibration": {"scale": float("inf"), "bias": 0.0}}, "`score_calibration` is"),
    ({"score_calibration": {"scale": 1.0}}, "`score_calibration` is"),
    ({"score_calibration": {"scale": "1", "bias": 0}}, "`score_calibration` is"),
    ({"label_counts": [1, 2]}, "`label_counts` has 2 values for 3 labels"),
    ({"label_counts": [1, -2, 3]}, "`label_counts` is -2 for label 1"),
    ({"label_counts": [1, 2, 30], "num_train_documents": 10}, "from 0 to `num_train_documents`, which is 10"),
    ({"num_train_documents": -1}, "`num_train_documents` is -1"),
    ({"class_weights": "balanced"}, "the number of documents per label is unknown"),
    ({"class_weights": "balanced", "classification_loss": "softmax"}, "has no binary cross-entropy to weight"),
    ({"classifier_dropout": 1.5}, "`classifier_dropout` is 1.5, but it is a probability"),
    ({"classifier_dropout": NAN}, "`classifier_dropout` is nan"),
    ({"similarity_scale_init": float("inf")}, "`similarity_scale_init` is inf"),
    ({"classifier_hidden_size": 0}, "`classifier_hidden_size` is 0"),
    ({"encoder_max_length": 0}, "`encoder_max_length` is 0"),
    ({"num_lexical_features": -1}, "`num_lexical_features` is -1"),
    ({"id2label": {0: "a", 2: "b"}}, "labels are numbered from 0 on without gaps"),
    ({"id2label": {0: "a", 1: " "}}, "`id2label` calls label 1 ' '"),
    ({"id2label": {0: "a", 1: "a"}}, "`id2label` has 'a' more than once"),
]


def make(**values):
    return SepMldcConfig(backbone_config=tiny_backbone_config(), **{"id2label": dict(enumerate("abc")), **values})


@pytest.mark.parametrize("values, message", WRONG, ids=[str(values) for values, _ in WRONG])
def test_a_value_that_means_nothing_is_refused_when_made_and_when_loaded(tmp_path, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**values)
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ValueError, match=re.escape(message)):
        SepMldcConfig.from_pretrained(tmp_path)


def test_a_value_that_overrides_a_saved_one_is_checked(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`thresholds` has 2 values for 3 labels"):
        SepMldcConfig.from_pretrained(tmp_path, thresholds=[0.5, 0.5])
    with pytest.raises(ValueError, match="without `num_labels` and `id2label`, and call `add_labels`"):
        SepMldcConfig.from_pretrained(tmp_path, thresholds=[0, 0.5, 1], num_labels=2)
    assert SepMldcConfig.from_pretrained(tmp_path, thresholds=[0, 0.5, 1]).thresholds == [0, 0.5, 1]


def test_a_model_whose_label_names_or_thresholds_were_changed_is_saved_only_if_it_can_be_loaded(tmp_path):
    model = tiny_model(num_labels=2)
    model.config.id2label = {0: "a", 1: "a"}
    with pytest.raises(ValueError, match="'a' more than once"):
        model.save_pretrained(tmp_path)
    model.config.id2label = {1: "a", 2: "b"}
    with pytest.raises(ValueError, match="numbered from 0 on"):
        model.save_pretrained(tmp_path)
    model.config.id2label = {0: "a", 1: "b"}
    model.config.thresholds = [0.5]
    with pytest.raises(ValueError, match="`thresholds` has 1 values for 2 labels"):
        model.save_pretrained(tmp_path)
    model.config.thresholds = None
    model.save_pretrained(tmp_path)
    assert SepMldcConfig.from_pretrained(tmp_path).label2id == {"a": 0, "b": 1}


def test_label_ids_that_are_strings_as_in_json_become_numbers():
    model = tiny_model(2)
    model.config.id2label = {"0": "a", "1": "b"}
    assert model.config.id2label == {0: "a", 1: "b"} and model.config.labels == ["a", "b"]


def test_label_names_are_in_one_unicode_form():
    decomposed = unicodedata.normalize("NFD", "forêt")
    config = make(id2label={0: decomposed, 1: "b"}, label_descriptions={decomposed: "Des arbres."})
    assert config.labels == ["forêt", "b"] and config.label2id["forêt"] == 0
    assert config.label_texts == ["forêt: Des arbres.", "b"]
    with pytest.raises(ValueError, match="'forêt' more than once"):
        make(id2label={0: decomposed, 1: "forêt"})
