"""The gate between generated pseudo-documents and training."""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .files import AugmentationError, check_writable, read_documents, read_json_lines, write_json_lines
from .language import is_language
from .near_duplicates import THRESHOLD, NearDuplicateIndex, shingles, words
from .prompts import PromptBuilder, approximate_tokens, template_names
from .tasks import is_refusal


KEPT, REJECTED = "pseudo_samples_kept.jsonl", "pseudo_samples_rejected.jsonl"
REASONS = (
    "empty",
    "refusal",
    "boilerplate",
    "prompt_echo",
    "cut_off",
    "too_short",
    "too_long",
    "wrong_language",
    "copy_of_demonstration",
    "duplicate_of_excluded",
    "near_duplicate_of_excluded",
    "duplicate_of_train",
    "near_duplicate_of_train",
    "duplicate_of_sample",
    "near_duplicate_of_sample",
    "disagreement",
)
ECHO_WORDS = 8  # words in a row; so many are not the same by chance
COPIED_SHARE = 0.3  # of a text's eight-word runs

_BOILERPLATE = re.compile(
    r"\A\W*((sure|certainly|of course|absolutely|okay|ok|great)\b\s*[,!.:]"
    r"|here(’|')?s?( is| are)? (a|an|the|your|one|my)\b[^.\n]{0,80}:"
    r"|(the following|below) is an? )"
    r"|as an ai (language )?model|as a large language model"
    r"|(let me know if|i hope (this|that) helps|feel free to (ask|adjust|modify)|would you like me to)"
    r"|\[(insert|your|name|date|title)\b[^\]\n]{0,40}\]"
    r"|```",
    re.I,
)
_FENCE = re.compile(r"</?document-[0-9a-f]{8}>")

