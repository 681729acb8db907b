"""Planted label errors are found, decisions are kept, and the corrected documents differ only in these."""

import csv
import gzip
import json
import os
import sys
import threading
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_files import jsonl, parquet, write
from datasets import Dataset
from scripts import load_example, run_example
from tiny_models import tiny_backbone, tiny_model, tiny_tokenizer

from trainer import audit_labels, load_documents
from trainer.audit import FindingsFile, apply_findings, fuse_scores, out_of_fold_scores, suspicion
from trainer.audit.files import (
    AuditedFiles,
    default_output_file,
    digest_of_texts,
    read_findings,
    write_findings,
)
from trainer.audit.findings import Finding, chosen_by_cleanlab, multi_hot
from trainer.audit.scores import OutOfFoldScores, assign_folds
from trainer.data.documents import LabeledDocuments


TOPICS = {
    "astronomy": "star stars galaxy data",
    "biology": "cell cells network learning",
    "economics": "market price models data",
    "robotics": "robot robots vision speech",
}
LABELS = sorted(TOPICS)


def documents(count=120, seed=0):
    """Texts of one or two topics with labels to match, and no two alike."""
    rng = np.random.default_rng(seed)
    texts, label_indices = [], []
    for number in range(count):
        chosen = sorted(rng.choice(len(LABELS), size=rng.integers(1, 3), replace=False).tolist())
        words = [word for index in chosen for word in TOPICS[LABELS[index]].split()]
        texts.append(" ".join([f"{number:x}", *rng.choice(words, 14)]))
        label_indices.append(chosen)
    return texts, label_indices


