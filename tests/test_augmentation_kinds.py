"""Pseudo-documents from labels alone, near misses and label sets that the model chooses, against an endpoint on loopback."""

import collections
import json
import random
import re
import subprocess
import sys
import time

import pytest
from aiohttp import web
from augmentation_server import (
    BatchServer,
    ChatServer,
    completion,
    document,
    obedient,
    prose,
    rows,
    settings,
    structured,
    write_rows,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scripts import fork

from augmentation import (
    AugmentationError,
    PromptBuilder,
    PseudoDocumentOptions,
    export_sft,
    report,
    review,
    write_pseudo_documents,
)
from augmentation.cli import main
from augmentation.kinds import kinds, read_near_miss, read_several
from augmentation.similar_labels import similar_labels


LABELS = {
    "algebra": "Rings, fields and groups of numbers.",
    "number theory": "Prime numbers and fields of numbers.",
    "geometry": "Curves and surfaces over fields.",
    "fishery": "Catching fish at sea.",
    "trade": "Selling goods such as fish and grain.",
    "farming": "Growing grain in fields.",
}
HARD = PseudoDocumentOptions(per_label=2, hard_share=1.0, several_share=0.0)
SEVERAL = PseudoDocumentOptions(per_label=2, hard_share=0.0, several_share=1.0)


@pytest.fixture
def server():
    with ChatServer() as running:
        yield running


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("label,description\n" + "".join(f'{name},"{text}"\n' for name, text in LABELS.items()))
    return path


def write(server, labels, folder, options=None, train=None, **more):
    return write_pseudo_documents(train, folder, settings(server), labels=labels, options=options, **more)


def written(folder):
    return rows(folder / "pseudo_documents.jsonl")


def user_prompts(server):
    return [body["messages"][1]["content"] for body in server.requests]


def answering(answer):
    """A server whose text is a function of the number of messages; with `None` it is obedient."""

    async def respond(body, attempt, request):
        text = prose(json.dumps(body["messages"]))
        return answer(len(body["messages"]), text) or obedient(body, text)

    return ChatServer(respond)


# ---------------------------------------------------------------------------------------------- labels alone


def test_every_label_gets_documents_of_three_kinds_from_names_and_descriptions_alone(server, labels, tmp_path):
    summary = write(server, labels, tmp_path, PseudoDocumentOptions(per_label=10))
    found = written(tmp_path)
    assert summary.done == len(found) == summary.sent == 60
    numbers = collections.Counter((row["tail_label"], row["kind"]) for row in found)
    assert numbers == {
        (label, kind): n for label in LABELS for kind, n in {"plain": 4, "hard": 2, "several": 4}.items()
    }
    assert any("24 are plain, 12 hard (near misses) and 24 of several labels" in note for note in summary.notes)
    for row in found:
        assert row["tail_label"] == row["labels"][0] and set(row["labels"]) <= LABELS.keys()
        assert len(row["labels"]) == (2 if row["kind"] == "several" else 1)
        assert (row["near_label"] is not None) == (row["kind"] == "hard") and row["near_label"] not in row["labels"]
        assert "label" not in row["text"].lower() and row["marks"] == "" and row["demonstration_id"] is None
    assert len({row["provenance"]["request_key"] for row in found}) == 60


def test_a_near_miss_is_requested_with_the_descriptions_of_both_labels_in_turn(server, labels, tmp_path):
    write(server, labels, tmp_path, PseudoDocumentOptions(per_label=5, hard_share=1.0, several_share=0.0))
    for row in written(tmp_path):
        (prompt,) = [
            text
            for text, body in zip(user_prompts(server), server.requests)
            if f"Variation {int(row['id'][-1]) + 1}:" in text and f'right:\n- "{row["tail_label"]}"' in text
        ]
        assert LABELS[row["tail_label"]] in prompt
        assert (
            f'near miss of another label is wanted:\n- "{row["near_label"]}": "{LABELS[row["near_label"]]}"' in prompt
        )
    near = [row["near_label"] for row in written(tmp_path) if row["tail_label"] == "algebra"]
    assert near[0] == "number theory" and sorted(near) == sorted(LABELS.keys() - {"algebra"})


def test_labels_come_from_the_label_list_or_else_from_the_descriptions(server, tmp_path):
    descriptions = write_rows(
        tmp_path / "d.jsonl", [{"label": name, "description": text} for name, text in LABELS.items()]
    )
    options = PseudoDocumentOptions(per_label=1)
    write_pseudo_documents(None, tmp_path, settings(server), descriptions, options=options)
    assert [row["tail_label"] for row in written(tmp_path)] == sorted(LABELS)
    assert all(text in "".join(user_prompts(server)) for text in LABELS.values())
    (tmp_path / "two.csv").write_text("label,description\nalgebra,What the list says.\nunknown,Only here.\n")
    summary = write_pseudo_documents(
        None, tmp_path, settings(server), descriptions, labels=tmp_path / "two.csv", options=options
    )
    assert [row["tail_label"] for row in written(tmp_path)] == ["algebra", "unknown"]
    assert "Only here." in "".join(user_prompts(server)) and "What the list" not in "".join(user_prompts(server))
    assert any("'geometry'" in note and "`labels` lacks" in note for note in summary.notes)


def test_a_label_whose_description_is_empty_gets_documents_too(server, tmp_path):
    (tmp_path / "d.csv").write_text("label,description\nalgebra,\nfishery,Catching fish at sea.\n")
    options = PseudoDocumentOptions(per_label=1)
    write_pseudo_documents(None, tmp_path, settings(server), tmp_path / "d.csv", options=options)
    assert [row["tail_label"] for row in written(tmp_path)] == ["algebra", "fishery"]


def test_bare_names_are_enough_and_a_single_label_has_plain_documents_only(server, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo words\n")
    summary = write(server, tmp_path / "names.txt", tmp_path, PseudoDocumentOptions(per_label=5))
    assert summary.done == 10 and any("2 of 2 labels have no description" in note for note in summary.notes)
    (tmp_path / "names.txt").write_text("!!!\n")
    assert write(server, tmp_path / "names.txt", tmp_path, PseudoDocumentOptions(per_label=5)).done == 5
    assert {row["kind"] for row in written(tmp_path)} == {"plain"}


def test_the_length_of_a_document_can_be_named(server, labels, tmp_path):
    summary = write(server, labels, tmp_path, PseudoDocumentOptions(per_label=1, tail_labels=["trade"], length=400))
    assert "About 400 tokens" in user_prompts(server)[0] and server.requests[0]["max_tokens"] == 928
    assert not any("tokens" in note for note in summary.notes)
    write(server, labels, tmp_path, PseudoDocumentOptions(per_label=1, tail_labels=["trade"]))
    assert "About 150 tokens" in user_prompts(server)[1]


def near_labels(folder):
    found = collections.defaultdict(set)
    for row in written(folder):
        found[row["tail_label"]].add(row["near_label"])
    return dict(found)


def test_near_misses_are_not_written_against_broader_or_narrower_labels(server, labels, tmp_path):
    options = PseudoDocumentOptions(per_label=5, hard_share=1.0, several_share=0.0)
    write(server, labels, tmp_path / "without", options)
    assert near_labels(tmp_path / "without")["algebra"] == LABELS.keys() - {"algebra"}
    parents = tmp_path / "parents.csv"
    parents.write_text("child,parent\nalgebra,geometry\ngeometry,mathematics\nmathematics,trade\nfishery,algebra\n")
    write(server, labels, tmp_path / "with", options, label_parents=parents)
    found = near_labels(tmp_path / "with")
    assert found["algebra"] == {"number theory", "farming"}
    assert found["trade"] == {"number theory", "farming"}  # geometry, algebra and fishery are below it
    assert found["farming"] == LABELS.keys() - {"farming"}


def test_a_near_miss_is_not_a_relative_of_any_label_of_its_demonstration(server, labels, tmp_path):
    train, parents = tmp_path / "train.jsonl", tmp_path / "parents.json"
    write_rows(train, [document(0, ["algebra", "trade"])])
    parents.write_text(json.dumps({"trade": ["fishery"], "farming": "trade"}))
    options = PseudoDocumentOptions(per_label=5, hard_share=1.0, tail_labels=["algebra"])
    write(server, labels, tmp_path, options, train, label_parents=parents)
    assert near_labels(tmp_path)["algebra"] == {"number theory", "geometry"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("child,parent\nalgebra,trade\ntrade,algebra\n", "has a cycle: 'algebra' > 'trade' > 'algebra'; remove"),
        ("child,parent\nalgebra,algebra\n", "has a cycle: 'algebra' > 'algebra'"),
        ("child,above\nalgebra,trade\n", "but `child` and `parent` are needed"),
        ("child,parent\nalgebra,\n", "names no parent of any label"),
    ],
)
def test_an_invalid_file_of_parents_is_refused_before_anything_is_sent(server, labels, tmp_path, text, message):
    parents = tmp_path / "parents.csv"
    parents.write_text(text)
    with pytest.raises(AugmentationError, match=re.escape(message)):
        write(server, labels, tmp_path / "out", HARD, label_parents=parents)
    assert not server.requests


def test_parents_of_unknown_labels_are_reported(server, labels, tmp_path, capsys):
    parents = tmp_path / "parents.csv"
    parents.write_text("child,parent\ndogs,animals\n")
    words = ["write-pseudo-documents", "--labels", str(labels), "--label-parents", str(parents), "--dry-run"]
    assert main([*words, "--model", "m", "--output-dir", str(tmp_path / "out")]) == 0
    assert "The label parents name none of the 6 labels, so they change nothing." in capsys.readouterr().out


def test_the_package_writes_from_labels_alone_without_torch(server, labels, tmp_path):
    code = (
        "import sys; from augmentation.cli import main; code = main(sys.argv[1:]);"
        "bad = {'torch', 'transformers', 'datasets', 'modeling_sep_mldc'} & set(sys.modules); sys.exit(bad or code)"
    )
    parents = tmp_path / "parents.csv"
    parents.write_text("child,parent\nfishery,trade\n")
    command = ["write-pseudo-documents", "--labels", labels, "--model", "m", "--base-url", server.base_url]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            *command,
            "--per-label",
            "5",
            "--label-parents",
            parents,
            "--output-dir",
            tmp_path,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(written(tmp_path)) == 30


# ------------------------------------------------------------------------------------- what the model answers


def test_a_model_that_returns_the_near_label_is_asked_for_another_text(labels, tmp_path):
    with answering(lambda turns, text: f"{text}\n**Near label: yes**" if turns == 2 else None) as server:
        summary = write(server, labels, tmp_path, HARD)
        assert summary.failed == 0 and len(server.requests) == 2 * summary.done == 24
        complaint = server.requests[-1]["messages"][-1]["content"]
        assert "is right for that text, but it must be wrong" in complaint
    assert all(row["provenance"]["requests"] == 2 and row["marks"] == "" for row in written(tmp_path))


def test_a_model_that_insists_on_the_near_label_makes_failed_items_that_are_not_paid_for_again(labels, tmp_path):
    def insist(turns, text):
        return f"{text}\nnear label: yes, it has become right"

    options = PseudoDocumentOptions(per_label=2, tail_labels=["trade"], hard_share=0.5, several_share=0.0)
    with answering(lambda turns, text: None) as server:
        assert write(server, labels, tmp_path / "other", options).failed == 0
    with answering(insist) as server:
        summary = write(server, labels, tmp_path, options)
        assert (summary.done, summary.failed, len(server.requests)) == (1, 1, 3)
        assert write(server, labels, tmp_path, options).sent == 0
    assert [row["kind"] for row in written(tmp_path)] == ["plain"]
    (failed,) = rows(tmp_path / "failed_requests.jsonl")
    assert failed["kind"] == "hard" and "no usable labels" in failed["reason"] and "must be wrong" in failed["reason"]


def test_a_near_miss_without_its_last_line_is_kept_and_marked(labels, tmp_path):
    with answering(lambda turns, text: text) as server:
        assert write(server, labels, tmp_path, HARD).sent == 12
    assert {row["marks"] for row in written(tmp_path)} == {"near_label_unchecked"}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("labels: 1, 9", "has the numbers 1 to 5, but not 9"),
        ("labels: 0", "has the numbers 1 to 5, but not 0"),
        ("labels: fishery, cooking", "The first line must be"),
        ("labels: 1, 2, 3", "At most 2 further labels may be chosen, but 3 are"),
        ("A text about fish and trade.", "The first line must be"),
    ],
)
def test_labels_that_are_not_in_the_list_are_requested_again_and_then_failed(labels, tmp_path, line, complaint):
    with answering(lambda turns, text: f"{line}\n{text}" if turns == 2 else None) as server:
        assert write(server, labels, tmp_path, SEVERAL).failed == 0
        assert complaint in server.requests[-1]["messages"][-1]["content"]
    assert all(len(row["labels"]) == 2 and line not in row["text"] for row in written(tmp_path))
    options = PseudoDocumentOptions(per_label=2, tail_labels=["trade"], hard_share=0.0, several_share=0.5)
    with answering(lambda turns, text: f"{line}\n{text}") as server:
        assert write(server, labels, tmp_path / "again", options).failed == 1
    (failed,) = rows(tmp_path / "again" / "failed_requests.jsonl")
    assert complaint in failed["reason"] and failed["kind"] == "several"


