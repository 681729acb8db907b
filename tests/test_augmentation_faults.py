"""describe-labels against an endpoint that fails in every way, and against kills: nothing is lost and nothing is paid for twice."""

import asyncio
import collections
import email.utils
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
from aiohttp import web
from augmentation_server import ChatServer, completion, error, on_a_small_disk, prose, rows, settings
from scripts import fork, run_forked

from augmentation import AugmentationError, RequestSettings, describe_labels
from augmentation.cli import main
from augmentation.journal import Journal


LABELS = [f"label {i}" for i in range(12)]


def run(server, folder, labels=LABELS, **options):
    return describe_labels(labels, folder, settings(server, **options))


def assert_each_item_ends_once(folder, labels, failed=()):
    path = folder / "failed_requests.jsonl"
    lost = [row["label"] for row in rows(path)] if path.exists() else []
    assert lost == list(failed)
    assert [row["label"] for row in rows(folder / "label_descriptions.jsonl")] == [x for x in labels if x not in lost]


# ----------------------------------------------------------------------------------------------- passing faults


async def too_many(body, attempt, request):
    return error(429, "slow down", {"Retry-After": "0.05"})


async def internal(body, attempt, request):
    return error(500, "internal error")


async def not_json(body, attempt, request):
    return web.Response(text='{"choices": [{"mess', content_type="application/json")


async def wrong_type(body, attempt, request):
    return web.Response(text="<html>a proxy speaks</html>", content_type="text/html")


async def empty_body(body, attempt, request):
    return web.Response(text="", content_type="application/json")


async def no_choices(body, attempt, request):
    return web.json_response({"choices": [], "usage": None})


async def cut(body, attempt, request):
    return None


@pytest.mark.parametrize("fault", [too_many, internal, not_json, wrong_type, empty_body, no_choices, cut])
def test_a_transient_fault_is_retried_and_only_lost_answers_are_paid_for_again(tmp_path, fault):
    async def every_third_label_twice(body, attempt, request):
        third = sum(map(ord, body["messages"][1]["content"])) % 3 == 0
        return await (fault if third and attempt <= 2 else ChatServer.good)(body, attempt, request)

    with ChatServer(every_third_label_twice) as server:
        summary = run(server, tmp_path)
    assert summary.done == len(LABELS) and summary.failed == 0
    assert_each_item_ends_once(tmp_path, LABELS)
    lost = sum(server.paid.values()) - len(LABELS)
    repeated = sum(count - 1 for count in server.attempts.values())
    assert repeated > 0 and lost == (0 if fault in (too_many, internal) else repeated)


def test_a_time_out_is_retried(tmp_path):
    async def slow_once(body, attempt, request):
        if attempt == 1 and '"label 3"' in body["messages"][1]["content"]:
            await asyncio.sleep(1.5)
        return await ChatServer.good(body, attempt, request)

    with ChatServer(slow_once) as server:
        assert run(server, tmp_path, timeout=0.4).done == len(LABELS)
    assert_each_item_ends_once(tmp_path, LABELS)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_back_all_requests(tmp_path, form):
    times = []

    async def wait(body, attempt, request):
        times.append(time.monotonic())
        if len(times) == 2:
            header = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
            return error(429, "slow down", {"Retry-After": header})
        await asyncio.sleep(0.02)
        return await ChatServer.good(body, attempt, request)

    with ChatServer(wait) as server:
        run(server, tmp_path, concurrency=2)
    late = [moment - times[1] for moment in times[2:]]
    assert sum(gap < 0.9 for gap in late) <= 1  # the other request may have been on its way already
    assert_each_item_ends_once(tmp_path, LABELS)


def test_a_persistent_fault_makes_a_failed_item_with_its_reason_and_a_rerun_sends_only_that_item(tmp_path):
    broken = True

    async def one_fails(body, attempt, request):
        if broken and '"label 3"' in body["messages"][1]["content"]:
            return error(500, "this one fails")
        return await ChatServer.good(body, attempt, request)

    with ChatServer(one_fails) as server:
        assert run(server, tmp_path, max_retries=2).failed == 1
        assert_each_item_ends_once(tmp_path, LABELS, ["label 3"])
        (failed,) = rows(tmp_path / "failed_requests.jsonl")
        assert "this one fails" in failed["reason"] and "3 attempts" in failed["reason"]
        broken, before = False, len(server.requests)
        run(server, tmp_path)
        assert len(server.requests) == before + 1
    assert_each_item_ends_once(tmp_path, LABELS)
    assert not (tmp_path / "failed_requests.jsonl").exists()