def labeled(texts, label_indices, labels=LABELS, **columns):
    counts = np.bincount([label for ids in label_indices for label in ids], minlength=len(labels)).tolist()
    dataset = Dataset.from_dict({"text": texts, "label_indices": label_indices, **columns})
    return LabeledDocuments(dataset, list(labels), counts)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tiny_backbone(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def audit(encoder, *given, **options):
    return audit_labels(labeled(*given), encoder, use_cpu=True, hide_progress=True, **options)


# ---- Scores ----


def test_folds_keep_near_duplicates_together_and_spread_each_label():
    _, label_indices = documents(200)
    groups = np.arange(200) // 2
    folds = assign_folds(label_indices, groups, len(LABELS), 5, seed=1)
    assert (folds[::2] == folds[1::2]).all()
    labels = multi_hot(label_indices, len(LABELS))
    per_fold = np.stack([labels[folds == fold].sum(axis=0) for fold in range(5)])
    assert (per_fold >= 0.5 * labels.sum(axis=0) / 5).all() and np.ptp(np.bincount(folds)) <= 2
    assert (folds == assign_folds(label_indices, groups, len(LABELS), 5, seed=1)).all()
    assert (folds != assign_folds(label_indices, groups, len(LABELS), 5, seed=2)).any()


def test_documents_without_labels_are_dealt_out_too():
    folds = assign_folds([[], [], [0], [0]], np.arange(4), 1, num_folds=2)
    assert np.bincount(folds).tolist() == [2, 2]


def test_scores_of_a_document_do_not_depend_on_its_own_labels(encoder):
    texts, label_indices = documents(60)
    folds = np.arange(60)  # as groups: no two documents are near-duplicates
    options = {"use_cpu": True, "hide_progress": True, "groups": folds, "num_folds": 2}
    first = out_of_fold_scores(labeled(texts, label_indices), encoder, **options)
    changed = [list(ids) for ids in label_indices]
    # The same labels in another fold change other scores, not its own.
    row = int(np.flatnonzero(first.folds == 0)[0])
    changed[row] = sorted(set(range(len(LABELS))) - set(label_indices[row]))
    import trainer.audit.scores as scores

    original = scores.assign_folds
    scores.assign_folds = lambda *_, **__: first.folds
    try:
        second = out_of_fold_scores(labeled(texts, changed), encoder, **options)
    finally:
        scores.assign_folds = original
    of_own_fold = first.folds == 0
    for name in ("encoder", "lexical"):
        np.testing.assert_allclose(getattr(first, name)[of_own_fold], getattr(second, name)[of_own_fold], atol=1e-5)
        assert np.abs(getattr(first, name)[~of_own_fold] - getattr(second, name)[~of_own_fold]).max() > 1e-3


def test_fused_probabilities_follow_the_better_scores_and_stay_out_of_fold():
    rng = np.random.default_rng(0)
    labels = rng.random((300, 6)) < 0.3
    good = (labels * 4.0 - 2.0 + rng.normal(size=labels.shape)).astype(np.float32)
    noise = rng.normal(size=labels.shape).astype(np.float32)
    folds = np.arange(300) % 5
    found = fuse_scores(OutOfFoldScores(good, noise, folds), labels)
    assert np.corrcoef(found.ravel(), labels.ravel())[0, 1] > 0.8
    flipped = labels.copy()
    flipped[folds == 0] = ~flipped[folds == 0]
    again = fuse_scores(OutOfFoldScores(good, noise, folds), flipped)
    np.testing.assert_allclose(found[folds == 0], again[folds == 0], atol=1e-6)


def test_suspicion_weighs_wrong_and_missing_labels_by_how_many_labels_there_are():
    labels = np.zeros((10, 10), dtype=bool)
    labels[0, 0] = labels[1, 1] = True  # 2 of 100 pairs
    probabilities = np.full((10, 10), 0.02)
    probabilities[2, 2] = 0.98
    found = suspicion(probabilities, labels)
    # A given label with the probability of any label is practically undecided.
    assert found[0, 0] == pytest.approx(0.5) and found[2, 2] == pytest.approx(0.98) and found[3, 3] < 0.03


def test_cleanlab_is_asked_label_by_label_in_parts(monkeypatch):
    import trainer.audit.findings as findings

    texts, label_indices = documents(80)
    labels = multi_hot(label_indices, len(LABELS))
    probabilities = np.where(labels, 0.9, 0.1)
    probabilities[3] = 1 - probabilities[3]
    whole = chosen_by_cleanlab(label_indices, probabilities, hide_progress=True)
    monkeypatch.setattr(findings, "LABELS_PER_STEP", 1)
    assert (chosen_by_cleanlab(label_indices, probabilities, hide_progress=True) == whole).all()
    assert whole[3].all() and whole.sum() == len(LABELS)


# ---- Findings ----


def test_planted_errors_are_the_first_findings(encoder):
    texts, label_indices = documents(150)
    damaged = [list(ids) for ids in label_indices]
    planted = set()
    for row in (7, 31, 88):
        wrong = next(index for index in range(len(LABELS)) if index not in label_indices[row])
        damaged[row] = sorted([*label_indices[row], wrong])
        planted.add((row + 1, "remove", LABELS[wrong]))
    for row in [row for row, ids in enumerate(label_indices) if len(ids) == 2][:3]:
        damaged[row] = label_indices[row][:1]
        planted.add((row + 1, "add", LABELS[label_indices[row][1]]))
    found = audit(encoder, texts, damaged)
    first = {(finding.row, finding.change, finding.label) for finding in found.findings[:6]}
    assert len(first & planted) >= 5
    assert [finding.number for finding in found.findings] == list(range(1, len(found.findings) + 1))
    scores = [finding.score for finding in found.findings if finding.row]
    assert scores == sorted(scores, reverse=True) and 0 <= min(scores) <= max(scores) <= 1
    page = str(found)
    assert "150 documents, 4 labels" in page and "wrong label" in page and len(page.splitlines()) < 60


def test_a_document_that_differs_from_its_near_duplicates_is_listed(encoder):
    texts, label_indices = documents(60)
    long = " ".join(f"word{number}" for number in range(60))
    texts += [f"{long} one", f"{long} two", f"{long} three"]
    label_indices += [[0, 1], [0, 1], [0, 2]]
    found = audit(encoder, texts, label_indices, num_folds=2)
    of_duplicates = {(f.row, f.change, f.label) for f in found.findings if f.kind == "near-duplicates"}
    assert of_duplicates == {(63, "add", LABELS[1]), (63, "remove", LABELS[2])}
    reason = next(f.reason for f in found.findings if f.kind == "near-duplicates" and f.change == "add")
    assert reason.startswith("2 of 3 documents that are nearly the same have it: row 61, 62")


def test_labels_that_always_occur_together_and_rare_labels_are_listed(encoder):
    texts, label_indices = documents(60)
    labels = [*LABELS, "twin", "unique", "zoology"]
    label_indices = [ids + ([4] if 0 in ids else []) for ids in label_indices]
    label_indices[0] = [*label_indices[0], 5]
    label_indices[1], label_indices[2] = [*label_indices[1], 6], [*label_indices[2], 6]
    found = audit(encoder, texts, label_indices, labels, num_folds=2)
    together = [f for f in found.findings if f.kind == "always together"]
    assert [(f.label, f.change, f.score, f.row) for f in together] == [("twin", "drop", 1.0, None)]
    assert "'astronomy'" in together[0].reason
    rare = [f for f in found.findings if f.kind == "too rare"]
    assert [(f.label, f.score) for f in rare] == [("unique", 0.8), ("zoology", 0.6)]
    assert rare[0].reason.startswith("1 document has it, and 5 are needed")
    # A label without enough documents is not called wrong.
    assert not [f for f in found.findings if f.kind == "wrong label" and f.label in ("unique", "zoology")]


def test_the_number_of_findings_about_documents_is_limited(encoder):
    texts, label_indices = documents(60)
    rng = np.random.default_rng(0)
    label_indices = [sorted(rng.choice(4, 2, replace=False).tolist()) for _ in label_indices]
    found = audit(encoder, texts, label_indices, max_findings=3, num_folds=2)
    assert len([f for f in found.findings if f.row]) == 3 < found.num_suspicious
    assert f"The first 3 of {found.num_suspicious} suspicious assignments are listed" in str(found)


@pytest.mark.parametrize(
    "count, options, message",
    [
        (3, {}, "There are 3 documents, but 5 folds need as many"),
        (20, {"num_folds": 1}, "`num_folds` is 1, but at least 2"),
        (20, {"max_findings": 0}, "`max_findings` is 0, but it must be at least 1"),
        (20, {"min_documents": 0}, "`min_documents` is 0, but it must be at least 1"),
    ],
)
def test_impossible_numbers_are_refused(encoder, count, options, message):
    with pytest.raises(ValueError, match=message):
        audit(encoder, *documents(count), **options)


def test_scores_that_do_not_fit_into_memory_are_refused_before_any_work(encoder, monkeypatch):
    import trainer.audit.scores as scores

    monkeypatch.setattr(scores, "available_memory", lambda *_: 1000)
    with pytest.raises(ValueError, match="The scores of 60 documents and 4 labels need .* of memory"):
        audit(encoder, *documents(60))


def test_one_label_alone_a_missing_encoder_and_a_trained_model_are_refused(encoder, tmp_path):
    texts, _ = documents(20)
    with pytest.raises(ValueError, match="There is 1 label, but an audit needs at least 2"):
        audit(encoder, texts, [[0]] * 20, ["a"])
    with pytest.raises(ValueError, match="There is no folder"):
        audit(str(tmp_path / "nothing"), *documents(20))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        audit(str(tmp_path / "empty"), *documents(20))
    tiny_model().save_pretrained(tmp_path / "trained")
    tiny_tokenizer().save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="is a trained SEP-MLDC model"):
        audit(str(tmp_path / "trained"), *documents(20))