@pytest.mark.parametrize("form", ["json", "fenced", "plain"])
def test_the_lines_on_labels_are_found_in_every_form_of_an_answer(labels, tmp_path, form):
    async def respond(body, attempt, request):
        text = obedient(body, prose(json.dumps(body["messages"])), labels="1 and 2.")
        text = structured(text, body) if form == "json" else f"```\n{text}\n```" if form == "fenced" else text
        return web.json_response(completion(text, body))

    with ChatServer(respond) as server:
        assert write(server, labels, tmp_path, PseudoDocumentOptions(per_label=5)).sent == 30
    assert {row["kind"]: len(row["labels"]) for row in written(tmp_path)} == {"plain": 1, "hard": 1, "several": 3}
    assert not any("label" in row["text"].lower() for row in written(tmp_path))


def test_a_model_may_choose_no_further_label(labels, tmp_path):
    with answering(lambda turns, text: f"labels: none\n{text}") as server:
        assert write(server, labels, tmp_path, SEVERAL).sent == 12
    assert all(row["labels"] == [row["tail_label"]] and row["kind"] == "several" for row in written(tmp_path))


@given(st.text(max_size=80))
@hypothesis_settings(max_examples=200, deadline=None)
def test_no_answer_causes_an_exception_and_no_text_contains_the_line(text):
    near, several = read_near_miss(f"{text}\nnear label: no", '"b"'), read_several(f"labels: 2\n{text}", "bc", 2)
    assert near.text == text.rstrip() and near.problem is None
    assert several.text == text.lstrip() and several.further == ("c",)
    read_near_miss(text, '"b"'), read_several(text, "bc", 2)


