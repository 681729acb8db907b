"""Standard streams that are closed or full, and outputs that are not files."""

import json
import os
import subprocess
import sys

import pytest
from augmentation_server import ChatServer, document, rows, settings, write_rows
from scripts import CLOSED, EXAMPLES, run_forked

from augmentation import AugmentationError, describe_labels, export_sft, report, review
from augmentation.cli import main
from augmentation.journal import Journal


@pytest.fixture
def server():
    with ChatServer() as running:
        yield running


@pytest.fixture
def command(server, tmp_path, monkeypatch):
    """Runs a command in the test's folder, in a process with other standard streams: exit code and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words, **streams):
        words += ("--model", "m", "--base-url", server.base_url, "--output-dir", "o")
        return run_forked(lambda: sys.exit(main(list(map(str, words)))), folder=tmp_path, **streams)

    return run


@pytest.mark.parametrize("closed", [["stderr"], ["stdin", "stdout", "stderr"]])
def test_a_closed_standard_stream_changes_no_file(command, tmp_path, closed):
    (tmp_path / "l.txt").write_text("a\nb\n")
    code, message = command("describe-labels", "l.txt", **dict.fromkeys(closed, CLOSED))
    assert code == 0, message
    assert [row["label"] for row in rows(tmp_path / "o" / "label_descriptions.jsonl")] == ["a", "b"]
    with Journal(tmp_path / "o" / "journal.jsonl", read_only=True) as journal:
        assert len(journal) == 2


@pytest.mark.parametrize("path", ["/dev/stdin", "-"])
def test_closed_standard_input_is_not_an_empty_file(command, tmp_path, path):
    code, message = command("write-pseudo-documents", path, stdin=CLOSED)
    assert code == 1 and "error: " in message and "Traceback" not in message
    assert not (tmp_path / "o").exists()


def test_documents_come_from_standard_input(command, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [document(i, ["rare"]) for i in range(2)])
    code, message = command("write-pseudo-documents", "/dev/stdin", "--per-label", 2, stdin=train)
    assert code == 0, message
    assert len(rows(tmp_path / "o" / "pseudo_documents.jsonl")) == 2


def test_a_full_standard_output_loses_the_summary_only(command, tmp_path):
    (tmp_path / "l.txt").write_text("a\n")
    code, message = command("describe-labels", "l.txt", "--quiet", stdout="/dev/full")
    assert code == 1 and "error: standard output cannot be written" in message
    assert len(rows(tmp_path / "o" / "label_descriptions.jsonl")) == 1


@pytest.fixture
def written(server, tmp_path):
    """A folder with label descriptions and their journal."""
    describe_labels(["a"], tmp_path, settings(server))
    return tmp_path


def test_an_output_that_is_a_folder_is_refused(written):
    with pytest.raises(AugmentationError, match="must be a file, but is something else"):
        export_sft(written / "label_descriptions.jsonl", written / "journal.jsonl", written)


def test_a_device_is_written_to_and_not_replaced(written, tmp_path):
    words = ["export-sft", "label_descriptions.jsonl", "--journal", "journal.jsonl", "--output", "/dev/stdout"]
    done = subprocess.run(
        [sys.executable, "-m", "augmentation", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert json.loads(done.stdout.splitlines()[0])["messages"] and done.returncode == 0
    before = os.stat("/dev/null").st_mode
    export_sft(written / "label_descriptions.jsonl", written / "journal.jsonl", "/dev/null")
    assert os.stat("/dev/null").st_mode == before
    with pytest.raises(AugmentationError, match="/dev/full cannot be written .*No space left"):
        export_sft(written / "label_descriptions.jsonl", written / "journal.jsonl", "/dev/full")


def test_an_output_behind_a_link_replaces_the_file_and_not_the_link(written):
    (written / "link.jsonl").symlink_to(written / "real.jsonl")
    for _ in range(2):
        export_sft(written / "label_descriptions.jsonl", written / "journal.jsonl", written / "link.jsonl")
    assert (written / "link.jsonl").is_symlink() and len(rows(written / "real.jsonl")) == 1


def test_no_command_replaces_what_it_reads(written):
    described, journal = written / "label_descriptions.jsonl", written / "journal.jsonl"
    train = write_rows(written / "pseudo_documents_kept.jsonl", [document(0, ["a"])])
    (written / "augmentation_report.json").hardlink_to(journal)
    before = {path: path.read_bytes() for path in (described, journal, train)}
    for function in (
        lambda: export_sft(described, journal, described),
        lambda: export_sft(described, journal, journal),
        lambda: review(train, written, train),
        lambda: report(train, written, journals=[journal], picture=False),
    ):
        with pytest.raises(AugmentationError, match="would be read and replaced"):
            function()
    assert {path: path.read_bytes() for path in before} == before


def test_an_endpoint_that_refuses_the_connection_is_distinguished_from_one_that_is_slow_and_costs_nothing(
    tmp_path, capsys
):
    (tmp_path / "l.txt").write_text("a\n")
    command = ["describe-labels", str(tmp_path / "l.txt"), "--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
    assert main([*command, "--output-dir", str(tmp_path), "--quiet"]) == 1
    shown = capsys.readouterr().err
    assert "cannot be reached (no connection" in shown and "no answer within" not in shown
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_something_unexpected_is_a_one_sentence_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdefghij")
    monkeypatch.setattr("augmentation.cli.template_names", lambda: [][1] or "sk-0123456789abcdefghij")
    assert main(["prompts", "list"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: something unexpected happened (IndexError") and shown.count("\n") == 1
