"""Review of pseudo-documents before training."""

import collections
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .answers import is_refusal
from .checks import check_number
from .errors import AugmentationError
from .files import Document, read_documents, read_rows
from .kinds import PLAIN
from .language import is_language
from .near_duplicates import THRESHOLD, NearDuplicateIndex, shingles, words
from .progress import progress_bar
from .prompts import PromptBuilder, template_names
from .tokens import approximate_tokens
from .writing import check_output, check_writable, write_json_lines


KEPT, REJECTED = "pseudo_documents_kept.jsonl", "pseudo_documents_rejected.jsonl"
OLD_NAME = "pseudo_samples"  # in file names of version 0.1
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
    "duplicate_of_pseudo_document",
    "near_duplicate_of_pseudo_document",
    "disagreement",
)
ECHO_WORDS = 8  # words in a shingle; longer shared sequences are hardly a coincidence
COPIED_SHARE = 0.3  # of a text's eight-word shingles

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
    Criteria for rejecting a pseudo-document.

    Args:
        min_length_ratio, max_length_ratio (`float`): Length in tokens relative to that of the demonstration, or else to the median
            length of the training documents or pseudo-documents.
        min_words (`int`): Minimum number of words, regardless of the demonstration.
        near_duplicate_threshold (`float`): Jaccard similarity of three-word shingles from which on two texts are near-duplicates.
        language (`str`): ISO 639-1 code.
        min_agreement (`float`, *optional*): Minimum mean score of a trained model for the intended labels; needs scores.

    Raises:
        AugmentationError: if a number is outside its range.
    """

    min_length_ratio: float = 0.4
    max_length_ratio: float = 2.5
    min_words: int = 8
    near_duplicate_threshold: float = THRESHOLD
    language: str = "en"
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        check_number("min_length_ratio", self.min_length_ratio)
        check_number("max_length_ratio", self.max_length_ratio, self.min_length_ratio, above=True)
        check_number("min_words", self.min_words, integer=True)
        check_number("near_duplicate_threshold", self.near_duplicate_threshold, 0, 1, above=True)
        check_number("min_agreement", self.min_agreement, 0, 1, optional=True)


@dataclass
class ReviewSummary:
    """How many pseudo-documents were kept and why the others were not; prints as a table."""

    kept: int
    rejected: dict[str, int]
    by_label: dict[str, tuple[int, int]]
    kept_file: Path
    rejected_file: Path
    notes: list[str] = field(default_factory=list)
    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        total = self.kept + sum(self.rejected.values())
        lines = [f"{'verdict':<34} {'documents':>9} {'share':>7}"]
        rows = [("kept", self.kept), *((name, self.rejected[name]) for name in REASONS if name in self.rejected)]
        lines += [f"{name:<34} {number:>9} {number / max(total, 1):>7.1%}" for name, number in rows]
        if self.by_kind.keys() - {PLAIN, "None"}:
            lines += [f"kept of {kind:<26} {kept:>9} of {number}" for kind, (kept, number) in self.by_kind.items()]
        poor = sorted((kept, label, number) for label, (kept, number) in self.by_label.items() if kept < number / 2)
        if poor:
            lines.append("Labels that keep less than half of their pseudo-documents:")
            lines += [f"  {label}: {kept} of {number}" for kept, label, number in poor[:20]]
        return "\n".join([*lines, *self.notes, f"Written: {self.kept_file}, {self.rejected_file}"])


class Reviewer:
    """
    Reviews pseudo-documents one after the other; of two near-duplicates, the first is kept.

    Args:
        train, excluded: Documents of the train and of the validation and test files.
        options (`ReviewOptions`, *optional*).
        prompts: Builders whose instructions must not be repeated in a text.
        pseudo_documents: Texts whose median length is the reference if there are no training documents.
    """

    def __init__(
        self,
        train: Sequence[Document],
        excluded: Sequence[Document] = (),
        options: ReviewOptions | None = None,
        prompts: Sequence[PromptBuilder] = (),
        pseudo_documents: Sequence[str] = (),
    ) -> None:
        self.options = options or ReviewOptions()
        threshold = self.options.near_duplicate_threshold
        self.train = {document.id: document.text for document in train}
        self._indices = {"excluded": NearDuplicateIndex(threshold), "train": NearDuplicateIndex(threshold)}
        for name, documents in (("excluded", excluded), ("train", train)):
            for document in progress_bar(documents, desc=f"hashing {name}", unit="doc", show=len(documents) >= 2000):
                self._indices[name].add(document.id, document.text)
        self._indices["pseudo_document"] = NearDuplicateIndex(threshold)
        texts = list(self.train.values())[:1000] or pseudo_documents
        lengths = sorted(approximate_tokens(text) for text in texts if text)
        self._usual_length = lengths[len(lengths) // 2] if lengths else None
        self._instructions: set[str] = set()
        for builder in prompts:
            for messages in (
                builder.pseudo_document([("x", "")], None, 100),
                builder.pseudo_document([("x", "")], None, 100, near=("y", "")),
                builder.pseudo_document([("x", "")], None, 100, candidates=[("y", "")]),
                builder.label_description("x"),
            ):
                for message in messages:
                    self._instructions |= _runs(message["content"])

    def judge(self, row: Mapping[str, Any], scores: Mapping[str, float] | None = None) -> tuple[str, str] | None:
        """The reason for a rejection, with details; None for a pseudo-document that is kept, which later ones are then compared with."""
        text = row["text"]
        verdict = self._content(row, text) or self._duplicate(text)
        if verdict is None and self.options.min_agreement is not None and scores is not None:
            agreement = mean_score(row, scores)
            if agreement < self.options.min_agreement:
                verdict = ("disagreement", f"mean score {agreement:.3f} of the intended labels")
        if verdict is None:
            self._indices["pseudo_document"].add(str(row.get("id", "without id")), text)
        return verdict

    def _content(self, row: Mapping[str, Any], text: str) -> tuple[str, str] | None:
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
        if "cut_off" in str(row.get("marks") or "").split():
            return "cut_off", text[-40:]
        demonstration = self.train.get(str(row.get("demonstration_id")))
        verdict = self._length(text, demonstration)
        if verdict is not None:
            return verdict
        if not is_language(text, self.options.language):
            return "wrong_language", text[:80]
        if demonstration:
            runs = _runs(text)
            share = len(runs & _runs(demonstration)) / max(len(runs), 1)
            if share > COPIED_SHARE:
                return "copy_of_demonstration", f"{share:.0%} of its eight-word shingles"
        return None

    def _length(self, text: str, demonstration: str | None) -> tuple[str, str] | None:
        options = self.options
        length = approximate_tokens(text)
        usual = approximate_tokens(demonstration) if demonstration else self._usual_length
        if len(words(text)) < options.min_words or (usual and length < options.min_length_ratio * usual):
            return "too_short", f"{length} tokens, usual {usual}"
        if usual and length > max(options.max_length_ratio * usual, options.min_words):
            return "too_long", f"{length} tokens, usual {usual}"
        return None

    def _duplicate(self, text: str) -> tuple[str, str] | None:
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


def mean_score(row: Mapping[str, Any], scores: Mapping[str, float]) -> float:
    """Mean of a model's scores for the intended labels; a label without a score counts 0."""
    labels = row["labels"]
    return sum(scores.get(label, 0.0) for label in labels) / max(len(labels), 1)


