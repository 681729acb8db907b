"""The Batch API, against a small server that speaks its files and batches endpoints."""

import json
import multiprocessing
import signal
import time

import pytest
from augmentation_server import BatchServer, ChatServer, prose, rows, settings

from augmentation import AugmentationError, describe_labels
from augmentation.cli import main
from augmentation.journal import Journal


LABELS = [f"label {i}" for i in range(9)]


def run(server, folder, labels=LABELS, **options):
    return describe_labels(labels, folder, settings(server, batch=True, batch_poll_seconds=0.02, **options))


def described(folder):
    return [row["label"] for row in rows(folder / "label_descriptions.jsonl")]


def test_a_batch_answers_every_item_at_half_the_price(tmp_path):
    with BatchServer(polls=3) as server:
        summary = run(server, tmp_path)
        assert len(server.batches) == 1 and not server.headers  # nothing went to the chat endpoint
    assert described(tmp_path) == LABELS
    assert summary.cost == pytest.approx(len(LABELS) * 450e-6 / 2)
    assert rows(tmp_path / "label_descriptions.jsonl")[0]["provenance"]["batch"] is True


def test_a_batch_and_single_requests_share_the_journal(tmp_path):
    with BatchServer() as server:
        describe_labels(LABELS[:4], tmp_path, settings(server))
        assert run(server, tmp_path).sent == len(LABELS) - 4
    assert described(tmp_path) == LABELS


def test_what_failed_or_was_left_out_is_submitted_again_and_only_that(tmp_path):
    def line(body, attempt):
        prompt = body["messages"][1]["content"]
        if attempt < 3 and '"label 3"' in prompt:
            return 500, "a passing error"
        return None if attempt == 1 and '"label 5"' in prompt else prose(prompt)

    with BatchServer(line) as server:
        run(server, tmp_path)
        assert len(server.batches) == 3 and sum(server.attempts.values()) == len(LABELS) + 2 + 1
        assert sum(server.paid.values()) == len(LABELS)
    assert described(tmp_path) == LABELS


def test_what_fails_for_good_is_listed_with_its_reason(tmp_path):
    def line(body, attempt):
        if '"label 3"' in body["messages"][1]["content"]:
            return 400, "against the policy"
        return (500, "always broken") if '"label 5"' in body["messages"][1]["content"] else prose(str(body))

    with BatchServer(line) as server:
        summary = run(server, tmp_path)
    assert summary.failed == 2 and described(tmp_path) == [x for x in LABELS if x not in ("label 3", "label 5")]
    reasons = {row["label"]: row["reason"] for row in rows(tmp_path / "failed_requests.jsonl")}
    assert "against the policy" in reasons["label 3"] and "always broken" in reasons["label 5"]


def test_descriptions_that_are_too_long_go_into_a_second_batch(tmp_path):
    def line(body, attempt):
        return (
            "word " * 50
            if len(body["messages"]) == 2 and '"label 3"' in body["messages"][1]["content"]
            else prose(str(body))
        )

    with BatchServer(line) as server:
        run(server, tmp_path)
        assert len(server.batches) == 2
    assert all(row["marks"] == "" for row in rows(tmp_path / "label_descriptions.jsonl"))


def test_an_endpoint_without_json_schema_is_found_out_in_a_batch_too(tmp_path):
    def line(body, attempt):
        return (400, "response_format is not supported") if "response_format" in body else prose(str(body))

    with BatchServer(line) as server:
        run(server, tmp_path)
        assert len(server.batches) == 2
    assert described(tmp_path) == LABELS


def test_a_creation_whose_answer_is_lost_makes_no_second_batch(tmp_path):
    with BatchServer() as server:
        server.fail_creation = 1
        run(server, tmp_path)
        assert len(server.batches) == 1 and sum(server.paid.values()) == len(LABELS)


def test_a_download_that_is_cut_is_repeated(tmp_path):
    with BatchServer() as server:
        server.cut_download = 2
        run(server, tmp_path)
        assert sum(server.paid.values()) == len(LABELS)
    assert described(tmp_path) == LABELS


def test_a_refused_batch_is_one_sentence(tmp_path):
    with (
        BatchServer(status="failed") as server,
        pytest.raises(AugmentationError, match="refuses the batch .*not acceptable"),
    ):
        run(server, tmp_path)


def test_an_expired_batch_keeps_its_answers_and_the_rest_is_submitted_again(tmp_path):
    def line(body, attempt):
        return None if attempt == 1 and '"label 3"' in body["messages"][1]["content"] else prose(str(body))

    with BatchServer(line, status="expired") as server:
        run(server, tmp_path)
        assert sum(server.attempts.values()) == len(LABELS) + 1
    assert described(tmp_path) == LABELS


def test_limits_hold_for_batches(tmp_path):
    with BatchServer() as server:
        assert "max_requests" in run(server, tmp_path, max_requests=4).stopped
        assert len(server.requests) == 4
        most = 4 * (160 * 10 + 300 * 2.5) / 1e6 / 2
        assert "max_cost" in run(server, tmp_path, max_cost=most).stopped
        assert 4 < len(server.requests) < len(LABELS)
        run(server, tmp_path)
        assert len(server.requests) == len(LABELS)
    assert described(tmp_path) == LABELS


def test_an_endpoint_without_the_batch_api_is_told_from_one_that_has_it(tmp_path):
    with ChatServer() as server, pytest.raises(AugmentationError, match="404"):
        run(server, tmp_path)


def test_a_killed_process_is_followed_by_one_that_takes_up_its_batch(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["augmentation.cli", "augmentation.label_descriptions", "augmentation.batch", "openai"]
    )
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    with BatchServer(polls=10**9) as server:
        command = ["describe-labels", str(tmp_path / "labels.txt"), "--model", "gpt-4o", "--base-url", server.base_url]
        command += ["--output-dir", str(tmp_path), "--batch", "--batch-poll-seconds", "0.05", "--quiet"]
        for moment in ("the batch is made", "it is polled"):
            process = context.Process(target=main, args=(command,))
            process.start()
            while not (server.batches if moment == "the batch is made" else server.seen["batch_0"] > 5):
                time.sleep(0.001)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        path = tmp_path / "journal.jsonl"
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["note"] == "batch_intent"]
        path.write_text(lines[0] + "\n")  # as if killed before the batch's id was noted
        server.polls = 0
        assert main(command) == 0
        assert len(server.batches) == 1 and sum(server.paid.values()) == len(LABELS)
    assert described(tmp_path) == LABELS
    with Journal(path, read_only=True) as journal:
        assert len(journal) == len(LABELS)


def test_ctrl_c_leaves_the_batch_to_the_next_run(tmp_path):
    import os
    import threading

    with BatchServer(polls=10**9) as server:
        threading.Timer(0.8, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert run(server, tmp_path).stopped == "interrupted"
        server.polls = 0
        assert run(server, tmp_path).sent == 0
        assert len(server.batches) == 1
    assert described(tmp_path) == LABELS


def test_many_requests_are_divided_into_files_within_the_limits(tmp_path, monkeypatch):
    monkeypatch.setattr("augmentation.batch.MAX_REQUESTS", 4)
    with BatchServer() as server:
        run(server, tmp_path)
        assert len(server.batches) == 3
    assert described(tmp_path) == LABELS
