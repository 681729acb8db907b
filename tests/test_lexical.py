"""Lexical scores: the sparse linear classifier on tokens that a trained model may have in addition to its encoder."""

from functools import partial

import datasets
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score
from sklearn.svm import LinearSVC
from tiny_models import tiny_model
from tiny_training import NUM_LABELS, make_trainer, tiny_documents

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline, SepMldcForMultiLabelClassification
from modeling_sep_mldc.lexical_sep_mldc import CPU_BATCH, LexicalScores, term_weights
from trainer.lexical import (
    choose_tail_weight,
    default_num_features,
    fit_kernel_ridge,
    fit_shortlist_svms,
    fit_sparse_svms,
    fitting,
    solvers,
    stack_scores,
    token_tf_idf,
)
from trainer.lexical.calibration import CommonLine, fit_common_line, fit_lines, log_frequencies
from trainer.lexical.fusion import BalancedObjective, ValidationScores
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
    # Padding is ignored even if its id is that of a word.
    assert torch.equal(term_weights(ids.masked_fill(mask == 0, 5), mask, torch.from_numpy(idf)), weights)


def test_pairs_of_neighboring_tokens_count_in_a_batch_as_in_fitting():
    documents = [[2, 5, 6, 7, 3], [2, 5, 6, 0, 3], [2, 7, 6, 5, 3], [2, 3]]
    matrix, idf = token_tf_idf(documents, vocab_size=12, special_ids=[0, 2, 3], num_bigrams=101)
    ids = torch.tensor([document + [0] * (6 - len(document)) for document in documents])
    mask = (torch.arange(6) < torch.tensor([[5], [5], [5], [2]])).long()
    weights = term_weights(ids, mask, torch.from_numpy(idf), num_bigrams=101)
    np.testing.assert_allclose(weights.numpy(), matrix.toarray(), atol=1e-6)
    # Only the pair (5, 6) is in two documents; pairs with special tokens, and the reverse order, are none.
    pairs = weights[:, 12:] > 0
    assert pairs.sum(dim=1).tolist() == [1, 1, 0, 0] and torch.equal(pairs[0], pairs[1])
    assert (idf[12:] > 0).sum() == 1 and idf[12:].max() == pytest.approx((np.log(5 / 3) + 1) / 2)
    # Padding and unknown tokens are not part of any pair.
    assert torch.equal(term_weights(ids.masked_fill(mask == 0, 6), mask, torch.from_numpy(idf), 101), weights)
    unknown = term_weights(torch.tensor([[9, 5, 9, 6]]), None, torch.from_numpy(idf), 101)
    assert (unknown > 0).sum() == 2


def test_margins_of_the_terms_of_a_batch_are_those_of_all_terms():
    torch.manual_seed(0)
    lexical = LexicalScores(vocab_size=40, num_labels=4, num_features=30, num_bigrams=101)
    lexical.idf.uniform_().masked_fill_(torch.rand(141) < 0.2, 0.0)
    lexical.feature_ids.copy_(torch.stack([torch.randperm(141)[:30] for _ in range(4)]))
    lexical.feature_weights.normal_()
    ids = torch.randint(0, 40, (CPU_BATCH + 3, 9))
    mask = (torch.arange(9) < torch.randint(1, 10, (len(ids), 1))).long()
    weights = torch.zeros(4, 141).scatter_(1, lexical.feature_ids.long(), lexical.feature_weights)
    for attended in (mask, None):
        expected = term_weights(ids, attended, lexical.idf, 101) @ weights.t() + lexical.bias
        torch.testing.assert_close(lexical.margins(ids, attended), expected)
        torch.testing.assert_close(lexical.margins(ids, attended, slice(1, 3)), expected[:, 1:3])


def random_documents(count=60, num_tokens=30):
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, num_tokens, size=12).tolist() for _ in range(count)]
    return documents, [sorted({ids[0] % 3, ids[1] % 3}) for ids in documents]


