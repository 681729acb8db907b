#!/usr/bin/env python
"""
How faithful the pipeline's explanations are, compared with gradient x input, integrated gradients, lexical parts and random order.

    python benchmarks/explanations.py --checkpoints arxiv_mlc=FOLDER debtags=FOLDER --test_files arxiv_mlc=FILE debtags=FILE

Checkpoints are models as `run_mldc.py` trains them with its defaults on 1,000 documents. For the best label of each of `--documents` test
documents:

- Spearman's rank correlation, over `--words` words, of a word's score with the fall of the label's logit when that word alone is left
  out, and when it is replaced by the mask token. Where documents are so short that the pipeline leaves out each word by itself, the
  first is 1 by construction, so it is also given for documents with groups of words alone.
- Pearson's correlation, over `--subsets` random sets of a fifth of the words, of the sum of their scores with the fall of the logit
  without all of them (Bhatt et al., 2020): no method has measured these.
- Deletion and insertion curves (Petsiuk et al., 2018): the logit without the most important words, and with them alone. The areas are
  means over the shares of words of the fall of the logit, and of the logit above that of a document without words.
- Seconds of one core.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from quality import write_json
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline, SepMldcForMultiLabelClassification
from modeling_sep_mldc.explanation_sep_mldc import _without, words_of_tokens


RESULTS = Path(__file__).parent / "results" / "explanations.json"
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)


class Document:
    """A document as the model reads it, and logits of its label without some of its words."""

    def __init__(self, model, tokenizer, text: str):
        self.model, self.tokenizer, self.text = model, tokenizer, text
        limit = model.config.max_tokens(tokenizer)
        encoded = tokenizer(
            text, truncation=True, max_length=limit, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        self.ids = torch.tensor(encoded["input_ids"])
        self.spans, owners = words_of_tokens(text, encoded["offset_mapping"], encoded["special_tokens_mask"])
        self.owners, self.num_words = torch.tensor(owners), len(self.spans)
        # The text that was read, so that the pipeline reads one window.
        self.text = text[: max((end for _, end in encoded["offset_mapping"]), default=0)]
        self.label = int(self.logits_of(torch.zeros(1, self.num_words, dtype=torch.bool), label=None)[0].argmax())

    @torch.no_grad()
    def logits_of(self, left_out: torch.Tensor, label: int | None = -1, mask: bool = False, bf16: bool = False):
        """Logits (K,) of the label, or (K, L) of all, without the words `left_out` (K, W), or with mask tokens in their place."""
        left_out = torch.cat([left_out, torch.zeros(len(left_out), 1, dtype=torch.bool)], dim=1)[:, self.owners]
        inputs = {"input_ids": self.ids[None], "attention_mask": torch.ones_like(self.ids)[None]}
        found = []
        for rows in left_out.split(16):
            batch = _without(inputs, rows, self.tokenizer.pad_token_id)
            if mask:
                ids = inputs["input_ids"].expand(len(rows), -1).masked_fill(rows, self.tokenizer.mask_token_id)
                batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found.append(self.model(**batch).logits.float())
        logits = torch.cat(found)
        return logits if label is None else logits[:, self.label]

    def of_words(self, of_tokens: torch.Tensor) -> np.ndarray:
        kept = self.owners >= 0
        return torch.zeros(self.num_words).index_add(0, self.owners[kept], of_tokens[kept].float()).numpy()

    # ---- Scores of words ----

    def pipeline(self, classify) -> tuple[np.ndarray, int]:
        answer = classify(self.text, return_explanation=True, explanation_size=10**6, top_k=1)
        (found,) = answer["explanations"].values()
        scores = {(word["start"], word["end"]): word["score"] for word in found["words"]}
        return np.array([scores.get(span, 0.0) for span in self.spans]), found["words_per_group"]

    def lexical(self) -> torch.Tensor:
        scale = self.model.config.logit_calibration[0]
        return scale * self.model.lexical.contributions(self.ids, [self.label])[0]

    def gradient_x_input(self) -> np.ndarray:
        embeds = self.model.get_input_embeddings()(self.ids)[None].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.model(inputs_embeds=embeds).logits[0, self.label], embeds)
        return self.of_words((gradient * embeds).sum(-1)[0].detach() + self.lexical())

    def integrated_gradients(self) -> np.ndarray:
        from captum.attr import IntegratedGradients

        embeds = self.model.get_input_embeddings()(self.ids)[None].detach()
        baseline = self.ids.masked_fill(self.owners >= 0, self.tokenizer.pad_token_id)
        baseline = self.model.get_input_embeddings()(baseline)[None].detach()
        method = IntegratedGradients(lambda embeds: self.model(inputs_embeds=embeds).logits[:, self.label])
        found = method.attribute(embeds, baselines=baseline, n_steps=8, internal_batch_size=8)
        return self.of_words(found.sum(-1)[0].detach() + self.lexical())


def measure(document: Document, classify, options, rng: np.random.Generator) -> dict:
    """All figures of one document."""
    timed = {}
    methods = {"gradient x input": document.gradient_x_input, "lexical part alone": lambda: None}
    methods["integrated gradients"] = document.integrated_gradients
    scores = {"random": rng.random(document.num_words)}
    start = time.thread_time()
    scores["pipeline"], per_group = document.pipeline(classify)
    timed["pipeline"] = time.thread_time() - start
    for name, method in methods.items():
        start = time.thread_time()
        try:
            found = method()
        except ImportError:
            continue
        timed[name] = time.thread_time() - start
        scores[name] = document.of_words(document.lexical()) if found is None else found
    nothing = torch.zeros(1, document.num_words, dtype=torch.bool)
    words = rng.permutation(document.num_words)[: options.words]
    single = torch.zeros(len(words), document.num_words, dtype=torch.bool)
    single[torch.arange(len(words)), torch.as_tensor(words)] = True
    full = document.logits_of(nothing).item()
    left_out = full - document.logits_of(single).numpy()
    masked = full - document.logits_of(single, mask=True).numpy()
    subsets = torch.as_tensor(rng.random((options.subsets, document.num_words)) < 0.2)
    falls = full - document.logits_of(subsets, bf16=True).numpy()
    empty = document.logits_of(~nothing).item()
    result = {}
    for name, values in scores.items():
        order = np.argsort(-values)
        removed = []
        for share in SHARES:
            row = torch.zeros(document.num_words, dtype=torch.bool)
            row[torch.as_tensor(order[: max(round(share * document.num_words), 1)].copy())] = True
            removed += [row, ~row]
        logits = document.logits_of(torch.stack(removed), bf16=True).numpy().reshape(-1, 2)
        sums = subsets.numpy().astype(float) @ values
        result[name] = {
            "spearman_left_out": float(np.nan_to_num(spearmanr(values[words], left_out).statistic)),
            "spearman_masked": float(np.nan_to_num(spearmanr(values[words], masked).statistic)),
            "subsets": float(np.nan_to_num(np.corrcoef(sums, falls)[0, 1])) if sums.std() else 0.0,
            "deletion": (full - logits[:, 0]).tolist(),
            "insertion": (logits[:, 1] - empty).tolist(),
            "seconds": timed.get(name, 0.0),
        }
    return {"words": document.num_words, "words_per_group": per_group, "methods": result}


def summary(documents: list[dict]) -> dict:
    """Means over documents, per method."""
    found = {}
    for name in documents[0]["methods"]:
        rows = [document["methods"][name] for document in documents if name in document["methods"]]
        means = {key: np.mean([row[key] for row in rows], axis=0) for key in rows[0]}
        grouped = [
            document["methods"][name]["spearman_left_out"] for document in documents if document["words_per_group"] > 1
        ]
        found[name] = {
            **{key: np.round(value, 3).tolist() for key, value in means.items()},
            "deletion_area": round(float(means["deletion"].mean()), 3),
            "insertion_area": round(float(means["insertion"].mean()), 3),
            "spearman_left_out_groups": round(float(np.mean(grouped)), 3) if grouped else None,
            "most_seconds": round(max(row["seconds"] for row in rows), 3),
        }
    return {
        "documents": len(documents),
        "documents_with_groups": sum(document["words_per_group"] > 1 for document in documents),
        "mean_words": round(float(np.mean([document["words"] for document in documents])), 1),
        "methods": found,
    }


def draw(results: dict, path: Path) -> None:
    """Deletion and insertion curves of each data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 2, figsize=(9, 3.4 * len(results)), squeeze=False)
    for row, (name, result) in zip(axes, results.items()):
        titles = ("deletion: fall of the logit", "insertion: logit above an empty document's")
        for axis, curve, title in zip(row, ("deletion", "insertion"), titles):
            for method, values in result["methods"].items():
                axis.plot([0, *(100 * share for share in SHARES)], [0, *values[curve]], marker=".", label=method)
            axis.set(title=f"{name}, {title}", xlabel="most important words (%)")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    pairs = {"type": lambda text: tuple(text.split("=", 1)), "nargs": "+", "required": True, "metavar": "NAME=PATH"}
    parser.add_argument("--checkpoints", **pairs)
    parser.add_argument("--test_files", **pairs)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--words", type=int, default=25)
    parser.add_argument("--subsets", type=int, default=24)
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--plot", default=None, help="a file for the picture of the curves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files, found, sources = dict(options.test_files), {}, {}
    for name, folder in options.checkpoints:
        model = SepMldcForMultiLabelClassification.from_pretrained(folder).requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with open(files[name], encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines][: options.documents]
        classify = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tokenizer)
        sources[name], found[name] = (model, tokenizer, classify, texts), []
    for number in range(options.documents):
        for name, (model, tokenizer, classify, texts) in sources.items():
            document = Document(model, tokenizer, texts[number])
            if document.num_words >= 10:
                found[name].append(measure(document, classify, options, np.random.default_rng(number)))
        if number % 10 == 9 or number == options.documents - 1:
            results = {name: summary(documents) for name, documents in found.items()}
            write_json(Path(options.output), {"shares": SHARES, "data": results})
            if options.plot:
                draw(results, Path(options.plot))
            print(f"{number + 1} documents", flush=True)
    for name, result in results.items():
        print(f"\n{name}: {result['documents']} documents of {result['mean_words']} words")
        keys = ("spearman_left_out", "spearman_left_out_groups", "spearman_masked", "subsets")
        keys += ("deletion_area", "insertion_area", "seconds", "most_seconds")
        print("| |", " | ".join(keys), "|")
        for method, values in result["methods"].items():
            print(f"| {method} |", " | ".join(str(values[key]) for key in keys), "|")


if __name__ == "__main__":
    main()