Scorer = Callable[[Sequence[str]], Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class ReviewOptions:
    """
    When a pseudo-document is rejected.

    Args:
        min_length_ratio, max_length_ratio (`float`): Length in tokens, as a share of the demonstration's (without one: of the
            median of the training documents).
        min_words (`int`): Fewest words, whatever the demonstration.
        near_duplicate_threshold (`float`): Jaccard similarity of three-word runs from which two texts are near-duplicates.
        language (`str`): ISO 639-1 code.
        min_agreement (`float`, *optional*): Smallest mean score of a trained model for the intended labels; needs scores.
    """

    min_length_ratio: float = 0.4
    max_length_ratio: float = 2.5
    min_words: int = 8
    near_duplicate_threshold: float = THRESHOLD
    language: str = "en"
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_length_ratio < self.max_length_ratio:
            raise AugmentationError(
                f"the length ratios are {self.min_length_ratio} and {self.max_length_ratio}, but the first must be smaller "
                "and not negative; correct them."
            )
        if not 0 < self.near_duplicate_threshold <= 1:
            raise AugmentationError(
                f"the near-duplicate threshold is {self.near_duplicate_threshold}, but a similarity lies above 0 and at "
                "most at 1; correct it."
            )


@dataclass
class ReviewSummary:
    """How many samples were kept and why the others were not; prints as a table."""

    kept: int
    rejected: dict[str, int]
    by_label: dict[str, tuple[int, int]]
    kept_file: Path
    rejected_file: Path
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = self.kept + sum(self.rejected.values())
        lines = [f"{'verdict':<28} {'samples':>8} {'share':>7}"]
        rows = [("kept", self.kept), *((name, self.rejected[name]) for name in REASONS if name in self.rejected)]
        lines += [f"{name:<28} {number:>8} {number / max(total, 1):>7.1%}" for name, number in rows]
        poor = sorted((kept, label, number) for label, (kept, number) in self.by_label.items() if kept < number / 2)
        if poor:
            lines.append("Labels that keep less than half of their samples:")
            lines += [f"  {label}: {kept} of {number}" for kept, label, number in poor[:20]]
        return "\n".join([*lines, *self.notes, f"Written: {self.kept_file}, {self.rejected_file}"])


class Reviewer:
    """
    Judges samples one after the other; of two that are nearly the same the first is kept.

    Args:
        train, excluded: Documents of the train and of the validation and test files.
        options (`ReviewOptions`, *optional*).
        prompts: Builders whose instructions must not come back as a text.
    """

    def __init__(self, train, excluded=(), options: ReviewOptions | None = None, prompts=()) -> None:
        self.options = options or ReviewOptions()
        threshold = self.options.near_duplicate_threshold
        self.train = {document.id: document.text for document in train}
        self._indices = {"excluded": NearDuplicateIndex(threshold), "train": NearDuplicateIndex(threshold)}
        for name, documents in (("excluded", excluded), ("train", train)):
            for document in tqdm(documents, desc=f"hashing {name}", unit="doc", disable=len(documents) < 2000):
                self._indices[name].add(document.id, document.text)
        self._indices["sample"] = NearDuplicateIndex(threshold)
        lengths = sorted(approximate_tokens(text) for text in list(self.train.values())[:1000] if text)
        self._usual_length = lengths[len(lengths) // 2] if lengths else None
        self._instructions = set()
        for builder in prompts:
            messages = [*builder.sample([("x", "")], None, 100), *builder.expand("x")]
            for message in messages:
                self._instructions |= _runs(message["content"])

    def judge(self, sample: Mapping[str, Any], scores: Mapping[str, float] | None = None) -> tuple[str, str] | None:
        """The reason for a rejection and its detail, or None for a sample that is kept (and remembered)."""
        text = sample["text"]
        verdict = self._content(sample, text) or self._duplicate(sample, text)
        if verdict is None and self.options.min_agreement is not None and scores is not None:
            agreement = mean_score(sample, scores)
            if agreement < self.options.min_agreement:
                verdict = ("disagreement", f"mean score {agreement:.3f} of the intended labels")
        if verdict is None:
            self._indices["sample"].add(str(sample.get("id", "a sample without id")), text)
        return verdict

    def _content(self, sample: Mapping[str, Any], text: str) -> tuple[str, str] | None:
        options = self.options
        if not text.strip():
            return "empty", ""
        if is_refusal(text):
            return "refusal", text[:80]
        found = _BOILERPLATE.search(text)
        if found:
            return "boilerplate", found[0][:80]
        echoed = self._instructions & _runs(text)
        if echoed or _FENCE.search(text):
            return "prompt_echo", min(echoed, default="a document tag")
        if "cut_off" in (sample.get("marks") or "").split():
            return "cut_off", text[-40:]
        demonstration = self.train.get(str(sample.get("demonstration_id")))
        length = approximate_tokens(text)
        usual = approximate_tokens(demonstration) if demonstration else self._usual_length
        number = len(words(text))
        if number < options.min_words or (usual and length < options.min_length_ratio * usual):
            return "too_short", f"{length} tokens, usual {usual}"
        if usual and length > max(options.max_length_ratio * usual, options.min_words):
            return "too_long", f"{length} tokens, usual {usual}"
        if not is_language(text, options.language):
            return "wrong_language", text[:80]
        if demonstration:
            runs = _runs(text)
            share = len(runs & _runs(demonstration)) / max(len(runs), 1)
            if share > COPIED_SHARE:
                return "copy_of_demonstration", f"{share:.0%} of its eight-word runs"
        return None

    def _duplicate(self, sample: Mapping[str, Any], text: str) -> tuple[str, str] | None:
        for name, index in self._indices.items():
            exact = index.find_exact(text)
            if exact is not None:
                return f"duplicate_of_{name}", exact
            near = index.find(text)
            if near is not None:
                return f"near_duplicate_of_{name}", near
        return None


def _runs(text: str) -> set[str]:
    return {run for run in shingles(text, ECHO_WORDS) if run.count(" ") == ECHO_WORDS - 1}


def mean_score(sample: Mapping[str, Any], scores: Mapping[str, float]) -> float:
    """Mean of a model's scores for the intended labels; a label without a score counts 0."""
    labels = sample["labels"]
    return sum(scores.get(label, 0.0) for label in labels) / max(len(labels), 1)


def read_scores(path: str | Path, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """
    Scores of the samples from a file of `{"id" or "index", "labels": [{"label", "score"}]}`, as `examples/predict.py` writes it.

    Raises:
        AugmentationError: if a sample has no scores, or a line has another form.
    """
    by_id, by_index, number = {}, {}, 0
    for line, row in read_json_lines(path):
        try:
            scores = {str(item["label"]): float(item["score"]) for item in row["labels"]}
        except (KeyError, TypeError, ValueError):
            raise AugmentationError(
                f'{path}, line {line}: `labels` must be a list of {{"label", "score"}}; write the file with '
                "examples/predict.py."
            ) from None
        if row.get("id") is not None:
            by_id[str(row["id"])] = scores
        by_index[int(row.get("index", number))] = scores
        number += 1
    found = []
    for index, sample in enumerate(samples):
        scores = by_id.get(str(sample.get("id"))) if by_id else by_index.get(index)
        if scores is None:
            raise AugmentationError(
                f"{path} has no scores for the sample {sample.get('id', index)!r}; predict the same file that is reviewed."
            )
        found.append(scores)
    return found


def review(
    samples: str | Path,
    output_dir: str | Path,
    train: str | Path | Sequence[str | Path],
    exclude: Sequence[str | Path] = (),
    options: ReviewOptions | None = None,
    prompts: PromptBuilder | None = None,
    scores: str | Path | Scorer | None = None,
) -> ReviewSummary:
    """
    Divides samples into `pseudo_samples_kept.jsonl` and `pseudo_samples_rejected.jsonl` (with `reason` and `reason_detail`).

    Each sample ends in exactly one of the files. Kept rows have the columns of the input, and `agreement` if there are scores.

    Args:
        samples: `pseudo_samples.jsonl`.
        output_dir: Folder of the two files.
        train: The train file or files the samples were made from.
        exclude: Validation and test files; a sample must not be nearly the same as one of their documents.
        options (`ReviewOptions`, *optional*).
        prompts (`PromptBuilder`, *optional*): The prompt the samples were made with, whose words must not come back; those of the
            package's templates are known.
        scores (*optional*): Scores of a trained model: a file of `examples/predict.py`, or a function from texts to
            `{label: score}`. Used with `options.min_agreement`.

    Raises:
        AugmentationError: bad input.
    """
    options = options or ReviewOptions()
    if options.min_agreement is not None and scores is None:
        raise AugmentationError(
            "`min_agreement` is given but no scores of a model; add `--scores` with a file of examples/predict.py."
        )
    output_dir = Path(output_dir)
    check_writable(output_dir)
    rows = []
    for number, row in read_json_lines(samples):
        if not isinstance(row.get("text"), str) or not isinstance(row.get("labels"), list):
            raise AugmentationError(
                f"{samples}, line {number}: `text` must be a string and `labels` a list; give a file that tail-samples "
                "has written."
            )
        rows.append(row)
    scored: Sequence[Mapping[str, float] | None] = [None] * len(rows)
    if callable(scores):
        scored = list(scores([row["text"] for row in rows]))
    elif scores is not None:
        scored = read_scores(scores, rows)
    builders = [PromptBuilder(name, language=options.language) for name in template_names()]
    builders += [prompts] if prompts else []
    reviewer = Reviewer(read_documents(train), read_documents(exclude, need_labels=False), options, builders)
    kept, rejected, reasons = [], [], collections.Counter()
    by_label: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for row, label_scores in zip(rows, scored):
        if label_scores is not None:
            row = {**row, "agreement": round(mean_score(row, label_scores), 4)}
        verdict = reviewer.judge(row, label_scores)
        counts = by_label[str(row.get("tail_label"))]
        counts[1] += 1
        if verdict is None:
            counts[0] += 1
            kept.append(row)
        else:
            reasons[verdict[0]] += 1
            rejected.append({**row, "reason": verdict[0], "reason_detail": verdict[1]})
    write_json_lines(output_dir / KEPT, kept)
    write_json_lines(output_dir / REJECTED, rejected)
    numbers = {label: (counts[0], counts[1]) for label, counts in by_label.items()}
    return ReviewSummary(len(kept), dict(reasons), numbers, output_dir / KEPT, output_dir / REJECTED)
