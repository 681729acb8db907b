#!/usr/bin/env python
"""
Heatmaps of the similarities that a checkpoint has learned, next to those of the data, as in Figures 2 and 3 of the paper.

    python examples/plot_similarity.py outputs/quickstart --train_file examples/data/train.jsonl.gz \
        --documents_file examples/data/test.jsonl.gz --output_dir outputs/similarity

Writes label_similarity.png (inner products of label embeddings, next to the Jaccard similarity of the labels in the
training documents, Eq. 5-8), document_similarity.png (inner products of document embeddings, next to the Jaccard
similarity of their label sets, Eq. 10-13) and similarity.json with the rank correlation of each pair of matrices.
Embeddings have unit length. Rows are ordered by average-linkage clustering of the embeddings. Needs the extra `plot`.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from modeling_sep_mldc import SepMldcForMultiLabelClassification
from trainer.data import encode_labels, label_counts, load_splits
from trainer.files import atomic_write
from trainer.losses import document_similarity, label_similarity


MINIMUM = 3  # fewer rows have no order and no rank correlation
LONGEST_NAME = 26


def inner_products(embeds: torch.Tensor) -> np.ndarray:
    """Inner products (n, n) of embeddings (n, d) scaled to unit length, in [-1, 1]."""
    unit = F.normalize(embeds.float(), dim=-1)
    return (unit @ unit.T).clamp(-1, 1).numpy()


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's ρ of two symmetric matrices (n, n) over the pairs i < j; None where one of them is constant."""
    pairs = np.triu_indices(len(first), k=1)
    first, second = first[pairs], second[pairs]
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def cluster_order(similarity: np.ndarray) -> np.ndarray:
    """Order (n,) of the rows of a similarity matrix (n, n) that puts similar ones side by side."""
    distance = np.maximum(1 - (similarity + similarity.T) / 2, 0)
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), method="average", optimal_ordering=True))


def multi_hot(label_indices: Iterable[Sequence[int]], chosen: Sequence[int]) -> torch.Tensor:
    """Documents' label ids to 0/1 columns (N, len(chosen)) of the chosen labels only."""
    column = {index: position for position, index in enumerate(chosen)}
    rows = list(label_indices)
    labels = torch.zeros(len(rows), len(column))
    for row, indices in enumerate(rows):
        labels[row, [column[index] for index in indices if index in column]] = 1
    return labels


def compare_labels(model: SepMldcForMultiLabelClassification, train, num_labels: int) -> dict:
    """Both matrices of the `num_labels` labels that most documents of `train` (a dataset with `label_indices`) have."""
    counts = label_counts(train, model.config.num_labels)
    chosen = [index for index in np.argsort(-counts, kind="stable")[:num_labels].tolist() if counts[index]]
    if len(chosen) < MINIMUM:
        raise ValueError(
            f"The training file has {len(chosen)} labels that the checkpoint knows, but {MINIMUM} are needed. Specify the file it "
            "was trained on."
        )
    jaccard, _ = label_similarity(multi_hot(train["label_indices"], chosen))
    return {
        "embeddings": inner_products(model.label_embeddings.detach()[chosen]),
        "data": jaccard.numpy(),
        "names": [model.config.id2label[index] for index in chosen],
    }