# --------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("shares", [(0.2, 0.4), (0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.33, 0.1), (0.0, 0.7)])
def test_kinds_have_their_shares_and_are_spread_evenly(shares):
    found = kinds(*shares, 1000)
    for kind, share in zip(("hard", "several"), shares):
        assert found.count(kind) == pytest.approx(1000 * share, abs=1)
        assert found[:100].count(kind) == pytest.approx(100 * share, abs=2)
    assert kinds(*shares, 77) == found[:77]


# ------------------------------------------------------------------------------------------ similar labels


def test_similar_labels_are_those_with_the_nearest_texts_of_all_pairs():
    rng = random.Random(0)
    words = "ring field number fish grain sea price curve plant court".split()
    texts = {f"l{i}": " ".join(rng.choices(words, k=rng.randint(1, 8))) for i in range(40)}
    counts = {word: sum(word in text.split() for text in texts.values()) for word in words}

    def vector(text):
        import math

        found = collections.Counter(text.split())
        weights = {w: (1 + math.log(n)) * (math.log(41 / (1 + counts[w])) + 1) for w, n in found.items()}
        norm = math.sqrt(sum(value**2 for value in weights.values()))
        return {word: value / norm for word, value in weights.items()}

    vectors = {label: vector(text) for label, text in texts.items()}
    for label, others in similar_labels(texts, texts, 5).items():
        scores = {
            other: round(sum(value * vectors[other].get(word, 0) for word, value in vectors[label].items()), 6)
            for other in texts
            if other != label
        }
        assert [scores[other] for other in others] == pytest.approx(sorted(scores.values(), reverse=True)[:5])


