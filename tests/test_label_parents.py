"""Files of parents and constraints, and a run with them: from files to label sets, metrics and model card."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from scripts import load_example
from test_hierarchy import LABELS, PARENTS, model_with
from test_run_mldc import files, run  # noqa: F401
from tiny_training import make_trainer, tiny_documents, trained_trainer

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from modeling_sep_mldc.hierarchy_sep_mldc import LabelHierarchy
from trainer.data import close_labels, parents_of_labels, read_label_constraints, read_label_parents
from trainer.data.text_lines import DataFileError
from trainer.hub import build_model_card
from trainer.metrics import StreamingMetrics


SKOS = """
@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
@prefix ex: <http://example.org/> .
ex:s skos:prefLabel "science"@en, "tiede"@fi ; skos:narrower ex:c ; skos:notation "S" .
ex:b skos:prefLabel "biology"@en, "biologia"@fi ; skos:broader ex:s ; skos:notation "B" .
ex:c skos:prefLabel "chemistry"@en ; skos:notation "C" .
ex:bc skos:prefLabel "biochemistry"@en, "biokemia"@fi ; skos:broader ex:b, ex:c ; skos:notation "BC" .
"""


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# ---- Files ----


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.csv", "child,parent\nbiology,science\nscience,\nbiochemistry,biology\nbiochemistry, chemistry\n"),
        ("p.json", '{"biology": "science", "biochemistry": ["biology", "chemistry"], "science": []}'),
        (
            "p.json",
            '[{"child": "biology", "parent": "science"}, {"child": "biochemistry", "parent": ["biology", "chemistry"]}]',
        ),
        (
            "p.jsonl",
            '{"child": "biology", "parent": "science"}\n{"child": "biochemistry", "parent": ["biology", "chemistry"]}\n',
        ),
    ],
)
def test_parents_are_read_from_every_form(tmp_path, name, text):
    expected = {"biology": ["science"], "biochemistry": ["biology", "chemistry"]}
    assert read_label_parents(write(tmp_path, name, text)) == expected


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.csv", "label,parent\na,b\n", "the columns are 'label', 'parent', but `child` and `parent` are needed"),
        ("p.csv", "child,parent\n,b\n", "line 2: `child` is ''"),
        ("p.csv", "child,parent\na,\n", "names no parent of any label. Write"),
        ("p.csv", "child,parent\na,a\n", "p.csv: `label_parents` makes 'a' its own parent"),
        ("p.json", '{"a": "b", "b": "a"}', "p.json: `label_parents` has a cycle: 'a' > 'b' > 'a'"),
        ("p.json", '{"a": 3}', "`parent` is 3"),
        ("p.ttl", "this is no turtle", "p.ttl: is not turtle that rdflib can read"),
        ("p.ttl", "@prefix ex: <http://e.org/> . ex:a ex:b ex:c .", "has neither `skos:broader` nor `skos:narrower`"),
    ],
)
def test_bad_files_of_parents_end_in_a_one_sentence_error(tmp_path, name, text, message):
    if name.endswith(".ttl"):
        pytest.importorskip("rdflib")
    with pytest.raises(DataFileError, match=re.escape(message)):
        read_label_parents(write(tmp_path, name, text))


@pytest.mark.parametrize(
    "labels, expected",
    [
        ([], {"chemistry": ["science"], "biology": ["science"], "biochemistry": ["biology", "chemistry"]}),
        (
            ["biokemia", "tiede"],
            {"chemistry": ["tiede"], "biologia": ["tiede"], "biokemia": ["biologia", "chemistry"]},
        ),
        (["BC", "S", "science"], {"C": ["S"], "B": ["S"], "BC": ["B", "C"]}),
        (
            ["http://example.org/bc"],
            {
                f"http://example.org/{c}": [f"http://example.org/{p}" for p in ps]
                for c, ps in {"c": "s", "b": "s", "bc": "bc"}.items()
            },
        ),
    ],
)
def test_skos_concepts_get_the_names_of_the_labels(tmp_path, labels, expected):
    pytest.importorskip("rdflib")
    found = read_label_parents(write(tmp_path, "p.ttl", SKOS), labels)
    assert {child: sorted(parents) for child, parents in found.items()} == expected


def test_without_rdflib_skos_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdflib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install sep-mldc\[skos\]"):
        read_label_parents(write(tmp_path, "p.ttl", SKOS))


def test_parents_of_other_labels_are_left_out_with_a_warning_and_missing_ones_are_an_error(caplog):
    assert parents_of_labels({**PARENTS, "botany": ["biology"]}, LABELS, "p.csv") == PARENTS
    assert "1 labels with parents are not among the 6 labels of the model and are left out: 'botany'" in caplog.text
    with pytest.raises(
        DataFileError, match="p.csv: 1 parents are not among the 5 labels of the model: 'science'. Add `--hierarchy"
    ):
        parents_of_labels(PARENTS, LABELS[1:], "p.csv")
    # Also an ancestor that is reached through a name that is not a label.
    with pytest.raises(DataFileError, match="2 parents are not among the 1 labels"):
        parents_of_labels({"a": ["b"], "b": ["c"]}, ["a"], "p.csv")
    with pytest.raises(DataFileError, match="but none of them is among the 6 labels of the model"):
        parents_of_labels({"x": ["y"]}, LABELS, "p.csv")


def test_closed_documents_have_the_ancestors_of_their_labels_once():
    import datasets

    rows = [
        {"text": "a", "labels": ["genetics", "biology"]},
        {"text": "b", "labels": []},
        {"text": "c", "labels": ["biochemistry"]},
    ]
    dataset = datasets.Dataset.from_list(
        rows,
        features=datasets.Features(
            {"text": datasets.Value("string"), "labels": datasets.List(datasets.Value("string"))}
        ),
    )
    expected = [["genetics", "biology", "science"], [], ["biochemistry", "biology", "chemistry", "science"]]
    assert list(close_labels(dataset, PARENTS)["labels"]) == expected
    assert [row["labels"] for row in close_labels(dataset.to_iterable_dataset(), PARENTS)] == expected


def test_constraints_are_read_with_their_place(tmp_path):
    group = {"labels": ["biology", "sports"], "at_most": 1}
    assert read_label_constraints(write(tmp_path, "c.json", json.dumps([group])), LABELS) == [group]
    with pytest.raises(DataFileError, match="c.jsonl, line 2: .* names 'botany'"):
        text = json.dumps(group) + "\n" + json.dumps({"labels": ["botany"], "at_most": 1}) + "\n"
        read_label_constraints(write(tmp_path, "c.jsonl", text), LABELS)
    with pytest.raises(DataFileError, match="c.json: contains no constraints. Write"):
        read_label_constraints(write(tmp_path, "c.json", "[]"), LABELS)


# ---- Metrics ----


def test_hierarchical_metrics_are_those_of_closed_label_sets():
    hierarchy = LabelHierarchy(LABELS, PARENTS)
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(20, len(LABELS), generator=generator)
    gold = (torch.rand(20, len(LABELS), generator=generator) < 0.3).long()
    settings = {"ks": (1,), "thresholds": 0.6, "activation": None}
    whole, parts = (StreamingMetrics(len(LABELS), hierarchy=hierarchy, **settings) for _ in range(2))
    whole.update(scores, gold)
    for start in range(0, 20, 7):
        part = StreamingMetrics(len(LABELS), hierarchy=LabelHierarchy(LABELS, PARENTS), **settings)
        part.update(scores[start : start + 7], gold[start : start + 7])
        parts.merge(part)
    correct = predicted = support = 0
    for row, truth in zip(scores >= 0.6, gold.bool()):
        ours, theirs = (
            {
                i
                for i, name in enumerate(LABELS)
                if any(of[j] and (i == j or name in above(LABELS[j])) for j in range(len(LABELS)))
            }
            for of in (row, truth)
        )
        correct, predicted, support = correct + len(ours & theirs), predicted + len(ours), support + len(theirs)
    expected = {
        "precision": correct / predicted,
        "recall": correct / support,
        "f1": 2 * correct / (predicted + support),
    }
    for metrics in (whole, parts):
        found = metrics.compute()
        assert {name: found[f"hierarchical_{name}"] for name in expected} == pytest.approx(expected)
    flat = StreamingMetrics(len(LABELS), **settings)
    flat.update(scores, gold)
    assert flat.compute().items() <= whole.compute().items() and "hierarchical_f1" not in flat.compute()
    with pytest.raises(ValueError, match="differ in `label_parents`"):
        flat.merge(whole)


def above(label):
    return {name for parent in PARENTS.get(label, ()) for name in {parent, *above(parent)}}


# ---- Trainer ----


CHAIN = {"label 1": ["label 0"], "label 2": ["label 1"]}


def test_evaluation_and_prediction_use_closed_scores_and_the_label_sets_of_the_model(tmp_path):
    constraints = [{"labels": ["label 3", "label 4", "label 5"], "at_most": 1}]
    trainer = trained_trainer(tmp_path, label_parents=CHAIN, hierarchy="leaves", label_constraints=constraints)
    documents = tiny_documents(30, seed=2)
    trainer.tune_thresholds(documents)
    output = trainer.predict(documents)
    model = trainer.model
    batches = [(batch.logits, batch.labels) for batch in trainer.logit_batches(documents)]
    logits, gold = (torch.cat(parts) for parts in zip(*batches))
    closed = model.close_scores(logits)
    assert np.allclose(output.predictions[0], model.probabilities(closed).sort(descending=True).values, atol=1e-5)
    expected = model.label_sets(model.probabilities(logits))
    assert [set(ids.tolist()) for ids in trainer.last_label_sets] == [
        set(row.nonzero().flatten().tolist()) for row in expected
    ]
    metrics = StreamingMetrics(6, ks=(1,), hierarchy=model.label_hierarchy)
    metrics.update(closed, gold, predicted=model.label_sets(model.probabilities(logits), leaves=False))
    for name in ("f1_micro", "hierarchical_f1", "p@1"):
        assert output.metrics[f"test_{name}"] == pytest.approx(metrics.compute()[name])


def test_thresholds_are_tuned_on_closed_scores(tmp_path):
    trainer = trained_trainer(tmp_path, label_parents=CHAIN)
    documents = tiny_documents(60, seed=2)
    closing = LabelHierarchy(trainer.model.config.labels, CHAIN)
    rows = [sorted({*ids, *closing.ancestors(ids)}) for ids in documents["label_indices"]]
    documents = documents.remove_columns("label_indices").add_column("label_indices", rows)
    trainer.tune_thresholds(documents)
    before = trainer.model.config.thresholds
    trainer.model.set_hierarchy(CHAIN, "closure")
    info = trainer.tune_thresholds(documents)
    after = trainer.model.config.thresholds
    assert before[:2] != after[:2]
    # The F1 that is stored for closed scores is better than that of the same thresholds on scores as they were.
    trainer.model.set_hierarchy(None, None)
    assert info["f1_micro"] > trainer.evaluate(documents)["eval_f1_micro"]


def test_without_a_hierarchy_the_last_label_sets_are_what_reaches_its_threshold(tmp_path):
    trainer = make_trainer(tmp_path, prediction_threshold=0.4, prediction_top_k=3)
    output = trainer.predict(tiny_documents(8))
    scores, indices = output.predictions
    expected = [ids[row >= 0.4].tolist() for row, ids in zip(scores, indices)]
    assert [ids.tolist() for ids in trainer.last_label_sets] == expected and any(expected)


@pytest.mark.parametrize(
    "fields", [{"hierarchy": "leaves"}, {"label_constraints": [{"labels": ["label 3", "label 4"], "at_most": 1}]}]
)
def test_a_guarantee_is_refused_where_label_sets_are_changed_further(tmp_path, fields):
    trainer = make_trainer(tmp_path)
    trainer.model.set_hierarchy(**{"label_parents": CHAIN, **fields})
    with pytest.raises(
        ValueError, match="`objective` is 'fdr:0.3', but its guarantee is of the labels that reach .* Use another"
    ):
        trainer.tune_thresholds(objective="fdr:0.3")
    assert trainer.model.config.thresholds is None
    trainer.model.set_hierarchy(CHAIN, "closure")
    assert "guarantee" in trainer.tune_thresholds(objective="fdr:0.3")
    trainer.model.set_hierarchy(CHAIN, None)
    assert "guarantee" not in trainer.model.config.threshold_info


def test_a_wrong_hierarchy_leaves_a_trained_model_unchanged_and_a_right_one_leaves_its_label_texts():
    model = model_with(hierarchy="closure", threshold_info={"guarantee": "On average ..."})
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="has a cycle"):
        model.set_hierarchy({"biology": ["science"], "science": ["biology"]}, "closure")
    assert model.config.to_dict() == before
    texts = model.config.label_texts
    model.set_hierarchy({"sports": ["science"]}, "closure")
    assert model.config.label_texts != texts and model.config.label_texts == LABELS
    plain = model_with(label_parents=None)
    plain.set_hierarchy(PARENTS, "leaves")
    assert plain.config.label_texts == LABELS


# ---- Model card ----


def test_the_model_card_reports_the_hierarchy_and_the_constraints():
    constraints = [{"labels": ["genetics", "sports"], "at_least": 1}]
    text = build_model_card(model_with(hierarchy="leaves", label_constraints=constraints).config).text
    assert "4 labels have parents" in text and "without ancestors of assigned labels" in text
    assert "- at least 1 of genetics, sports" in text
    assert "Label sets are closed" in build_model_card(model_with(hierarchy="closure").config).text
    plain = build_model_card(model_with(label_parents=None).config).text
    assert "parents" not in plain and "constraints" not in plain


# ---- A run ----


def test_a_run_adds_parents_as_labels_and_its_label_sets_are_closed(monkeypatch, files, tmp_path, capsys):  # noqa: F811
    # "space" and "things" are not labels of the documents.
    parents = write(tmp_path, "parents.csv", "child,parent\nstars,space\nspace,things\nrobots,things\nmoons,space\n")
    constraints = write(tmp_path, "constraints.json", '[{"labels": ["robots", "markets"], "at_most": 1}]')
    out = tmp_path / "out"
    settings = {"label_parents_file": parents, "label_constraints_file": constraints, "num_train_epochs": 3}
    run(monkeypatch, files, out, hierarchy="closure", **settings)
    config = SepMldcForMultiLabelClassification.from_pretrained(out).config
    assert set(config.labels) == {"stars", "robots", "markets", "space", "things"}
    assert config.label_parents == {"stars": ["space"], "space": ["things"], "robots": ["things"]}
    assert config.hierarchy == "closure" and config.label_constraints[0]["at_most"] == 1
    counts = dict(zip(config.labels, config.label_counts))
    assert counts["space"] == counts["stars"] > 0 and counts["things"] > counts["stars"]
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert any("things" in row["gold"] for row in rows) and any(row["assigned"] for row in rows)
    for row in rows:
        for labels in (row["gold"], row["assigned"]):
            assert {name for label in labels for name in config.label_parents.get(label, ())} <= set(labels)
        assert not {"robots", "markets"} <= set(row["assigned"])
    results = json.loads((out / "all_results.json").read_text())
    assert 0 < results["test_hierarchical_f1"] <= 1
    assert "hierarchical_f1" in capsys.readouterr().out
    assert "3 labels have parents" in (out / "README.md").read_text()

    # The same answers from predict.py, and as leaves from the trained checkpoint.
    predict = load_example("predict")
    predict.main(
        [
            "--model_name_or_path",
            str(out),
            "--input_file",
            str(files / "test.jsonl"),
            "--output_file",
            str(tmp_path / "p.jsonl"),
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [{e["label"] for e in line["labels"]} for line in lines] == [set(row["assigned"]) for row in rows]
    run(
        monkeypatch,
        files,
        tmp_path / "leaves",
        model_name_or_path=out,
        do_train=None,
        do_eval=None,
        train_file=None,
        hierarchy="leaves",
    )
    leaves = [json.loads(line) for line in (tmp_path / "leaves" / "predictions.jsonl").read_text().splitlines()]
    shown = [line.removeprefix("  -> ") for line in capsys.readouterr().out.splitlines() if line.startswith("  -> ")]
    assert shown
    for line, row in zip(shown, leaves):
        names = [part.rpartition(" ")[0] for part in line.split(", ")]
        assert names == row["assigned"] or (not row["assigned"] and line.endswith("(below its threshold)"))
    hierarchy = LabelHierarchy(config.labels, config.label_parents)
    for row, reduced in zip(rows, leaves):
        for key in ("assigned", "gold"):
            ids = [config.label2id[name] for name in reduced[key]]
            covered = {config.labels[index] for index in hierarchy.ancestors(ids)}
            assert not covered & set(reduced[key]) and covered | set(reduced[key]) == set(row[key])
    found = json.loads((tmp_path / "leaves" / "all_results.json").read_text())
    for name in ("test_hierarchical_f1", "test_f1_micro", "test_p@1"):
        assert found[name] == pytest.approx(results[name])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hierarchy": "closure"}, "`--hierarchy` is closure, but no label has a parent. Specify parents with"),
        (
            {"label_parents_file": "child,parent\nstars,space\n"},
            "1 parents are not among the 3 labels of the model: 'space'",
        ),
        ({"label_parents_file": "child,parent\nstars,stars\n"}, "makes 'stars' its own parent"),
        (
            {
                "label_parents_file": "child,parent\nstars,space\n",
                "hierarchy": "leaves",
                "threshold_objective": "recall:0.9",
            },
            "`objective` is 'recall:0.9', but its guarantee",
        ),
        (
            {"label_constraints_file": '[{"labels": ["moons"], "at_most": 1}]'},
            "names 'moons', which is not among the 3 labels",
        ),
    ],
)
def test_a_run_with_a_wrong_hierarchy_ends_before_training(monkeypatch, files, tmp_path, changes, message):  # noqa: F811
    for name in ("label_parents_file", "label_constraints_file"):
        if name in changes:
            changes = {
                **changes,
                name: write(tmp_path, name + (".csv" if "parents" in name else ".json"), changes[name]),
            }
    with pytest.raises(ValueError, match=re.escape(message)):
        run(monkeypatch, files, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_label_list_and_hierarchy_must_agree(monkeypatch, files, tmp_path):  # noqa: F811
    parents = write(tmp_path, "parents.csv", "child,parent\nstars,space\n")
    listed = write(tmp_path, "labels.txt", "stars\nrobots\nmarkets\n")
    with pytest.raises(ValueError, match="1 parents are not among the 3 labels of the model: 'space'"):
        run(
            monkeypatch,
            files,
            tmp_path / "out",
            label_parents_file=parents,
            label_list_file=listed,
            hierarchy="closure",
        )