def test_without_cleanlab_the_error_says_what_to_install(encoder, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "cleanlab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(ImportError, match=r'pip install "sep-mldc\[audit\]"'):
        audit(encoder, *documents(20))


# ---- Files ----


FINDINGS = [
    Finding(1, "wrong label", "remove", "a", 0.99, "a reason", row=1, id="d1", text="=SUM(A1), with; marks"),
    Finding(2, "missing label", "add", "=b", 0.9, "a reason", row=2, text='"quoted"\ttab'),
    Finding(3, "always together", "drop", "c", 1.0, "a reason"),
]
RECORDS = [
    {"text": "first", "labels": ["a", "c"], "extra": {"x": 1}},
    {"text": "second", "labels": ["a"], "extra": None},
    {"text": "third", "labels": ["=b", "c"], "extra": [1, 2]},
]


def source_of(path, texts=("first", "second", "third"), **columns):
    columns = {"text_columns": ["text"], "label_column": "labels", **columns}
    return AuditedFiles([str(path)], texts=digest_of_texts(texts), **columns)


def write_all(tmp_path, path, findings=FINDINGS, decisions=("accept", "accept", "accept"), **columns):
    findings = [replace(f, decision=d) for f, d in zip(findings, decisions)]
    write_findings(tmp_path / "findings.csv", findings, source_of(path, **columns))
    return tmp_path / "findings.csv"


def test_findings_are_read_as_they_were_written(tmp_path):
    path = write_all(tmp_path, "x.jsonl", decisions=("accept", "reject", ""))
    read = read_findings(path)
    assert read == [replace(f, decision=d) for f, d in zip(FINDINGS, ("accept", "reject", ""))]
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[2][3] == "'=b" and rows[1][8].startswith("'=SUM"), "a spreadsheet runs no formula"
    write_findings(path, read, source_of("x.jsonl"))
    assert read_findings(path) == read


def test_findings_are_read_as_a_spreadsheet_with_semicolons_saves_them(tmp_path):
    path = write_all(tmp_path, "x.jsonl", decisions=("", "", ""))
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[1][-1], rows[2][-1], rows[1][4] = "Accept ", "N", "0,99"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    assert [(f.decision, f.score) for f in read_findings(path)] == [("accept", 0.99), ("reject", 0.9), ("", 1.0)]


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("decision", "maybe", "line 2: `decision` is 'maybe', but it must be 'accept', 'reject' or nothing"),
        ("kind", "odd", "line 2: `kind` is 'odd', but it must be 'wrong label'"),
        ("change", "swap", "line 2: `change` is 'swap', but it must be 'remove', 'add', 'drop'"),
        ("row", "", "line 2: `row` is '' and `change` 'remove', but a row from 1 belongs"),
        ("row", "x", "line 2: .*`row` 'x'.* must be numbers"),
        ("score", "high", "line 2: .*`score` 'high', but they must be numbers"),
    ],
)
def test_a_bad_value_in_the_findings_is_reported_with_its_line(tmp_path, column, value, message):
    path = write_all(tmp_path, "x.jsonl")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[1][rows[0].index(column)] = value
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(ValueError, match=message):
        read_findings(path)


