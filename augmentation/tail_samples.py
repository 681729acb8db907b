"""Pseudo-documents for tail labels (Eq. 3-4)."""

import collections
import difflib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import ItemError, RequestSettings, answer_text
from .files import AugmentationError, Document, read_documents, read_expansions, read_labels
from .journal import Request
from .prompts import PromptBuilder, approximate_tokens, cut_to_tokens, typical_length
from .tasks import Plan, RunSummary, follow_up, is_refusal, provenance, run_task


TEMPERATURE = 1.0
FILE_NAME = "pseudo_samples.jsonl"


@dataclass(frozen=True)
class TailOptions:
    """
    Which pseudo-documents are wanted.

    Args:
        tail_threshold (`int`): A label with fewer training documents is a tail label.
        per_label (`int`): Pseudo-documents for each tail label.
        tail_labels (`Sequence[str]`, *optional*): These labels instead of all tail labels.
        allow_no_demonstration (`bool`): Write documents from the expansion alone for labels without a usable document.
        max_document_tokens (`int`): Longest demonstration in tokens; a longer one is cut and marked.
        seed (`int`): Order in which a label's documents take turns as demonstrations.
    """

    tail_threshold: int = 50
    per_label: int = 50
    tail_labels: Sequence[str] | None = None
    allow_no_demonstration: bool = False
    max_document_tokens: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tail_threshold", "per_label", "max_document_tokens"):
            if getattr(self, name) < 1:
                raise AugmentationError(f"`{name}` is {getattr(self, name)}, but must be at least 1; correct it.")


