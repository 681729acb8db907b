"""No limit can be switched off, no answer is paid for twice, and no key is stored or shown."""

import asyncio
import email.utils
import itertools
import json
import math
import time

import pytest
from aiohttp import web
from augmentation_server import (
    BatchServer,
    ChatServer,
    completion,
    document,
    error,
    prose,
    rows,
    settings,
    structured,
    write_rows,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from augmentation import (
    AugmentationError,
    PseudoDocumentOptions,
    RequestSettings,
    ReviewOptions,
    describe_labels,
    report,
    write_pseudo_documents,
)
from augmentation.cli import main
from augmentation.pricing import Budget, PriceList, most_prompt_tokens
from augmentation.redaction import Redactor
from augmentation.request import Request
from augmentation.waiting import retry_after_seconds


NUMBERS = {
    "concurrency": 1, "requests_per_minute": 1.0, "tokens_per_minute": 1.0, "max_requests": 0, "max_cost": 0.0,
    "max_retries": 0, "initial_backoff": 0.0, "max_wait": 0.0, "timeout": 1.0, "batch_poll_seconds": 1.0,
    "temperature": 0.0, "max_tokens": 1,
}  # fmt: skip
KEY = "sk-SECRETKEY-abcdefghijklmnopqrstuvwxyz-0123456789"


# ------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("name", NUMBERS)
def test_a_limit_is_a_finite_number_within_its_range(name):
    RequestSettings("m", **{name: NUMBERS[name]})
    for value in (math.nan, math.inf, -math.inf, -1, "5", True, [1]):
        with pytest.raises(AugmentationError, match=f"`{name}` is .*, but must be a"):
            RequestSettings("m", **{name: value})


@pytest.mark.parametrize("name", ["tail_threshold", "per_label", "max_document_tokens", "seed"])
@pytest.mark.parametrize("value", [math.nan, -1, 1.5, "2"])
def test_the_number_of_pseudo_documents_is_a_whole_number(name, value):
    with pytest.raises(AugmentationError, match=f"`{name}` is"):
        PseudoDocumentOptions(**{name: value})


@pytest.mark.parametrize(
    "name", ["min_length_ratio", "max_length_ratio", "min_words", "near_duplicate_threshold", "min_agreement"]
)
@pytest.mark.parametrize("value", [math.nan, -0.5, "0.5"])
def test_a_threshold_of_the_review_is_a_number(name, value):
    with pytest.raises(AugmentationError, match=f"`{name}` is"):
        ReviewOptions(**{name: value})


def test_limits_that_are_not_numbers_are_refused_on_the_command_line(tmp_path, capsys):
    (tmp_path / "l.txt").write_text("a\n")
    for option in ("--max-cost", "--temperature", "--timeout", "--requests-per-minute"):
        command = ["describe-labels", str(tmp_path / "l.txt"), "--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
        assert main([*command, f"{option}=nan"]) == 1
        assert f"`{option[2:].replace('-', '_')}` is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name,words",
    [
        ("messages", "changes the prompt"),
        ("tools", "changes the prompt"),
        ("prediction", "changes the prompt"),
        ("n", "changes the number of answers that are paid"),
        ("best_of", "changes the number of answers that are paid"),
        ("N", "changes the number of answers that are paid"),
        ("service_tier", "changes what is paid per answer"),
        ("models", "changes what is paid per answer"),
        ("stream", "changes the form of the answer"),
        ("response_format", "changes the form of the answer"),
        ("model", "use the argument `model`"),
        ("max_tokens", "use the argument `max_tokens`"),
        ("max_completion_tokens", "use the argument `max_tokens`"),
        ("n_predict", "use the argument `max_tokens`"),
        ("temperature", "use the argument `temperature`"),
        ("extra_headers", "changes the headers"),
        ("api_key", "secrets are read from the environment only"),
        ("X-Api-Key", "secrets are read from the environment only"),
        ("Authorization", "secrets are read from the environment only"),
    ],
)
def test_parameters_change_neither_what_is_paid_nor_the_prompt_nor_how_it_is_read(name, words):
    with pytest.raises(AugmentationError, match=f"`parameters` must not hold '{name}'.*{words}"):
        RequestSettings("m", parameters={name: 1})


@pytest.mark.parametrize("parameters", [{"top_p": math.nan}, {"a": {1, 2}}, ["n"], {1: 2}])
def test_parameters_that_cannot_be_sent_are_refused(parameters):
    with pytest.raises(AugmentationError, match="`parameters`"):
        RequestSettings("m", parameters=parameters)


def test_other_parameters_are_sent(tmp_path):
    with ChatServer() as server:
        more = {"top_p": 0.9, "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
        describe_labels(["a"], tmp_path, settings(server, parameters=more))
        assert more.items() <= server.requests[0].items()


@pytest.mark.parametrize(
    "content",
    [
        '{"models": {"m": {"input": NaN, "output": 1}}}',
        '{"models": {"m": {"input": 1, "output": -1}}}',
        '{"models": {"m": {"input": Infinity, "output": 1}}}',
        '{"models": {"m": {"input": "1", "output": 1}}}',
        '{"models": {"m": {"input": 1, "output": 1}}, "batch_factor": NaN}',
        '{"models": {"m": {"input": 1, "output": 1}}, "batch_factor": -1}',
        '{"models": {"m": {"input": 1, "output": 1}}, "currency": 3}',
        "[" * 100_000,
    ],
)
def test_a_price_that_would_switch_a_limit_off_is_refused(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(AugmentationError, match="price file .* is malformed"):
        PriceList(tmp_path / "p.json")


def test_the_limit_holds_where_a_text_has_more_tokens_than_letters_suggest(tmp_path):
    labels = ["ȺȾɃɄ" * 60, "x" * 250]

    async def bytewise(body, attempt, request):
        answer = completion(structured(prose(str(body)), body), body)
        prompt = sum(len(message["content"].encode()) for message in body["messages"])
        answer["usage"] = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"]}
        return web.json_response(answer)

    with ChatServer(bytewise) as server:
        for limit in (0.0001, 0.004, 0.005, 0.006, 0.009):
            folder = tmp_path / str(limit)
            summary = describe_labels(labels, folder, settings(server, max_cost=limit))
            assert summary.cost <= limit


@given(st.text(max_size=200))
@hypothesis_settings(deadline=None, max_examples=50)
def test_no_tokenizer_makes_more_tokens_of_a_prompt_than_estimated(text):
    request = Request([{"role": "user", "content": text}], "m", {}, "f")
    assert most_prompt_tokens(request) >= len(text.encode("utf-8", "backslashreplace"))


def test_an_answer_that_was_paid_and_lost_counts_against_the_limit_of_later_runs(tmp_path):
    async def cut(body, attempt, request):
        return None

    with ChatServer(cut) as server:
        with pytest.raises(AugmentationError):
            describe_labels(["a"], tmp_path, settings(server, max_retries=0))
        assert sum(server.paid.values()) == 1
        summary = describe_labels(["a"], tmp_path, settings(server, max_cost=0.004))
        assert summary.sent == 0 and "max_cost" in summary.stopped


def test_the_price_is_that_of_the_model_that_was_requested(tmp_path):
    async def other_name(body, attempt, request):
        return web.json_response({**completion(prose("a"), body), "model": "gpt-4o-mini"})

    with ChatServer(other_name) as server:
        summary = describe_labels(["a"], tmp_path, settings(server))
    train = write_rows(tmp_path / "train.jsonl", [document(0, ["a"])])
    paid = report(train, tmp_path, journals=[tmp_path / "journal.jsonl"], picture=False).models
    assert summary.cost == paid[0]["cost"] == pytest.approx(450e-6)


def test_earlier_answers_without_a_price_are_reported(tmp_path):
    with ChatServer() as server:
        describe_labels(["a"], tmp_path, settings(server, model="own"))
        summary = describe_labels(["a"], tmp_path, settings(server, max_cost=1.0))
    assert any("does not count earlier answers of own" in note for note in summary.notes)


def test_what_is_reserved_is_freed_again(tmp_path):
    class Empty:
        notes = ()

        def entries(self):
            return ()

    budget = Budget(RequestSettings("gpt-4o", max_cost=1.0, max_requests=3), Empty())
    assert budget.refusal(1.0) is None
    budget.reserve(0.6)
    assert "max_cost" in budget.refusal(0.5)
    budget.release(0.6)
    assert budget.refusal(0.5) is None
    budget.reserve(0.0, requests=2)
    assert "max_requests" in budget.refusal(0.0)


@pytest.mark.parametrize("count", [-5, 1e400, "many", True, None, [], 10**30])
def test_an_odd_count_of_tokens_is_replaced_by_the_estimate(tmp_path, count):
    async def odd(body, attempt, request):
        answer = completion(prose("a"), body)
        answer["usage"] = {"prompt_tokens": count, "completion_tokens": count}
        return web.Response(text=json.dumps(answer), content_type="application/json")

    with ChatServer(odd) as server:
        summary = describe_labels(["a"], tmp_path, settings(server))
    assert 50 < summary.prompt_tokens < 1000 and 5 < summary.completion_tokens < 100


@pytest.mark.parametrize(
    "odd", [[], "text", {"choices": {}}, {"choices": [None]}, {"choices": [{"message": {"content": 5}}]}, 3]
)
def test_an_answer_of_another_form_is_one_failed_item(tmp_path, odd):
    async def answer(body, attempt, request):
        return web.json_response(odd) if '"b"' in body["messages"][1]["content"] else prose("a")

    with ChatServer(answer) as server:
        summary = describe_labels(["a", "b", "c"], tmp_path, settings(server, max_retries=1))
    assert (summary.done, summary.failed) == (2, 1)


# ----------------------------------------------------------------------------------------- nothing is paid twice


def slowly(answer=ChatServer.good, seconds=0.05):
    async def slow(body, attempt, request):
        await asyncio.sleep(seconds)
        return await answer(body, attempt, request)

    return slow


def test_tail_labels_that_share_their_only_document_get_texts_of_their_own(tmp_path):
    train = write_rows(tmp_path / "t.jsonl", [document(i, [f"a{i}", f"b{i}", f"c{i}"]) for i in range(3)])
    with ChatServer(slowly()) as server:
        options = PseudoDocumentOptions(per_label=2)
        plan = write_pseudo_documents(train, tmp_path, settings(server), options=options, dry_run=True)
        summary = write_pseudo_documents(train, tmp_path, settings(server, concurrency=18), options=options)
        assert summary.sent == plan.missing == 18 and max(server.paid.values()) == 1
        more = write_pseudo_documents(train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=3))
        assert more.sent == 9 and max(server.paid.values()) == 1
    found = rows(tmp_path / "pseudo_documents.jsonl")
    assert len({row["text"] for row in found}) == len({row["id"] for row in found}) == 27


def test_copies_of_a_training_document_do_not_share_answers(tmp_path):
    copies = [{"id": f"copy {i}", "text": document(0, [])["text"], "labels": ["a", "b"]} for i in range(2)]
    train = write_rows(tmp_path / "t.jsonl", copies)
    with ChatServer(slowly()) as server:
        write_pseudo_documents(train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=3))
        assert len(server.requests) == 6 and max(server.paid.values()) == 1
    assert len({row["text"] for row in rows(tmp_path / "pseudo_documents.jsonl")}) == 6


@given(st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=6), st.integers(1, 6))
@hypothesis_settings(deadline=None, max_examples=40)
def test_no_two_rows_have_the_same_request_and_more_per_label_keeps_the_earlier_ones(label_sets, per_label):
    from augmentation.files import Document
    from augmentation.prompts import PromptBuilder
    from augmentation.pseudo_documents import PseudoDocuments

    train = [Document(str(i), f"text {len(labels)}", tuple(sorted(labels))) for i, labels in enumerate(label_sets)]

    def keys(number):
        options = PseudoDocumentOptions(per_label=number)
        task = PseudoDocuments(train, {}, PromptBuilder(), RequestSettings("m"), options)
        return {task.row_id(i): task.request(i).key for i in range(len(task))}

    found, more = keys(per_label), keys(per_label + 2)
    assert len(set(more.values())) == len(more) and found.items() <= more.items()


