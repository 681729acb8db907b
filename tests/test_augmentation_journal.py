"""The journal against damage, hand edits and full disks."""

import asyncio
import contextlib
import json
import logging
import os
import subprocess

import pytest
from augmentation_server import ChatServer, on_a_small_disk, prose, rows, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scripts import run_forked

from augmentation import AugmentationError, describe_labels, export_sft, report
from augmentation.cli import main
from augmentation.journal import Journal
from augmentation.journal_lines import JournalLineError, decode_line, encode_line


ENTRY = {
    "key": "k1", "content": "text \ud83d \u00e9", "finish_reason": "stop", "model": "m", "requested_model": "m",
    "endpoint": "host", "parameters": {"temperature": 0.0}, "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    "time": "2026-01-01", "batch": False, "messages": [{"role": "user", "content": "q"}], "template": "generic",
    "template_hash": "0",
}  # fmt: skip
INTENT = {
    "note": "batch_intent", "command": "describe-labels", "token": "t", "keys": ["k1"], "endpoint": "host",
    "dialect": {"structured": True, "token_parameter": "max_tokens", "dropped": []},
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- lines


def test_a_line_is_read_as_it_was_written():
    for entry in (ENTRY, INTENT, {"note": "batch", "token": "t", "id": "b"}, {"note": "batch_done", "token": "t"}):
        assert decode_line(encode_line(entry)) == entry


def test_a_line_that_another_program_rewrote_is_the_same_line():
    line = json.dumps(json.loads(encode_line(ENTRY)), separators=(" , ", " : "))
    assert decode_line(line.encode() + b"\n") == ENTRY


def test_a_line_of_version_0_1_has_no_digest():
    assert decode_line(json.dumps(ENTRY).encode() + b"\n") == ENTRY


@given(st.data())
@hypothesis_settings(deadline=None, max_examples=300)
def test_any_changed_byte_is_detected(data):
    line = encode_line(ENTRY)
    place = data.draw(st.integers(0, len(line) - 2))
    changed = bytearray(line)
    changed[place] = data.draw(st.integers(0, 255))
    try:
        assert decode_line(bytes(changed)) == ENTRY
    except JournalLineError:
        assert bytes(changed) != line


@given(st.integers(0, 10_000))
@hypothesis_settings(deadline=None)
def test_any_truncated_line_is_detected(length):
    line = encode_line(ENTRY)
    with pytest.raises(JournalLineError):
        decode_line(line[: length % len(line)])


@pytest.mark.parametrize("entry", [ENTRY, INTENT], ids=["answer", "note"])
@pytest.mark.parametrize("value", ["missing", None, [1], {"a": 1}, 5, "text"])
def test_a_line_that_lacks_a_field_or_has_one_of_another_type_does_not_pass(entry, value):
    for name in entry:
        if name in ("finish_reason", "command"):
            continue
        changed = {k: v for k, v in entry.items() if k != name} if value == "missing" else {**entry, name: value}
        if type(changed.get(name)) is type(entry[name]) and name not in (
            "usage",
            "dialect",
            "messages",
            "keys",
            "note",
        ):
            continue
        with pytest.raises(JournalLineError):
            decode_line(json.dumps(changed).encode() + b"\n")


def test_damaged_lines_are_left_out_with_few_warnings_and_only_they_are_requested_again(tmp_path, caplog):
    labels = [f"l{i}" for i in range(12)]
    with ChatServer() as server:
        describe_labels(labels, tmp_path, settings(server))
        path = tmp_path / "journal.jsonl"
        lines = path.read_text().splitlines()
        for place in (1, 3, 4, 6, 8):
            lines[place] = lines[place].replace("documents", "something else", 1).replace('"stop"', '"length"')
        lines[9] = "[" * 100_000
        path.write_text("\n".join(lines) + "\n")
        with caplog.at_level(logging.WARNING):
            assert describe_labels(labels, tmp_path, settings(server)).sent == 6
    assert caplog.text.count("is left out") == 3 and "6 lines are left out" in caplog.text
    assert len(rows(tmp_path / "label_descriptions.jsonl")) == 12


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1], lambda data: data.replace(b"\n", b"\r\n\r\n"), lambda data: b"\xef\xbb\xbf" + data],
)
def test_a_journal_that_an_editor_has_saved_loses_nothing(tmp_path, change, caplog):
    labels = ["a", "b", "c"]
    path = tmp_path / "journal.jsonl"
    with ChatServer() as server:
        describe_labels(labels[:2], tmp_path, settings(server))
        path.write_bytes(change(path.read_bytes()))
        for sent in (1, 0):
            assert describe_labels(labels, tmp_path, settings(server)).sent == sent
    assert not caplog.text
    with Journal(path, read_only=True) as journal:
        assert len(journal) == 3


