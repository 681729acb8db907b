#!/usr/bin/env python
"""
How faithful the pipeline's explanations are, compared with gradient x input, integrated gradients, lexical parts and random order.

    python benchmarks/explanations.py --checkpoints arxiv_mlc=FOLDER debtags=FOLDER --files arxiv_mlc=FILE debtags=FILE

Checkpoints are models as `run_mldc.py` trains them with its defaults on 1,000 documents. Files hold documents that they were not trained
on: validation documents to choose (`--fades`), test documents to confirm. For the best label of each of `--documents` documents:

- Spearman's rank correlation, over `--words` words, of a word's score with the fall of the label's logit when that word alone is masked:
  neither the encoder nor the lexical scores read it, and all other tokens keep their positions. Also when it is taken out of the text, so
  that all tokens behind it move by one or more positions, and when the mask token takes its place.
- Pearson's correlation, over `--subsets` random sets of a fifth of the words, of the sum of their scores with the fall of the logit
  of a text without all of them (Bhatt et al., 2020), which no method measures.
- Deletion and insertion curves (Petsiuk et al., 2018): the logit of a text without the most important words, and with them alone. The
  areas are means over the shares of words of the fall of the logit, and of the logit above that of a document without words.
- Seconds of one core, and `remainder` as a share of the difference between logit and bias.

For the first `--ceilings` documents two methods that are too expensive in practice: masking every word individually (Spearman 1 by definition), and a
greedy search, which measures each remaining word by the pipeline's method again after each twentieth of the words is deleted.

References and curves are computed in bfloat16 where the processor computes it, which moves a word's effect by a twentieth of its
standard deviation.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from tasks import write_json
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from modeling_sep_mldc import (
    MultiLabelDocumentClassificationPipeline,
    SepMldcForMultiLabelClassification,
    explanation_sep_mldc,
)
from modeling_sep_mldc.explanation_sep_mldc import explain_window, masked_copies, words_of_tokens
from trainer.data import load_splits
from trainer.devices import is_bfloat16_native


RESULTS = Path(__file__).parent / "results" / "explanations.json"
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
REMOVALS = ("masked", "taken out", "mask token")
BFLOAT16 = is_bfloat16_native(use_cpu=True)


class Document:
    """A document as the model reads it, and logits of its label without some of its words."""

    def __init__(self, model, tokenizer, text: str):
        self.model, self.tokenizer, self.text = model, tokenizer, text
        limit = model.config.max_tokens(tokenizer)
        encoded = tokenizer(
            text, truncation=True, max_length=limit, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        self.ids = torch.tensor(encoded["input_ids"])
        self.spans, word_ids = words_of_tokens(text, encoded["offset_mapping"], encoded["special_tokens_mask"])
        self.word_ids, self.num_words = torch.tensor(word_ids), len(self.spans)
        # The text that was read, so that the pipeline reads one window.
        self.text = text[: max((end for _, end in encoded["offset_mapping"]), default=0)]
        self.label = int(self.logits_of(self.no_words, label=None)[0].argmax())

    @property
    def no_words(self) -> torch.Tensor:
        return torch.zeros(1, self.num_words, dtype=torch.bool)

    @torch.no_grad()
    def logits_of(self, removed: torch.Tensor, how: str = "taken out", label: int | None = -1) -> torch.Tensor:
        """Logits (K,) of the label, or (K, L) of all, without the words `removed` (K, W), see `REMOVALS`."""
        outside = torch.zeros(len(removed), 1, dtype=torch.bool)
        found = []
        for rows in torch.cat([removed, outside], dim=1)[:, self.word_ids].split(16):
            with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                found.append(self.model(**self.copies(rows, how)).logits.float())
        logits = torch.cat(found)
        return logits if label is None else logits[:, self.label]

    def copies(self, rows: torch.Tensor, how: str) -> dict[str, torch.Tensor]:
        ids = self.ids[None]
        if how == "masked":
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return masked_copies(inputs, rows, self.tokenizer.pad_token_id)
        if how == "mask token":
            ids = ids.expand(len(rows), -1).masked_fill(rows, self.tokenizer.mask_token_id)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        left = [self.ids[~row] for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in left], batch_first=True)
        return {
            "input_ids": pad_sequence(left, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": mask,
        }

    def of_words(self, of_tokens: torch.Tensor) -> np.ndarray:
        kept = self.word_ids >= 0
        return torch.zeros(self.num_words).index_add(0, self.word_ids[kept], of_tokens[kept].float()).numpy()

    # ---- Scores of words ----

    def pipeline(self, classify) -> tuple[np.ndarray, float]:
        """Scores, and the share that belongs to no word."""
        answer = classify(self.text, return_explanation=True, explanation_size=10**6, top_k=1)
        (found,) = answer["explanations"].values()
        scores = {(word["start"], word["end"]): word["score"] for word in found["words"]}
        share = abs(found["remainder"]) / max(abs(found["logit"] - found["bias"]), 1e-6)
        return np.array([scores.get(span, 0.0) for span in self.spans]), share

    def lexical(self) -> torch.Tensor:
        scale = self.model.config.logit_calibration[0]
        return scale * self.model.lexical.contributions(self.ids, [self.label])[0]

    def lexical_of_words(self) -> np.ndarray:
        return self.of_words(self.lexical())

    def gradient_x_input(self) -> np.ndarray:
        embeds = self.model.get_input_embeddings()(self.ids)[None].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.model(inputs_embeds=embeds).logits[0, self.label], embeds)
        return self.of_words((gradient * embeds).sum(-1)[0].detach() + self.lexical())

    def integrated_gradients(self) -> np.ndarray:
        from captum.attr import IntegratedGradients

        embeds = self.model.get_input_embeddings()(self.ids)[None].detach()
        baseline = self.ids.masked_fill(self.word_ids >= 0, self.tokenizer.pad_token_id)
        baseline = self.model.get_input_embeddings()(baseline)[None].detach()
        method = IntegratedGradients(lambda embeds: self.model(inputs_embeds=embeds).logits[:, self.label])
        found = method.attribute(embeds, baselines=baseline, n_steps=8, internal_batch_size=8)
        return self.of_words(found.sum(-1)[0].detach() + self.lexical())

    # ---- Methods that are too expensive in practice ----

    def every_word_masked(self) -> np.ndarray:
        every = torch.cat([self.no_words, torch.eye(self.num_words, dtype=torch.bool)])
        logits = self.logits_of(every, "masked")
        return (logits[0] - logits[1:]).numpy()

    def greedy(self) -> np.ndarray:
        """Ranks, the highest for the words that are deleted first, down to half of the words."""
        ranks, gone = np.zeros(self.num_words), self.no_words[0]
        step = max(round(self.num_words / 20), 1)
        while gone.float().mean() < max(SHARES):
            left = self.word_ids < 0
            left[~left] = ~gone[self.word_ids[~left]]
            kept = (~gone).nonzero().flatten()
            new_owners = torch.cat([(~gone).cumsum(0) - 1, torch.tensor([-1])])[self.word_ids[left]]
            ids = self.ids[left][None]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            parts = explain_window(self.model, inputs, new_owners.tolist(), [self.label], 36, 0)
            for word in kept[(parts.lexical + parts.encoder)[:, 0].argsort(descending=True, stable=True)][:step]:
                ranks[word] = self.num_words - int(gone.sum())
                gone[word] = True
        return ranks


def scores_of(document: Document, classify, options, with_ceilings: bool) -> tuple[dict, dict, dict]:
    """Scores of words, CPU seconds and shares of the remainder, by method."""
    methods = {"gradient x input": document.gradient_x_input, "lexical part alone": document.lexical_of_words}
    methods["integrated gradients"] = document.integrated_gradients
    if with_ceilings:
        methods |= {"every word masked": document.every_word_masked, "greedy": document.greedy}
    scores, seconds, remainders = {}, {}, {}
    variants = {"pipeline": explanation_sep_mldc.FADES}
    variants |= {f"pipeline, fades {fades}": tuple(map(float, fades.split(","))) for fades in options.fades}
    for name, fades in variants.items():
        former, explanation_sep_mldc.FADES = explanation_sep_mldc.FADES, fades
        start = time.thread_time()
        try:
            scores[name], remainders[name] = document.pipeline(classify)
        finally:
            explanation_sep_mldc.FADES = former
        seconds[name] = time.thread_time() - start
    for name, method in methods.items():
        if name in options.without:
            continue
        start = time.thread_time()
        try:
            scores[name] = method()
        except ImportError:  # captum
            continue
        seconds[name] = time.thread_time() - start
    return scores, seconds, remainders


def measure(document: Document, classify, options, rng: np.random.Generator, with_ceilings: bool) -> dict:
    """All metrics of one document."""
    scores, seconds, remainders = scores_of(document, classify, options, with_ceilings)
    scores["random"] = rng.random(document.num_words)
    words = rng.permutation(document.num_words)[: options.words]
    single = torch.zeros(1 + len(words), document.num_words, dtype=torch.bool)  # the first is the whole document
    single[torch.arange(1, len(single)), torch.as_tensor(words)] = True
    logits = {how: document.logits_of(single, how).numpy() for how in REMOVALS}
    subsets = torch.as_tensor(rng.random((options.subsets, document.num_words)) < 0.2)
    full, empty, *of_subsets = document.logits_of(torch.cat([document.no_words, ~document.no_words, subsets])).tolist()
    result = {}
    for name, values in scores.items():
        order = np.argsort(-values, kind="stable")
        removed = torch.zeros(len(SHARES), document.num_words, dtype=torch.bool)
        for row, share in zip(removed, SHARES):
            row[torch.as_tensor(order[: max(round(share * document.num_words), 1)].copy())] = True
        curves = document.logits_of(torch.cat([removed, ~removed])).numpy().reshape(2, -1)
        sums = subsets.numpy().astype(float) @ values
        result[name] = {
            **{f"spearman, {how}": spearman(values[words], logits[how][0] - logits[how][1:]) for how in REMOVALS},
            "subsets": float(np.nan_to_num(np.corrcoef(sums, full - np.array(of_subsets))[0, 1]))
            if sums.std()
            else 0.0,
            "deletion": (full - curves[0]).tolist(),
            "insertion": (curves[1] - empty).tolist(),
            "seconds": seconds.get(name, 0.0),
            "remainder_share": remainders.get(name, 0.0),
        }
    return {"words": document.num_words, "methods": result}


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.nan_to_num(spearmanr(first, second).statistic)) if np.ptp(first) and np.ptp(second) else 0.0


def summary(documents: list[dict]) -> dict:
    """Means over documents, per method."""
    found = {}
    for name in documents[0]["methods"]:
        rows = [document["methods"][name] for document in documents if name in document["methods"]]
        means = {key: np.mean([row[key] for row in rows], axis=0) for key in rows[0]}
        found[name] = {
            **{key: np.round(value, 3).tolist() for key, value in means.items()},
            "deletion_area": round(float(means["deletion"].mean()), 3),
            "insertion_area": round(float(means["insertion"].mean()), 3),
            "remainder_share": round(float(np.median([row["remainder_share"] for row in rows])), 3),
            "most_seconds": round(max(row["seconds"] for row in rows), 3),
        }
    base, random = found["gradient x input"]["deletion_area"], found["random"]["deletion_area"]
    for values in found.values():
        values["deletion_ratio"] = round((values["deletion_area"] - random) / (base - random), 2)
    return {
        "documents": len(documents),
        "mean_words": round(float(np.mean([document["words"] for document in documents])), 1),
        "methods": found,
    }


def summaries(documents: list[dict], num_ceilings: int) -> dict:
    """All documents with the methods that all of them have, and the first ones with all methods."""
    names = [name for name in documents[0]["methods"] if all(name in document["methods"] for document in documents)]
    usable = [{**document, "methods": {name: document["methods"][name] for name in names}} for document in documents]
    result = summary(usable)
    if num_ceilings:
        result["ceilings"] = summary(documents[:num_ceilings])
    return result


def draw(results: dict, path: Path) -> None:
    """Deletion and insertion curves of each dataset."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 2, figsize=(9, 3.4 * len(results)), squeeze=False)
    for row, (name, result) in zip(axes, results.items()):
        titles = ("deletion: fall of the logit", "insertion: logit above no words")
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
    parser.add_argument("--files", **pairs)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--words", type=int, default=25)
    parser.add_argument("--subsets", type=int, default=24)
    parser.add_argument("--ceilings", type=int, default=20)
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out")
    parser.add_argument(
        "--fades", nargs="*", default=[], help="other points of the pipeline's method, such as 0 or 0,-1"
    )
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--plot", default=None, help="a file for the plot of the curves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files, found, sources = dict(options.files), {}, {}
    for name, folder in options.checkpoints:
        model = SepMldcForMultiLabelClassification.from_pretrained(folder).requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = load_splits(test_file=files[name], label_column=None)["test"]["text"][: options.documents]
        classify = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tokenizer)
        sources[name], found[name] = (model, tokenizer, classify, texts), []
    for number in range(options.documents):
        for name, (model, tokenizer, classify, texts) in sources.items():
            document = Document(model, tokenizer, texts[number])
            if document.num_words >= 10:
                rng, with_ceilings = np.random.default_rng(number), len(found[name]) < options.ceilings
                found[name].append(measure(document, classify, options, rng, with_ceilings))
        if number % 10 == 9 or number == options.documents - 1:
            results = {name: summaries(documents, options.ceilings) for name, documents in found.items()}
            write_json(Path(options.output), {"shares": SHARES, "data": results})
            if options.plot:
                draw(results, Path(options.plot))
            print(f"{number + 1} documents", flush=True)
    for name, result in results.items():
        for part in (result, result.get("ceilings")):
            if part is not None:
                show(name, part)


def show(name: str, result: dict) -> None:
    print(f"\n{name}: {result['documents']} documents of {result['mean_words']} words")
    keys = [f"spearman, {how}" for how in REMOVALS] + ["subsets", "deletion_area", "deletion_ratio", "insertion_area"]
    keys += ["seconds", "most_seconds", "remainder_share"]
    print("| |", " | ".join(keys), "|")
    for method, values in result["methods"].items():
        print(f"| {method} |", " | ".join(str(values[key]) for key in keys), "|")


if __name__ == "__main__":
    main()