def test_ridge_regressions_of_all_labels_at_once_are_those_of_each(monkeypatch):
    documents, gold = random_documents()
    gold = [[*ids, *ids, 4] for ids in gold]  # twice the same label is once; label 3 is in no document, 4 in all
    matrix, _ = token_tf_idf(documents, 30, [])
    found = fit_kernel_ridge(matrix, gold, 5, num_features=30, penalty=0.5, hide_progress=True)
    with_bias = np.hstack([matrix.toarray(), np.ones((60, 1))])
    for label in range(3):
        target = np.array([1 if label in ids else -1 for ids in gold])
        expected = Ridge(alpha=0.5, fit_intercept=False).fit(with_bias, target).coef_
        weights = np.zeros(30)
        weights[found[0][label]] += found[1][label]
        np.testing.assert_allclose(weights, expected[:-1], atol=1e-4)
        assert found[2][label] == pytest.approx(expected[-1], abs=1e-4)
    assert found[2][3:].tolist() == [-1, 1] and not found[1][3:].any()
    # In steps and blocks, the same.
    monkeypatch.setattr(solvers, "LABELS_PER_STEP", 2)
    monkeypatch.setattr(solvers, "DOCUMENTS_PER_BLOCK", 16)
    again = fit_kernel_ridge(matrix, gold, 5, num_features=30, penalty=0.5, hide_progress=True)
    np.testing.assert_allclose(np.sort(again[1]), np.sort(found[1]), atol=1e-5)


def held_out_margins(matrix, gold, label, penalty):
    """Margins of each document by the ridge regression on all others."""
    features = np.hstack([matrix.toarray(), np.ones((matrix.shape[0], 1))])
    target = np.array([1 if label in ids else -1 for ids in gold])
    others = [np.arange(len(target)) != row for row in range(len(target))]
    return np.array(
        [
            Ridge(alpha=penalty, fit_intercept=False).fit(features[kept], target[kept]).predict(features[[row]])[0]
            for row, kept in enumerate(others)
        ]
    ), (target + 1) / 2


def test_margins_are_calibrated_on_documents_that_were_left_out(monkeypatch):
    documents, gold = random_documents()
    gold = [[*ids, 4] for ids in gold]
    matrix, _ = token_tf_idf(documents, 30, [])
    seen = []

    def keep(margins, rows, line):
        seen.append((margins.copy(), fit_lines(margins, rows, line)))
        return seen[-1][1]

    monkeypatch.setattr(solvers, "fit_lines", keep)
    monkeypatch.setattr(solvers, "DOCUMENTS_PER_BLOCK", 7)
    plain = fit_kernel_ridge(matrix, gold, 5, 30, penalty=0.5, hide_progress=True)
    found = fit_kernel_ridge(matrix, gold, 5, 30, penalty=0.5, calibrate=True, hide_progress=True)
    ((margins, (slopes, intercepts)),) = seen
    for label in range(3):
        expected, _ = held_out_margins(matrix, gold, label, penalty=0.5)
        np.testing.assert_allclose(margins[:, label], expected, atol=1e-4)
        # Weights and bias are those of the ridge regression, on the label's line.
        rows = [np.zeros(30), np.zeros(30)]
        for row, (ids, weights, _) in zip(rows, (plain, found)):
            row[ids[label]] += weights[label]
        np.testing.assert_allclose(rows[1], slopes[label] * rows[0], atol=1e-4)
        assert found[2][label] == pytest.approx(slopes[label] * plain[2][label] + intercepts[label], abs=1e-4)
    assert found[2][3] <= found[2][:3].min() and found[2][4] >= found[2][:3].max()


def noisy_margins(num_documents=400, counts=(200, 100, 2)):
    """Margins of labels that are one higher on the labels' own documents, and the rows of these."""
    generator = np.random.default_rng(0)
    members = [generator.choice(num_documents, count, replace=False).tolist() for count in counts]
    margins = generator.normal(-1, 0.3, (num_documents, len(counts))).astype(np.float32)
    for label, rows in enumerate(members):
        margins[rows, label] += 1
    return margins, members


def test_lines_of_frequent_labels_are_logistic_regressions_and_those_of_rare_ones_near_the_common_line():
    margins, members = noisy_margins()
    line = CommonLine(center=-3.0, spread=1.0, slopes=(4.0, 0.0), intercepts=(1.0, -0.5), least=0.1)
    slopes, intercepts = fit_lines(margins, members, line)
    prior_slopes, prior_intercepts = line.at(log_frequencies(np.array([len(rows) for rows in members]), 400))
    for label, rows in enumerate(members):
        target = np.isin(np.arange(400), rows).astype(float)

        def loss(values, label=label, target=target):
            logits = values[0] * margins[:, label] + values[1]
            prior = 4 * (values[0] / prior_slopes[label] - 1) ** 2 + (values[1] - prior_intercepts[label]) ** 2
            return np.logaddexp(0, logits).sum() - (logits * target).sum() + prior

        expected = minimize(loss, [prior_slopes[label], prior_intercepts[label]]).x
        assert slopes[label] == pytest.approx(expected[0], rel=0.01)
        assert intercepts[label] == pytest.approx(expected[1], abs=0.02)


