"""Lexical scores: the sparse linear classifier on tokens that a trained model may have beside its encoder."""

import datasets
import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score
from sklearn.svm import LinearSVC
from tiny_models import tiny_model
from tiny_training import NUM_LABELS, make_trainer, tiny_documents

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline, SepMldcForMultiLabelClassification
from modeling_sep_mldc.lexical_sep_mldc import LexicalScores, term_weights
from trainer.lexical import fit_kernel_ridge, fit_sparse_svms, token_tf_idf
from trainer.lexical.fusion import BalancedObjective
from trainer.metrics import ranking_metrics
from trainer.metrics.ranking import inverse_propensities


pytestmark = pytest.mark.numeric


def fitted(folder, model=None, **kwargs):
    trainer = make_trainer(folder, model, documents=tiny_documents(120), evaluation=tiny_documents(60, seed=1))
    trainer.fit_lexical_scores(num_features=8, **kwargs)
    return trainer


def batch(trainer, count=6):
    rows = trainer.data_collator([trainer.eval_dataset[i] for i in range(count)])
    rows.pop("labels")
    return rows


def test_tf_idf_of_tokens_is_that_of_scikit_learn():
    documents = [[5, 6, 6, 7], [7, 8], [5, 5, 5, 9]]
    matrix, idf = token_tf_idf(documents, vocab_size=12, special_ids=[])
    reference = TfidfVectorizer(analyzer=lambda ids: [str(i) for i in ids], sublinear_tf=True)
    expected = reference.fit_transform(documents)
    columns = [int(token) for token in reference.get_feature_names_out()]
    np.testing.assert_allclose(matrix.toarray()[:, columns], expected.toarray(), rtol=1e-5)
    assert idf[[0, 1, 10]].tolist() == [0, 0, 0]


def test_a_batch_of_the_model_gets_the_term_weights_that_were_fitted_on():
    documents = [[2, 5, 6, 6, 7, 3], [2, 7, 8, 3], [2, 3]]
    matrix, idf = token_tf_idf(documents, vocab_size=12, special_ids=[0, 2, 3])
    ids = torch.zeros(3, 8, dtype=torch.long)
    mask = torch.zeros(3, 8, dtype=torch.long)
    for row, tokens in enumerate(documents):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    weights = term_weights(ids, mask, torch.from_numpy(idf))
    np.testing.assert_allclose(weights.numpy(), matrix.toarray(), atol=1e-6)
    assert weights[2].abs().sum() == 0 and weights[:, [0, 2, 3]].abs().sum() == 0
    # Padding counts for nothing even where its id is a word's.
    assert torch.equal(term_weights(ids.masked_fill(mask == 0, 5), mask, torch.from_numpy(idf)), weights)


def test_margins_are_those_of_the_support_vector_machines():
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, 30, size=12).tolist() for _ in range(60)]
    gold = [sorted({ids[0] % 3, ids[1] % 3}) for ids in documents]
    matrix, idf = token_tf_idf(documents, 30, [])
    token_ids, weights, biases = fit_sparse_svms(matrix, gold, 4, num_features=30, num_jobs=2)
    lexical = LexicalScores(30, 4, 30)
    for name, values in (("feature_ids", token_ids), ("feature_weights", weights), ("bias", biases)):
        getattr(lexical, name).copy_(torch.from_numpy(values))
    lexical.idf.copy_(torch.from_numpy(idf))
    margins = lexical.margins(torch.tensor(documents)).numpy()
    for label in range(3):
        target = np.array([label in ids for ids in gold]).astype(int)
        svm = LinearSVC(C=1.0).fit(matrix, target)
        np.testing.assert_allclose(margins[:, label], svm.decision_function(matrix), atol=1e-3)
    assert np.allclose(margins[:, 3], -1) and np.allclose(
        lexical.margins(torch.tensor(documents), labels=slice(1, 3)).numpy(), margins[:, 1:3]
    )


def test_only_the_largest_weights_are_kept():
    matrix, _ = token_tf_idf([[4, 5, 5], [4, 6], [5, 6], [4, 4, 7], [6, 7]], 8, [])
    every = fit_sparse_svms(matrix, [[0], [0], [], [0], []], 1, num_features=4)
    two = fit_sparse_svms(matrix, [[0], [0], [], [0], []], 1, num_features=2)
    largest = sorted(zip(np.abs(every[1][0]), every[0][0], strict=True), reverse=True)[:2]
    assert set(two[0][0]) == {token for _, token in largest}