def test_labels_that_share_no_word_are_shown_in_turn():
    found = similar_labels({f"x{i}": f"x{i}" for i in range(40)}, [f"x{i}" for i in range(40)], 1)
    assert len({others[0] for others in found.values()}) > 15 and all(
        own != others[0] for own, others in found.items()
    )
    assert found == similar_labels({f"x{i}": f"x{i}" for i in reversed(range(40))}, [f"x{i}" for i in range(40)], 1)


# ------------------------------------------------------------------------------------- with training documents


@pytest.fixture
def train(tmp_path):
    items = [document(i, ["algebra", "trade"] if i % 2 else ["fishery", "trade"]) for i in range(8)]
    return write_rows(tmp_path / "train.jsonl", items)


def test_with_training_documents_all_are_plain_unless_near_misses_are_requested(server, train, labels, tmp_path):
    write(server, labels, tmp_path, PseudoDocumentOptions(per_label=4), train)
    assert {row["kind"] for row in written(tmp_path)} == {"plain"}
    assert not any("near miss" in text or "labels:" in text for text in user_prompts(server))
    plain = {row["id"]: row["text"] for row in written(tmp_path)}
    summary = write(server, labels, tmp_path, PseudoDocumentOptions(per_label=4, hard_share=0.5), train)
    numbers = collections.Counter(row["kind"] for row in written(tmp_path))
    assert numbers == {"plain": 6, "hard": 6} and summary.sent == 6  # plain ones are not paid for again
    assert all(row["text"] == plain[row["id"]] for row in written(tmp_path) if row["kind"] == "plain")