def test_other_files_are_not_taken_for_findings(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'number'"):
        read_findings(tmp_path / "table.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_findings(tmp_path / "empty.csv")
    with pytest.raises(ValueError, match="Name it findings.csv"):
        read_findings(tmp_path / "findings.txt")
    with pytest.raises(FileNotFoundError):
        FindingsFile(tmp_path / "nothing.csv")


def test_a_decision_is_on_the_disk_when_decide_returns_and_changes_nothing_else(tmp_path):
    path = write_all(tmp_path, "x.jsonl", decisions=("", "", ""))
    store = FindingsFile(path)
    store.decide(2, "reject")
    assert read_findings(path) == [FINDINGS[0], replace(FINDINGS[1], decision="reject"), FINDINGS[2]]
    store.decide(2, "")
    assert read_findings(path) == FINDINGS
    with pytest.raises(ValueError, match="has no finding 9"):
        store.decide(9, "accept")
    with pytest.raises(ValueError, match="`decision` is 'maybe'"):
        store.decide(1, "maybe")


def test_decisions_of_many_threads_and_of_another_program_are_all_kept(tmp_path):
    findings = [replace(FINDINGS[0], number=number, row=number) for number in range(1, 31)]
    path = write_all(tmp_path, "x.jsonl", findings, [""] * 30)
    store = FindingsFile(path)
    threads = [threading.Thread(target=store.decide, args=(number, "accept")) for number in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    FindingsFile(path).decide(25, "reject")  # as if by a spreadsheet
    store.decide(26, "accept")
    decisions = {f.number: f.decision for f in read_findings(path) if f.decision}
    assert decisions == {**dict.fromkeys([*range(1, 21), 26], "accept"), 25: "reject"}


def test_a_disk_that_cannot_be_written_leaves_the_findings_unchanged(tmp_path, monkeypatch):
    path = write_all(tmp_path, "x.jsonl", decisions=("", "", ""))
    store = FindingsFile(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.decide(1, "accept")
    assert path.read_bytes() == before and store.read()[0].decision == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["findings.csv", "findings.json"]


# ---- Corrected documents ----


CORRECTED = [[], ["a", "=b"], ["=b"]]


def test_corrected_jsonl_differs_in_the_labels_only(tmp_path):
    path = write_all(tmp_path, write(tmp_path / "train.jsonl", jsonl(RECORDS)))
    counts = apply_findings(path, tmp_path / "out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [{**record, "labels": labels} for record, labels in zip(RECORDS, CORRECTED)]
    assert counts == {"documents": 3, "changed": 3, "remove": 1, "add": 1, "drop": 1}
    assert default_output_file(path) == str(tmp_path / "findings.corrected.jsonl")


def test_only_accepted_findings_are_applied(tmp_path):
    path = write_all(tmp_path, write(tmp_path / "train.jsonl", jsonl(RECORDS)), decisions=("reject", "", "reject"))
    assert apply_findings(path, tmp_path / "out.jsonl.gz")["changed"] == 0
    with gzip.open(tmp_path / "out.jsonl.gz", "rt") as file:
        assert [json.loads(line) for line in file] == RECORDS


def test_rows_that_the_audit_left_out_are_left_out_of_the_corrected_documents(tmp_path):
    rows = [RECORDS[0], {"text": " ", "labels": ["a"]}, *RECORDS[1:]]
    files = write(tmp_path / "train.jsonl", jsonl(rows))
    path = write_all(tmp_path, files, on_bad_rows="skip")
    assert apply_findings(path, tmp_path / "out.jsonl")["documents"] == 3
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["labels"] for record in written] == CORRECTED
    path = write_all(tmp_path, files)
    with pytest.raises(ValueError, match="line 2.*--on_bad_rows skip` of run_mldc.py and audit_labels.py"):
        apply_findings(path, tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize("form", ["joined", "printed", "columns", "parquet", "several files"])
def test_labels_keep_the_form_in_which_the_documents_had_them(tmp_path, form):
    texts = ["first", "second", "third"]
    columns, files, output = {}, None, tmp_path / "out.csv"
    if form == "joined":
        rows = [["text", "labels", "n"], *([t, ";".join(r["labels"]), "007"] for t, r in zip(texts, RECORDS))]
        columns, ending = {"label_delimiter": ";"}, ".csv"
    elif form == "printed":
        rows = [["text", "labels", "n"], *([t, str(r["labels"]), "007"] for t, r in zip(texts, RECORDS))]
        ending = ".csv"
    elif form == "columns":
        names = ["a", "=b", "c"]
        rows = [["text", *names], *([t, *(int(n in r["labels"]) for n in names)] for t, r in zip(texts, RECORDS))]
        columns, ending = {"label_column": names}, ".csv"
    elif form == "parquet":
        files = write(
            tmp_path / "train.parquet", parquet([{"text": r["text"], "labels": r["labels"]} for r in RECORDS])
        )
        output = tmp_path / "out.parquet"
    else:
        files = str(tmp_path / "part-*.jsonl")
        for number, record in enumerate(RECORDS):
            write(tmp_path / f"part-{number}.jsonl", jsonl([record]))
        output = tmp_path / "out.jsonl"
    if files is None:
        files = str(tmp_path / f"train{ending}")
        with open(files, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    apply_findings(write_all(tmp_path, files, **columns), output)
    keywords = {name: columns[name] for name in columns}
    read = load_documents(str(output), cache_dir=str(tmp_path / "cache"), **keywords)
    found = [{read.labels[index] for index in ids} for ids in read.dataset["label_indices"]]
    assert found == [set(labels) for labels in CORRECTED] and read.dataset["text"][:] == texts
    if form in ("joined", "printed"):
        with open(output, newline="", encoding="utf-8") as file:
            written = list(csv.reader(file))
        assert [row[2] for row in written] == ["n", "007", "007", "007"]
        assert written[1][1] == ("" if form == "joined" else "[]")
    if form == "parquet":
        assert pq.read_table(output).column_names == ["text", "labels"]


def test_documents_that_changed_since_the_audit_are_not_corrected(tmp_path):
    train = write(tmp_path / "train.jsonl", jsonl(RECORDS))
    path = write_all(tmp_path, train)
    write(tmp_path / "train.jsonl", jsonl([RECORDS[1], RECORDS[0], RECORDS[2]]))
    with pytest.raises(ValueError, match="the documents are not those that were audited"):
        apply_findings(path, tmp_path / "out.jsonl")
    write(tmp_path / "train.jsonl", jsonl(RECORDS[:1]))
    with pytest.raises(ValueError, match="the documents are not those that were audited"):
        apply_findings(path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "output, message",
    [
        ("train.jsonl", "which is read for the corrections"),
        ("findings.csv", "which is read for the corrections"),
        ("out.xlsx", "corrected documents are written as .jsonl, .csv, .tsv, .parquet"),
        ("out.parquet.gz", "corrected documents are written as"),
    ],
)
def test_an_output_that_would_lose_something_is_refused(tmp_path, output, message):
    path = write_all(tmp_path, write(tmp_path / "train.jsonl", jsonl(RECORDS)))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        apply_findings(path, tmp_path / output)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_findings_without_their_description_are_not_applied(tmp_path):
    path = write_all(tmp_path, write(tmp_path / "train.jsonl", jsonl(RECORDS)))
    (tmp_path / "findings.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="does not say which documents"):
        apply_findings(path, tmp_path / "out.jsonl")
    (tmp_path / "findings.json").unlink()
    with pytest.raises(FileNotFoundError, match="says which documents the findings in findings.csv are about"):
        apply_findings(path, tmp_path / "out.jsonl")


# ---- The command ----


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["audit_labels.py", *map(str, arguments)])
    load_example("audit_labels").main()


def test_the_command_audits_and_applies(encoder, tmp_path, monkeypatch, capsys):
    texts, label_indices = documents(60)
    for row in (4, 20, 33):
        label_indices[row] = sorted(set(range(len(LABELS))) - set(label_indices[row]))
    with open(tmp_path / "train.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "title", "body", "tags"])
        for number, (text, ids) in enumerate(zip(texts, label_indices)):
            rows.writerow([f"k{number}", "title", text, ";".join(LABELS[i] for i in ids)])
        rows.writerow(["no document", "", "", LABELS[0]])
    monkeypatch.chdir(tmp_path)
    columns = ["--text_columns", "title", "body", "--label_column", "tags", "--label_delimiter", ";"]
    columns += ["--on_bad_rows", "skip"]
    audit = ["--train_file", "train.csv", *columns, "--id_column", "key", "--model_name_or_path", encoder, "--use_cpu"]
    run(monkeypatch, *audit)
    printed = capsys.readouterr().out
    assert "60 documents, 4 labels" in printed and "findings.csv lists" in printed
    findings = read_findings("findings.csv")
    assert findings and all(f.id == f"k{f.row - 1}" and f.text.startswith("title ") for f in findings if f.row)
    with pytest.raises(ValueError, match="findings.csv exists, perhaps with decisions"):
        run(monkeypatch, *audit)
    first = findings[0]
    FindingsFile("findings.csv").decide(first.number, "accept")
    run(monkeypatch, "--apply", "findings.csv")
    assert "60 documents, 1 of them changed" in capsys.readouterr().out
    with open("findings.corrected.csv", newline="", encoding="utf-8") as file:
        changed = list(csv.DictReader(file))
    before = {LABELS[i] for i in label_indices[first.row - 1]}
    after = {name for name in changed[first.row - 1]["tags"].split(";") if name}
    assert before ^ after == {first.label} and [row["key"] for row in changed] == [f"k{n}" for n in range(60)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "`--train_file` is not given"),
        (["--train_file", "nothing.csv"], "`--model_name_or_path` is not given"),
        (["--train_file", "nothing.csv", "--model_name_or_path", "x"], "nothing.csv"),
        (["--train_file", "a.csv", "--model_name_or_path", "x", "--findings_file", "f.xlsx"], "Name it findings.csv"),
        (["--apply", "nothing.csv"], "nothing.json"),
    ],
)
def test_bad_input_of_the_command_is_a_one_sentence_error(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_example("audit_labels", *arguments)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, findings, more", [("train.csv", "train.csv", ["--overwrite"]), ("train.json", "train.csv", [])]
)
def test_findings_are_never_written_over_the_audited_documents(name, findings, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("kept")
    done = run_example(
        "audit_labels", "--train_file", name, "--model_name_or_path", "x", "--findings_file", findings, *more
    )
    assert done.returncode == 2 and f"would overwrite '{name}'" in done.stderr
    with pytest.raises(ValueError, match=f"would overwrite '{name}'"):
        write_findings(findings, [], AuditedFiles([str(tmp_path / name)], ["text"], "labels"))
    assert (tmp_path / name).read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_the_description_of_findings_replaces_no_other_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("text,labels\na,b\n")
    (tmp_path / "findings.json").write_text("kept")
    done = run_example("audit_labels", "--train_file", "train.csv", "--model_name_or_path", "x")
    assert done.returncode == 2 and "findings.json exists" in done.stderr
    assert (tmp_path / "findings.json").read_text() == "kept"