def test_a_file_that_is_not_a_journal_is_refused_by_the_report(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text('{"text": "a", "labels": ["x"]}\n')
    with pytest.raises(AugmentationError, match="train.jsonl is not a journal"):
        report(train, tmp_path, journals=[train], picture=False)
    with pytest.raises(AugmentationError, match="there is no journal .*missing.jsonl"):
        export_sft(train, tmp_path / "missing.jsonl", tmp_path / "sft.jsonl")


def test_a_journal_whose_only_line_was_truncated_by_a_kill_is_planned_and_repaired(tmp_path):
    with ChatServer() as server:
        describe_labels(["a"], tmp_path, settings(server))
        path = tmp_path / "journal.jsonl"
        path.write_bytes(path.read_bytes()[:100])
        assert describe_labels(["a"], tmp_path, settings(server), dry_run=True).missing == 1
        assert describe_labels(["a"], tmp_path, settings(server)).sent == 1


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_journal_that_is_not_a_file_is_a_one_sentence_error_before_anything_is_sent(tmp_path, kind):
    path = tmp_path / "journal.jsonl"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with ChatServer() as server, pytest.raises(AugmentationError, match="journal.jsonl must be a file"):
        describe_labels(["a"], tmp_path, settings(server))
    assert not server.requests


# -------------------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes; yields a function that makes it larger."""
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not mount(f"size={size}"):
        pytest.skip("needs the right to mount a file system")
    try:
        yield lambda more: mount(f"remount,size={more}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def slow(body, attempt, request):
    await asyncio.sleep(0.05)
    return prose(json.dumps(body["messages"]))


@pytest.mark.parametrize("pages", [2, 3, 4, 5, 6, 8, 12, 16])
def test_a_full_disk_costs_no_answer(tmp_path, pages, capsys):
    disk = tmp_path / "disk"
    (tmp_path / "labels.txt").write_text("".join(f"label {i}\n" for i in range(24)))
    with small_disk(disk, f"{4 * pages}k") as enlarge, ChatServer(slow) as server:
        command = ["describe-labels", str(tmp_path / "labels.txt"), "--model", "m", "--base-url", server.base_url]
        command += ["--output-dir", str(disk), "--quiet"]
        assert main(command) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and "cannot be written (No space left on device)" in shown
        enlarge("4m")
        assert main(command) == 0
        assert len(rows(disk / "label_descriptions.jsonl")) == 24 and max(server.paid.values()) == 1
        left = {path.name for path in disk.iterdir()}
    assert left == {"journal.jsonl", "journal.jsonl.lock", "label_descriptions.jsonl"}


def test_answers_that_no_reserve_can_hold_are_kept_beside_the_journal(tmp_path):
    async def use():
        with Journal(tmp_path / "journal.jsonl") as journal:
            journal.append(ENTRY)
            await journal.synced()
            full = os.open("/dev/full", os.O_WRONLY)  # every write fails from here on
            os.dup2(full, journal._stream.fileno())
            os.close(full)
            for number in (2, 3):
                with pytest.raises(AugmentationError, match="Paid answers are kept: .*journal.jsonl.rescued"):
                    journal.append({**ENTRY, "key": f"k{number}"})
            with pytest.raises(AugmentationError, match="No space left"):
                journal.check()

    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    asyncio.run(use())
    assert (tmp_path / "journal.jsonl.rescued").exists()
    with Journal(tmp_path / "journal.jsonl") as journal:
        assert [entry["key"] for entry in journal.entries()] == ["k1", "k2", "k3"]
    assert not (tmp_path / "journal.jsonl.rescued").exists()
    with Journal(tmp_path / "journal.jsonl", read_only=True) as journal:
        assert len(journal) == 3


def test_a_failed_sync_loses_no_answer(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    with ChatServer(slow) as server:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(AugmentationError, match="Input/output error"):
            describe_labels([f"l{i}" for i in range(20)], tmp_path, settings(server, concurrency=8))
        monkeypatch.undo()
        describe_labels([f"l{i}" for i in range(20)], tmp_path, settings(server))
        assert max(server.paid.values()) == 1


def test_a_full_disk_at_the_output_is_a_one_sentence_error_and_a_rerun_sends_nothing(tmp_path):
    (tmp_path / "labels.txt").write_text("".join(f"l{i}\n" for i in range(5)))
    with ChatServer() as server:
        command = ["describe-labels", tmp_path / "labels.txt", "--model", "m", "--base-url", server.base_url]
        command += ["--output-dir", tmp_path, "--quiet"]
        assert main(list(map(str, command))) == 0
        code, message = run_forked(on_a_small_disk, 600, command, folder=tmp_path)
        assert code == 1 and "label_descriptions.jsonl cannot be written" in message
        assert "Traceback" not in message and len(server.requests) == 5
    assert len(rows(tmp_path / "label_descriptions.jsonl")) == 5
