"""Class weights that are chosen on validation documents."""

from types import SimpleNamespace

import pytest
from test_label_audit import documents, labeled
from tiny_models import tiny_backbone

from modeling_sep_mldc.class_weights_sep_mldc import CLASS_WEIGHTS
from trainer import class_weights
from trainer.class_weights import choose_class_weights


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tiny_backbone(folder)
    return str(folder)


@pytest.fixture
def weighted(monkeypatch):
    """The class weights of each training."""
    train, seen = class_weights.HeadTrainer.train, []

    def recorded(self, embeds, label_indices):
        seen.append((self.model.config.class_weights, self.model.config.label_counts))
        train(self, embeds[:16], label_indices[:16])

    monkeypatch.setattr(class_weights.HeadTrainer, "train", recorded)
    return seen


@pytest.mark.parametrize(
    "gain, objective, chosen", [(0.3, "macro", "effective"), (0.3, "micro", "none"), (0.01, "f1", "none")]
)
def test_weights_are_chosen_by_the_objective_if_they_are_better_than_the_noise(
    encoder, weighted, monkeypatch, gain, objective, chosen
):
    def tuned(*args, **kwargs):
        macro = 0.4 + gain * (weighted[-1][0] == "effective")
        return SimpleNamespace(threshold_info={"f1_micro": 0.5, "f1_macro": macro})

    monkeypatch.setattr(class_weights, "tune_thresholds_from_batches", tuned)
    train, validation = labeled(*documents(40)), labeled(*documents(30, seed=1))
    kind, found = choose_class_weights(train, validation, encoder, objective=objective, hide_progress=True)
    assert kind == chosen and [name for name, _ in weighted] == list(CLASS_WEIGHTS)
    assert found["effective"]["f1_macro"] == 0.4 + gain
    assert all(counts == train.label_counts for _, counts in weighted)


def test_the_classifiers_are_measured_on_the_validation_documents(encoder):
    train, validation = labeled(*documents(60)), labeled(*documents(30, seed=1))
    kind, found = choose_class_weights(train, validation, encoder, hide_progress=True)
    assert kind in CLASS_WEIGHTS and found.keys() == set(CLASS_WEIGHTS)
    assert all(0 < f1["f1_micro"] <= 1 and 0 < f1["f1_macro"] <= 1 for f1 in found.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classification_loss": "softmax"}, "`classification_loss` is 'softmax', which has no binary cross-entropy"),
        ({"validation": labeled([], [])}, "There are no validation documents to choose class weights on"),
    ],
)
def test_bad_input_is_a_one_sentence_error(encoder, change, message):
    given = {"validation": labeled(*documents(10)), **change}
    with pytest.raises(ValueError, match=message):
        choose_class_weights(labeled(*documents(10)), model_name_or_path=encoder, hide_progress=True, **given)