def test_fitting_raises_the_validation_metrics_and_changes_the_logits_by_the_scaled_margins(tmp_path):
    trainer = make_trainer(tmp_path, documents=tiny_documents(120), evaluation=tiny_documents(60, seed=1))
    inputs = batch(trainer)
    model = trainer.model.eval()
    before = model(**inputs).logits
    info = trainer.fit_lexical_scores(num_features=8)
    assert info["scale"] > 0 and info["with"]["ndcg@5"] > info["without"]["ndcg@5"] + 0.05
    margins = model.lexical.margins(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(model(**inputs).logits, before + info["scale"] * margins)
    assert info["tail_weight"] == 0  # nothing is known of how frequent the labels are
    measured = trainer.evaluate()
    assert measured["eval_ndcg@5"] == pytest.approx(info["with"]["ndcg@5"])
    assert model.config.num_lexical_features == 8 and model.config.lexical_info == info


def test_the_weight_of_the_tail_lifts_rare_labels_by_their_inverse_propensity(tmp_path):
    support = [100, 80, 40, 20, 2, 1]
    change = {"label_counts": support, "num_train_documents": 120}
    plain = fitted(tmp_path / "a", tiny_model(num_labels=NUM_LABELS, **change), scales=(2.0,), tail_weights=(0.0,))
    lifted = fitted(tmp_path / "b", tiny_model(num_labels=NUM_LABELS, **change), scales=(2.0,), tail_weights=(1.5,))
    assert lifted.model.config.lexical_info["tail_weight"] == 1.5
    inputs = batch(plain)
    added = lifted.model.lexical(**inputs) - plain.model.lexical(**inputs)
    expected = 1.5 * np.log(inverse_propensities(np.array(support), 120))
    np.testing.assert_allclose(added.numpy(), np.tile(expected, (6, 1)), atol=1e-4)
    # A label that is lifted gets a threshold that is lifted as much (`shrinkage=0`: no other label has a say).
    for trainer in (plain, lifted):
        trainer.tune_thresholds(calibration="platt", shrinkage=0.0)
    assert lifted.evaluate()["eval_f1_micro"] == pytest.approx(plain.evaluate()["eval_f1_micro"])
    assert not np.allclose(lifted.model.config.thresholds, plain.model.config.thresholds, atol=0.01)
    measured = lifted.evaluate()
    assert measured["eval_psp@5"] == pytest.approx(lifted.model.config.lexical_info["with"]["psp@5"])


def test_training_sees_no_lexical_scores(tmp_path):
    trainer = fitted(tmp_path)
    model, inputs = trainer.model, batch(trainer)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with_lexical = model(**inputs).logits
    model.lexical = None
    torch.testing.assert_close(model(**inputs).logits, with_lexical)


def test_scores_that_do_not_help_are_not_kept(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=tiny_documents(10, seed=1))
    info = trainer.fit_lexical_scores(scales=())
    assert info["scale"] == 0 and trainer.model.lexical is None and trainer.model.config.num_lexical_features is None


def test_former_thresholds_are_dropped_and_can_be_tuned_anew(tmp_path):
    trainer = make_trainer(tmp_path, documents=tiny_documents(120), evaluation=tiny_documents(60, seed=1))
    trainer.tune_thresholds()
    trainer.fit_lexical_scores(num_features=8)
    assert trainer.model.config.thresholds is None
    info = trainer.tune_thresholds()
    # Margins shift every logit: without calibration the sigmoid of the sum would be no probability.
    assert info["calibration"] == "platt" and len(trainer.model.config.thresholds) == NUM_LABELS
    assert info["f1_micro"] > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_the_lexical_scores(tmp_path, dtype):
    trainer = fitted(tmp_path / "run")
    inputs = batch(trainer)
    expected = trainer.model.eval()(**inputs).logits
    trainer.save_model(str(tmp_path / "saved"))
    model = SepMldcForMultiLabelClassification.from_pretrained(tmp_path / "saved", dtype=dtype).eval()
    found = model(**inputs).logits.float()
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.3, rtol=0.02)
    names = set(dict(model.named_parameters()))
    assert not any("lexical" in name for name in names) and "lexical.feature_weights" in model.state_dict()


