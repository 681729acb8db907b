"""describe-labels and write-pseudo-documents against a well-behaved endpoint."""

import json
import subprocess
import sys

import pytest
from aiohttp import web
from augmentation_server import ChatServer, completion, document, error, prose, rows, settings, structured, write_rows

from augmentation import (
    AugmentationError,
    PromptBuilder,
    PseudoDocumentOptions,
    describe_labels,
    write_pseudo_documents,
)
from augmentation.cli import main
from augmentation.tokens import approximate_tokens


LONG = "word " * 40


@pytest.fixture
def server():
    with ChatServer() as running:
        yield running


@pytest.fixture
def train(tmp_path):
    items = [document(i, ["big", "rare" if i < 3 else "other"]) for i in range(60)]
    return write_rows(tmp_path / "train.jsonl", items)


# ------------------------------------------------------------------------------------------------ describe-labels


def test_every_label_gets_one_description_with_its_provenance(server, tmp_path):
    summary = describe_labels(["b", "a"], tmp_path, settings(server), PromptBuilder("news"))
    found = rows(tmp_path / "label_descriptions.jsonl")
    assert [row["label"] for row in found] == ["b", "a"]
    assert summary.done == 2 and summary.sent == 2 and summary.output.name == "label_descriptions.jsonl"
    origin = found[0]["provenance"]
    assert origin["model"] == "gpt-4o-2026-01-01" and origin["endpoint"] == f"127.0.0.1:{server.port}"
    assert origin["template"] == "news" and len(origin["template_hash"]) == 16
    assert origin["usage"] == {"prompt_tokens": 100, "completion_tokens": 20}
    assert origin["parameters"]["temperature"] == 0.0 and origin["time"].startswith("20")
    assert summary.cost == pytest.approx(2 * (100 * 2.5 + 20 * 10) / 1e6)


def test_a_rerun_sends_nothing_and_writes_the_same_bytes(server, tmp_path):
    describe_labels(["a", "b", "c"], tmp_path, settings(server))
    first = (tmp_path / "label_descriptions.jsonl").read_bytes()
    (tmp_path / "label_descriptions.jsonl").unlink()
    summary = describe_labels(["a", "b", "c"], tmp_path, settings(server))
    assert summary.sent == 0 and len(server.requests) == 3
    assert (tmp_path / "label_descriptions.jsonl").read_bytes() == first


def test_the_output_does_not_depend_on_the_order_in_which_answers_come(tmp_path):
    import asyncio
    import random

    async def shuffled(body, attempt, request):
        await asyncio.sleep(random.random() / 20)
        return prose(json.dumps(body["messages"]))

    outputs = []
    for run in range(2):
        with ChatServer(shuffled) as server:
            describe_labels([f"label {i}" for i in range(20)], tmp_path / str(run), settings(server, concurrency=20))
        found = rows(tmp_path / str(run) / "label_descriptions.jsonl")
        outputs.append([(row["label"], row["description"]) for row in found])
    assert outputs[0] == outputs[1]


def test_a_description_that_is_too_long_is_requested_once_more_saying_so(tmp_path):
    async def long_first(body, attempt, request):
        return LONG if len(body["messages"]) == 2 else prose("short")

    with ChatServer(long_first) as server:
        describe_labels(["a"], tmp_path, settings(server))
        assert "at most 30" in server.requests[1]["messages"][-1]["content"]
        assert server.requests[1]["messages"][-2] == {"role": "assistant", "content": LONG.strip()}
    (row,) = rows(tmp_path / "label_descriptions.jsonl")
    assert row["description"] == prose("short") and row["marks"] == "" and row["provenance"]["requests"] == 2
    assert row["provenance"]["usage"]["prompt_tokens"] == 200


def test_a_description_that_stays_too_long_is_kept_and_marked_after_two_requests(tmp_path):
    async def always_long(body, attempt, request):
        return LONG

    with ChatServer(always_long) as server:
        describe_labels(["a"], tmp_path, settings(server))
        assert len(server.requests) == 2
    (row,) = rows(tmp_path / "label_descriptions.jsonl")
    assert "too_long" in row["marks"] and row["description"] == LONG.strip()