def test_the_common_line_is_a_logistic_regression_over_all_labels():
    margins, members = noisy_margins(counts=(200, 150, 100, 50))
    line = fit_common_line(lambda labels: margins[:, list(labels)], members, 400)
    slopes, intercepts = line.at(log_frequencies(np.array([len(rows) for rows in members]), 400))
    probabilities = 1 / (1 + np.exp(-(margins * slopes + intercepts)))
    # On average as frequent as the labels, and more certain the further the margins are apart.
    np.testing.assert_allclose(probabilities.mean(0), [len(rows) / 400 for rows in members], rtol=0.15)
    doubled = fit_common_line(lambda labels: 2 * margins[:, list(labels)], members, 400)
    np.testing.assert_allclose(doubled.slopes[0], line.slopes[0] / 2, rtol=0.1)


def test_the_slope_of_the_common_line_goes_with_the_documents_that_classifiers_have_learned_from():
    margins, members = noisy_margins(counts=(40, 10, 5, 2))
    line = fit_common_line(lambda labels: margins[:, list(labels)], members, 400)
    rows, targets = [], []
    for label, documents in enumerate(members):
        of_all, of_left = (
            (np.log((n + 0.5) / 401) - line.center) / line.spread for n in (len(documents), len(documents) - 1)
        )
        for document in range(400):
            margin = float(margins[document, label])
            rows.append((margin, margin * max(of_left, -3), of_all))
            targets.append(document in documents)
    reference = LogisticRegression(C=100.0, max_iter=500).fit(rows, targets)
    slope, slope_change, intercept_change = reference.coef_[0]
    assert line.slopes == pytest.approx((slope, slope_change), rel=0.02)
    assert line.intercepts == pytest.approx((reference.intercept_[0], intercept_change), rel=0.02)


def test_a_label_with_one_document_is_on_the_common_line_and_does_not_bend_it():
    margins, members = noisy_margins(counts=(100, 50, 20, 10, 5, 2))
    line = fit_common_line(lambda labels: margins[:, list(labels)], members, 400)
    # Without its only document, a classifier knows less about it than about any other.
    margins = np.concatenate([margins, np.full((400, 3), -1, np.float32)], axis=1)
    members = [*members, [0], [1], [2]]
    margins[range(3), range(6, 9)] = -1.5
    assert fit_common_line(lambda labels: margins[:, list(labels)], members, 400) == line
    slopes, intercepts = fit_lines(margins, members, line)
    expected = line.at(log_frequencies(np.ones(3), 400))
    np.testing.assert_allclose((slopes[6:], intercepts[6:]), expected)


def test_slopes_are_those_of_classifiers_of_all_documents():
    """Margins of left-out documents come from classifiers with a document less: where slopes grow with documents, so does the result."""
    margins, members = noisy_margins(counts=(200, 100, 3, 2))
    steep = CommonLine(center=-3.0, spread=1.0, slopes=(4.0, 1.0), intercepts=(1.0, 0.0), least=0.1)
    counts = np.array([len(rows) for rows in members])
    of_all, _ = steep.at(log_frequencies(counts, 400))
    of_left, _ = steep.at(log_frequencies(counts - 1, 400))
    expected = []
    for label, slope in enumerate(of_left.tolist()):
        alike = CommonLine(center=-3.0, spread=1.0, slopes=(slope, 0.0), intercepts=(1.0, 0.0), least=0.1)
        expected.append(fit_lines(margins[:, [label]], [members[label]], alike)[0][0])
    np.testing.assert_allclose(fit_lines(margins, members, steep)[0], expected * of_all / of_left, rtol=1e-3)
    assert (of_all / of_left)[3] > 1.1


def test_labels_that_say_nothing_are_refused_by_the_common_line():
    with pytest.raises(
        ValueError, match="None of the 2 labels is on some of the 3 documents but not on others. Check"
    ):
        fit_common_line(lambda labels: np.zeros((3, len(labels))), [[], [0, 1, 2]], 3)


