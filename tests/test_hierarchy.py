"""Label hierarchy and constraints: checks, closed scores and label sets, label texts, editing, decisions of every client."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model, tiny_tokenizer

from modeling_sep_mldc import (
    MultiLabelDocumentClassificationPipeline,
    SepMldcConfig,
    SepMldcForMultiLabelClassification,
)
from modeling_sep_mldc.hierarchy_sep_mldc import LabelHierarchy, check_label_parents
from modeling_sep_mldc.label_sets_sep_mldc import check_label_constraints
from trainer.labeler import FastLabeler


# A diamond, a chain, and a label by itself.
LABELS = ["science", "biology", "chemistry", "biochemistry", "genetics", "sports"]
PARENTS = {
    "biology": ["science"],
    "chemistry": ["science"],
    "biochemistry": ["biology", "chemistry"],
    "genetics": ["biology"],
}
TEXTS = ["the star of a galaxy", "price of the market", "proof", "robots and cells in code", ""]


def sets(*rows, labels=LABELS):
    return torch.tensor([[label in row for label in labels] for row in rows])


def names(label_sets, labels=LABELS):
    return [{label for label, chosen in zip(labels, row) if chosen} for row in label_sets.tolist()]


def model_with(**fields):
    return tiny_model(**{"id2label": dict(enumerate(LABELS)), "label_parents": PARENTS, **fields})


# ---- Checks ----


@pytest.mark.parametrize(
    "parents, message",
    [
        (
            {"biology": "science", "science": "biology"},
            "has a cycle: 'biology' > 'science' > 'biology'. Remove one",
        ),
        (
            {"genetics": "biology", "biology": "science", "science": "genetics"},
            "has a cycle: 'genetics' > 'science'",
        ),
        ({"biology": ["science", "biology"]}, "makes 'biology' its own parent. Remove"),
        ({"biology": "knowledge"}, "names the parent 'knowledge', which is not among the 6 labels. Add it"),
        ({"botany": "biology"}, "names the label 'botany', which is not among the 6 labels. Add it"),
        ({"biology": 3}, "has 3 for 'biology', but names of parents are needed"),
        ([["biology", "science"]], "but parents by label are needed"),
    ],
)
def test_wrong_parents_are_reported_with_a_remedy(parents, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_label_parents(parents, LABELS)


def test_a_cycle_is_reported_from_child_to_parent_and_a_diamond_is_not_a_cycle():
    with pytest.raises(ValueError, match="'a' > 'c' > 'b' > 'a'"):
        check_label_parents({"z": "a", "a": "b", "b": "c", "c": "a"})
    assert check_label_parents(PARENTS, LABELS) == PARENTS


def test_names_of_parents_are_composed_and_distinct():
    assert check_label_parents({"e\u0301": ["a", "a"]}) == {"\u00e9": ["a"]}


@pytest.mark.parametrize(
    "group, message",
    [
        ({"labels": ["biology", "botany"], "at_most": 1}, "names 'botany', which is not among the 6 labels"),
        ({"labels": ["biology", "biology"], "at_most": 1}, "names 'biology' twice"),
        ({"labels": ["biology"]}, "has no bound, but it needs `at_least` or `at_most`"),
        ({"labels": ["biology"], "most": 1}, "has 'most', but it needs"),
        ({"labels": [], "at_most": 1}, "it must name labels. Write"),
        ({"labels": ["biology", "sports"], "at_most": 0}, "`at_most` is 0 in the label constraint on 'biology'"),
        ({"labels": ["biology", "sports"], "at_least": True}, "`at_least` is True"),
        ({"labels": ["biology", "sports"], "at_least": 3}, "at most 2 of its 2 labels can be assigned"),
        ({"labels": ["biology", "sports"], "at_least": 2, "at_most": 1}, "at most 1 of its 2 labels"),
        (
            {"labels": ["genetics", "science"], "at_most": 1},
            "'genetics' always comes with its ancestor 'science' of the same group. Leave one",
        ),
    ],
)
def test_wrong_constraints_are_reported_with_a_remedy(group, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_label_constraints([group], LABELS, PARENTS)


def test_a_label_and_its_ancestor_may_exclude_each_other_where_sets_are_not_closed():
    group = {"labels": ["genetics", "science"], "at_most": 1}
    assert check_label_constraints([group], LABELS) == [group]
    assert model_with(label_constraints=[group]).config.label_constraints == [group]
    with pytest.raises(ValueError, match="always comes with its ancestor"):
        model_with(label_constraints=[group], hierarchy="closure")


def test_a_hierarchy_without_parents_is_refused():
    with pytest.raises(ValueError, match="`hierarchy` is 'leaves', but no label has a parent. Give `label_parents`"):
        SepMldcConfig(num_labels=3, hierarchy="leaves")


# ---- Scores and sets ----


def test_scores_and_sets_of_a_diamond():
    hierarchy = LabelHierarchy(LABELS, PARENTS)
    assert hierarchy.height.tolist() == [2, 1, 1, 0, 0, 0]
    closed = hierarchy.close_scores(torch.tensor([[0.1, 0.2, 0.3, 0.8, 0.4, 0.5]]))
    assert closed[0].tolist() == pytest.approx([0.8, 0.8, 0.8, 0.8, 0.4, 0.5])
    assert names(hierarchy.close(sets({"genetics"}, {"biochemistry", "sports"}))) == [
        {"genetics", "biology", "science"},
        {"biochemistry", "biology", "chemistry", "science", "sports"},
    ]
    # A grandparent of an assigned label goes too, although its child is not assigned.
    assert names(hierarchy.leaves(sets({"science", "genetics"}, {"science", "biology", "chemistry"}))) == [
        {"genetics"},
        {"biology", "chemistry"},
    ]
    assert names(hierarchy.descendants(sets({"chemistry"}))) == [{"chemistry", "biochemistry"}]


@st.composite
def hierarchies(draw):
    """Parents with lower ids in a random order of the labels, so without circles."""
    size = draw(st.integers(2, 9))
    order = draw(st.permutations(range(size)))
    parents = {
        order[place]: draw(st.lists(st.sampled_from(order[:place]), unique=True, max_size=3))
        for place in range(1, size)
    }
    return size, {child: above for child, above in parents.items() if above}


def all_ancestors(parents, label):
    found = set()
    for parent in parents.get(label, ()):
        found |= {parent} | all_ancestors(parents, parent)
    return found


@given(hierarchies(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_scores_and_sets_agree_with_a_reference_label_by_label(drawn, seed):
    size, parents = drawn
    labels = [str(index) for index in range(size)]
    hierarchy = LabelHierarchy(labels, {labels[c]: [labels[p] for p in above] for c, above in parents.items()})
    generator = torch.Generator().manual_seed(seed)
    scores, chosen = torch.rand(3, size, generator=generator), torch.rand(3, size, generator=generator) < 0.4
    before = scores.clone(), chosen.clone()
    closed, sets_closed, leaves = hierarchy.close_scores(scores), hierarchy.close(chosen), hierarchy.leaves(chosen)
    below = hierarchy.descendants(chosen)
    assert torch.equal(scores, before[0]) and torch.equal(chosen, before[1])
    for row in range(3):
        for label in range(size):
            family = [other for other in range(size) if label == other or label in all_ancestors(parents, other)]
            assert closed[row, label] == max(scores[row, other] for other in family)
            assert sets_closed[row, label] == any(chosen[row, other] for other in family)
            others = [chosen[row, other] for other in family if other != label]
            assert leaves[row, label] == (chosen[row, label] and not any(others))
            assert below[row, label] == any(chosen[row, other] for other in {label} | all_ancestors(parents, label))
    assert torch.equal(hierarchy.close(leaves), sets_closed)


def test_memory_grows_with_the_number_of_parents_not_with_its_square():
    """20,000 labels in a chain of 40 levels: a matrix of labels by labels would hold 400 million entries."""
    size = 20_000
    labels = [str(index) for index in range(size)]
    hierarchy = LabelHierarchy(labels, {str(i): [str(i - 500)] for i in range(500, size)})
    assert sum(level.numel() for level in hierarchy._levels) == 2 * (size - 500) and len(hierarchy._levels) == 39
    scores = torch.zeros(2, size)
    scores[1, size - 1] = 1.0
    assert hierarchy.close_scores(scores).sum(dim=1).tolist() == [0, 40]


# ---- Decisions ----


def scores_of(**values):
    return torch.tensor([[values.get(label, 0.0) for label in LABELS]])


def test_label_sets_are_closed_or_reduced_to_leaves():
    scores = scores_of(genetics=0.7, biology=0.1, sports=0.6)
    assert names(model_with().label_sets(scores)) == [{"genetics", "sports"}]
    closed = model_with(hierarchy="closure")
    assert names(closed.label_sets(scores)) == [{"genetics", "biology", "science", "sports"}]
    assert names(model_with(hierarchy="leaves").label_sets(scores)) == [{"genetics", "sports"}]
    assert names(closed.label_sets(scores, leaves=True)) == [{"genetics", "sports"}]
    assert closed.close_scores(scores)[0].tolist() == pytest.approx([0.7, 0.7, 0, 0, 0.7, 0.6])
    assert model_with().close_scores(scores) is scores
    # A parent of an assigned label is assigned although it does not reach its own, higher threshold.
    strict = model_with(hierarchy="closure", thresholds=[0.9, 0.9, 0.5, 0.5, 0.5, 0.5])
    assert names(strict.label_sets(scores)) == [{"genetics", "biology", "science", "sports"}]
    assert names(strict.label_sets(scores, threshold=0.65)) == [{"genetics", "biology", "science"}]


def test_an_exclusive_group_keeps_its_best_label_and_loses_the_others_with_their_descendants():
    group = {"labels": ["biology", "chemistry"], "at_most": 1}
    scores = scores_of(chemistry=0.8, genetics=0.7)
    assert names(model_with(label_constraints=[group]).label_sets(scores)) == [{"chemistry", "genetics"}]
    closed = model_with(label_constraints=[group], hierarchy="closure")
    assert names(closed.label_sets(scores)) == [{"chemistry", "science"}]
    assert names(closed.label_sets(scores_of(chemistry=0.6, genetics=0.7))) == [{"biology", "genetics", "science"}]


def test_the_best_labels_fill_a_group_that_has_too_few():
    group = {"labels": ["biology", "chemistry", "sports"], "at_least": 2}
    scores = scores_of(biology=0.2, chemistry=0.3, sports=0.9)
    assert names(model_with(label_constraints=[group]).label_sets(scores)) == [{"chemistry", "sports"}]
    # A label that reached its threshold counts before one with a higher score that did not.
    thresholds = [0.5, 0.1, 0.5, 0.5, 0.5, 0.95]
    model = model_with(label_constraints=[{**group, "at_least": 1}], thresholds=thresholds)
    assert names(model.label_sets(scores)) == [{"biology"}]
    leaves = model_with(label_constraints=[group], hierarchy="leaves")
    assert names(leaves.label_sets(scores_of(genetics=0.1))) == [{"biology", "chemistry"}]


def test_a_needed_label_stays_where_another_group_has_too_many():
    constraints = [{"labels": ["sports"], "at_least": 1}, {"labels": LABELS, "at_most": 2}]
    scores = scores_of(biology=0.9, chemistry=0.8, genetics=0.7, sports=0.1)
    assert names(model_with(label_constraints=constraints).label_sets(scores)) == [{"biology", "sports"}]


@given(st.integers(0, 10_000), st.sampled_from([None, "closure", "leaves"]))
@settings(max_examples=60, deadline=None)
def test_at_most_always_holds_and_sets_stay_closed(seed, hierarchy):
    constraints = [
        {"labels": ["biology", "sports", "chemistry"], "at_least": 1, "at_most": 2},
        {"labels": ["biochemistry", "genetics"], "at_most": 1},
    ]
    model = DECIDERS[hierarchy]
    model.config.label_constraints = constraints
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4, len(LABELS), generator=generator)
    chosen = model.label_sets(scores, leaves=False)
    for row in names(chosen):
        assert 1 <= len(row & {"biology", "sports", "chemistry"}) <= 2 and len(row & {"biochemistry", "genetics"}) <= 1
    if hierarchy is not None:
        assert torch.equal(model.label_hierarchy.close(chosen), chosen)
        # Deciding one document at a time changes nothing.
    rows = [model.label_sets(row.unsqueeze(0), leaves=False) for row in scores]
    assert torch.equal(torch.cat(rows), chosen)


DECIDERS = {kind: model_with(hierarchy=kind) for kind in (None, "closure", "leaves")}


# ---- The chain: checkpoint, label texts, pipeline, editing ----


def classify_with(model):
    return MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tiny_tokenizer(), device="cpu")


def test_a_checkpoint_keeps_the_hierarchy_and_one_without_it_loads_unchanged(tmp_path):
    constraints = [{"labels": ["genetics", "sports"], "at_most": 1}]
    model = model_with(hierarchy="closure", label_constraints=constraints)
    model.save_pretrained(tmp_path / "with")
    config = SepMldcForMultiLabelClassification.from_pretrained(tmp_path / "with").config
    assert (config.label_parents, config.hierarchy, config.label_constraints) == (PARENTS, "closure", constraints)
    stored = json.loads((tmp_path / "with" / "config.json").read_text())
    for name in ("label_parents", "hierarchy", "label_constraints"):
        del stored[name]
    (tmp_path / "with" / "config.json").write_text(json.dumps(stored))
    config = SepMldcForMultiLabelClassification.from_pretrained(tmp_path / "with").config
    assert config.label_parents is config.hierarchy is config.label_constraints is None
    assert config.label_texts == LABELS


def test_a_label_text_begins_with_the_ancestors_of_the_label():
    config = model_with(label_descriptions={"genetics": "genes and heredity", "sports": "games"}).config
    assert config.label_texts == [
        "science",
        "science > biology",
        "science > chemistry",
        "science > biology > biochemistry",
        "science > biology > genetics: genes and heredity",
        "sports: games",
    ]


@pytest.mark.parametrize("hierarchy", ["closure", "leaves"])
def test_the_pipeline_and_the_fast_labeler_return_the_label_sets_of_the_model(hierarchy):
    model = model_with(hierarchy=hierarchy, label_constraints=[{"labels": ["genetics", "sports"], "at_least": 1}])
    classify = classify_with(model)
    inputs = tiny_tokenizer()(TEXTS[:-1], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model.probabilities(model(**inputs).logits)
    expected = [*names(model.label_sets(scores)), set()]
    answers = classify(TEXTS)
    assert [{entry["label"] for entry in labels} for labels in answers] == expected
    assert answers == [
        [{**entry, "score": pytest.approx(entry["score"], abs=1e-6)} for entry in labels]
        for labels in FastLabeler(model, tiny_tokenizer())(TEXTS)
    ]
    closed = model.close_scores(scores)
    for labels, row in zip(answers, closed):
        for entry in labels:
            assert entry["score"] == pytest.approx(row[model.config.label2id[entry["label"]]].item(), abs=1e-5)


@pytest.mark.parametrize("labels", [LABELS, LABELS[::-1]])
def test_in_a_ranking_a_parent_comes_before_a_child_with_the_same_score(labels):
    model = model_with(hierarchy="closure", id2label=dict(enumerate(labels)))
    with torch.no_grad():
        model.classifier.bias[labels.index("biochemistry")] += 10
    ranked = [entry["label"] for entry in classify_with(model)("star", top_k=4)]
    assert ranked[0] == "science" and set(ranked[1:3]) == {"biology", "chemistry"} and ranked[3] == "biochemistry"
    answer = next(iter(FastLabeler(model, tiny_tokenizer())(["star"])))
    assert [entry["label"] for entry in answer[:4]] == ranked


def test_editing_labels_keeps_parents_and_constraints_consistent():
    constraints = [{"labels": ["biology", "chemistry", "sports"], "at_least": 1, "at_most": 2}]
    model = model_with(hierarchy="closure", label_constraints=constraints)
    model.rename_label("biology", "life science")
    assert model.config.label_parents["genetics"] == ["life science"]
    assert model.config.label_parents["life science"] == ["science"]
    assert model.config.label_constraints[0]["labels"] == ["life science", "chemistry", "sports"]
    assert names(model.label_sets(scores_of(genetics=0.9)), model.config.labels) == [
        {"genetics", "life science", "science"}
    ]

    model.add_labels(
        {"botany": "plants", "moss": None},
        tiny_tokenizer(),
        label_parents={"moss": "botany", "botany": "life science"},
    )
    assert model.config.label_parents["moss"] == ["botany"]
    assert model.config.label_texts[-2:] == [
        "science > life science > botany: plants",
        "science > life science > botany > moss",
    ]
    scores = torch.zeros(1, 8)
    scores[0, -1] = 0.9
    assert names(model.label_sets(scores), model.config.labels) == [{"moss", "botany", "life science", "science"}]

    model.remove_labels(["life science", "sports"])
    assert model.config.label_parents["genetics"] == ["science"]
    assert model.config.label_parents["biochemistry"] == ["science", "chemistry"]
    assert model.config.label_constraints == [{"labels": ["chemistry"], "at_least": 1}]
    model.config.check_values()
    model.remove_labels(["science", "chemistry", "botany"])
    assert model.config.label_parents is model.config.hierarchy is model.config.label_constraints is None
    model.config.check_values()


def test_parents_of_new_labels_are_checked_before_anything_changes():
    model = model_with()
    for parents, message in (
        ({"botany": "knowledge"}, "names the parent 'knowledge'"),
        ({"sports": "science"}, "'sports', which is not a new label"),
        ({"botany": "botany"}, "its own parent"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_labels({"botany": None}, tiny_tokenizer(), label_parents=parents)
    assert model.config.labels == LABELS and model.config.label_parents == PARENTS


def test_a_guarantee_is_dropped_where_label_sets_are_changed_further():
    info = {"objective": "recall:0.9", "guarantee": "On average ..."}
    assert "guarantee" in model_with(hierarchy="closure", threshold_info=info).config.threshold_info
    assert "guarantee" not in model_with(hierarchy="leaves", threshold_info=info).config.threshold_info
    constraints = [{"labels": ["genetics", "sports"], "at_most": 1}]
    assert "guarantee" not in model_with(label_constraints=constraints, threshold_info=info).config.threshold_info