def test_a_description_in_another_language_is_requested_again_and_then_marked(tmp_path):
    german = "Dieses Etikett beschreibt Arbeiten über das Wiederfinden von Dokumenten in großen Sammlungen."

    async def answer(body, attempt, request):
        return german

    with ChatServer(answer) as server:
        describe_labels(["a"], tmp_path, settings(server))
        assert "not in English" in server.requests[1]["messages"][-1]["content"]
        describe_labels(["a"], tmp_path / "de", settings(server), PromptBuilder(language="de"))
        assert len(server.requests) == 3
    assert rows(tmp_path / "label_descriptions.jsonl")[0]["marks"] == "wrong_language"
    assert rows(tmp_path / "de" / "label_descriptions.jsonl")[0]["marks"] == ""


@pytest.mark.parametrize("useless", ["", "As an AI language model, I cannot explain that label."])
def test_an_answer_that_stays_useless_is_a_failed_item_that_is_not_paid_for_again(tmp_path, useless):
    async def answer(body, attempt, request):
        return useless if "bad" in body["messages"][1]["content"] else prose("good")

    with ChatServer(answer) as server:
        summary = describe_labels(["good", "bad"], tmp_path, settings(server))
        assert summary.done == 1 and summary.failed == 1 and len(server.requests) == 3
        describe_labels(["good", "bad"], tmp_path, settings(server))
        assert len(server.requests) == 3
    assert [row["label"] for row in rows(tmp_path / "label_descriptions.jsonl")] == ["good"]
    (failed,) = rows(tmp_path / "failed_requests.jsonl")
    assert failed["label"] == "bad" and "no usable answer" in failed["reason"]


@pytest.mark.parametrize(
    "name,content",
    [
        ("l.txt", "a\nb\n"),
        ("l.json", '["a", "b"]'),
        ("l.json", '{"a": {"name": "A", "description": "first"}, "b": "second"}'),
        ("l.csv", "label,description\na,first\nb,second\n"),
        ("l.jsonl", '{"label": "a"}\n{"label": "b"}\n'),
        ("train.jsonl", '{"text": "x", "labels": ["b", "a"]}\n{"text": "y", "labels": ["a"]}\n'),
    ],
)
def test_labels_are_read_from_every_documented_form(server, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    describe_labels(tmp_path / name, tmp_path / "out", settings(server))
    assert [row["label"] for row in rows(tmp_path / "out" / "label_descriptions.jsonl")] == ["a", "b"]


# ------------------------------------------------------------------------------------------------- write-pseudo-documents


def test_a_pseudo_document_carries_the_label_set_of_its_demonstration_and_demonstrations_take_turns(
    server, train, tmp_path
):
    write_pseudo_documents(train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=6))
    found = rows(tmp_path / "pseudo_documents.jsonl")
    assert [row["tail_label"] for row in found] == ["rare"] * 6
    assert all(row["labels"] == ["big", "rare"] for row in found)
    assert sorted(row["demonstration_id"] for row in found) == ["d0", "d0", "d1", "d1", "d2", "d2"]
    assert len({row["demonstration_id"] for row in found[:3]}) == 3
    assert len({row["id"] for row in found}) == 6
    assert {"text", "labels", "tail_label", "demonstration_id", "provenance"} <= set(found[0])


def test_the_prompt_holds_the_demonstration_its_length_and_all_its_labels_with_descriptions(server, train, tmp_path):
    descriptions = write_rows(
        tmp_path / "e.jsonl", [{"label": "big", "description": "Large."}, {"label": "rare", "description": "Seldom."}]
    )
    write_pseudo_documents(train, tmp_path, settings(server), descriptions, options=PseudoDocumentOptions(per_label=1))
    prompt = server.requests[0]["messages"][1]["content"]
    number = rows(tmp_path / "pseudo_documents.jsonl")[0]["demonstration_id"][1:]
    text = document(int(number), [])["text"]
    assert text in prompt and '"big": "Large."' in prompt and '"rare": "Seldom."' in prompt
    assert f"About {approximate_tokens(text)} tokens" in prompt


def test_only_labels_below_the_threshold_are_tail_labels(server, train, tmp_path):
    write_pseudo_documents(
        train, tmp_path / "a", settings(server), options=PseudoDocumentOptions(tail_threshold=3, per_label=1)
    )
    write_pseudo_documents(
        train, tmp_path / "b", settings(server), options=PseudoDocumentOptions(tail_threshold=4, per_label=1)
    )
    assert rows(tmp_path / "a" / "pseudo_documents.jsonl") == []
    assert [row["tail_label"] for row in rows(tmp_path / "b" / "pseudo_documents.jsonl")] == ["rare"]


