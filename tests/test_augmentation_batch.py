"""The Batch API, against a small server that speaks its files and batches endpoints."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from augmentation_server import BatchServer, ChatServer, error, prose, rows, settings, write_rows

from augmentation import AugmentationError, PromptBuilder, describe_labels
from augmentation.cli import main
from augmentation.journal import Journal
from augmentation.label_descriptions import LabelDescriptions


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


def test_a_refused_batch_is_a_one_sentence_error(tmp_path):
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


def test_an_endpoint_without_the_batch_api_is_distinguished_from_one_that_has_it(tmp_path):
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


def test_many_requests_are_divided_into_files_within_the_limits(tmp_path, monkeypatch):
    monkeypatch.setattr("augmentation.batch.MAX_REQUESTS", 4)
    with BatchServer() as server:
        run(server, tmp_path)
        assert len(server.batches) == 3
    assert described(tmp_path) == LABELS


# ----------------------------------------------------------------------------------- odd providers, open batches


class OddFile(BatchServer):
    """The output file begins with lines of other forms."""

    first = (
        b'"a string"\n', b"5\n", b"null\n", b"[1]\n", b'{"custom_id": ["a"]}\n', b'{"custom_id": "unknown"}\n', b"{}\n", b"\xff\xfe\n",
        b"[" * 100_000 + b"\n", b"half a li\n",
    )  # fmt: skip

    async def _download(self, request):
        response = await super()._download(request)
        if "output" in request.match_info["id"]:
            response.body = b"".join(self.first) + response.body
        return response


def test_odd_lines_of_an_output_file_cost_none_of_its_good_answers(tmp_path):
    with OddFile() as server:
        summary = run(server, tmp_path, max_retries=1)
        assert sum(server.paid.values()) == len(LABELS)
    assert described(tmp_path) == LABELS
    assert any("3 lines of the file" in note for note in summary.notes)


@pytest.mark.parametrize(
    "response",
    ["text", 5, None, [], {"status_code": "many"}, {"status_code": [200]}, {"status_code": 200, "body": "text"},
     {"status_code": 200, "body": {"choices": []}}, {"status_code": 1e400}, {"status_code": 500, "body": [1]}],
)  # fmt: skip
def test_an_odd_response_in_a_line_counts_as_no_answer(tmp_path, response):
    class Odd(BatchServer):
        def _answer_line(self, line, out, bad):
            if '"label 3"' in line["body"]["messages"][1]["content"]:
                self.requests.append(line["body"])
                out.append({"custom_id": line["custom_id"], "response": response, "error": None})
            else:
                super()._answer_line(line, out, bad)

    with Odd() as server:
        summary = run(server, tmp_path)
        assert summary.failed == 1 and len(server.batches) == 4
    assert described(tmp_path) == [label for label in LABELS if label != "label 3"]
    assert "label 3" == rows(tmp_path / "failed_requests.jsonl")[0]["label"]


def test_an_output_file_that_is_gone_is_a_note_and_its_requests_are_submitted_again(tmp_path):
    class Gone(BatchServer):
        async def _download(self, request):
            if request.match_info["id"].startswith("batch_0"):
                return error(404, "no such file")
            return await super()._download(request)

    with Gone() as server:
        summary = run(server, tmp_path)
        assert len(server.batches) == 2
        assert any("batch_0-output_file_id of the batch batch_0 is gone" in note for note in summary.notes)
        assert run(server, tmp_path).sent == 0
    assert described(tmp_path) == LABELS


class Forgetful(BatchServer):
    """Does not know its batches (any more, or not with this key)."""

    forgets = False

    async def _retrieve(self, request):
        return error(404, "no such batch") if self.forgets else await super()._retrieve(request)


def left_under_way(server, folder):
    """A run that stops while its batch is in progress."""
    server.polls = 10**9
    asked = threading.Event()
    retrieve = server._retrieve

    async def notice(request):
        asked.set()
        return await retrieve(request)

    server._retrieve = notice
    threading.Thread(target=lambda: (asked.wait(20), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    with server:
        assert run(server, folder).stopped == "interrupted"
        yield


@pytest.fixture
def under_way(tmp_path):
    """A server whose batch is in progress, and the folder of the run that submitted it."""
    server = Forgetful()
    running = left_under_way(server, tmp_path)
    next(running)
    yield server
    next(running, None)


def test_ctrl_c_leaves_the_batch_to_the_next_run(tmp_path, under_way):
    under_way.polls = 0
    assert run(under_way, tmp_path).sent == 0
    assert len(under_way.batches) == 1 and described(tmp_path) == LABELS


def test_a_batch_that_is_not_known_stops_the_run_until_the_user_abandons_it(tmp_path, under_way):
    under_way.forgets = True
    for batch in (True, False):
        with pytest.raises(AugmentationError, match="part of the batch batch_0.*does not know.*`abandon_batches`"):
            describe_labels(LABELS, tmp_path, settings(under_way, batch=batch))
    assert len(under_way.batches) == 1 and not under_way.headers
    summary = describe_labels(LABELS, tmp_path, settings(under_way, abandon_batches=True))
    assert summary.sent == len(LABELS) and any("abandoned" in note for note in summary.notes)
    assert described(tmp_path) == LABELS


def test_requests_in_progress_in_a_batch_are_not_paid_for_again_without_batch(tmp_path, under_way):
    with pytest.raises(
        AugmentationError, match="9 requests are in progress in the batch batch_0 .*in_progress.*paid for twice"
    ):
        describe_labels(LABELS, tmp_path, settings(under_way))
    plan = describe_labels([*LABELS, "new"], tmp_path, settings(under_way), dry_run=True)
    assert (plan.missing, plan.under_way) == (1, 9) and "9 in progress in a batch" in str(plan)
    assert not under_way.headers
    under_way.polls = 0
    assert describe_labels([*LABELS, "new"], tmp_path, settings(under_way)).sent == 1
    assert max(under_way.paid.values()) == 1 and described(tmp_path) == [*LABELS, "new"]


def test_a_batch_at_another_endpoint_is_not_paid_for_again_here(tmp_path, under_way):
    with BatchServer() as other:
        for batch in (True, False):
            with pytest.raises(
                AugmentationError, match=f"sent to 127.0.0.1:{under_way.port}, not to.*`base_url` again"
            ):
                describe_labels(LABELS, tmp_path, settings(other, batch=batch))
        assert not other.batches and not other.headers


def test_a_batch_whose_intention_is_damaged_is_collected_before_anything_is_sent(tmp_path, under_way):
    path = tmp_path / "journal.jsonl"
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["note"] == "batch_intent"
    path.write_text("damaged\n" + "\n".join(lines[1:]) + "\n")
    under_way.polls = 0
    run(under_way, tmp_path)
    assert len(under_way.batches) == 1 and max(under_way.paid.values()) == 1
    assert described(tmp_path) == LABELS


def test_a_cancelled_batch_is_sent_singly(tmp_path, under_way):
    under_way.polls, under_way.status = 0, "cancelled"
    for name in under_way.files:
        if name.startswith("batch_"):
            under_way.files[name] = b""
    assert describe_labels(LABELS, tmp_path, settings(under_way)).sent == len(LABELS)
    assert described(tmp_path) == LABELS


@pytest.mark.parametrize("status", [None, "odd", 5, ["completed"]])
def test_a_batch_without_a_known_status_is_a_one_sentence_error(tmp_path, status):
    with (
        BatchServer(status=status) as server,
        pytest.raises(AugmentationError, match="does not answer as the Batch API does .*no known status"),
    ):
        run(server, tmp_path, max_retries=1)


def test_a_file_that_ends_at_a_line_but_too_early_is_downloaded_again(tmp_path):
    class Short(BatchServer):
        short = 2

        def _at(self, batch):
            found = super()._at(batch)
            return {**found, "request_counts": {**found["request_counts"], "completed": len(LABELS)}}

        async def _download(self, request):
            response = await super()._download(request)
            if self.short:
                self.short -= 1
                response.body = b"\n".join(response.body.split(b"\n")[:4]) + b"\n"
            return response

    with Short() as server:
        run(server, tmp_path)
        assert sum(server.paid.values()) == len(LABELS)
    assert described(tmp_path) == LABELS


def test_a_batch_of_version_0_1_is_collected_and_not_paid_for_again(tmp_path, under_way):
    """Its keys were those of answers with the field `expansion`."""
    task = LabelDescriptions(dict.fromkeys(LABELS, ""), PromptBuilder(), settings(under_way))
    former = {task.request(i).key: task.request(i).old_key for i in range(len(task))}
    journal = tmp_path / "journal.jsonl"
    notes = [json.loads(line) for line in journal.read_text().splitlines()]
    for note in notes:
        del note["digest"]
        note["command"] = "expand-labels"
        note["keys"] = [former[key] for key in note.get("keys", ())]
    write_rows(journal, notes)
    for name, data in under_way.files.items():
        if name.startswith("batch_"):
            lines = [json.loads(line) for line in data.splitlines()]
            lines = [{**line, "custom_id": former[line["custom_id"]]} for line in lines]
            under_way.files[name] = (
                "".join(json.dumps(line) + "\n" for line in lines).replace("description", "expansion").encode()
            )
    under_way.polls = 0
    assert run(under_way, tmp_path).sent == 0
    assert described(tmp_path) == LABELS and len(under_way.batches) == 1


def test_a_good_answer_counts_whatever_else_its_line_says(tmp_path):
    class Doubtful(BatchServer):
        def _answer_line(self, line, out, bad):
            super()._answer_line(line, out, bad)
            out[0]["error"] = {"message": "a warning"}
            out[0]["response"]["status_code"] = "200"

    with Doubtful() as server:
        run(server, tmp_path)
        assert len(server.batches) == 1
    assert described(tmp_path) == LABELS


def test_the_batch_api_is_asked_again_only_after_the_time_that_it_names(tmp_path):
    times = []

    class Busy(BatchServer):
        async def _upload(self, request):
            times.append(time.monotonic())
            if len(times) == 1:
                return error(429, "slow down", {"Retry-After": "1"})
            return await super()._upload(request)

    with Busy() as server:
        run(server, tmp_path)
    assert times[1] - times[0] >= 1
