"""Documents of a comparison, as the benchmarks read and sample them, and the file format of results."""

import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from trainer.data import build_label_list, encode_labels, label_counts, load_splits, num_real_documents


SPLITS = ("train", "validation", "test")


def find(folder: Path, name: str) -> Path | None:
    """The file of this name, compressed or not, if the folder has it."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def read_splits(folder: str | Path, splits: tuple[str, ...] = SPLITS, **arguments) -> dict[str, datasets.Dataset]:
    """The documents of a folder with train / validation / test .jsonl(.gz) files of {"text", "labels"}."""
    files = {split: find(Path(folder), f"{split}.jsonl") for split in splits}
    missing = [split for split, path in files.items() if path is None]
    if missing:
        raise SystemExit(
            f"{folder} has no {missing[0]}.jsonl or {missing[0]}.jsonl.gz. Specify a folder with the splits "
            f"{', '.join(splits)}."
        )
    return load_splits(**{f"{split}_file": path for split, path in files.items()}, **arguments)


def sample(documents: datasets.Dataset, size: int | None) -> datasets.Dataset:
    """The first `size` documents of a permutation with seed 0: the training documents of every benchmark."""
    return documents.select(np.random.default_rng(0).permutation(len(documents))[:size])


def write_splits(folder: Path, **parts: datasets.Dataset) -> None:
    """Write documents where `load_task` and `run_mldc.py` read them."""
    for split, part in parts.items():
        part.select_columns(["text", "labels"]).to_json(folder / f"{split}.jsonl", force_ascii=False)


@dataclass
class Task:
    """The documents of one comparison. The labels are those of the training documents."""

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    labels: list[str] = field(init=False)
    counts: np.ndarray = field(init=False)
    num_documents: int = field(init=False)

    def __post_init__(self):
        self.labels = build_label_list(self.train)
        encoded = encode_labels(self.train, self.label2id)
        self.counts = label_counts(encoded, len(self.labels))
        self.num_documents = num_real_documents(encoded)

    @property
    def label2id(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.labels)}

    def indices(self, documents: datasets.Dataset) -> list[list[int]]:
        """The label ids of each document."""
        return list(encode_labels(documents, self.label2id)["label_indices"])


def load_task(folder: str | Path) -> Task:
    return Task(**read_splits(folder))


def write_json(path: Path, content: dict | list) -> None:
    """Write a result under a temporary name, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.rename(path)


def without_folders(arguments: list[str]) -> str:
    """Arguments of a command, for a result file: files and folders by their names, because their paths are those of one machine."""
    return shlex.join(Path(word).name if os.sep in word and Path(word).exists() else word for word in arguments)
