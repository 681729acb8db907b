"""
Creates the sample in this folder from the full arxiv_mlc dataset. Only needed to change the sample: its files are included in the repository.

    python examples/data/make_sample.py --source FOLDER

FOLDER holds `arxiv_mlc/{train,validation,test}.jsonl.gz`, `arxiv_mlc/labels.json` and
`llm/arxiv_mlc_{expansions,tail_samples}.jsonl`. The same source and seed give the same files. README.md describes them.
"""

import argparse
import collections
import gzip
import json
import random
import re
from pathlib import Path


# split: documents, fewest documents of a label
SPLITS = {"train": (2500, 2), "validation": (300, 0), "test": (500, 1)}
FREQUENT = 50  # only documents whose labels all have more documents than this make room for a rare label's document
PSEUDO_SAMPLES_PER_LABEL = 25
SHINGLE = 8  # words; two texts that share more than MAX_SHARED of such runs are near-copies
MAX_SHARED = 0.05


def read(path):
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as lines:
        return [json.loads(line) for line in lines]


def write(path, records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    # no time stamp inside, so that equal content gives equal files
    path.write_bytes(gzip.compress(text, 9, mtime=0) if path.suffix == ".gz" else text)


def sample(documents, size, minimum, rng):
    """A random sample, in which documents of frequent labels then give way until every label has `minimum` documents."""
    order = rng.sample(range(len(documents)), len(documents))
    chosen, rest = order[:size], order[size:]
    counts = collections.Counter(label for i in chosen for label in documents[i]["labels"])
    for label in sorted({label for document in documents for label in document["labels"]}):
        while counts[label] < minimum:
            added = next(i for i in rest if label in documents[i]["labels"])
            dropped = next(i for i in chosen if all(counts[other] > FREQUENT for other in documents[i]["labels"]))
            rest.remove(added)
            chosen[chosen.index(dropped)] = added
            counts.update(documents[added]["labels"])
            counts.subtract(documents[dropped]["labels"])
    return [documents[i] for i in chosen]


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def without_copies(records, others, name):
    """The records of which no more than MAX_SHARED of the word runs are in any single text of `others`."""
    owners = collections.defaultdict(list)
    for number, other in enumerate(others):
        for shingle in shingles(other):
            owners[shingle].append(number)
    kept, largest = [], 0.0
    for record in records:
        own = shingles(record["text"])
        hits = collections.Counter(number for shingle in own for number in owners.get(shingle, ()))
        shared = max(hits.values(), default=0) / max(len(own), 1)
        if shared <= MAX_SHARED:
            kept.append(record)
            largest = max(largest, shared)
    print(
        f"{name}: left out {len(records) - len(kept)} of {len(records)} that share more than {MAX_SHARED:.0%} of their "
        f"{SHINGLE}-word runs with one held-out document; at most {largest:.1%} among the others"
    )
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with arxiv_mlc/ and llm/")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    full = {split: read(args.source / "arxiv_mlc" / f"{split}.jsonl.gz") for split in SPLITS}
    # Nothing a model is trained on may be a near-copy of a document that it is judged on. The demonstrations of the
    # pseudo-documents are documents of the full training set, so these are compared with all held-out documents.
    held_out = [document["text"] for split in ("validation", "test") for document in full[split]]
    full["train"] = without_copies(full["train"], held_out, "train")
    splits = {split: sample(full[split], size, minimum, rng) for split, (size, minimum) in SPLITS.items()}

    by_label = collections.defaultdict(list)
    tail_samples = read(args.source / "llm" / "arxiv_mlc_tail_samples.jsonl")
    for record in without_copies(tail_samples, held_out, "pseudo_documents"):
        by_label[record["tail_label"]].append(record)
    # evenly spaced, because the demonstrations rotate over a label's documents
    pseudo_documents = [
        records[i * len(records) // PSEUDO_SAMPLES_PER_LABEL]
        for _, records in sorted(by_label.items())
        for i in range(PSEUDO_SAMPLES_PER_LABEL)
    ]

    names = json.loads((args.source / "arxiv_mlc" / "labels.json").read_text(encoding="utf-8"))
    descriptions = [
        {"label": record["label"], "name": names[record["label"]]["name"], "description": record["expansion"]}
        for record in read(args.source / "llm" / "arxiv_mlc_expansions.jsonl")
    ]

    args.output.mkdir(parents=True, exist_ok=True)
    for split, documents in splits.items():
        write(args.output / f"{split}.jsonl.gz", documents)
    write(args.output / "pseudo_documents.jsonl.gz", pseudo_documents)
    write(args.output / "label_descriptions.jsonl", descriptions)


if __name__ == "__main__":
    main()