@pytest.mark.parametrize("documents", [[[4, 5]], [[], []], [[], [4]]])
@pytest.mark.parametrize(
    "fit", [fit_kernel_ridge, partial(fit_kernel_ridge, calibrate=True), fit_sparse_svms, fit_shortlist_svms]
)
def test_one_document_and_empty_documents_can_be_fitted(fit, documents):
    matrix, _ = token_tf_idf(documents, 8, [], num_bigrams=11)
    _, weights, biases = fit(matrix, [[0]] + [[] for _ in documents[1:]], 2, num_features=3, hide_progress=True)
    assert np.isfinite(weights).all() and np.isfinite(biases).all() and biases[1] <= biases[0]


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


@pytest.mark.parametrize("fit", [fit_sparse_svms, partial(fit_shortlist_svms, num_random=60)])
def test_balanced_class_weights_are_those_of_scikit_learn(fit):
    documents, gold = random_documents()
    matrix, _ = token_tf_idf(documents, 30, [])
    found = fit(matrix, gold, 3, num_features=30, class_weights="balanced", hide_progress=True)
    for label in range(3):
        target = np.array([label in ids for ids in gold]).astype(int)
        svm = LinearSVC(C=1.0, class_weight="balanced").fit(matrix, target)
        np.testing.assert_allclose(dense(found, label)[:30], svm.coef_[0], atol=1e-3)
        np.testing.assert_allclose(found[2][label], svm.intercept_[0], atol=1e-3)


@pytest.mark.parametrize("gain, chosen", [(0.5, "balanced"), (0.001, "none")])
def test_automatic_class_weights_are_balanced_only_if_they_are_better_than_the_noise(
    tmp_path, monkeypatch, gain, chosen
):
    weigh, seen = fitting.weigh_lexical_scores, []

    def weighed(model, lexical, batches, tail_weights, info):
        found = weigh(model, lexical, batches, tail_weights, info)
        seen.append(info["class_weights"])
        return {**found, "with": {"p@1": 0.4 + gain * (info["class_weights"] == "balanced")}}

    monkeypatch.setattr(fitting, "weigh_lexical_scores", weighed)
    trainer = fitted(tmp_path, class_weights="auto", num_jobs=1)
    info = trainer.model.config.lexical_info
    assert seen == ["none", "balanced", *(["none"] if chosen == "none" else [])]
    assert info["class_weights"] == chosen and info["solver"] == "svm"


def test_class_weights_are_refused_for_ridge_regressions(tmp_path):
    with pytest.raises(ValueError, match="ridge regressions share one factor of the kernel and cannot weight"):
        fitted(tmp_path, class_weights="balanced", solver="ridge")
    with pytest.raises(ValueError, match="`class_weights` is 'effective'"):
        fitted(tmp_path, class_weights="effective")


@pytest.mark.parametrize("fit", [fit_kernel_ridge, fit_sparse_svms, fit_shortlist_svms])
def test_only_the_largest_weights_are_kept(fit):
    matrix, _ = token_tf_idf([[4, 5, 5], [4, 6], [5, 6], [4, 4, 7], [6, 7]], 8, [])
    every = fit(matrix, [[0], [0], [], [0], []], 1, num_features=4)
    two = fit(matrix, [[0], [0], [], [0], []], 1, num_features=2)
    largest = sorted(zip(np.abs(every[1][0]), every[0][0], strict=True), reverse=True)[:2]
    assert set(two[0][0]) == {token for _, token in largest}


class Stored:
    """Margins that are given with the documents."""

    def margins(self, input_ids, attention_mask=None):
        return input_ids


def validation_scores(logits, margins, labels, size=50, **kwargs):
    batches = zip(
        *(values.split(size) for values in (logits, labels)), [{"input_ids": m} for m in margins.split(size)]
    )
    return ValidationScores(batches, Stored(), **kwargs)


def simulated(of_logits, of_margins, bias, count=400, num_labels=20):
    generator = torch.Generator().manual_seed(0)
    logits, margins = (scale * torch.randn(count, num_labels, generator=generator) for scale in (3.0, 0.2))
    probabilities = (of_logits * logits + of_margins * margins + bias).sigmoid()
    return logits, margins, torch.bernoulli(probabilities, generator=generator)