def test_a_refused_prompt_is_not_retried(tmp_path):
    async def refuse(body, attempt, request):
        if '"label 3"' in body["messages"][1]["content"]:
            return error(400, "content policy", code="content_filter")
        return await ChatServer.good(body, attempt, request)

    with ChatServer(refuse) as server:
        run(server, tmp_path)
        assert len(server.requests) == len(LABELS)
    assert_each_item_ends_once(tmp_path, LABELS, ["label 3"])


def test_json_cut_by_the_token_limit_is_requested_again(tmp_path):
    async def truncated(body, attempt, request):
        if len(body["messages"]) == 2:
            return web.json_response(completion('{"description": "Half a sentence about \\u00e', body, "length"))
        return prose("whole")

    with ChatServer(truncated) as server:
        run(server, tmp_path, ["a"])
        assert server.requests[1]["messages"][2]["content"] == "Half a sentence about"
        assert "cut off" in server.requests[1]["messages"][3]["content"]
    assert rows(tmp_path / "label_descriptions.jsonl")[0]["description"] == prose("whole")


# ------------------------------------------------------------------------------------------------ breaking off


@pytest.mark.parametrize(
    "status,code,words",
    [(401, "invalid_api_key", "refuses the key"), (404, "model_not_found", "does not know the model 'gpt-4o'"),
     (429, "insufficient_quota", "no credit left")],
)  # fmt: skip
def test_a_hopeless_refusal_stops_the_run_after_one_request_with_one_sentence(tmp_path, status, code, words, capsys):
    async def refuse(body, attempt, request):
        return error(status, f"refused: {code}", code=code)

    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    with ChatServer(refuse) as server:
        command = ["describe-labels", str(tmp_path / "labels.txt"), "--model", "gpt-4o", "--base-url", server.base_url]
        assert main([*command, "--output-dir", str(tmp_path), "--concurrency", "64", "--quiet"]) == 1
        assert len(server.requests) == 1
    shown = capsys.readouterr().err.strip()
    assert words in shown and shown.count("\n") == 0
    assert not (tmp_path / "label_descriptions.jsonl").exists()


def test_an_endpoint_that_cannot_be_reached_stops_the_run_with_one_sentence(tmp_path):
    options = {"initial_backoff": 0.01, "progress": False}
    with pytest.raises(AugmentationError, match=r"127.0.0.1:9 cannot be reached .*base_url"):
        describe_labels(LABELS, tmp_path, RequestSettings("m", base_url="http://127.0.0.1:9/v1", **options))


def test_the_run_stops_when_everything_fails(tmp_path):
    labels = [f"l{i}" for i in range(200)]
    answers = 0

    async def then_nothing(body, attempt, request):
        nonlocal answers
        answers += 1
        return await ChatServer.good(body, attempt, request) if answers < 5 else error(400, "no more")

    with ChatServer(then_nothing) as server:
        with pytest.raises(AugmentationError, match="last 10 requests all failed .*no more"):
            run(server, tmp_path, labels)
        assert len(server.requests) < 30
    with Journal(tmp_path / "journal.jsonl", read_only=True) as journal:
        assert len(journal) == 4


def test_a_retry_after_of_a_day_stops_the_run(tmp_path):
    async def tomorrow(body, attempt, request):
        return error(429, "daily limit", {"Retry-After": "86400"})

    with ChatServer(tomorrow) as server, pytest.raises(AugmentationError, match="asks to wait 86400 s"):
        run(server, tmp_path)


# ----------------------------------------------------------------------------------------------------- limits


def test_the_limit_of_requests_is_never_exceeded_and_the_next_run_continues(tmp_path):
    with ChatServer() as server:
        summary = run(server, tmp_path, max_requests=5)
        assert len(server.requests) == 5 and "max_requests" in summary.stopped and summary.output is None
        assert not (tmp_path / "label_descriptions.jsonl").exists()
        assert run(server, tmp_path).sent == len(LABELS) - 5
    assert_each_item_ends_once(tmp_path, LABELS)


def test_partial_writes_the_answers_so_far(tmp_path):
    with ChatServer() as server:
        describe_labels(LABELS, tmp_path, settings(server, max_requests=5), partial=True)
    assert len(rows(tmp_path / "label_descriptions.jsonl")) == 5


