"""Label files: only labels are accepted as labels, and names are the same as in training."""

import json
import unicodedata

import pytest
from augmentation_server import ChatServer, rows, settings, write_rows
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from augmentation import AugmentationError, describe_labels
from augmentation.cli import main
from augmentation.files import read_documents, read_label_descriptions, read_labels


def labels_of(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8") if isinstance(content, str) else path.write_bytes(content)
    return read_labels(path)


TRAINING_TABLES = {
    "titles.csv": "title,text\nA survey,We survey.\nA method,We propose.\n",
    "titles.tsv": "title\ttext\nA survey\tWe survey.\n",
    "kaggle.csv": "id,comment_text,toxic,obscene\n1,Some words,0,1\n",
    "one_column.csv": "topic\nphysics\n",
    "no_header.csv": "A survey,a; b\nA method,c\n",
    "joined.csv": "text,labels\nWe survey.,a; b\n",
    "train.jsonl": '{"title": "A survey", "text": "We survey."}\n',
    "multi.jsonl": '{"text": "We survey.", "physics": 1, "maths": 0}\n',
    "scores.jsonl": '{"labels": [{"label": "a", "score": 0.5}]}\n',
    "numbers.jsonl": '{"text": "We survey.", "labels": [3, 4]}\n',
    "record.json": '{"text": "We survey.", "labels": ["a"]}',
    "records.json": '[{"title": "A survey", "text": "We survey."}]',
    "joined.json": '{"text": "We survey.", "labels": "a; b"}',
    "dataset.json": '{"version": "1.0", "data": [{"text": "We survey."}]}',
    "nested.json": '[["a", "b"]]',
    "ids.json": '{"label2id": {"a": 0}}',
    "records.txt": '{"text": "We survey.", "labels": ["a"]}\n',
    "lists.txt": '["a", "b"]\n',
    "fasttext.txt": "__label__a We survey.\n",
    "table.txt": "text\tlabel\nWe survey.\ta\n",
    "documents.txt": "We survey. " * 40 + "\n",
    "unknown": "a\nb\n",
    "labels.xlsx": b"PK\x03\x04",
    "labels.doc": "a\n",
    "long.csv": "label\n" + "x" * 200_000 + "\n",
    "latin.txt": "caf\xe9\n".encode("latin-1"),
}


@pytest.mark.parametrize("name", TRAINING_TABLES)
def test_a_file_without_labels_is_refused_before_anything_is_sent(tmp_path, capsys, name):
    with pytest.raises(AugmentationError, match=name):
        labels_of(tmp_path, name, TRAINING_TABLES[name])
    with ChatServer() as server:
        command = ["describe-labels", str(tmp_path / name), "--model", "m", "--base-url", server.base_url]
        assert main([*command, "--output-dir", str(tmp_path)]) == 1
        assert not server.requests
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "name,content",
    [
        ("train.csv", 'text,labels\nWe survey.,"[""b"", ""a""]"\nWe prove.,"[""a""]"\n'),
        ("train.csv", "text,labels\nWe survey.,\"['b', 'a']\"\n"),
        ("train.tsv", 'text\tlabels\nWe survey.\t["b", "a"]\n'),
        ("train.jsonl", '{"text": "We survey.", "labels": ["b", " a "]}\n{"text": "x", "labels": ["a"]}\n'),
        ("train.jsonl", '{"text": "We survey.", "labels": "[\'b\', \'a\']"}\n'),
        ("train.csv", "text,label\nWe survey.,\"['b', 'a']\"\n"),
        ("train.json", '[{"text": "We survey.", "labels": ["b", "a"]}]'),
        ("labels.tsv", "label\tdescription\na\t\nb\t\n"),
        ("labels.csv", "id,label\n1,a\n2,b\n3, a\n"),
        ("labels.json", '[{"label": "a"}, {"label": "b"}]'),
        ("labels.json", '{"a": null, "b": ""}'),
        ("labels.txt", "\ufeff a \r\n\r\nb\r\na\r\n"),
        ("LABELS.TXT", "a\nb\n"),
    ],
)
def test_labels_are_found_in_training_files_and_tables(tmp_path, name, content):
    assert labels_of(tmp_path, name, content) == {"a": "", "b": ""}


def test_joined_labels_need_their_separator(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,labels\nWe survey.,b; a\nWe prove.,a\n")
    with pytest.raises(AugmentationError, match="`labels` is 'b; a'.*`label_delimiter`"):
        read_labels(path)
    assert list(read_labels(path, ";")) == ["a", "b"]
    with ChatServer() as server:
        command = [
            "describe-labels",
            str(path),
            "--label-delimiter",
            ";",
            "--model",
            "m",
            "--output-dir",
            str(tmp_path),
        ]
        assert main([*command, "--base-url", server.base_url, "--quiet"]) == 0
    assert [row["label"] for row in rows(tmp_path / "label_descriptions.jsonl")] == ["a", "b"]


def test_blanks_and_unicode_forms_make_no_second_label(tmp_path):
    name = "économie"
    forms = [name, f" {name}\t", unicodedata.normalize("NFD", name)]
    path = write_rows(tmp_path / "t.jsonl", [{"text": "x", "labels": [form]} for form in forms])
    assert list(read_labels(path)) == [name]
    assert {document.labels for document in read_documents(path)} == {(name,)}
    described = write_rows(tmp_path / "d.jsonl", [{"label": forms[2], "description": "money"}])
    assert read_label_descriptions(described) == {name: "money"}
    with ChatServer() as server:
        assert describe_labels(forms, tmp_path, settings(server)).total == 1


def test_a_line_break_in_a_note_stays_one(tmp_path):
    assert labels_of(tmp_path, "l.csv", 'label,description\na,"first line\nsecond line"\n') == {
        "a": "first line\nsecond line"
    }


def test_notes_are_read_with_names(tmp_path):
    content = '{"a": {"name": "A", "description": "first"}, "b": "second", "c": {"name": "C"}}'
    assert labels_of(tmp_path, "l.json", content) == {"a": "A. first", "b": "second", "c": "C"}


@pytest.mark.parametrize("labels", [[], {}, [""], ["a", None], [3], ["x" * 301]])
def test_invalid_label_names_are_refused(tmp_path, labels):
    with ChatServer() as server, pytest.raises(AugmentationError, match="`labels`"):
        describe_labels(labels, tmp_path, settings(server))


def test_an_output_never_replaces_an_input(tmp_path):
    path = write_rows(tmp_path / "label_descriptions.jsonl", [{"label": "a", "description": "what the makers say"}])
    before = path.read_bytes()
    with ChatServer() as server:
        with pytest.raises(AugmentationError, match="would be read and replaced"):
            describe_labels(path, tmp_path, settings(server))
        assert not server.requests and path.read_bytes() == before
        assert describe_labels(path, tmp_path / "out", settings(server)).done == 1


@given(
    name=st.sampled_from(["l.txt", "l.csv", "l.tsv", "l.json", "l.jsonl", "l.jsonl.gz", "l.parquet"]),
    content=st.one_of(
        st.binary(max_size=80),
        st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=8)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(st.sampled_from(["label", "labels", "description", "text", "x"]), inner, max_size=3),
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
        st.just(b"[" * 50_000),
        st.just(b'{"label": ' + b"9" * 5000 + b"}"),
    ),
)
@hypothesis_settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_label_file_gives_label_names_or_a_one_sentence_error(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_labels, read_documents, read_label_descriptions):
        try:
            found = read(path)
        except AugmentationError as problem:
            assert name in str(problem) and "\n" not in str(problem)
        else:
            assert read is read_documents or all(label and label == label.strip() for label in found)