def test_stacking_finds_the_weights_that_made_the_labels():
    logits, margins, labels = simulated(0.7, 5.0, -2.0)
    found = stack_scores(validation_scores(logits, margins, labels))
    features = torch.stack([logits.flatten(), margins.flatten()], dim=1).numpy()
    expected = LogisticRegression(C=np.inf).fit(features, labels.flatten().numpy())
    np.testing.assert_allclose(found, [*expected.coef_[0], *expected.intercept_], rtol=0.02)
    np.testing.assert_allclose(found, (0.7, 5.0, -2.0), rtol=0.15)


def test_scores_that_point_the_wrong_way_get_no_weight():
    logits, margins, labels = simulated(0.7, -5.0, -2.0)
    of_logits, of_margins, _ = stack_scores(validation_scores(logits, margins, labels))
    assert of_logits > 0.5 and of_margins == 0


def test_weights_are_finite_where_the_scores_separate_the_labels():
    logits = torch.linspace(-5, 5, 40).view(10, 4)
    found = stack_scores(validation_scores(logits, logits / 10, (logits > 0).float()))
    assert np.isfinite(found).all() and max(found) < 1e4
    # Logits that are all the same, and one document.
    found = stack_scores(validation_scores(torch.zeros(1, 4), torch.tensor([[1.0, -1, -1, -1]]), torch.eye(4)[:1]))
    assert np.isfinite(found).all() and found[1] > 0


def test_no_more_pairs_than_requested_are_kept():
    logits, margins, labels = simulated(0.7, 5.0, -2.0)
    scores = validation_scores(logits, margins, labels, max_pairs=2001)
    assert scores.num_documents == 150 and sum(len(batch[0]) for batch in scores.batches) == 150


def test_few_documents_keep_the_weight_of_the_tail_near_the_usual_one():
    objectives = {0.0: 0.48, 0.75: 0.5, 1.5: 0.508, 2.0: 0.511}
    assert [choose_tail_weight(objectives, count) for count in (10, 100, 10_000)] == [0.75, 1.5, 2.0]
    assert choose_tail_weight({0.0: 0.5}, 10) == 0.0


def test_the_default_number_of_weights_is_bounded():
    assert [default_num_features(count) for count in (1, 1000, 2500, 700_000)] == [1000, 1000, 400, 300]


