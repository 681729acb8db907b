"""Pseudo-documents for tail labels (Eq. 3-4) or, without training documents, for all labels."""

import collections
import difflib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answers import answer_text, is_refusal
from .checks import check_number
from .demonstrations import Demonstrations
from .errors import AugmentationError, ItemError
from .files import (
    Document,
    label_name,
    read_described_labels,
    read_documents,
    read_label_parents,
    read_labels,
)
from .kinds import (
    CANDIDATES,
    HARD,
    NEAR_LABELS,
    PLAIN,
    SEVERAL,
    SIMILAR,
    Reading,
    kinds,
    read_near_miss,
    read_several,
)
from .prompts import PromptBuilder, quoted
from .request import Request
from .settings import RequestSettings
from .similar_labels import relatives, similar_labels
from .summary import Plan, RunSummary
from .tasks import provenance, run_task
from .tokens import approximate_tokens, typical_length


TEMPERATURE = 1.0
FILE_NAME = "pseudo_documents.jsonl"
# Without training documents. With 50 pseudo-documents per label, 10 are hard: two against each of the five nearest labels.
HARD_SHARE, SEVERAL_SHARE = 0.2, 0.4


@dataclass(frozen=True)
class PseudoDocumentOptions:
    """
    Which pseudo-documents to write.

    Args:
        tail_threshold (`int`): A label with fewer training documents is a tail label.
        per_label (`int`): Pseudo-documents per tail label.
        tail_labels (`Sequence[str]`, *optional*): These labels instead of all tail labels.
        allow_no_demonstration (`bool`): Write documents from the description alone for labels without a usable document.
        max_document_tokens (`int`): Maximum length of a demonstration in tokens; longer ones are truncated and marked.
        seed (`int`): Random seed of the order of demonstrations and of the choice of candidate labels.
        hard_share (`float`, *optional*): Share of near misses: documents that only seem to have a similar label. By default 0.2 without
            training documents, else 0.
        several_share (`float`, *optional*): Share of documents without demonstration for which the model chooses further labels. By
            default 0.4 without training documents, else 0.
        max_labels (`int`): Maximum number of labels of such a document.
        length (`int`, *optional*): Length in tokens of a document without demonstration; by default the median of the training documents,
            or 150.

    Raises:
        AugmentationError: if a number is outside its range.
    """

    tail_threshold: int = 50
    per_label: int = 50
    tail_labels: Sequence[str] | None = None
    allow_no_demonstration: bool = False
    max_document_tokens: int = 2000
    seed: int = 0
    hard_share: float | None = None
    several_share: float | None = None
    max_labels: int = 3
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("tail_threshold", "per_label", "max_document_tokens"):
            check_number(name, getattr(self, name), 1, integer=True)
        check_number("seed", self.seed, integer=True)
        for name in ("hard_share", "several_share"):
            check_number(name, getattr(self, name), 0, 1, optional=True)
        check_number("max_labels", self.max_labels, 2, integer=True)
        check_number("length", self.length, 1, integer=True, optional=True)

    def shares(self, has_train: bool) -> tuple[float, float]:
        """
        `hard_share` and `several_share`, with their defaults.

        Raises:
            AugmentationError: if they are more than 1 together.
        """
        hard, several = (0.0, 0.0) if has_train else (HARD_SHARE, SEVERAL_SHARE)
        hard = hard if self.hard_share is None else self.hard_share
        several = several if self.several_share is None else self.several_share
        if hard + several > 1 + 1e-9:
            raise AugmentationError(
                f"`hard_share` {hard:g} and `several_share` {several:g} must be at most 1 together; the rest are plain pseudo-documents. "
                "Lower one of them."
            )
        return hard, several


