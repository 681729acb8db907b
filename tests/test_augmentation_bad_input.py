"""Bad input ends in one sentence that names the value, the rule and the remedy, before anything is sent."""

import gzip
import json
import os

import pytest
from aiohttp import web
from augmentation_server import ChatServer, completion, document, rows, settings, write_rows

from augmentation import (
    AugmentationError,
    PseudoDocumentOptions,
    RequestSettings,
    describe_labels,
    write_pseudo_documents,
)
from augmentation.cli import main
from augmentation.files import read_documents, read_label_descriptions, read_labels
from augmentation.writing import replace_atomically


@pytest.mark.parametrize(
    "content,words",
    [
        (b'{"text": "caf\xe9", "labels": []}\n', "line 1: byte 0xe9 is not UTF-8.*iconv"),
        (b'{"text": "a", "labels": ["x"]}\n{"text": \n', "line 2: not valid JSON"),
        (b'["a"]\n', "line 1: .* is not a JSON object"),
        (b'{"text": 3, "labels": ["x"]}\n', "line 1: `text` is 3"),
        (b'{"text": "a", "labels": "x"}\n', "line 1: `labels` is 'x'.*a list of label names"),
        (b'{"text": "a"}\n', "`labels` is None"),
    ],
)
def test_a_bad_train_file_is_reported_with_its_line(tmp_path, content, words):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(AugmentationError, match=words):
        read_documents(path)


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("l.txt", "\n \n", "contains no label"),
        ("l.json", '{"a": ', "l.json, line 1: not valid JSON"),
        ("l.json", "3", "JSON int of a different structure, but labels must be a list"),
        ("l.jsonl", '{"name": "a"}\n', "columns are 'name', but labels are read from a column `label`"),
        ("l.csv", "", "contains no label"),
    ],
)
def test_a_bad_label_file_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(AugmentationError, match=words):
        read_labels(tmp_path / name)


def test_files_that_are_missing_or_damaged_are_reported(tmp_path):
    with pytest.raises(AugmentationError, match="missing.jsonl: no such file"):
        read_documents(tmp_path / "missing.jsonl")
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a", "labels": []}\n' * 50)[:-10])
    with pytest.raises(AugmentationError, match="t.jsonl.gz: cannot be decompressed"):
        read_documents(tmp_path / "t.jsonl.gz")
    path = write_rows(tmp_path / "e.jsonl", [{"label": "a", "description": "x"}, {"label": "a", "description": "y"}])
    with pytest.raises(AugmentationError, match="line 2: label 'a' is described a second time"):
        read_label_descriptions(path)
    with pytest.raises(AugmentationError, match="line 1: `description`"):
        read_label_descriptions(write_rows(tmp_path / "e.jsonl", [{"label": "a"}]))