def test_the_limit_of_cost_is_never_exceeded_over_all_runs(tmp_path):
    async def longest(body, attempt, request):
        text = completion(prose(json.dumps(body["messages"])), body)
        text["usage"] = {"prompt_tokens": 100, "completion_tokens": body["max_tokens"]}
        return web.json_response(text)

    each = (100 * 2.5 + 160 * 10) / 1e6
    with ChatServer(longest) as server:
        for _ in range(3):
            summary = run(server, tmp_path, max_cost=6.5 * each, concurrency=8)
            assert "max_cost" in summary.stopped
        assert 3 <= len(server.requests) <= 6


def test_a_limit_of_cost_without_a_price_is_refused(tmp_path):
    with ChatServer() as server, pytest.raises(AugmentationError, match="price of 'own' is unknown.*prices"):
        options = {"base_url": server.base_url, "max_cost": 1.0, "progress": False}
        describe_labels(LABELS, tmp_path, RequestSettings("own", **options))


def test_concurrency_is_used_and_kept(tmp_path):
    async def slow(body, attempt, request):
        await asyncio.sleep(0.05)
        return await ChatServer.good(body, attempt, request)

    with ChatServer(slow) as server:
        run(server, tmp_path, [f"l{i}" for i in range(40)], concurrency=7)
        assert server.most_under_way == 7


@pytest.mark.parametrize("limit", [{"requests_per_minute": 1200}, {"tokens_per_minute": 1200 * 350}])
def test_rate_limits_spread_the_requests(tmp_path, limit):
    times = []

    async def note(body, attempt, request):
        times.append(time.monotonic())
        return await ChatServer.good(body, attempt, request)

    with ChatServer(note) as server:
        run(server, tmp_path, concurrency=12, **limit)
    assert (
        times[-1] - times[1] >= (len(LABELS) - 2) * 0.05 * 0.4
    )  # tokens that were reserved and not used are released


def test_ctrl_c_finishes_and_saves_requests_in_progress(tmp_path):
    async def slow(body, attempt, request):
        await asyncio.sleep(0.3)
        return await ChatServer.good(body, attempt, request)

    (tmp_path / "labels.txt").write_text("\n".join(f"l{i}" for i in range(60)))
    with ChatServer(slow) as server:
        command = ["describe-labels", str(tmp_path / "labels.txt"), "--model", "gpt-4o", "--concurrency", "4"]
        command += ["--base-url", server.base_url, "--output-dir", str(tmp_path)]
        process = fork(lambda: sys.exit(main(command)), stdout=tmp_path / "out")
        while len(server.requests) < 7:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 130 and "run the same command again" in (tmp_path / "out").read_text()
        with Journal(tmp_path / "journal.jsonl", read_only=True) as journal:
            assert len(journal) == sum(server.paid.values()) == len(server.requests) < 60


# ---------------------------------------------------------------------------------------------------- the journal


def test_a_journal_cut_in_mid_line_is_repaired_and_only_the_cut_answer_is_paid_for_again(tmp_path, caplog):
    with ChatServer() as server:
        run(server, tmp_path)
        path = tmp_path / "journal.jsonl"
        path.write_bytes(path.read_bytes()[:-40])
        with caplog.at_level(logging.WARNING):
            assert run(server, tmp_path).sent == 1
    assert "was repaired" in caplog.text
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert_each_item_ends_once(tmp_path, LABELS)


def test_a_damaged_line_amid_the_journal_costs_one_answer(tmp_path):
    with ChatServer() as server:
        run(server, tmp_path)
        path = tmp_path / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        lines[3] = b'{"key": "\xff\n'
        path.write_bytes(b"".join(lines))
        assert run(server, tmp_path).sent == 1


def test_the_first_of_two_answers_with_the_same_key_counts(tmp_path):
    with ChatServer() as server:
        run(server, tmp_path, ["a"])
        before = rows(tmp_path / "label_descriptions.jsonl")
        with open(tmp_path / "journal.jsonl", "a") as stream:
            (entry,) = rows(tmp_path / "journal.jsonl")
            stream.write(json.dumps({**entry, "content": "another answer"}) + "\n")
        run(server, tmp_path, ["a"])
    assert rows(tmp_path / "label_descriptions.jsonl") == before


def test_two_processes_on_one_journal_are_kept_apart(tmp_path):
    with ChatServer() as server, Journal(tmp_path / "journal.jsonl"):
        with pytest.raises(AugmentationError, match="in use by another process.*output_dir"):
            run(server, tmp_path)
        assert not server.requests