class PseudoDocuments:
    """
    The task of `write_pseudo_documents`; items are pairs of a tail label and a number. Without training documents (`train=None`), all
    labels are tail labels.

    If two tail labels, or two copies of a training document, have the same demonstration, they get different variations of the prompt, so
    that no two rows share an answer and no prompt is sent twice.
    """

    name, old_name, file_name = "write-pseudo-documents", "tail-samples", FILE_NAME

    def __init__(
        self,
        train: Sequence[Document] | None,
        descriptions: Mapping[str, str],
        prompts: PromptBuilder,
        settings: RequestSettings,
        options: PseudoDocumentOptions,
        excluded: Sequence[Document] = (),
        more_labels: Iterable[str] = (),
        label_parents: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.prompts, self.settings, self.options, self.descriptions = prompts, settings, options, descriptions
        self.notes: list[str] = []
        self.has_train, train = train is not None, train or ()
        hard_share, several_share = options.shares(self.has_train)
        self.kinds = kinds(hard_share, several_share, options.per_label)
        counts = collections.Counter(label for document in train for label in document.labels)
        known = {*counts, *more_labels}
        self._check_descriptions(known)
        self.relatives = relatives(label_parents or {})
        if label_parents and not known & self.relatives.keys():
            self.notes.append(
                f"The label parents name none of the {len(known)} labels, so they change nothing. Use the same names in both files."
            )
        self.tail = self._tail_labels(counts, known)
        self.demonstrations = Demonstrations(train, excluded, self.tail, options.max_document_tokens, options.seed)
        self.notes += self.demonstrations.notes
        self.default_length = options.length or typical_length(
            [document.text for document in train[:1000]], options.max_document_tokens
        )
        if self.has_train:
            self._drop_labels_without_demonstration()
        elif options.length is None:
            self.notes.append(
                f"Pseudo-documents have about {self.default_length} tokens; specify another length with `length`."
            )
        self.similar = self._similar_labels(known, train) if hard_share or several_share else {}
        if self.has_train and not self.tail:
            self.notes.append(
                f"There is no tail label: none has fewer than {options.tail_threshold} training documents (`tail_threshold`)."
            )
        self._variations = self._other_variations()
        numbers = collections.Counter(self._kind(index) for index in range(len(self))) if self.similar else {}
        if numbers:
            self.notes.append(
                f"Of {len(self)} pseudo-documents, {numbers[PLAIN]} are plain, {numbers[HARD]} hard (near misses) and {numbers[SEVERAL]} of "
                "several labels."
            )

    def _check_descriptions(self, known: set[str]) -> None:
        for label in sorted(set(self.descriptions) - known):
            near = difflib.get_close_matches(label, known, 1)
            self.notes.append(
                f"The label descriptions have a label {label!r} that {'no training document has' if self.has_train else '`labels` lacks'}"
                f"{f' (did you mean {near[0]!r}?)' if near else ''}; it is left out. Correct the name, or list it in a file "
                "given with `labels`."
            )

    def _tail_labels(self, counts: Mapping[str, int], known: set[str]) -> list[str]:
        if self.options.tail_labels is not None:
            tail = list(dict.fromkeys(label_name(label, "`tail_labels`") for label in self.options.tail_labels))
            for label in tail:
                if label not in known:
                    near = difflib.get_close_matches(label, known, 1)
                    raise AugmentationError(
                        f"the label {label!r} occurs neither in the training file nor in `labels`"
                        f"{f'; did you mean {near[0]!r}?' if near else ', so nothing is known of it; correct it.'}"
                    )
        else:
            tail = sorted(label for label in known if counts.get(label, 0) < self.options.tail_threshold)
        bare = [label for label in tail if not self.descriptions.get(label)]
        if bare:
            self.notes.append(
                f"{len(bare)} of {len(tail)} {'tail ' * self.has_train}labels have no description ({', '.join(bare[:5])}"
                f"{', ...' if len(bare) > 5 else ''}): their bare names are used. Write descriptions with describe-labels."
            )
        return tail

    def _drop_labels_without_demonstration(self) -> None:
        lacking = [label for label in self.tail if self.demonstrations.of(label, 0) is None]
        if not lacking:
            return
        names = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        if self.options.allow_no_demonstration:
            self.notes.append(
                f"{len(lacking)} labels have no usable training document ({names}): the description alone is used."
            )
        else:
            self.notes.append(
                f"{len(lacking)} labels have no usable training document to demonstrate them and are left out ({names}); "
                "use their descriptions alone with `allow_no_demonstration`."
            )
            self.tail = [label for label in self.tail if label not in set(lacking)]

    def _similar_labels(self, known: Iterable[str], train: Sequence[Document]) -> dict[str, list[str]]:
        """The labels with the most similar texts, except those that most of the label's training documents have, because a near miss lacks them."""
        texts = {label: f"{label} {self.descriptions.get(label, '')}" for label in known}
        together: dict[str, collections.Counter[str]] = {label: collections.Counter() for label in self.tail}
        for document in train:
            for label in together.keys() & document.labels:
                together[label].update(document.labels)
        found = similar_labels(texts, self.tail, SIMILAR)
        return {
            label: [other for other in others if together[label][other] * 2 <= together[label][label]]
            for label, others in found.items()
        }

    def _other_variations(self) -> dict[int, int]:
        """
        The items whose variation differs from their number, because another item already uses this variation of the same prompt.

        Numbers are assigned round by round, so that a larger `per_label` does not change those of earlier rounds.
        """
        prompts = self._shared_prompts()
        used: dict[Any, set[int]] = collections.defaultdict(set)
        free: collections.Counter[Any] = collections.Counter()
        found: dict[int, int] = {}
        for number in range(self.options.per_label if prompts else 0):
            for place, label in enumerate(self.tail):
                document = self.demonstrations.of(label, number)
                if id(document) not in prompts:
                    continue
                prompt = prompts[id(document)], self._near(label, number, document)
                variation = number
                if variation in used[prompt]:
                    while free[prompt] in used[prompt]:
                        free[prompt] += 1
                    variation = found[place * self.options.per_label + number] = free[prompt]
                used[prompt].add(variation)
        return found

    def _shared_prompts(self) -> dict[int, Any]:
        """By `id(document)`: distinguishes the prompts of tail labels that use the same demonstration."""
        prompts: dict[int, Any] = {}
        owners: dict[Any, set[str]] = collections.defaultdict(set)
        for label in self.tail:
            for document in self.demonstrations.all_of(label):
                if id(document) not in prompts:
                    shown = self.demonstrations.text(document)[0]
                    prompts[id(document)] = (shown, tuple(map(quoted, document.labels)))
                owners[prompts[id(document)]].add(label)
        return {name: prompt for name, prompt in prompts.items() if len(owners[prompt]) > 1}

    # ----------------------------------------------------------------------------------------------- the task

    def __len__(self) -> int:
        return len(self.tail) * self.options.per_label

    def _place(self, index: int) -> tuple[str, int, Document | None]:
        label, number = self.tail[index // self.options.per_label], index % self.options.per_label
        return label, number, self.demonstrations.of(label, number)

    def _near(self, label: str, number: int, document: Document | None) -> str | None:
        """The label that a hard pseudo-document must not have; None if it is not hard or there is no such label."""
        if self.kinds[number] != HARD:
            return None
        own = document.labels if document else (label,)
        excluded = {*own, *(other for name in own for other in self.relatives.get(name, ()))}
        others = [other for other in self.similar.get(label, ()) if other not in excluded][:NEAR_LABELS]
        turns = len(self.demonstrations.all_of(label)) or 1
        before = sum(self.kinds[other] == HARD for other in range(number % turns, number, turns))
        return others[(number % turns + before) % len(others)] if others else None

    def _candidates(self, label: str, number: int, document: Document | None) -> list[str]:
        """The labels that the model may choose from; empty unless the kind is `several`."""
        others = self.similar.get(label, ())
        if document is not None or not others or self.kinds[number] != SEVERAL:
            return []
        drawn = random.Random(f"{self.options.seed} {label} {number}").sample(others, min(CANDIDATES, len(others)))
        return sorted(drawn, key=others.index)

    def _kind(self, index: int) -> str:
        """The kind of an item: the scheduled one, or plain if that is not possible."""
        place = self._place(index)
        return HARD if self._near(*place) else SEVERAL if self._candidates(*place) else PLAIN

    def _described(self, labels: Iterable[str]) -> list[tuple[str, str]]:
        return [(label, self.descriptions.get(label, "")) for label in labels]

    def row_id(self, index: int) -> str:
        """The id of an item's row."""
        label, number, _ = self._place(index)
        return f"pseudo:{label}:{number}"

    def identity(self, index: int) -> dict[str, Any]:
        label, number, document = self._place(index)
        return {
            "tail_label": label,
            "number": number,
            "demonstration_id": document.id if document else None,
            "kind": self._kind(index),
        }

    def request(self, index: int) -> Request:
        label, number, document = self._place(index)
        text = self.demonstrations.text(document)[0] if document else None
        labels = document.labels if document else (label,)
        length = approximate_tokens(text) if text else self.default_length
        variation = self._variations.get(index, number)
        near, candidates = self._near(label, number, document), self._candidates(label, number, document)
        return Request(
            messages=self.prompts.pseudo_document(
                self._described(labels),
                text,
                length,
                variation,
                self._described([near])[0] if near else None,
                self._described(candidates),
                self.options.max_labels - 1,
            ),
            model=self.settings.model,
            parameters=self.settings.request_parameters(TEMPERATURE, 2 * length + 128),
            field="text",
            variation=variation,
            expected_tokens=length + 12 + (8 if near or candidates else 0),
            origin={"template": self.prompts.name, "template_hash": self.prompts.template_hash},
        )

    def follow_up(self, index: int, request: Request, entry: dict[str, Any]) -> Request | None:
        """
        A follow-up request after an empty answer or a refusal, if a near miss has the near label, or if chosen labels are not in the list.
        Other problems are left to the review.
        """
        answer, _ = answer_text(entry, request.field)
        reading = self._read(index, answer)
        if not reading.text or is_refusal(reading.text):
            return request.again(
                answer, "The text itself is wanted. Write it now, without any remark; it only trains a classifier."
            )
        if reading.problem is not None:
            return request.again(answer, f"{reading.problem} Write the whole answer again.")
        return None

    def _read(self, index: int, answer: str) -> Reading:
        """Parses an answer according to the kind of the item."""
        place = self._place(index)
        near, candidates = self._near(*place), self._candidates(*place)
        if near:
            return read_near_miss(answer, quoted(near))
        if candidates:
            return read_several(answer, candidates, self.options.max_labels - 1)
        return Reading(answer)

    def row(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        label, number, document = self._place(index)
        answer, cut = answer_text(entries[-1], "text")
        reading = self._read(index, answer)
        text = reading.text
        if not text or is_refusal(text):
            raise ItemError(f"no usable answer, also when asked again: {text[:80]!r}")
        if reading.problem is not None:
            raise ItemError(f"no usable labels, also when asked again: {reading.problem}")
        marks = [*(["cut_off"] if cut else []), *reading.marks]
        if document and self.demonstrations.text(document)[1]:
            marks.append("demonstration_cut")
        return {
            "id": self.row_id(index),
            "text": text,
            "labels": [*(document.labels if document else [label]), *reading.further],
            "kind": self._kind(index),
            "near_label": self._near(label, number, document),
            "tail_label": label,
            "demonstration_id": document.id if document else None,
            "marks": " ".join(marks),
            "provenance": provenance(entries),
        }


def write_pseudo_documents(
    train: str | Path | Sequence[str | Path] | None,
    output_dir: str | Path,
    settings: RequestSettings,
    label_descriptions: str | Path | None = None,
    prompts: PromptBuilder | None = None,
    options: PseudoDocumentOptions | None = None,
    exclude: Sequence[str | Path] = (),
    labels: str | Path | None = None,
    dry_run: bool = False,
    partial: bool = False,
    label_delimiter: str | None = None,
    label_parents: str | Path | None = None,
) -> RunSummary | Plan:
    """
    Writes `pseudo_documents.jsonl`: `{"id", "text", "labels", "kind", "near_label", "tail_label", "demonstration_id", "marks",
    "provenance"}` (Eq. 3-4).

    A pseudo-document has the whole label set of the training document that is its demonstration; the documents of a label take turns. Only
    training documents are used in prompts, and none with the id or nearly the text of a document in `exclude`.

    Without training documents, every label gets pseudo-documents, from its name and description. Their `kind` is `"plain"`,
    `"hard"` (a near miss of `near_label`) or `"several"` (the model may have chosen further labels from similar ones).

    Args:
        train: Training file or files, `{"text", "labels", "id"?}`; None for none.
        output_dir: Folder of the output and the journal.
        settings (`RequestSettings`): Model, endpoint and limits.
        label_descriptions (path, *optional*): `label_descriptions.jsonl` of `describe_labels`. Without `train` and `labels`, its
            labels are all labels.
        prompts (`PromptBuilder`, *optional*): Template and what it is filled with.
        options (`PseudoDocumentOptions`, *optional*): Which pseudo-documents to write.
        exclude: Files of validation and test documents (`text`, or `id`, or both).
        labels (path, *optional*): File with all labels, if some have no training document. Without `train`, its notes are used as
            descriptions of labels that have none.
        dry_run, partial (`bool`): As in `describe_labels`.
        label_delimiter (`str`, *optional*): Separator of joined labels in a training table.
        label_parents (path, *optional*): File of labels and their parents, as `run_mldc.py` reads it. Near misses are not written
            against a broader or a narrower label.

    Returns:
        `RunSummary`, or `Plan` for a dry run; `notes` says which labels and documents were left out.

    Raises:
        AugmentationError: invalid input, or an endpoint that refuses requests or cannot be reached.
    """
    trains = [train] if isinstance(train, (str, Path)) else list(train or ())
    if not trains and labels is None and label_descriptions is None:
        raise AugmentationError(
            "there are neither training documents nor labels to write pseudo-documents for; give a training file, or `labels` or "
            "`label_descriptions`."
        )
    described = read_described_labels(label_descriptions) if label_descriptions else {}
    descriptions = {label: text for label, text in described.items() if text}
    notes = read_labels(labels, label_delimiter) if labels else {}
    if not trains:
        notes = notes or dict.fromkeys(described, "")
        descriptions = {label: note for label, note in notes.items() if note} | descriptions
    documents = read_documents(trains, label_delimiter=label_delimiter) if trains else None
    names = {*notes, *(label for document in documents or () for label in document.labels)}
    task = PseudoDocuments(
        documents,
        descriptions,
        prompts or PromptBuilder(),
        settings,
        options or PseudoDocumentOptions(),
        read_documents(exclude, need_labels=False),
        notes,
        read_label_parents(label_parents, names) if label_parents is not None else None,
    )
    others = [path for path in (label_descriptions, labels, label_parents) if path is not None]
    result = run_task(task, settings, output_dir, dry_run, partial, (*trains, *exclude, *others))
    result.notes += task.notes
    return result
