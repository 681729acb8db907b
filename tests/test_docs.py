"""The code of README and documentation runs, and what they name exists."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from tiny_models import tiny_backbone, tiny_model, tiny_tokenizer


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXECUTED = ("README.md", "settings.md")
TOPICS = {"billing": "price market data", "refund": "market price", "bug": "code robot", "search": "search ranking"}


def blocks(page, language):
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info.strip() == language]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files and models that the pages speak of."""
    names = list(TOPICS)
    with open(tmp_path / "train.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["title", "body", "tags"])
        for i in range(40):
            chosen = {names[i % 4], names[(i // 4) % 4]}
            rows.writerow(
                [f"document {i}", " ".join(TOPICS[name] for name in sorted(chosen)), ";".join(sorted(chosen))]
            )
    tiny_backbone(tmp_path / "encoder")
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", EXECUTED)
def test_the_python_blocks_of_a_page_run_one_after_the_other(name, folder):
    page = next(page for page in PAGES if page.name == name)
    namespace = {}
    for code in blocks(page, "python"):
        code = code.replace('"roberta-base"', repr(str(folder / "encoder")))
        code = code.replace('"user/checkpoint"', repr(str(folder / "checkpoint")))
        exec(compile(code, name, "exec"), namespace)
    if name == "README.md":
        assert (folder / "outputs" / "model.safetensors").exists()


def commands(page):
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.strip().startswith("#"):
                yield line.split(" #")[0].strip()


def test_the_readme_trains_on_your_own_file_as_printed(folder, monkeypatch):
    command = next(line for line in commands(PAGES[0]) if "train.csv" in line)
    words = shlex.split(command.replace("roberta-base", str(folder / "encoder")))
    words = words[words.index("examples/run_mldc.py") + 1 :]
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import run_mldc

    monkeypatch.setattr(sys, "argv", ["run_mldc.py", *words, "--report_to", "none", "--max_steps", "3"])
    run_mldc.main()
    assert (folder / "outputs" / "tickets" / "model.safetensors").exists()
    assert (folder / "outputs" / "tickets" / "README.md").exists()
    results = json.loads((folder / "outputs" / "tickets" / "all_results.json").read_text(encoding="utf-8"))
    assert results["settings"]["classifier"] == {
        "value": "mlp+similarity",
        "why": results["settings"]["classifier"]["why"],
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_scripts_options_and_targets_that_exist(page):
    help_texts = {}
    for line in commands(page):
        for script in re.findall(r"(?:examples|benchmarks)/\w+\.py", line):
            assert (ROOT / script).is_file(), line
        if line.startswith("make "):
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert {word for word in line.split()[1:] if "=" not in word} <= set(targets), line
        for script in re.findall(r"examples/run_mldc\.py", line):
            from trainer.run_arguments import ARGUMENT_GROUPS

            fields = help_texts.setdefault(
                script, {name for group in ARGUMENT_GROUPS for name in group.__dataclass_fields__}
            )
            used = re.findall(r" --(\w+)", line.split(script)[1])
            assert set(used) <= fields, set(used) - fields


def test_the_readme_is_short():
    text = re.sub(r"```.*?```", "", PAGES[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(text.split()) <= 900