def test_an_empty_document_is_never_a_demonstration(tmp_path):
    train = write_rows(tmp_path / "t.jsonl", [{"text": " ", "labels": ["rare"]}, document(1, ["rare"])])
    with ChatServer() as server:
        summary = write_pseudo_documents(train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=3))
    assert {row["demonstration_id"] for row in rows(tmp_path / "pseudo_documents.jsonl")} == {"d1"}
    assert any("1 training documents of tail labels are without text" in note for note in summary.notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_before_anything_is_sent(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with ChatServer() as server, pytest.raises(AugmentationError, match="output folder .* cannot be written"):
        describe_labels(["a"], tmp_path / "locked", settings(server))
    assert not server.requests


def test_an_output_folder_that_is_a_file_is_refused_before_anything_is_sent(tmp_path):
    (tmp_path / "file").write_text("")
    with ChatServer() as server, pytest.raises(AugmentationError, match="output folder .*output_dir"):
        describe_labels(["a"], tmp_path / "file", settings(server))
    assert not server.requests


def test_an_output_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), replace_atomically(path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize(
    "options,words",
    [
        ({"concurrency": 0}, "`concurrency` is 0"),
        ({"requests_per_minute": -1}, "`requests_per_minute` is -1"),
        ({"base_url": "localhost:8000"}, "must begin with http"),
        ({"base_url": "http://me:secret@localhost/v1"}, "`base_url` contains a user name.*OPENAI_API_KEY"),
        ({"structured_output": "xml"}, "'xml', but must be auto"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(AugmentationError, match=words):
        RequestSettings("m", **options)


def test_a_missing_key_is_refused_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(AugmentationError, match="OPENAI_API_KEY is empty.*base_url"):
        describe_labels(["a"], tmp_path, RequestSettings("gpt-4o"))


@pytest.mark.parametrize("content", ["[]", '{"models": {"m": {"input": "x", "output": 1}}}', "no json"])
def test_a_bad_price_file_is_refused(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with ChatServer() as server, pytest.raises(AugmentationError, match="price file .* is malformed"):
        describe_labels(["a"], tmp_path, settings(server, prices=tmp_path / "p.json"))


def test_the_command_line_prints_one_sentence_and_no_traceback(tmp_path, capsys):
    assert (
        main(["describe-labels", str(tmp_path / "none.txt"), "--model", "m", "--base-url", "http://127.0.0.1:9/v1"])
        == 1
    )
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and "Traceback" not in shown


def test_a_label_set_with_odd_names_goes_through(tmp_path):
    labels = ['say "hi"', "{{ x }}", "a\\b", "naïve ☃", "<|im_end|>", "[x](y)"]
    with ChatServer() as server:
        describe_labels(labels, tmp_path, settings(server))
        train = write_rows(tmp_path / "t.jsonl", [document(i, [label]) for i, label in enumerate(labels)])
        options = PseudoDocumentOptions(per_label=1)
        write_pseudo_documents(
            train, tmp_path, settings(server), tmp_path / "label_descriptions.jsonl", options=options
        )
    assert [row["label"] for row in rows(tmp_path / "label_descriptions.jsonl")] == labels
    assert sorted(row["tail_label"] for row in rows(tmp_path / "pseudo_documents.jsonl")) == sorted(labels)


def test_an_answer_with_broken_unicode_is_stored_and_cleaned(tmp_path):
    async def surrogate(body, attempt, request):
        return web.Response(
            body=json.dumps(
                completion('{"description": "Half a pair \\ud83d in \\u0000 words of a sentence."}', body)
            ).encode(),
            content_type="application/json",
        )

    async def plain(body, attempt, request):
        return web.json_response(completion("Half a pair \ud83d in plain words of a sentence.", body))

    for name, answer in (("json", surrogate), ("plain", plain)):
        with ChatServer(answer) as server:
            for _ in range(2):
                assert describe_labels(["a"], tmp_path / name, settings(server)).done == 1
            assert len(server.requests) == 1
        text = rows(tmp_path / name / "label_descriptions.jsonl")[0]["description"]
        assert text.startswith("Half a pair") and text.encode()


def test_an_endpoint_that_counts_no_tokens_is_charged_by_estimate(tmp_path):
    async def uncounted(body, attempt, request):
        answer = completion("A sentence about documents.", body)
        del answer["usage"]
        return web.json_response(answer)

    with ChatServer(uncounted) as server:
        summary = describe_labels(["a"], tmp_path, settings(server))
    assert summary.prompt_tokens > 50 and summary.completion_tokens == 5 and summary.cost > 0


def test_documents_that_share_an_id_stay_apart(tmp_path):
    items = [{"id": "same", "text": f"{word} " * 30, "labels": ["rare"]} for word in ("alpha", "beta")]
    train = write_rows(tmp_path / "t.jsonl", items)
    with ChatServer() as server:
        write_pseudo_documents(train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=2))
        prompts = [body["messages"][1]["content"] for body in server.requests]
    assert sum("alpha alpha" in prompt for prompt in prompts) == sum("beta beta" in prompt for prompt in prompts) == 1


def test_a_run_without_a_tail_label_says_so(tmp_path):
    train = write_rows(tmp_path / "t.jsonl", [document(i, ["big"]) for i in range(60)])
    with ChatServer() as server:
        summary = write_pseudo_documents(train, tmp_path, settings(server))
    assert summary.total == 0 and any("no tail label" in note for note in summary.notes)
