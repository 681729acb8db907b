"""The commands of README and documentation run as printed, one page after the other, with tiny models and a local LLM endpoint."""

import gzip
import json
import shlex
import shutil
import sys

import pytest
from augmentation_server import ChatServer, document, rows, write_rows
from scripts import EXAMPLES, load_example
from test_docs import PAGES, commands
from tiny_models import tiny_backbone, tiny_model, tiny_tokenizer

from augmentation.cli import main as augmentation_main


LABELS = ["cs.IR", "cs.CL", "cs.OH", "cs.CV", "cs.RO", "cs.LG"]
TRAINED = ("outputs/quickstart", "outputs/model", "outputs/aapd", "user/checkpoint")
# Servers and pages run until they are stopped (see test_serve.py and test_app.py); the others need a cluster or train, and have tests of their own.
NOT_HERE = ("examples/serve.py", "examples/app.py", "examples/predict_ray.py", "--push_to_hub", "...")


def executed(page):
    """The commands of a page that this project provides, as lists of words."""
    for line in commands(page):
        words = shlex.split(line)
        if words[:2] == ["accelerate", "launch"]:
            words = ["python", *words[2:]]
        ours = words[0] == "sep-mldc-augment" or (words[0] == "python" and words[1].startswith("examples/"))
        if ours and not any(word in NOT_HERE for word in words):
            yield words


# A command that is on several pages runs once.
COMMANDS: dict[str, list[list[str]]] = {}
for page in PAGES:
    known = [words for others in COMMANDS.values() for words in others]
    COMMANDS[page.name] = [words for words in executed(page) if words not in known]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files and the checkpoints that the pages mention."""
    documents = [document(i, [LABELS[i % 3], LABELS[3 + i % 3]]) for i in range(60)]
    for name in ("train", "dev", "validation", "test", "unlabeled", "new"):
        start = 40 if name in ("dev", "validation", "test") else 0
        write_rows(tmp_path / f"{name}.jsonl", documents[start : start + 40])
    (tmp_path / "new.txt").write_text("the search ranking\nvision of images\n", encoding="utf-8")
    (tmp_path / "labels.csv").write_text(
        "label,description\n" + "".join(f"{label},A topic.\n" for label in LABELS), encoding="utf-8"
    )
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    with open(tmp_path / "train.csv", "w", encoding="utf-8") as file:
        file.writelines(
            [
                "title,body,tags\n",
                *(f'{i},"{row["text"]}",{";".join(row["labels"])}\n' for i, row in enumerate(documents)),
            ]
        )
    lines = [f"{label},{label.partition('.')[0]}\n" for label in LABELS]
    (tmp_path / "parents.csv").write_text("".join(["child,parent\n", *lines]), encoding="utf-8")
    constraints = [{"labels": LABELS[:3], "at_least": 1}, {"labels": LABELS[3:], "at_most": 1}]
    (tmp_path / "constraints.json").write_text(json.dumps(constraints), encoding="utf-8")
    data = tmp_path / "examples" / "data"
    data.mkdir(parents=True)
    for name in ("train", "validation", "test"):
        with gzip.open(data / f"{name}.jsonl.gz", "wb") as file:
            file.write((tmp_path / f"{name}.jsonl").read_bytes())
    tiny_backbone(tmp_path / "encoder")
    tiny_model(id2label=dict(enumerate(LABELS)), thresholds=[0.3] * 6).save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    for name in TRAINED:
        shutil.copytree(tmp_path / "checkpoint", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return tmp_path


def run(words, server, folder, monkeypatch):
    if words[0] == "sep-mldc-augment":
        arguments = words[1:]
        if "--model" in arguments:
            if "--base-url" in arguments:
                at = arguments.index("--base-url")
                del arguments[at : at + 2]
            arguments += ["--base-url", server.base_url]
        assert augmentation_main(arguments) == 0, words
        return
    arguments = [str(folder / "encoder") if word == "roberta-base" else word for word in words[2:]]
    if "run_mldc.py" in words[1]:
        arguments += ["--report_to", "none", "--max_steps", "3"]
    monkeypatch.setattr(sys, "argv", [words[1], *arguments])
    name = words[1].removeprefix("examples/").removesuffix(".py")
    assert load_example(name, f"{name}_of_the_pages").main() in (None, 0), words


MARKS = {
    # Three ONNX exports: test_export.py runs the command, test_docs.py what the page does in Python.
    "deploy.md": [pytest.mark.slow, pytest.mark.pictures],
    "augmentation.md": pytest.mark.pictures,
}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=MARKS.get(page, ())) for page, found in COMMANDS.items() if found],
)
def test_the_commands_of_a_page_run_one_after_the_other(page, folder, monkeypatch):
    if page == "deploy.md":
        pytest.importorskip("onnxscript")
    with ChatServer() as server:
        for words in COMMANDS[page]:
            run(words, server, folder, monkeypatch)
    for words in COMMANDS[page]:
        for option in ("--output_dir", "--output_file", "--output-dir"):
            if option in words and not {"--dry_run", "--dry-run"} & set(words):
                assert (folder / words[words.index(option) + 1]).exists(), words
    if page == "prediction.md":
        answers = (folder / "labels.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(answers) == 40 and {"labels", "scores"} & set(json.loads(answers[0]))
    if page == "train.md":
        kept = rows(folder / "outputs" / "from_labels" / "pseudo_documents_kept.jsonl")
        assert {row["kind"] for row in kept} == {"plain", "hard", "several"}
        card = (folder / "outputs" / "from_labels" / "model" / "README.md").read_text(encoding="utf-8")
        assert f"{len(kept)} of the training documents were written by a language model" in card
    if page == "README.md":
        trained = folder / "outputs" / "tickets"
        assert (trained / "model.safetensors").exists() and (trained / "README.md").exists()
        results = json.loads((trained / "all_results.json").read_text(encoding="utf-8"))
        assert results["settings"]["classifier"]["value"] == "mlp+similarity"