def test_documents_of_the_excluded_files_never_enter_a_prompt(server, train, tmp_path):
    texts = [document(i, [])["text"] for i in range(3)]
    near = texts[1].replace("Document", "document,", 1) + " Once more."
    excluded = write_rows(tmp_path / "test.jsonl", [{"id": "d0"}, {"text": near}])
    summary = write_pseudo_documents(
        train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=4), exclude=[excluded]
    )
    assert {row["demonstration_id"] for row in rows(tmp_path / "pseudo_documents.jsonl")} == {"d2"}
    prompts = json.dumps(server.requests)
    assert texts[0] not in prompts and texts[1] not in prompts and texts[2] in prompts
    assert any("id of an excluded" in note for note in summary.notes)
    assert any("nearly the same" in note for note in summary.notes)


def test_a_label_without_documents_is_left_out_with_a_note_or_uses_its_description_alone(server, train, tmp_path):
    (tmp_path / "labels.txt").write_text("big\nrare\nother\nunseen\n")
    descriptions = write_rows(tmp_path / "e.jsonl", [{"label": "unseen", "description": "Never seen."}])
    options = {"label_descriptions": descriptions, "labels": tmp_path / "labels.txt"}
    summary = write_pseudo_documents(
        train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=1), **options
    )
    assert any("unseen" in note and "allow_no_demonstration" in note for note in summary.notes)
    assert {row["tail_label"] for row in rows(tmp_path / "pseudo_documents.jsonl")} == {"rare"}
    allowed = PseudoDocumentOptions(per_label=1, allow_no_demonstration=True)
    write_pseudo_documents(train, tmp_path, settings(server), options=allowed, **options)
    found = {row["tail_label"]: row for row in rows(tmp_path / "pseudo_documents.jsonl")}
    assert found["unseen"]["labels"] == ["unseen"] and found["unseen"]["demonstration_id"] is None
    assert (
        "Never seen." in server.requests[-1]["messages"][1]["content"] + server.requests[-2]["messages"][1]["content"]
    )


def test_an_unknown_label_in_the_descriptions_is_reported_with_the_nearest_name(server, train, tmp_path):
    descriptions = write_rows(tmp_path / "e.jsonl", [{"label": "rares", "description": "Typo."}])
    summary = write_pseudo_documents(
        train, tmp_path, settings(server), descriptions, options=PseudoDocumentOptions(per_label=1)
    )
    assert any("'rares'" in note and "'rare'" in note for note in summary.notes)


def test_more_pseudo_documents_per_label_reuse_existing_answers(server, train, tmp_path):
    write_pseudo_documents(train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=4))
    summary = write_pseudo_documents(train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=6))
    assert summary.sent == 2 and summary.done == 6


def test_a_document_of_a_megabyte_is_cut_to_the_budget_and_marked(server, tmp_path):
    train = write_rows(
        tmp_path / "train.jsonl", [document(0, ["rare"], "lorem ipsum dolor " * 60_000), document(1, ["rare"])]
    )
    write_pseudo_documents(
        train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=2, max_document_tokens=300)
    )
    found = {row["demonstration_id"]: row for row in rows(tmp_path / "pseudo_documents.jsonl")}
    assert found["d0"]["marks"] == "demonstration_cut" and found["d1"]["marks"] == ""
    assert max(len(body["messages"][1]["content"]) for body in server.requests) < 6000
    assert max(body["max_tokens"] for body in server.requests) < 800