def test_a_near_miss_has_the_labels_of_its_demonstration_and_its_near_label_never_goes_with_them(
    server, train, labels, tmp_path
):
    write(server, labels, tmp_path, PseudoDocumentOptions(per_label=16, hard_share=1.0), train)
    found = written(tmp_path)
    shown = {row["id"]: row for row in rows(train)}
    assert len(found) == 48 and len({row["provenance"]["request_key"] for row in found}) == 48
    for row in found:
        assert row["kind"] == "hard" and row["labels"] == shown[row["demonstration_id"]]["labels"]
        assert row["near_label"] not in row["labels"]
    # half of the documents of "trade" have "algebra", half have "fishery": both may be wrong
    assert {row["near_label"] for row in found if row["tail_label"] == "trade"} >= {"algebra", "fishery"}


def test_a_label_that_most_documents_of_a_label_have_is_not_its_near_label(server, labels, tmp_path):
    items = [document(0, ["algebra"]), *(document(i, ["algebra", "number theory"]) for i in range(1, 4))]
    train = write_rows(tmp_path / "train.jsonl", items)
    options = PseudoDocumentOptions(per_label=4, hard_share=1.0, tail_labels=["algebra"])
    write(server, labels, tmp_path, options, train)
    assert "number theory" not in {row["near_label"] for row in written(tmp_path)}


def test_labels_without_documents_get_further_labels_where_these_are_requested(server, train, labels, tmp_path):
    options = PseudoDocumentOptions(per_label=2, several_share=1.0, allow_no_demonstration=True)
    write(server, labels, tmp_path, options, train)
    found = {row["tail_label"]: row["kind"] for row in written(tmp_path)}
    assert found == {label: "plain" if label in ("algebra", "fishery", "trade") else "several" for label in LABELS}


@given(
    st.lists(st.sets(st.sampled_from(sorted(LABELS)), min_size=1), min_size=1, max_size=4), st.sampled_from([0.3, 1.0])
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_no_two_rows_share_a_request(label_sets, hard_share):
    from augmentation import RequestSettings
    from augmentation.files import Document
    from augmentation.pseudo_documents import PseudoDocuments

    train = [Document(f"d{i}", "The same text.", tuple(sorted(names))) for i, names in enumerate(label_sets)]
    options = PseudoDocumentOptions(
        per_label=5, hard_share=hard_share, several_share=1 - hard_share, allow_no_demonstration=True
    )
    for documents in (train, None):
        task = PseudoDocuments(
            documents, LABELS, PromptBuilder(), RequestSettings("m"), options, more_labels=sorted(LABELS)
        )
        assert len({task.request(index).key for index in range(len(task))}) == len(task) == 30


# ------------------------------------------------------------------------ budget, journal, kills, dry run, batch


def test_a_dry_run_reports_kinds_requests_and_cost_and_sends_nothing(server, labels, tmp_path, capsys):
    command = ["write-pseudo-documents", "--labels", str(labels), "--per-label", "5", "--model", "gpt-4o"]
    command += ["--base-url", server.base_url, "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--dry-run", "--hard-share", "0.4", "--several-share", "0.6"]) == 0
    shown = capsys.readouterr().out
    assert "0 are plain, 12 hard (near misses) and 18 of several labels" in shown
    assert "30 requests to send" in shown and "Estimated cost" in shown and shown.count("[user]") == 5
    assert not server.requests and not (tmp_path / "out").exists()
    assert main(command) == 0 and len(server.requests) == 30
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0 and "0 requests to send" in capsys.readouterr().out