class TailSamples:
    """The task of `generate_tail_samples`; items are pairs of a tail label and a number."""

    name = "tail-samples"

    def __init__(
        self,
        train: Sequence[Document],
        expansions: Mapping[str, str],
        prompts: PromptBuilder,
        settings: RequestSettings,
        options: TailOptions,
        excluded: Sequence[Document] = (),
        more_labels: Iterable[str] = (),
    ) -> None:
        self.prompts, self.settings, self.options, self.expansions = prompts, settings, options, expansions
        self.notes: list[str] = []
        counts = collections.Counter(label for document in train for label in document.labels)
        known = {*counts, *more_labels}
        self._check_expansions(known)
        self.tail = self._tail_labels(counts, known)
        self.demonstrations = self._demonstrations(train, excluded)
        self.default_length = typical_length([document.text for document in train[:1000]], options.max_document_tokens)
        self._drop_labels_without_demonstration()
        if not self.tail:
            self.notes.append(
                f"There is no tail label: none has fewer than {options.tail_threshold} training documents (--tail-threshold)."
            )
        self._cut: dict[int, tuple[str, bool]] = {}

    def _check_expansions(self, known: set[str]) -> None:
        for label in sorted(set(self.expansions) - known):
            near = difflib.get_close_matches(label, known, 1)
            self.notes.append(
                f"The expansions have a label {label!r} that no training document has{f' (did you mean {near[0]!r}?)' if near else ''}; "
                "it is left out. Correct the name, or list it in a file given with --labels."
            )

    def _tail_labels(self, counts: Mapping[str, int], known: set[str]) -> list[str]:
        if self.options.tail_labels is not None:
            for label in self.options.tail_labels:
                if label not in known:
                    near = difflib.get_close_matches(label, known, 1)
                    raise AugmentationError(
                        f"the label {label!r} occurs neither in the train file nor in --labels"
                        f"{f'; did you mean {near[0]!r}?' if near else ', so nothing is known of it; correct it.'}"
                    )
            tail = list(dict.fromkeys(self.options.tail_labels))
        else:
            tail = sorted(label for label in known if counts.get(label, 0) < self.options.tail_threshold)
        bare = [label for label in tail if not self.expansions.get(label)]
        if bare:
            self.notes.append(
                f"{len(bare)} of {len(tail)} tail labels have no expansion ({', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''}): "
                "their bare names are used. Write expansions with expand-labels."
            )
        return tail

    def _demonstrations(self, train: Sequence[Document], excluded: Sequence[Document]) -> dict[str, list[Document]]:
        wanted, found = set(self.tail), collections.defaultdict(list)
        ids = {document.id for document in excluded if document.has_own_id}
        index = None
        if any(document.text for document in excluded):
            from .near_duplicates import index_of

            index = index_of([(str(number), document.text) for number, document in enumerate(excluded)])
        reasons: collections.Counter = collections.Counter()
        for document in train:
            labels = wanted.intersection(document.labels)
            if not labels:
                continue
            if not document.text:
                reasons["without text"] += 1
            elif document.has_own_id and document.id in ids:
                reasons["with the id of an excluded document"] += 1
            elif index is not None and index.find(document.text) is not None:
                reasons["nearly the same as an excluded document"] += 1
            else:
                for label in labels:
                    found[label].append(document)
        for reason, number in reasons.items():
            self.notes.append(f"{number} training documents of tail labels are {reason}; none is shown to the model.")
        for label, documents in found.items():
            random.Random(f"{self.options.seed} {label}").shuffle(documents)
        return found

    def _drop_labels_without_demonstration(self) -> None:
        lacking = [label for label in self.tail if not self.demonstrations.get(label)]
        if not lacking:
            return
        names = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        if self.options.allow_no_demonstration:
            self.notes.append(
                f"{len(lacking)} labels have no usable training document ({names}): the expansion alone is used."
            )
        else:
            self.notes.append(
                f"{len(lacking)} labels have no usable training document to demonstrate them and are left out ({names}); "
                "use their expansions alone with --allow-no-demonstration."
            )
            self.tail = [label for label in self.tail if label not in set(lacking)]

    # ----------------------------------------------------------------------------------------------- the task

    def __len__(self) -> int:
        return len(self.tail) * self.options.per_label

    def _place(self, index: int) -> tuple[str, int, Document | None]:
        label, number = self.tail[index // self.options.per_label], index % self.options.per_label
        documents = self.demonstrations.get(label)
        return label, number, documents[number % len(documents)] if documents else None

    def identity(self, index: int) -> dict[str, Any]:
        label, number, document = self._place(index)
        return {"tail_label": label, "sample": number, "demonstration_id": document.id if document else None}

    def _demonstration(self, document: Document) -> tuple[str, bool]:
        if len(self._cut) > 1000:  # items of one label follow each other: a small cache is enough
            self._cut.clear()
        if id(document) not in self._cut:  # not by its own id, which two documents may share
            self._cut[id(document)] = cut_to_tokens(document.text, self.options.max_document_tokens)
        return self._cut[id(document)]

    def request(self, index: int) -> Request:
        label, number, document = self._place(index)
        text, _ = self._demonstration(document) if document else (None, False)
        labels = document.labels if document else (label,)
        length = approximate_tokens(text) if text else self.default_length
        return Request(
            messages=self.prompts.sample(
                [(name, self.expansions.get(name, "")) for name in labels], text, length, number
            ),
            model=self.settings.model,
            parameters=self.settings.request_parameters(TEMPERATURE, 2 * length + 128),
            field="text",
            sample_index=number,
            expected_tokens=length + 12,
            origin={"template": self.prompts.name, "template_hash": self.prompts.template_hash},
        )

    def follow_up(self, index: int, request: Request, entry: dict[str, Any]) -> Request | None:
        """Asks once more after an empty answer or a refusal; all else is for the review."""
        text, _ = answer_text(entry, request.field)
        if text and not is_refusal(text):
            return None
        return follow_up(
            request, entry, "The text itself is wanted. Write it now, without any remark; it only trains a classifier."
        )

    def row(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        label, number, document = self._place(index)
        text, cut = answer_text(entries[-1], "text")
        if not text or is_refusal(text):
            raise ItemError(f"no usable answer, also when asked again: {text[:80]!r}")
        marks = ["cut_off"] if cut else []
        if document and self._demonstration(document)[1]:
            marks.append("demonstration_cut")
        return {
            "id": f"pseudo:{label}:{number}",
            "text": text,
            "labels": list(document.labels) if document else [label],
            "tail_label": label,
            "demonstration_id": document.id if document else None,
            "marks": " ".join(marks),
            "provenance": provenance(entries),
        }


def generate_tail_samples(
    train: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    settings: RequestSettings,
    expansions: str | Path | None = None,
    prompts: PromptBuilder | None = None,
    options: TailOptions | None = None,
    exclude: Sequence[str | Path] = (),
    labels: str | Path | None = None,
    dry_run: bool = False,
    partial: bool = False,
) -> RunSummary | Plan:
    """
    Writes `pseudo_samples.jsonl`: `{"id", "text", "labels", "tail_label", "demonstration_id", "marks", "provenance"}` (Eq. 3-4).

    A pseudo-document carries the whole label set of the training document that demonstrates it; the documents of a label take
    turns. Only training documents enter a prompt: none that has the id or nearly the text of a document in `exclude`.

    Args:
        train: JSON Lines file or files, `{"text", "labels", "id"?}`.
        output_dir: Folder of the output and the journal.
        settings (`RequestSettings`): Model, endpoint and limits.
        expansions (path, *optional*): `label_descriptions.jsonl` of `expand_labels`.
        prompts (`PromptBuilder`, *optional*): Template and what it is filled with.
        options (`TailOptions`, *optional*): Which pseudo-documents are wanted.
        exclude: JSON Lines files of validation and test documents (`text`, or `id`, or both).
        labels (path, *optional*): File with all labels, where some have no training document.
        dry_run, partial (`bool`): As in `expand_labels`.

    Returns:
        `RunSummary`, or `Plan` for a dry run; `notes` says which labels and documents were left out.

    Raises:
        AugmentationError: bad input, an endpoint that refuses or cannot be reached.
    """
    task = TailSamples(
        read_documents(train),
        read_expansions(expansions) if expansions else {},
        prompts or PromptBuilder(),
        settings,
        options or TailOptions(),
        read_documents(exclude, need_labels=False),
        read_labels(labels) if labels else (),
    )
    result = run_task(task, settings, output_dir, FILE_NAME, dry_run, partial)
    result.notes += task.notes
    return result
