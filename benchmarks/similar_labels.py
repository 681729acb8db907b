#!/usr/bin/env python
"""
Do labels with similar texts occur together? Pseudo-documents from labels alone rely on this.

    python benchmarks/similar_labels.py --folder FOLDER

For each label, the 20 labels with the most similar texts (TF-IDF, names and descriptions) are compared with the labels of its training documents:

- `one_of_20`: share of labels with at least one of the 20 in a document of theirs; `one_of_8`: of 8 that are drawn from the 20, as they are
  shown to the model (expected share); `one_of_8_at_random`: of 8 that are drawn from all labels.
- `with_near_label`: mean share of a label's documents that have one of its 5 nearest labels, against which near misses are written.
"""

import argparse
import collections
import gzip
import json
from math import comb
from pathlib import Path

from augmentation.kinds import CANDIDATES, NEAR_LABELS, SIMILAR
from augmentation.similar_labels import similar_labels


RESULTS = Path(__file__).parent / "results" / "similar_labels.json"


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", nargs="+", default=["arxiv_mlc", "usbills4k"])
    parser.add_argument("--folder", required=True, help="Folder of the datasets.")
    parser.add_argument("--output", default=str(RESULTS))
    return parser.parse_args()


def at_least_one(hits: int, total: int, drawn: int) -> float:
    """Probability that `drawn` of `total` labels hold one of `hits`."""
    drawn = min(drawn, total)
    return 1 - comb(total - hits, drawn) / comb(total, drawn)


def measure(folder: Path, data: str, described: bool) -> dict[str, float]:
    together: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with gzip.open(folder / data / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            names = json.loads(line)["labels"]
            for label in names:
                together[label].update(names)
    descriptions = {}
    if described:
        lines = (folder / "llm" / f"{data}_expansions.jsonl").read_text(encoding="utf-8").splitlines()
        descriptions = {row["label"]: row["expansion"] for row in map(json.loads, lines)}
    similar = similar_labels(
        {label: f"{label} {descriptions.get(label, '')}" for label in together}, together, SIMILAR
    )
    sums: collections.Counter = collections.Counter()
    for label, others in similar.items():
        hits = sum(other in together[label] for other in others)
        sums["one_of_20"] += hits > 0
        sums["one_of_8"] += at_least_one(hits, len(others), CANDIDATES)
        sums["one_of_8_at_random"] += at_least_one(len(together[label]) - 1, len(together) - 1, CANDIDATES)
        near = others[:NEAR_LABELS]
        sums["with_near_label"] += sum(together[label][other] for other in near) / len(near) / together[label][label]
    return {"labels": len(together)} | {name: round(value / len(together), 4) for name, value in sums.items()}


def main() -> None:
    options = parse_options()
    results = {}
    for data in options.data:
        for described in (False, True):
            name = f"{data}, {'names and descriptions' if described else 'names'}"
            results[name] = measure(Path(options.folder), data, described)
            print(name, results[name])
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