def test_more_documents_per_label_reuse_existing_answers(server, labels, tmp_path):
    write(server, labels, tmp_path, PseudoDocumentOptions(per_label=5))
    first = written(tmp_path)
    assert write(server, labels, tmp_path, PseudoDocumentOptions(per_label=8)).sent == 18
    assert [row for row in written(tmp_path) if int(row["id"].rpartition(":")[2]) < 5] == first


def test_a_limit_of_cost_holds_for_near_misses_that_are_requested_twice(labels, tmp_path):
    async def respond(body, attempt, request):
        text = completion(structured(f"{prose(str(body))}\nnear label: yes", body), body)
        text["usage"] = {"prompt_tokens": 100, "completion_tokens": body["max_tokens"]}
        return web.json_response(text)

    each = (100 * 2.5 + 428 * 10) / 1e6
    with ChatServer(respond) as server:
        summary = write_pseudo_documents(
            None, tmp_path, settings(server, max_cost=4.5 * each), labels=labels, options=HARD
        )
        assert "max_cost" in summary.stopped and summary.output is None and 1 <= len(server.requests) <= 4


def test_after_kills_the_same_command_continues_and_pays_for_nothing_twice(labels, tmp_path):
    async def slow(body, attempt, request):
        import asyncio

        await asyncio.sleep(0.05)
        first = len(body["messages"]) == 2
        return obedient(body, prose(json.dumps(body["messages"])), "9" if first else "1", "yes" if first else "no")

    command = ["write-pseudo-documents", "--labels", str(labels), "--model", "gpt-4o", "--per-label", "10"]
    command += ["--output-dir", str(tmp_path), "--concurrency", "4", "--quiet"]
    with ChatServer(slow) as server:
        command += ["--base-url", server.base_url]
        under_way = 0
        for _ in range(3):
            began = len(server.requests)
            process = fork(lambda: sys.exit(main(command)))
            while len(server.requests) < began + 15 and process.is_alive():
                time.sleep(0.005)
            process.kill()
            process.join()
            assert process.exitcode == -9 and not (tmp_path / "pseudo_documents.jsonl").exists()
            under_way += 4
            time.sleep(0.2)  # the server finishes the requests in progress
        assert main(command) == 0
        once = 60 + 12 + 24  # near misses and several labels take two requests each
        assert once <= sum(server.paid.values()) <= once + under_way
        assert len(server.paid) == once
    with ChatServer(slow) as server:
        write(server, labels, tmp_path / "whole", PseudoDocumentOptions(per_label=10))
    columns = ("id", "text", "labels", "kind", "near_label", "marks")
    found, whole = (
        [[row[name] for name in columns] for row in written(path)] for path in (tmp_path, tmp_path / "whole")
    )
    assert found == whole and len(found) == 60


def test_a_batch_gives_the_same_documents(server, labels, tmp_path):
    options = PseudoDocumentOptions(per_label=5)
    write(server, labels, tmp_path / "single", options)
    with BatchServer() as batches:
        write_pseudo_documents(
            None,
            tmp_path / "batch",
            settings(batches, batch=True, batch_poll_seconds=0.01),
            labels=labels,
            options=options,
        )
    found = [
        [(row["text"], row["labels"], row["kind"]) for row in written(tmp_path / name)] for name in ("single", "batch")
    ]
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------------- review, report, chats