def test_labels_are_added_and_removed_with_their_lexical_rows(tmp_path):
    trainer = fitted(tmp_path)
    model, inputs = trainer.model.eval(), batch(trainer)
    names = model.config.labels
    margins = model.lexical.margins(inputs["input_ids"], inputs["attention_mask"])
    model.add_labels({"new": "something"}, trainer.processing_class)
    longer = model.lexical.margins(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(longer[:, :NUM_LABELS], margins)
    assert (longer[:, NUM_LABELS] == -1).all()
    model.remove_labels([names[1], names[4]])
    shorter = model.lexical.margins(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(shorter, longer[:, [0, 2, 3, 5, 6]])
    assert model(**inputs).logits.shape == (6, 5)


def test_the_encoder_sees_the_first_tokens_and_the_lexical_scores_all(tmp_path):
    trainer = fitted(tmp_path, tiny_model(num_labels=NUM_LABELS, encoder_max_length=4))
    model, inputs = trainer.model.eval(), batch(trainer)
    assert inputs["input_ids"].shape[1] > 4
    output = model(**inputs)
    shorter = model(**{name: value[:, :4] for name, value in inputs.items()})
    torch.testing.assert_close(output.document_embeds, shorter.document_embeds)
    assert not torch.allclose(output.logits, shorter.logits)


def test_a_forward_with_lexical_scores_compiles_to_one_graph(tmp_path):
    trainer = fitted(tmp_path)
    model, inputs = trainer.model.eval(), batch(trainer)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_dataset": datasets.Dataset.from_dict({"input_ids": [[1]]})}, "`label_indices` are needed"),
        ({"eval_dataset": datasets.Dataset.from_dict({})}, "Pass a data set of tokenised documents"),
        ({"num_features": 0}, "needs a weight at least"),
    ],
)
def test_bad_input_is_refused(tmp_path, change, message):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.fit_lexical_scores(**change)
    assert trainer.model.lexical is None


@pytest.mark.parametrize("field", ["encoder_max_length", "num_lexical_features"])
def test_a_size_below_one_is_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` is 0"):
        tiny_model(num_labels=3, **{field: 0})


def test_contributions_of_tokens_add_up_to_the_scores(tmp_path):
    trainer = fitted(tmp_path)
    lexical = trainer.model.lexical
    ids = torch.tensor(trainer.eval_dataset[0]["input_ids"])
    parts = lexical.contributions(ids, [0, 3])
    expected = lexical.scale * (lexical.margins(ids[None]) - lexical.bias)[0, [0, 3]]
    assert parts.shape == (2, len(ids))
    torch.testing.assert_close(parts.sum(dim=1), expected)


def test_an_explanation_names_a_word_that_only_the_lexical_scores_see(tmp_path):
    trainer = fitted(tmp_path, tiny_model(num_labels=NUM_LABELS, encoder_max_length=2))
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    words = ["the", tokenizer.decode([10]), tokenizer.decode([10]), "the"]
    pipe = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tokenizer)
    found = pipe(" ".join(words), threshold=0.0, return_explanation=True, explanation_size=2)
    name = model.config.id2label[0]  # `tiny_documents` writes token 10 for label 0
    assert {entry["token"] for entry in found["tokens"][name] if entry["score"] > 0} == {words[1]}


def test_the_best_labels_in_chunks_are_those_of_forward(tmp_path):
    trainer = fitted(tmp_path, tiny_model(num_labels=NUM_LABELS, encoder_max_length=4))
    model, inputs = trainer.model.eval(), batch(trainer)
    scores, indices = model.predict_top_k(**inputs, k=3, chunk_size=4)
    expected = model(**inputs).logits.topk(3)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(indices, expected.indices)


def test_the_weight_is_chosen_by_ranking_and_by_the_best_f1_of_a_single_threshold():
    rng = np.random.default_rng(5)
    labels = torch.tensor((rng.random((40, 7)) < 0.3).astype(np.float32))
    scores = torch.tensor(rng.integers(-20, 20, labels.shape) / 4 + 1 / 128, dtype=torch.float32) + 2 * labels
    config = tiny_model(num_labels=7, label_counts=[9, 8, 7, 6, 5, 4, 3], num_train_documents=40).config
    objective = BalancedObjective(config)
    for at in (0, 15):
        objective.update(scores[at : at + 15 if not at else None], labels[at : at + 15 if not at else None])
    found = objective.compute()
    best = max(f1_score(labels, scores >= edge, average="micro", zero_division=0) for edge in scores.unique())
    assert found["f1_micro"] == pytest.approx(best)
    names = ["p@1", "p@3", "p@5", "psp@1", "psp@3", "psp@5", "ndcg@5", "f1_micro"]
    assert found["objective"] == pytest.approx(np.mean([found[name] for name in names]))
    expected = ranking_metrics(scores, labels, propensities=inverse_propensities(np.array(config.label_counts), 40))
    assert found["psp@3"] == pytest.approx(expected["psp@3"])