def test_fitting_raises_the_validation_metrics_and_changes_the_logits_by_the_scaled_margins(tmp_path):
    trainer = make_trainer(tmp_path, documents=tiny_documents(120), evaluation=tiny_documents(60, seed=1))
    inputs = batch(trainer)
    model = trainer.model.eval()
    before = model(**inputs).logits
    info = trainer.fit_lexical_scores(num_features=8)
    assert info["scale"] > 0 and info["with"]["ndcg@5"] > info["without"]["ndcg@5"] + 0.05
    margins = model.lexical.margins(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(model(**inputs).logits, before + info["scale"] * margins)
    assert info["tail_weight"] == 0  # label frequencies are unknown
    assert info["calibrate"]
    measured = trainer.evaluate()
    assert measured["eval_ndcg@5"] == pytest.approx(info["with"]["ndcg@5"])
    assert model.config.num_lexical_features == 8 and model.config.lexical_info == info


def test_the_weight_of_the_tail_lifts_rare_labels_by_their_inverse_propensity(tmp_path):
    counts = [100, 80, 40, 20, 2, 1]
    change = {"label_counts": counts, "num_train_documents": 120}
    plain = fitted(tmp_path / "a", tiny_model(num_labels=NUM_LABELS, **change), tail_weights=(0.0,))
    lifted = fitted(tmp_path / "b", tiny_model(num_labels=NUM_LABELS, **change), tail_weights=(1.5,))
    info = lifted.model.config.lexical_info
    assert info["tail_weight"] == 1.5 and info["scale"] == plain.model.config.lexical_info["scale"]
    inputs = batch(plain)
    added = (lifted.model.lexical(**inputs) - plain.model.lexical(**inputs)).numpy()
    expected = 1.5 * np.log(inverse_propensities(np.array(counts), 120))
    # In units of the logit: the same factor for all labels, which is 1 over the logit's own weight.
    factor = added[0] @ expected / (expected @ expected)
    assert factor > 0
    np.testing.assert_allclose(added, np.tile(factor * expected, (6, 1)), atol=1e-3)
    # A label that is lifted gets a threshold that is lifted as much (`shrinkage=0`: no influence of other labels).
    for trainer in (plain, lifted):
        trainer.tune_thresholds(calibration="platt", shrinkage=0.0)
    measured = lifted.evaluate()
    assert measured["eval_f1_micro"] == pytest.approx(plain.evaluate()["eval_f1_micro"], abs=0.02)
    assert not np.allclose(lifted.model.config.thresholds, plain.model.config.thresholds, atol=0.01)
    assert measured["eval_psp@5"] == pytest.approx(info["with"]["psp@5"])


def dense(found, label, num_tokens=30):
    weights = np.zeros(num_tokens)
    weights[found[0][label]] += found[1][label]
    return weights


def test_a_shortlist_of_all_documents_gives_the_machines_of_all_documents():
    documents, gold = random_documents()
    gold = [[*ids, 4] for ids in gold]  # label 3 is in no document, 4 in all
    matrix, _ = token_tf_idf(documents, 30, [])
    expected = fit_sparse_svms(matrix, gold, 5, num_features=30, hide_progress=True)
    found = fit_shortlist_svms(matrix, gold, 5, num_features=30, num_random=60, num_jobs=2, hide_progress=True)
    for label in range(5):
        np.testing.assert_allclose(dense(found, label), dense(expected, label), atol=1e-3)
    np.testing.assert_allclose(found[2], expected[2], atol=1e-3)


def test_a_shortlist_holds_the_documents_that_are_hard_to_tell_apart(monkeypatch):
    # Label 0 is told from its neighbors, which share token 4, by token 5; 200 far documents have other tokens.
    rng = np.random.default_rng(0)
    documents = [[4, 5]] * 6 + [[4, 6]] * 6 + rng.integers(10, 30, size=(200, 4)).tolist()
    gold = [[0]] * 6 + [[1]] * 6 + [[2]] * 200
    matrix, _ = token_tf_idf(documents, 30, [])
    seen, fit = [], LinearSVC.fit

    def record(svm, rows, y, sample_weight):
        seen.append(sample_weight)
        return fit(svm, rows, y, sample_weight=sample_weight)

    monkeypatch.setattr(LinearSVC, "fit", record)
    found = fit_shortlist_svms(matrix, gold, 3, num_features=30, num_near=8, num_random=20, hide_progress=True)
    for weights in seen[:2]:
        assert (
            len(weights) <= 12 + 20
        )  # documents with token 4, and random ones, which stand for all that are left out
        assert (weights[:12] == 1).all() and weights.sum() == pytest.approx(212)
    assert dense(found, 0)[5] > 0.5 and dense(found, 0)[6] < -0.5
    margins = matrix @ dense(found, 0) + found[2][0]
    assert margins[:6].min() > 0 > margins[6:].max()


@pytest.mark.parametrize("solver", ["ridge", "svm"])
def test_the_solver_is_the_one_that_memory_allows_or_that_is_named(tmp_path, monkeypatch, solver):
    documents, model = tiny_documents(120), tiny_model(num_labels=NUM_LABELS)
    trainer = make_trainer(tmp_path, model, documents=documents, evaluation=tiny_documents(60, seed=1))
    needed = 4 * 120**2 / 2**30
    info = trainer.fit_lexical_scores(max_memory=needed * (1.01 if solver == "ridge" else 0.99), num_jobs=1)
    assert info["solver"] == solver and info["scale"] > 0
    if solver == "svm":
        monkeypatch.setattr(fitting, "MAX_SVM_PAIRS", 1)
        assert trainer.fit_lexical_scores(max_memory=needed * 0.99)["solver"] == "shortlist"
    named = trainer.fit_lexical_scores(solver=solver, num_bigrams=0, max_memory=1e-9)
    assert named["solver"] == solver and model.config.num_lexical_bigrams == 0 and model.lexical.num_bigrams == 0


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
    documents = tiny_documents(120)
    others = [[index for index in range(NUM_LABELS) if index not in ids] for ids in documents["label_indices"]]
    wrong = documents.remove_columns("label_indices").add_column("label_indices", others)
    trainer = make_trainer(tmp_path, documents=wrong, evaluation=tiny_documents(60, seed=1))
    info = trainer.fit_lexical_scores()
    assert info["scale"] == 0 and info["with"] == info["without"]
    assert trainer.model.lexical is None and trainer.model.config.num_lexical_features is None


def test_former_thresholds_are_dropped_and_can_be_tuned_again(tmp_path):
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
        ({"eval_dataset": datasets.Dataset.from_dict({})}, "Pass a dataset of tokenized documents"),
        ({"num_features": 0}, "needs at least one weight"),
        ({"num_bigrams": -1}, "`num_bigrams` is -1"),
        ({"solver": "tree"}, "`solver` is 'tree'"),
        ({"tail_weights": ()}, "`tail_weights` is empty"),
    ],
)
def test_bad_input_is_refused(tmp_path, change, message):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.fit_lexical_scores(**change)
    assert trainer.model.lexical is None