def read_scores(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """
    Scores of pseudo-documents from a file of `{"id" or "index", "labels": [{"label", "score"}]}`, as `examples/predict.py` writes
    it.

    Raises:
        AugmentationError: if a pseudo-document has no scores, or a line is malformed.
    """
    by_id: dict[str, dict[str, float]] = {}
    by_index: dict[int, dict[str, float]] = {}
    for where, row in read_rows(path):
        try:
            scores = {str(item["label"]): float(item["score"]) for item in row["labels"]}
            index = int(row.get("index", len(by_index)))
            if not all(map(math.isfinite, scores.values())):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise AugmentationError(
                f'{where}: `labels` must be a list of {{"label", "score"}} with finite scores; write the file with '
                "examples/predict.py."
            ) from None
        if row.get("id") is not None:
            by_id[str(row["id"])] = scores
        by_index[index] = scores
    found = []
    for index, wanted in enumerate(rows):
        known = by_id.get(str(wanted.get("id"))) if by_id else by_index.get(index)
        if known is None:
            raise AugmentationError(
                f"{path} has no scores for the pseudo-document {wanted.get('id', index)!r}; predict the same file that is reviewed."
            )
        found.append(known)
    return found


def read_pseudo_documents(path: str | Path) -> list[dict[str, Any]]:
    """
    The rows of a file of pseudo-documents.

    Raises:
        AugmentationError: if a row has no text or no list of label names.
    """
    rows = []
    for where, row in read_rows(path):
        labels = row.get("labels")
        if (
            not isinstance(row.get("text"), str)
            or not isinstance(labels, list)
            or not all(isinstance(x, str) for x in labels)
        ):
            raise AugmentationError(
                f"{where}: `text` must be a string and `labels` a list of names; give a file that "
                "write-pseudo-documents has written."
            )
        rows.append(row)
    return rows


def review(
    pseudo_documents: str | Path,
    output_dir: str | Path,
    train: str | Path | Sequence[str | Path] | None = None,
    exclude: Sequence[str | Path] = (),
    options: ReviewOptions | None = None,
    prompts: PromptBuilder | None = None,
    scores: str | Path | Scorer | None = None,
    label_delimiter: str | None = None,
) -> ReviewSummary:
    """
    Divides pseudo-documents into `pseudo_documents_kept.jsonl` and `pseudo_documents_rejected.jsonl` (with `reason` and
    `reason_detail`).

    Each pseudo-document ends up in exactly one of the files. Kept rows have the columns of the input, and `agreement` if there are scores.

    Args:
        pseudo_documents: `pseudo_documents.jsonl`.
        output_dir: Folder of the two files.
        train (*optional*): The training file or files that the pseudo-documents were made from.
        exclude: Validation and test files; a pseudo-document must not be nearly the same as one of their documents.
        options (`ReviewOptions`, *optional*): Criteria for rejection.
        prompts (`PromptBuilder`, *optional*): The prompt that was used, whose words must not be repeated in a text; the package's own
            templates are always checked.
        scores (*optional*): Scores of a trained model: a file written by `examples/predict.py`, or a function from texts to
            `{label: score}`. Used with `options.min_agreement`.
        label_delimiter (`str`, *optional*): Separator of joined labels in a training table.

    Raises:
        AugmentationError: bad input.
    """
    options = options or ReviewOptions()
    if options.min_agreement is not None and scores is None:
        raise AugmentationError(
            "`min_agreement` is given but no scores of a model; add `scores` with a file of examples/predict.py."
        )
    kept_file, rejected_file = _output_files(Path(pseudo_documents), Path(output_dir))
    trains = [train] if isinstance(train, (str, Path)) else list(train or ())
    for output in (kept_file, rejected_file):
        check_output(output, (pseudo_documents, *trains, *exclude))
    check_writable(output_dir)
    rows = read_pseudo_documents(pseudo_documents)
    if not rows:
        raise AugmentationError(f"{pseudo_documents} has no pseudo-documents; specify a file that has some.")
    scored: Sequence[Mapping[str, float] | None] = [None] * len(rows)
    if callable(scores):
        scored = list(scores([row["text"] for row in rows]))
        if len(scored) != len(rows):
            raise AugmentationError(
                f"`scores` gave {len(scored)} results for {len(rows)} texts; return one dictionary per text."
            )
    elif scores is not None:
        scored = read_scores(scores, rows)
    builders = [PromptBuilder(name, language=options.language) for name in template_names()]
    builders += [prompts] if prompts else []
    documents = read_documents(trains, label_delimiter=label_delimiter)
    excluded = read_documents(exclude, need_labels=False)
    reviewer = Reviewer(documents, excluded, options, builders, [row["text"] for row in rows])
    kept, rejected = _divide(reviewer, rows, scored)
    write_json_lines(kept_file, kept)
    write_json_lines(rejected_file, rejected)
    reasons = collections.Counter(row["reason"] for row in rejected)
    by_label, by_kind = (_kept_by(column, kept, rejected) for column in ("tail_label", "kind"))
    return ReviewSummary(len(kept), dict(reasons), by_label, kept_file, rejected_file, by_kind=by_kind)


def _kept_by(
    column: str, kept: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]]
) -> dict[str, tuple[int, int]]:
    """Numbers of kept and of all rows, by the value of a column."""
    numbers: dict[str, tuple[int, int]] = {}
    for row, is_kept in [*((row, True) for row in kept), *((row, False) for row in rejected)]:
        good, total = numbers.get(str(row.get(column)), (0, 0))
        numbers[str(row.get(column))] = (good + is_kept, total + 1)
    return numbers


def _divide(
    reviewer: Reviewer, rows: Sequence[dict[str, Any]], scored: Sequence[Mapping[str, float] | None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Kept and rejected rows."""
    kept, rejected = [], []
    for row, scores in zip(rows, scored, strict=True):
        if scores is not None:
            row = {**row, "agreement": round(mean_score(row, scores), 4)}
        verdict = reviewer.judge(row, scores)
        if verdict is None:
            kept.append(row)
        else:
            rejected.append({**row, "reason": verdict[0], "reason_detail": verdict[1]})
    return kept, rejected


def _output_files(pseudo_documents: Path, output_dir: Path) -> tuple[Path, Path]:
    """The two output files; with the names of version 0.1 if the input has such a name."""
    names = [KEPT, REJECTED]
    if pseudo_documents.name.startswith(OLD_NAME):
        warnings.warn(
            f"{pseudo_documents.name} is called pseudo_documents.jsonl now, and so are the files that the review makes of it; "
            "the next version will use the new names only.",
            FutureWarning,
            stacklevel=3,
        )
        names = [name.replace("pseudo_documents", OLD_NAME) for name in names]
    return output_dir / names[0], output_dir / names[1]