def test_a_disk_that_fails_to_sync_stops_the_run(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with ChatServer() as server:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(AugmentationError, match="journal .* cannot be written .*No space left"):
            run(server, tmp_path)


def test_a_full_disk_stops_the_run_and_leaves_no_half_line(tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    with ChatServer() as server:
        command = ["describe-labels", tmp_path / "labels.txt", "--model", "m", "--base-url", server.base_url]
        command += ["--output-dir", tmp_path, "--concurrency", "1", "--quiet"]
        code, message = run_forked(on_a_small_disk, 8000, command, folder=tmp_path)
        assert code == 1 and "cannot be written" in message and "Paid answers are kept" in message
        stored = rows(tmp_path / "journal.jsonl")
        assert 0 < len(stored) < len(LABELS)
        assert describe_labels(LABELS, tmp_path, settings(server, model="m")).sent > 0
        assert sum(server.paid.values()) == len(LABELS)  # what did not fit was not paid for again
        assert not (tmp_path / "journal.jsonl.rescued").exists()
    assert_each_item_ends_once(tmp_path, LABELS)


def test_the_key_appears_in_no_file_and_in_no_message(tmp_path, monkeypatch, capfd):
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", secret)

    async def echo(body, attempt, request):
        if attempt == 1 and '"label 3"' in body["messages"][1]["content"]:
            return error(400, f"odd request with {request.headers['Authorization']}")
        return await ChatServer.good(body, attempt, request)

    with ChatServer(echo) as server:
        (tmp_path / "labels.txt").write_text("\n".join(LABELS))
        main(
            [
                "describe-labels",
                str(tmp_path / "labels.txt"),
                "--model",
                "m",
                "--base-url",
                server.base_url,
                "--output-dir",
                str(tmp_path),
            ]
        )
        assert secret in server.headers[0]["Authorization"]
    output = "".join(capfd.readouterr()) + "".join(path.read_text() for path in tmp_path.glob("*"))
    assert len(rows(tmp_path / "failed_requests.jsonl")) == 1
    assert secret not in output


# --------------------------------------------------------------------------------------------------------- kills


def kill_at_random_moments(tmp_path, times, labels):
    """Runs one command repeatedly and kills it; checks after each kill what was paid for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["augmentation.cli", "augmentation.label_descriptions", "augmentation.runner", "openai"]
    )
    rng, bill = random.Random(times), collections.Counter()
    path = tmp_path / "journal.jsonl"
    (tmp_path / "labels.txt").write_text("\n".join(labels))

    async def jittery(body, attempt, request):
        await asyncio.sleep(rng.uniform(0.02, 0.1))
        return await ChatServer.good(body, attempt, request)

    with ChatServer(jittery) as server:
        command = ["describe-labels", str(tmp_path / "labels.txt"), "--model", "gpt-4o", "--base-url", server.base_url]
        command += ["--output-dir", str(tmp_path), "--concurrency", "4", "--quiet"]
        kills = lost = 0
        while kills < times:
            with Journal(path, read_only=True) as journal:
                known = {entry["key"]: server.prompt_of(entry) for entry in journal.entries()}
            before = server.paid.copy()
            began = len(server.requests)
            process = context.Process(target=main, args=(command,))
            process.start()
            while (
                len(server.requests) == began and process.is_alive()
            ):  # the moment is random from the first request on
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.2))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            time.sleep(0.12)  # the server records the requests in progress
            bill = server.paid - before
            with Journal(path, read_only=True) as journal:
                now = {server.prompt_of(entry) for entry in journal.entries()}
            assert not set(known.values()) & set(bill), "an answer in the journal was paid again"
            assert now == set(known.values()) | (now & set(bill))
            lost += sum(bill[prompt] for prompt in bill if prompt not in now)
        assert not (tmp_path / "label_descriptions.jsonl").exists()
        process = context.Process(target=main, args=(command,))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert sum(server.paid.values()) == len(labels) + lost
    assert_each_item_ends_once(tmp_path, labels)
    return lost


def test_three_kills_at_random_moments_lose_nothing_and_pay_nothing_twice(tmp_path):
    kill_at_random_moments(tmp_path, 3, [f"l{i}" for i in range(60)])


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing_and_pay_nothing_twice(tmp_path):
    assert kill_at_random_moments(tmp_path, 20, [f"l{i}" for i in range(300)]) > 0
