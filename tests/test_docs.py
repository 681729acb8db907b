"""The code in the README and the documentation runs, and the names in them exist."""

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from markdown_it import MarkdownIt
from tiny_models import tiny_backbone, tiny_model, tiny_tokenizer

from augmentation.arguments import build_parser


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_EXECUTED = re.compile(r"<!-- not executed: (.+?) -->\n```python\n")
TOPICS = {"billing": "price market data", "refund": "market price", "bug": "code robot", "search": "search ranking"}


def blocks(page, language):
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info.strip() == language]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files and models that the pages mention."""
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
    labels = ["cs.IR", "cs.CL", "cs.OH", "cs.CV", "cs.RO", "cs.LG"]
    tiny_model(id2label=dict(enumerate(labels))).save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def executed_blocks(page):
    """The Python blocks of a page, without those that are marked as not executed."""
    text = page.read_text(encoding="utf-8")
    marked = NOT_EXECUTED.sub("```not-executed\n", text)
    tokens = MarkdownIt().parse(marked)
    return [token.content for token in tokens if token.type == "fence" and token.info.strip() == "python"]


# Names that a page takes for granted, as a reader does.
PRELUDE = """
import json
from datasets import Dataset
from transformers import AutoTokenizer
from modeling_sep_mldc import SepMldcForMultiLabelClassification

teacher = SepMldcForMultiLabelClassification.from_pretrained({checkpoint!r})
model = SepMldcForMultiLabelClassification.from_pretrained({checkpoint!r})
tokenizer = AutoTokenizer.from_pretrained({checkpoint!r})
text = "the search ranking of language models"
texts = [text, "vision of images", "the price of a robot", "data of the stars"]
database = [{{"body": text}} for text in texts]
dataset = Dataset.from_list(database)
train = validation = Dataset.from_list(
    [{{**tokenizer(text), "label_indices": [index % 6], "length": 8}} for index, text in enumerate(texts * 3)]
)
with open("unlabeled.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps({{"text": " ".join(texts[: 1 + index % 4])}}) + "\\n" for index in range(40))
"""


def program(page, folder, **names):
    """The Python blocks of a page as one program over tiny models."""
    names = {'"roberta-base"': str(folder / "encoder"), '"user/checkpoint"': str(folder / "checkpoint"), **names}
    code = "\n".join([PRELUDE.format(checkpoint=str(folder / "checkpoint")), *executed_blocks(page)])
    for name, replacement in names.items():
        code = code.replace(name, repr(replacement))
    return code


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "hub.md" and executed_blocks(page)], ids=lambda page: page.name
)
def test_the_python_blocks_of_a_page_run_one_after_the_other(page, folder, monkeypatch):
    if page.name == "deploy.md":
        pytest.importorskip("onnxscript")
    if page.name == "settings.md":
        pytest.importorskip("optuna")
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    namespace = {}
    code = program(page, folder).replace("n_trials=20", "n_trials=2")
    exec(compile(code, page.name, "exec"), namespace)
    if page.name == "README.md":
        assert (folder / "outputs" / "model.safetensors").exists()
    if page.name == "settings.md":
        found = namespace["best"]
        expected = {"learning_rate", "head_learning_rate", "num_train_epochs", "per_device_train_batch_size"}
        assert set(found.hyperparameters) == expected | {"classifier_dropout"} and 0 < found.objective <= 1


def test_the_python_blocks_about_the_hub_run_against_a_hub(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    page = next(page for page in PAGES if page.name == "hub.md")
    with HubServer({"hf_alice": "alice"}) as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_alice")
        api.create_repo("alice/model")
        api.upload_folder(repo_id="alice/model", folder_path=folder / "checkpoint")
        script = folder / "page.py"
        script.write_text(program(page, folder, **{'"user/model"': "alice/model"}), encoding="utf-8")
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert {"README.md", "model.safetensors", "config.json"} <= set(api.list_repo_files("alice/model"))


def test_blocks_that_are_not_executed_say_why():
    reasons = {page.name: NOT_EXECUTED.findall(page.read_text(encoding="utf-8")) for page in PAGES}
    assert {name: len(found) for name, found in reasons.items() if found} == {"augmentation.md": 1}


def commands(page):
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.strip().startswith("#"):
                yield line.split(" #")[0].strip()


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
        if line.startswith("sep-mldc-augment "):
            build_parser().parse_args(shlex.split(line)[1:])  # exits where an option is unknown
        for script in re.findall(r"(?:examples|benchmarks)/(?!run_mldc)\w+\.py", line):
            source = (ROOT / script).read_text(encoding="utf-8")
            unknown = [
                name
                for name in re.findall(r" --([\w-]+)", line.split(script)[1])
                if name.replace("-", "_") not in source.replace("-", "_")
            ]
            assert not unknown, f"{script} has no option {unknown}"


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda script: script.stem)
def test_a_benchmark_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    assert module.__doc__


def test_the_readme_is_short():
    text = re.sub(r"```.*?```", "", PAGES[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(text.split()) <= 900
