"""Commands, names, files and journals of version 0.1 work for one release; `augmentation_v0_1` was written by that version."""

import shutil
from pathlib import Path

import pytest
from augmentation_server import ChatServer, document, error, rows, settings, write_rows

import augmentation
from augmentation import (
    PromptBuilder,
    PseudoDocumentOptions,
    describe_labels,
    export_sft,
    report,
    review,
    write_pseudo_documents,
)
from augmentation.cli import main
from augmentation.files import read_label_descriptions


FORMER = Path(__file__).with_name("augmentation_v0_1")
OPTIONS = PseudoDocumentOptions(tail_threshold=3, per_label=3)
pytestmark = pytest.mark.filterwarnings("default::FutureWarning")


@pytest.fixture
def folder(tmp_path):
    for path in FORMER.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


async def refuse(body, attempt, request):
    return error(400, "nothing is to be sent")


def test_answers_in_a_journal_of_version_0_1_are_not_paid_for_again(folder):
    with ChatServer(refuse) as server:
        with pytest.warns(FutureWarning, match="2 answers in the journal are in the format of version 0.1"):
            summary = describe_labels(["big", "rare"], folder, settings(server))
        written = write_pseudo_documents(
            folder / "train.jsonl", folder, settings(server), folder / "label_descriptions.jsonl", options=OPTIONS
        )
        assert not server.requests
    assert summary.done == 2 and written.done == 3
    former = {row["label"]: row["expansion"] for row in rows(FORMER / "label_descriptions.jsonl")}
    assert {row["label"]: row["description"] for row in rows(folder / "label_descriptions.jsonl")} == former
    texts = [row["text"] for row in rows(FORMER / "pseudo_samples.jsonl")]
    assert [row["text"] for row in rows(folder / "pseudo_documents.jsonl")] == texts


def test_label_descriptions_of_version_0_1_are_read_with_a_warning():
    with pytest.warns(FutureWarning, match="column `expansion`.*[Rr]ename it to `description`"):
        found = read_label_descriptions(FORMER / "label_descriptions.jsonl")
    assert list(found) == ["big", "rare"] and all(found.values())


def test_files_of_version_0_1_are_reviewed_exported_and_reported(folder):
    with pytest.warns(FutureWarning, match="pseudo_samples.jsonl is called pseudo_documents.jsonl now"):
        summary = review(folder / "pseudo_samples.jsonl", folder, folder / "train.jsonl")
    assert summary.kept_file.name == "pseudo_samples_kept.jsonl" and summary.kept_file.exists()
    files = [folder / "pseudo_samples.jsonl", folder / "label_descriptions.jsonl"]
    assert export_sft(files, folder / "journal.jsonl", folder / "sft.jsonl") == 5
    result = report(folder / "train.jsonl", folder, files[0], [folder / "journal.jsonl"], picture=False)
    assert result.models[0]["answers"] == 6


def test_former_functions_write_former_files(tmp_path):
    with ChatServer() as server:
        with pytest.warns(FutureWarning, match="`expand_labels` is called `describe_labels` now"):
            augmentation.expand_labels(["rare"], tmp_path, settings(server))
        train = write_rows(tmp_path / "train.jsonl", [document(i, ["big", "rare"]) for i in range(2)])
        with pytest.warns(FutureWarning, match="`generate_tail_samples` is called `write_pseudo_documents` now"):
            summary = augmentation.generate_tail_samples(
                train, tmp_path, settings(server), expansions=tmp_path / "label_descriptions.jsonl", options=OPTIONS
            )
    (row,) = rows(tmp_path / "label_descriptions.jsonl")
    assert row["expansion"] == row["description"]
    assert summary.output == tmp_path / "pseudo_samples.jsonl"
    assert rows(summary.output) == rows(tmp_path / "pseudo_documents.jsonl")


def test_former_names_are_found_in_the_package_and_in_the_former_modules():
    with pytest.warns(FutureWarning, match="`TailOptions` is called `PseudoDocumentOptions` now"):
        assert augmentation.TailOptions is PseudoDocumentOptions
    with pytest.warns(FutureWarning, match="`TailOptions`"):
        from augmentation.tail_samples import TailOptions, generate_tail_samples
    from augmentation.expansion import expand_labels

    assert TailOptions is PseudoDocumentOptions
    assert (expand_labels, generate_tail_samples) == (augmentation.expand_labels, augmentation.generate_tail_samples)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        augmentation.nothing  # noqa: B018


def test_former_commands_and_options_are_understood(tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("rare\n")
    train = write_rows(tmp_path / "train.jsonl", [document(i, ["rare"]) for i in range(2)])
    with ChatServer() as server:
        endpoint = ["--model", "m", "--base-url", server.base_url, "--output-dir", str(tmp_path), "--quiet"]
        with pytest.warns(FutureWarning, match="The command expand-labels is called describe-labels now"):
            assert main(["expand-labels", str(tmp_path / "labels.txt"), *endpoint]) == 0
        described = str(tmp_path / "label_descriptions.jsonl")
        with pytest.warns(FutureWarning, match="The option --expansions is called --label-descriptions now"):
            command = ["tail-samples", str(train), "--expansions", described, "--per-label", "2", *endpoint]
            assert main(command) == 0
        prompt = server.requests[-1]["messages"][1]["content"]
    assert rows(tmp_path / "label_descriptions.jsonl")[0]["description"] in prompt
    with pytest.warns(FutureWarning, match="The option --samples is called --pseudo-documents now"):
        command = ["report", "--train", str(train), f"--samples={tmp_path / 'pseudo_samples.jsonl'}", "--no-picture"]
        assert main([*command, "--output-dir", str(tmp_path)]) == 0
    assert "2 pseudo-documents" in capsys.readouterr().out


def test_a_template_of_version_0_1_fills_the_blocks_that_it_filled(tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% extends 'generic.jinja' %}{% block expand %}Explain {{ label }}.{% endblock %}"
        "{% block sample %}{% for label in labels %}{{ label.name }}: {{ label.expansion }}{% endfor %}{% endblock %}"
    )
    with pytest.warns(
        FutureWarning, match=r"`expand` \(now `label_description`\), `sample` \(now `pseudo_document`\)"
    ):
        builder = PromptBuilder(str(own))
    assert builder.label_description("a")[1]["content"].endswith('Explain "a".')
    assert builder.pseudo_document([("a", "First.")], None, 10)[1]["content"].endswith('"a": "First."')


def test_failed_items_of_a_former_command_are_replaced(tmp_path):
    write_rows(tmp_path / "failed_requests.jsonl", [{"command": "expand-labels", "label": "a", "reason": "old"}])
    with ChatServer() as server:
        describe_labels(["a"], tmp_path, settings(server))
    assert not (tmp_path / "failed_requests.jsonl").exists()
