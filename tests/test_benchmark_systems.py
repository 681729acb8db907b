"""The systems that benchmarks/defaults.py compares the command with, on a few short documents."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_backbone


TOPICS = {"billing": "price market data", "refund": "market price", "bug": "code robot", "search": "search ranking"}
FILES = {"train": 40, "validation": 300, "test": 20}  # enough validation documents to choose a checkpoint


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import other_systems
    import tasks

    return tasks, other_systems


def documents(folder):
    names = list(TOPICS)
    for split, number in FILES.items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for i in range(number):
                chosen = sorted({names[i % 4], names[(i // 4) % 4]})
                text = f"document {i} " + " ".join(TOPICS[name] for name in chosen)
                file.write(json.dumps({"text": text, "labels": chosen}) + "\n")
    return folder


def test_a_sample_is_the_start_of_one_permutation(modules, tmp_path):
    tasks, _ = modules
    train = tasks.read_splits(documents(tmp_path), ("train",))["train"]
    few, more = (tasks.sample(train, size)["text"][:] for size in (5, 10))
    assert few == more[:5] and sorted(tasks.sample(train, None)["text"]) == sorted(train["text"])


def test_a_missing_split_is_named(modules, tmp_path):
    tasks, _ = modules
    documents(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(SystemExit, match="has no test.jsonl"):
        tasks.load_task(tmp_path)


# A random encoder hardly learns in so few steps; predicting every label has an F1 of 0.6.
@pytest.mark.parametrize("system, f1", [("linear", 0.8), ("frozen + logistic regression", 0.8), ("bare encoder", 0.6)])
def test_every_test_document_gets_a_ranking_and_a_label_set(system, f1, modules, tmp_path):
    if system.startswith("frozen"):
        pytest.importorskip("sentence_transformers")
    tasks, other_systems = modules
    task = tasks.load_task(documents(tmp_path))
    encoder = tiny_backbone(tmp_path / "encoder")
    work = tmp_path / "work"
    work.mkdir()
    found = other_systems.run_system(task, system, other_systems.Settings(str(encoder), 0, str(work)))
    assert np.array(found["top"]).shape == (20, 4) and len(found["assigned"]) == 20
    gold = task.indices(task.test)
    correct = sum(len(set(ours) & set(ids)) for ours, ids in zip(found["assigned"], gold))
    assert 2 * correct / (sum(map(len, found["assigned"])) + sum(map(len, gold))) > f1
    assert not list(work.iterdir())  # no temporary files are left


def test_result_files_name_files_without_the_folders_of_a_machine(modules, tmp_path):
    tasks, _ = modules
    path = tmp_path / "descriptions.jsonl"
    path.touch()
    arguments = ["--label_descriptions_file", str(path), "--learning_rate", "1e-4"]
    assert tasks.without_folders(arguments) == "--label_descriptions_file descriptions.jsonl --learning_rate 1e-4"