def test_a_kernel_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(
        "trainer.lexical.fitting.available_memory", lambda: solvers.kernel_bytes(len(trainer.train_dataset)) - 1
    )
    with pytest.raises(
        ValueError, match="The kernel of .* documents needs .* Free some memory, fit on fewer documents"
    ):
        trainer.fit_lexical_scores()
    assert trainer.model.lexical is None
    trainer.fit_lexical_scores(solver="svm")


@pytest.mark.parametrize("field", ["encoder_max_length", "num_lexical_features"])
def test_a_size_below_one_is_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` is 0"):
        tiny_model(num_labels=3, **{field: 0})


def test_a_negative_number_of_buckets_is_refused():
    with pytest.raises(ValueError, match="`num_lexical_bigrams` is -1"):
        tiny_model(num_labels=3, num_lexical_bigrams=-1)


def test_pairs_keep_their_features_when_the_vocabulary_is_resized(tmp_path):
    trainer = fitted(tmp_path)
    model, inputs = trainer.model.eval(), batch(trainer)
    margins = model.lexical.margins(inputs["input_ids"], inputs["attention_mask"])
    model.resize_token_embeddings(model.config.get_text_config().vocab_size + 5)
    torch.testing.assert_close(model.lexical.margins(inputs["input_ids"], inputs["attention_mask"]), margins)


@pytest.mark.parametrize("num_bigrams", [0, 131_071])
def test_contributions_of_tokens_add_up_to_the_scores(tmp_path, num_bigrams):
    trainer = fitted(tmp_path, num_bigrams=num_bigrams)
    lexical = trainer.model.lexical
    assert (lexical.feature_ids >= lexical.idf.shape[0] - num_bigrams).any() == (num_bigrams > 0)
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
    assert {entry["word"] for entry in found["explanations"][name]["words"] if entry["lexical"] > 0} == {words[1]}


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


@pytest.mark.parametrize(
    "settings",
    [{"solver": "ridge"}, {"solver": "ridge", "calibrate": True}, {"solver": "svm"}, {"solver": "shortlist"}],
)
def test_a_model_trained_on_more_documents_keeps_the_weights_and_gets_classifiers_of_all_documents(tmp_path, settings):
    tuned = fitted(tmp_path / "tuned", **settings)
    tuned.tune_thresholds()
    everything = datasets.concatenate_datasets([tuned.train_dataset, tuned.eval_dataset])
    final = make_trainer(tmp_path / "final", tiny_model(num_labels=NUM_LABELS, seed=1), documents=everything)
    final.keep_tuning_of(tuned.model)
    former, config = tuned.model.lexical, final.model.config
    assert former.scale > 0 and final.model.lexical.scale == former.scale
    assert torch.equal(final.model.lexical.lift, former.lift)
    assert not torch.equal(final.model.lexical.idf, former.idf)
    assert config.lexical_info == {**tuned.model.config.lexical_info, "num_documents": 180}
    for name in ("thresholds", "threshold_info", "score_calibration", "num_lexical_features", "num_lexical_bigrams"):
        assert getattr(config, name) == getattr(tuned.model.config, name) != []
    fresh = make_trainer(tmp_path / "fresh", documents=everything, evaluation=tuned.eval_dataset)
    fresh.fit_lexical_scores(num_features=8, **settings)
    torch.testing.assert_close(final.model.lexical.feature_weights, fresh.model.lexical.feature_weights)
    final.save_model()
    loaded = SepMldcForMultiLabelClassification.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(loaded(**batch(final)).logits, final.model.eval()(**batch(final)).logits)


def test_what_was_tuned_for_other_labels_is_refused(tmp_path):
    final = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="`tuned` has 3 labels and the model has 6"):
        final.keep_tuning_of(tiny_model(num_labels=3))