def test_equal_prompts_are_sent_once_even_at_the_same_time(tmp_path):
    labels = ["a b", "a  b", "a\tb"]  # the same in a prompt, but three labels
    with ChatServer(slowly()) as server:
        summary = describe_labels(labels, tmp_path, settings(server, concurrency=3))
        assert len(server.requests) == 1
    assert summary.done == 3 and [row["label"] for row in rows(tmp_path / "label_descriptions.jsonl")] == labels


def test_a_journal_of_another_endpoint_is_used_and_named(tmp_path):
    with ChatServer() as one, ChatServer() as other:
        describe_labels(["a"], tmp_path, settings(one))
        summary = describe_labels(["a"], tmp_path, settings(other))
        assert not other.requests
    assert any(f"come from 127.0.0.1:{one.port}" in note for note in summary.notes)


def unreadable(text, status=200):
    async def answer(body, attempt, request):
        return web.Response(text=text, status=status, content_type="application/json")

    return answer


@pytest.mark.parametrize("text", ["<html>", 'data: {"choices": []}', '{"choices": []}', "[]", "null"])
def test_an_endpoint_with_unreadable_answers_is_paid_for_three_of_them(tmp_path, text):
    with ChatServer(unreadable(text)) as server:
        with pytest.raises(AugmentationError, match="gives no answer that can be read"):
            describe_labels([f"l{i}" for i in range(20)], tmp_path, settings(server))
        assert len(server.requests) == 3