def test_the_pseudo_documents_are_read_by_the_datasets_library_beside_the_train_file(server, train, tmp_path):
    from datasets import load_dataset

    write_pseudo_documents(train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=2))
    data = load_dataset("json", data_files=str(tmp_path / "pseudo_documents.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert data["train"]["labels"][0] == ["big", "rare"]


# ------------------------------------------------------------------------------------ structured output, dialects


def test_an_endpoint_without_json_schema_is_found_out_and_then_asked_for_plain_text(tmp_path):
    async def answer(body, attempt, request):
        if "response_format" in body:
            return error(400, "response_format of type json_schema is not supported")
        return prose(json.dumps(body["messages"]))

    with ChatServer(answer) as server:
        describe_labels([f"l{i}" for i in range(10)], tmp_path, settings(server))
        assert sum("response_format" in body for body in server.requests) == 1
    assert len(rows(tmp_path / "label_descriptions.jsonl")) == 10


def test_a_plain_or_fenced_answer_to_a_json_request_is_understood(tmp_path):
    async def answer(body, attempt, request):
        plain = "a" in body["messages"][1]["content"].split("label ")[1][:3]
        text = prose("x") if plain else f"```json\n{structured(prose('x'), body)}\n```"
        return web.json_response(completion(text, body))

    with ChatServer(answer) as server:
        describe_labels(["a", "b"], tmp_path, settings(server))
    assert [row["description"] for row in rows(tmp_path / "label_descriptions.jsonl")] == [prose("x")] * 2


def test_a_model_that_takes_other_parameter_names_is_served(tmp_path):
    async def answer(body, attempt, request):
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "temperature" in body:
            return error(400, "Unsupported value: 'temperature' does not support 0.0 with this model.")
        return prose("x")

    with ChatServer(answer) as server:
        describe_labels(["a", "b"], tmp_path, settings(server))
        assert server.requests[-1]["max_completion_tokens"] == 160 and len(server.requests) == 4
    origin = rows(tmp_path / "label_descriptions.jsonl")[0]["provenance"]
    assert origin["parameters"] == {"max_completion_tokens": 160}


def test_the_thoughts_of_a_reasoning_model_are_no_part_of_the_answer(tmp_path):
    async def answer(body, attempt, request):
        return web.json_response(completion(f"<think>hm, {LONG}</think>\n{prose('x')}", body))

    with ChatServer(answer) as server:
        describe_labels(["a"], tmp_path, settings(server))
    assert rows(tmp_path / "label_descriptions.jsonl")[0]["description"] == prose("x")


# ----------------------------------------------------------------------------------------- dry run, command line


def test_a_dry_run_shows_numbers_cost_and_five_prompts_and_sends_nothing(server, train, tmp_path, capsys):
    command = [
        "write-pseudo-documents",
        str(train),
        "--model",
        "gpt-4o",
        "--base-url",
        server.base_url,
        "--per-label",
        "7",
    ]
    assert main([*command, "--output-dir", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "7 requests to send" in shown and "Estimated cost" in shown and shown.count("[user]") == 5
    assert not server.requests and not (tmp_path / "out").exists()
    assert main([*command[:3], "unheard-of", *command[4:], "--output-dir", str(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "price of unheard-of is unknown" in shown and "prompt tokens" in shown
    (tmp_path / "file").touch()
    assert main([*command, "--output-dir", str(tmp_path / "file"), "--dry-run"]) != 0
    assert "is a file" in capsys.readouterr().err


def test_a_dry_run_counts_only_what_the_journal_lacks_and_uses_the_users_prices(server, tmp_path):
    describe_labels(["a", "b"], tmp_path, settings(server))
    prices = tmp_path / "prices.json"
    prices.write_text('{"models": {"gpt-4o": {"input": 1000000, "output": 0}}}')
    plan = describe_labels(["a", "b", "c"], tmp_path, settings(server, prices=prices), dry_run=True)
    assert plan.missing == 1 and plan.cost == plan.prompt_tokens > 50
    half = describe_labels(["a", "b", "c"], tmp_path, settings(server, prices=prices, batch=True), dry_run=True)
    assert half.cost == plan.cost / 2


def test_prompts_are_listed_and_shown_with_real_data(train, capsys):
    assert main(["prompts", "list"]) == 0
    assert capsys.readouterr().out.split() == ["eu_law", "generic", "news", "scientific_abstract"]
    assert main(["prompts", "show", "eu_law", "--train", str(train)]) == 0
    shown = capsys.readouterr().out
    assert "Document 0." in shown and "Whereas" in shown and '"rare"' in shown


def test_the_module_runs_without_torch_transformers_and_datasets(server, train, tmp_path):
    code = (
        "import sys; from augmentation.cli import main; code = main(sys.argv[1:]);"
        "bad = {'torch', 'transformers', 'datasets', 'modeling_sep_mldc'} & set(sys.modules); sys.exit(bad or code)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "write-pseudo-documents",
            train,
            "--exclude",
            train,
            "--model",
            "m",
            "--base-url",
            server.base_url,
        ]
        + ["--per-label", "1", "--output-dir", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stdout


def test_a_notebook_with_a_running_event_loop_can_call_the_functions(server, tmp_path):
    import asyncio

    async def cell():
        return describe_labels(["a"], tmp_path, settings(server))

    assert asyncio.run(cell()).done == 1


def test_an_unknown_tail_label_is_refused_with_the_nearest_name(server, train, tmp_path):
    with pytest.raises(AugmentationError, match="'rarr'.*did you mean 'rare'"):
        write_pseudo_documents(train, tmp_path, settings(server), options=PseudoDocumentOptions(tail_labels=["rarr"]))