def test_documents_from_labels_alone_are_reviewed_reported_and_exported(labels, tmp_path, capsys):
    async def respond(body, attempt, request):
        prompt = body["messages"][1]["content"]
        text = prose(json.dumps(body["messages"]), 12 if "Variation 2:" in prompt else 60)
        first = "Variation 5:" in prompt and len(body["messages"]) == 2
        return obedient(body, text, near="yes" if first else "no")

    with ChatServer(respond) as server:
        write(server, labels, tmp_path, PseudoDocumentOptions(per_label=5))
    assert main(["review", str(tmp_path / "pseudo_documents.jsonl"), "--output-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "too_short" in shown and "kept of several" in shown
    summary = review(tmp_path / "pseudo_documents.jsonl", tmp_path)
    assert summary.by_kind == {"plain": (12, 12), "several": (6, 12), "hard": (6, 6)}
    assert summary.rejected == {"too_short": 6}
    kept = tmp_path / "pseudo_documents_kept.jsonl"
    result = report(None, tmp_path, kept, picture=False)
    assert result.train_documents == 0 and result.pseudo_documents == 24 and result.labels == 6
    with pytest.raises(AugmentationError, match="neither training documents nor pseudo-documents"):
        report(None, tmp_path)
    once = [row for row in rows(kept) if row["provenance"]["requests"] == 1]
    assert {row["kind"] for row in rows(kept) if row not in once} == {"hard"}
    assert export_sft(kept, tmp_path / "journal.jsonl", tmp_path / "sft.jsonl") == len(once) == 18
    for row, chat in zip(once, rows(tmp_path / "sft.jsonl"), strict=True):
        answer, prompt = chat["messages"][-1]["content"], chat["messages"][1]
        assert answer == obedient({"messages": [None, prompt]}, row["text"])
    assert any(row["kind"] == "several" for row in once)


def test_a_text_that_repeats_the_request_for_a_near_miss_is_rejected(tmp_path):
    text = f"{prose('x', 60)} Choose a subject for which a hasty reader would give that label as well."
    row = {"id": "1", "text": text, "labels": ["a"], "kind": "hard", "near_label": "b", "marks": ""}
    assert review(write_rows(tmp_path / "p.jsonl", [row]), tmp_path).rejected == {"prompt_echo": 1}


# ------------------------------------------------------------------------------------------------- bad input


def test_without_documents_and_labels_nothing_can_be_written(server, tmp_path, capsys):
    with pytest.raises(AugmentationError, match="neither training documents nor labels.*`label_descriptions`"):
        write(server, None, tmp_path)
    assert main(["write-pseudo-documents", "--model", "m", "--base-url", server.base_url]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not server.requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hard_share": 1.5}, "`hard_share` is 1.5, but must be a number of at least 0 and at most 1"),
        ({"hard_share": float("nan")}, "`hard_share` is nan"),
        ({"several_share": -0.1}, "`several_share` is -0.1"),
        ({"hard_share": 0.7}, "`hard_share` 0.7 and `several_share` 0.4 must be at most 1 together"),
        ({"max_labels": 1}, "`max_labels` is 1, but must be an integer of at least 2"),
        ({"length": 0}, "`length` is 0"),
        ({"tail_labels": ["algebrra"]}, "did you mean 'algebra'"),
    ],
)
def test_an_option_outside_its_range_is_a_one_sentence_error_before_anything_is_sent(
    server, labels, tmp_path, options, words
):
    with pytest.raises(AugmentationError, match=words.replace("(", r"\(")):
        write(server, labels, tmp_path / "out", PseudoDocumentOptions(**options))
    assert not server.requests and not (tmp_path / "out").exists()


def test_a_template_that_does_not_show_the_near_label_is_refused(server, labels, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{% if part == 'pseudo_document' %}Write about {{ labels[0].name }}.{% else %}System.{% endif %}")
    with pytest.raises(AugmentationError, match="own.jinja does not show the label .*`near`.*generic.jinja"):
        write(server, labels, tmp_path, HARD, prompts=PromptBuilder(str(own)))
    plain = PseudoDocumentOptions(per_label=1, hard_share=0.0, several_share=0.0)
    assert write(server, labels, tmp_path, plain, prompts=PromptBuilder(str(own))).done == 6