def test_an_error_with_status_200_is_recognized(tmp_path):
    async def busy(body, attempt, request):
        if attempt == 1:
            return web.json_response({"error": {"message": "rate limited upstream", "code": 429}})
        if '"b"' in body["messages"][1]["content"]:
            return web.json_response({"error": {"message": "not allowed", "code": 400}})
        return prose("a")

    with ChatServer(busy) as server:
        summary = describe_labels(["a", "b"], tmp_path, settings(server))
    assert (summary.done, summary.failed) == (1, 1)
    assert "status 400: not allowed" in rows(tmp_path / "failed_requests.jsonl")[0]["reason"]


def test_an_answer_in_parts_is_one_text(tmp_path):
    async def parts(body, attempt, request):
        answer = completion("", body)
        answer["choices"][0]["message"]["content"] = [
            {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Papers on "}, {"type": "text", "text": "graphs."}
        ]  # fmt: skip
        return web.json_response(answer)

    with ChatServer(parts) as server:
        describe_labels(["a"], tmp_path, settings(server))
    assert rows(tmp_path / "label_descriptions.jsonl")[0]["description"] == "Papers on graphs."


def test_a_first_refusal_costs_no_retry(tmp_path):
    async def picky(body, attempt, request):
        if "response_format" in body:
            return error(400, "response_format is not supported")
        if "max_tokens" in body:
            return error(400, "use max_completion_tokens")
        return prose("a")

    with ChatServer(picky) as server:
        assert describe_labels(["a"], tmp_path, settings(server, max_retries=0)).done == 1


# ------------------------------------------------------------------------------------------------------- waiting


def limited_for(seconds, headers):
    began = []

    async def answer(body, attempt, request):
        began.append(time.monotonic())
        if len(began) > 1 and began[-1] - began[0] < seconds:
            return error(429, "slow down", headers())
        return await ChatServer.good(body, attempt, request)

    return answer


@pytest.mark.parametrize("skew", [None, -3600, 3600])
def test_a_short_overload_is_waited_out_regardless_of_retry_after(tmp_path, skew):
    def headers():
        if skew is None:
            return {"Retry-After": "0"}
        now = time.time() + skew  # the clock of the endpoint
        return {
            "Retry-After": email.utils.formatdate(now + 0.5, usegmt=True),
            "Date": email.utils.formatdate(now, usegmt=True),
        }

    with ChatServer(limited_for(0.6, headers)) as server:
        labels = [f"l{i}" for i in range(12)]
        summary = describe_labels(labels, tmp_path, settings(server, initial_backoff=0.05))
        assert summary.done == 12 and len(server.requests) < 12 + 7 * 6


def test_a_date_is_measured_against_the_clock_of_the_endpoint():
    now = time.time() - 86400
    headers = {
        "retry-after": email.utils.formatdate(now + 90, usegmt=True),
        "date": email.utils.formatdate(now, usegmt=True),
    }
    assert retry_after_seconds(headers) == pytest.approx(90, abs=1)
    assert retry_after_seconds({"retry-after": email.utils.formatdate(time.time() + 90)}) == pytest.approx(90, abs=2)


@given(st.dictionaries(st.sampled_from(["retry-after", "retry-after-ms", "date"]), st.text(max_size=40)))
@hypothesis_settings(deadline=None)
def test_no_header_causes_an_exception_or_an_endless_wait(headers):
    found = retry_after_seconds(headers)
    assert found is None or (math.isfinite(found) and found >= 0)


# ---------------------------------------------------------------------------------------------------------- keys


@given(st.text(max_size=60), st.integers(0, len(KEY) - 8), st.integers(8, len(KEY)), st.text(max_size=60))
@hypothesis_settings(deadline=None)
def test_no_eight_characters_of_a_key_pass(before, start, length, after):
    shown = Redactor(KEY)(before + KEY[start : start + length] + after)
    assert not any(KEY[i : i + 8] in shown for i in range(len(KEY) - 7))


@given(st.text(max_size=200))
@hypothesis_settings(deadline=None)
def test_a_text_without_the_key_stays_unchanged(text):
    if not any(KEY[i : i + 8] in text for i in range(len(KEY) - 7)):
        assert Redactor(KEY, "", "EMPTY")(text) == text


def test_placeholders_for_keys_are_words_that_answers_may_hold():
    redact = Redactor("none", "dummy", "no-key-required")
    assert redact("none is required; a dummy is no key") == "none is required; a dummy is no key"
    assert redact("key no-key-required") == "key ***"


def test_a_line_is_cut_after_the_key_is_masked():
    text = "x" * 70 + KEY + "y" * 500
    assert Redactor(KEY).line(text, 80) == "x" * 70 + "***" + "yyyy..."
    assert Redactor().line("proxy http://me:password@host:8080/ refused") == "proxy http://***@host:8080/ refused"


async def key_in_text(body, attempt, request):
    return f"A sentence about {KEY} and documents."


async def key_in_structure(body, attempt, request):
    answer = completion(structured(prose("a"), body), body, KEY)
    return web.json_response({**answer, "model": f"model {KEY}", "id": KEY})


async def key_in_error(body, attempt, request):
    return error(400, f"bad request: {'x' * 60} Bearer {KEY[:20]}", code="x")


async def key_in_odd_answer(body, attempt, request):
    return web.json_response({"x" * 60: [f"Bearer {KEY}"]})


async def key_in_page(body, attempt, request):
    return web.Response(text="x" * 60 + f" Bearer {KEY}", content_type="text/html")


async def key_in_refusal(body, attempt, request):
    return f"I cannot help with {'x' * 60}{KEY}."


@pytest.mark.parametrize(
    "answer", [key_in_text, key_in_structure, key_in_error, key_in_odd_answer, key_in_page, key_in_refusal]
)
def test_a_key_in_any_answer_reaches_no_file_and_no_message(tmp_path, monkeypatch, capfd, answer):
    run_with_key(tmp_path, monkeypatch, ChatServer(answer))
    assert_no_key(tmp_path, capfd)


@pytest.mark.parametrize("line", [f"A sentence about {KEY}.", (400, f"{KEY} is bad"), (401, f"{KEY} is no key")])
def test_a_key_in_any_line_of_a_batch_reaches_no_file_and_no_message(tmp_path, monkeypatch, capfd, line):
    run_with_key(tmp_path, monkeypatch, BatchServer(lambda body, attempt: line), "--batch")
    assert_no_key(tmp_path, capfd)


def run_with_key(tmp_path, monkeypatch, server, *more):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    with server:
        command = ["describe-labels", str(tmp_path / "labels.txt"), "--model", "m", "--base-url", server.base_url]
        main([*command, "--output-dir", str(tmp_path / "out"), "--max-retries", "0", *more])


def assert_no_key(tmp_path, capfd):
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert "journal.jsonl" in files
    for name, text in {**files, "shown": "".join(capfd.readouterr())}.items():
        assert not any(KEY[i : i + 8] in text for i in range(len(KEY) - 7)), name


def test_a_key_that_was_given_as_the_model_or_is_in_a_document_is_not_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    train = write_rows(tmp_path / "t.jsonl", [document(0, ["a"], f"Our key is {KEY}, keep it.")])
    with ChatServer() as server:
        command = [
            "write-pseudo-documents",
            str(train),
            "--model",
            KEY,
            "--base-url",
            server.base_url,
            "--per-label=1",
        ]
        main([*command, "--output-dir", str(tmp_path / "out"), "--dry-run"])
        main([*command, "--output-dir", str(tmp_path / "out")])
    shown = "".join(capsys.readouterr()) + "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert KEY[:12] not in shown and "Our key is ***" in shown


@pytest.mark.parametrize(
    "address", ["http://me@host/v1", "http://host/v1?api_key=abc", "ftp://host", "http://", "http://h:x/"]
)
def test_an_address_with_a_secret_or_of_another_form_is_refused(address):
    with pytest.raises(AugmentationError, match="`base_url`"):
        RequestSettings("m", base_url=address)


@pytest.mark.parametrize("key", ["sk-abc\nsk-def-0123", "sk with blanks 0123", "ключ-0123456789"])
def test_a_key_that_cannot_be_sent_is_a_one_sentence_error_without_the_key(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with ChatServer() as server, pytest.raises(AugmentationError, match="key in OPENAI_API_KEY contains") as caught:
        describe_labels(["a"], tmp_path, settings(server))
    assert key not in str(caught.value)


def test_every_combination_of_limits_is_checked_before_a_folder_is_made(tmp_path):
    for name, value in itertools.product(["max_cost", "max_requests"], [math.nan, -1]):
        with pytest.raises(AugmentationError):
            describe_labels(["a"], tmp_path / "never", RequestSettings("m", **{name: value}))
    assert not (tmp_path / "never").exists()