@torch.inference_mode()
def compare_documents(model: SepMldcForMultiLabelClassification, tokenizer, documents, max_length: int) -> dict:
    """Both matrices of `documents`, a dataset with `text` and `label_indices`."""
    if len(documents) < MINIMUM:
        raise ValueError(f"There are {len(documents)} documents, but {MINIMUM} are needed. Specify a larger file.")
    embeds = []
    for batch in tqdm(documents.iter(8), total=-(-len(documents) // 8), desc="Encoding", unit="batch"):
        inputs = tokenizer(batch["text"], padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        embeds.append(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).document_embeds)
    labels = multi_hot(documents["label_indices"], range(model.config.num_labels))
    return {
        "embeddings": inner_products(torch.cat(embeds)),
        "data": document_similarity(labels).numpy(),
        "names": [
            ", ".join(model.config.id2label[i] for i in ids) or "(no label)" for ids in documents["label_indices"]
        ],
    }


def draw(matrices: dict, titles: tuple[str, str]) -> bytes:
    """A PNG with embeddings on the left and data on the right, in the same clustered order."""
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure

    order = cluster_order(matrices["embeddings"])
    names = [matrices["names"][i] for i in order]
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in names]
    # A dollar sign would start a formula.
    names = [name.replace("$", r"\$") for name in names]
    font = max(3.0, min(8.0, 320 / len(names)))
    size = 2.0 + 0.11 * len(names)  # inches
    room = 0.0085 * font * max(map(len, names))
    figure = Figure(figsize=(2 * size + room + 2.2, size + room + 0.9), layout="constrained")
    rho = rank_correlation(matrices["embeddings"], matrices["data"])
    figure.suptitle(f"rank correlation of the two: {'undefined' if rho is None else f'{rho:.2f}'}", fontsize="medium")
    for axes, kind, title in zip(figure.subplots(1, 2), ("embeddings", "data"), titles):
        matrix = matrices[kind][np.ix_(order, order)]
        others = matrix[~np.eye(len(matrix), dtype=bool)]
        # The colors are scaled to the values off the diagonal. Most pairs of labels share few documents or none: a square root
        # makes the few visible.
        low, high = others.min(), max(others.max(), others.min() + 1e-6)
        norm = Normalize(low, high) if kind == "embeddings" else PowerNorm(0.5, low, high)
        image = axes.imshow(matrix, cmap="viridis", norm=norm)
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=font)
        axes.set_yticks(range(len(names)), names if kind == "embeddings" else [], fontsize=font)
        figure.colorbar(image, ax=axes, shrink=0.7, extend="max")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("checkpoint", help="folder or Hub name of a trained model")
    parser.add_argument("--train_file", nargs="+", required=True, help="the documents it was trained on")
    parser.add_argument("--documents_file", nargs="+", help="documents to compare; defaults to the training documents")
    parser.add_argument("--text_columns", nargs="+", default=["text"])
    parser.add_argument("--label_column", nargs="+", default=["labels"])
    parser.add_argument("--label_delimiter", default=None)
    parser.add_argument(
        "--num_labels", type=int, default=40, help="number of most frequent labels to draw (default %(default)s)"
    )
    parser.add_argument(
        "--num_documents", type=int, default=30, help="number of documents to draw (default %(default)s)"
    )
    parser.add_argument("--max_length", type=int, default=256, help="tokens per document (default %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the choice of documents (default %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/similarity"))
    options = parser.parse_args()
    for name in ("num_labels", "num_documents"):
        if getattr(options, name) < MINIMUM:
            raise ValueError(
                f"`--{name}` is {getattr(options, name)}, but it must be at least {MINIMUM}. Choose a larger number."
            )
    return options


def main() -> None:
    options = parse_arguments()
    model = SepMldcForMultiLabelClassification.from_pretrained(options.checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    splits = load_splits(
        train_file=options.train_file,
        test_file=options.documents_file,
        text_columns=options.text_columns,
        label_column=options.label_column[0] if len(options.label_column) == 1 else options.label_column,
        label_delimiter=options.label_delimiter,
    )
    splits = {name: encode_labels(documents, model.config.label2id) for name, documents in splits.items()}
    documents = splits.get("test", splits["train"]).shuffle(seed=options.seed)
    documents = documents.select(range(min(options.num_documents, len(documents))))
    limit = min(options.max_length, tokenizer.model_max_length)
    found = {
        "label": compare_labels(model, splits["train"], options.num_labels),
        "document": compare_documents(model, tokenizer, documents, limit),
    }
    titles = {
        "label": ("label embeddings, inner products", "labels in training, Jaccard"),
        "document": ("document embeddings, inner products", "label sets, Jaccard"),
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    summary = {}
    for kind, matrices in found.items():
        path = options.output_dir / f"{kind}_similarity.png"
        with atomic_write(path, "wb") as file:
            file.write(draw(matrices, titles[kind]))
        rho = rank_correlation(matrices["embeddings"], matrices["data"])
        summary[kind] = {"rows": len(matrices["names"]), "rank_correlation": rho}
        print(
            f"{path}: {len(matrices['names'])} {kind}s, rank correlation {'undefined' if rho is None else f'{rho:.3f}'}"
        )
    with atomic_write(options.output_dir / "similarity.json") as file:
        file.write(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"plot_similarity.py: {error}")
