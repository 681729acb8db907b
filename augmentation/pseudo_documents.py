"""Pseudo-documents for tail labels (Eq. 3-4)."""

import collections
import difflib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answers import answer_text, is_refusal
from .checks import check_number
from .errors import AugmentationError, ItemError
from .files import Document, label_name, read_documents, read_label_descriptions, read_labels
from .near_duplicates import NearDuplicateIndex, index_of
from .prompts import PromptBuilder, quoted
from .request import Request
from .settings import RequestSettings
from .summary import Plan, RunSummary
from .tasks import provenance, run_task
from .tokens import approximate_tokens, cut_to_tokens, typical_length


TEMPERATURE = 1.0
FILE_NAME = "pseudo_documents.jsonl"
CACHED_DEMONSTRATIONS = 1000


@dataclass(frozen=True)
class PseudoDocumentOptions:
    """
    Which pseudo-documents are wanted.

    Args:
        tail_threshold (`int`): A label with fewer training documents is a tail label.
        per_label (`int`): Pseudo-documents per tail label.
        tail_labels (`Sequence[str]`, *optional*): These labels instead of all tail labels.
        allow_no_demonstration (`bool`): Write documents from the description alone for labels without a usable document.
        max_document_tokens (`int`): Longest demonstration in tokens; a longer one is cut and marked.
        seed (`int`): Order in which the documents of a label become its demonstrations.

    Raises:
        AugmentationError: if a number is outside its range.
    """

    tail_threshold: int = 50
    per_label: int = 50
    tail_labels: Sequence[str] | None = None
    allow_no_demonstration: bool = False
    max_document_tokens: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tail_threshold", "per_label", "max_document_tokens"):
            check_number(name, getattr(self, name), 1, integer=True)
        check_number("seed", self.seed, integer=True)


class Demonstrations:
    """
    The training documents that may be shown, by tail label.

    Args:
        train, excluded: Training documents, and validation and test documents. A training document without text, with the id
            of an excluded one or nearly its text is not used; `notes` says how many.
        labels: The tail labels.
        options (`PseudoDocumentOptions`): With the seed and the longest demonstration.
    """

    def __init__(
        self,
        train: Sequence[Document],
        excluded: Sequence[Document],
        labels: Iterable[str],
        options: PseudoDocumentOptions,
    ) -> None:
        self.notes: list[str] = []
        self._longest = options.max_document_tokens
        self._cut: dict[int, tuple[str, bool]] = {}
        self._by_label: dict[str, list[Document]] = collections.defaultdict(list)
        wanted = set(labels)
        ids = {document.id for document in excluded if document.has_own_id}
        texts = [(str(number), document.text) for number, document in enumerate(excluded) if document.text]
        index = index_of(texts) if texts else None
        reasons: collections.Counter[str] = collections.Counter()
        for document in train:
            found = wanted.intersection(document.labels)
            reason = _why_unusable(document, ids, index) if found else None
            if reason:
                reasons[reason] += 1
            for label in () if reason else found:
                self._by_label[label].append(document)
        for reason, number in reasons.items():
            self.notes.append(f"{number} training documents of tail labels are {reason}; none is shown to the model.")
        for label, documents in self._by_label.items():
            random.Random(f"{options.seed} {label}").shuffle(documents)

    def all_of(self, label: str) -> Sequence[Document]:
        """The demonstrations of a label."""
        return self._by_label.get(label, ())

    def of(self, label: str, number: int) -> Document | None:
        """The demonstration of a label's pseudo-document: its documents in turn, or None if it has none."""
        documents = self.all_of(label)
        return documents[number % len(documents)] if documents else None

    def text(self, document: Document) -> tuple[str, bool]:
        """What is shown of a document, and whether it was cut."""
        if len(self._cut) > CACHED_DEMONSTRATIONS:  # the items of a label are consecutive: a small cache is enough
            self._cut.clear()
        if id(document) not in self._cut:  # not by its own id, which two documents may share
            self._cut[id(document)] = cut_to_tokens(document.text, self._longest)
        return self._cut[id(document)]


def _why_unusable(document: Document, ids: set[str], index: NearDuplicateIndex | None) -> str | None:
    if not document.text:
        return "without text"
    if document.has_own_id and document.id in ids:
        return "with the id of an excluded document"
    if index is not None and index.find(document.text) is not None:
        return "nearly the same as an excluded document"
    return None


class PseudoDocuments:
    """
    The task of `write_pseudo_documents`; items are pairs of a tail label and a number.

    Where two tail labels, or two copies of a training document, have the same demonstration, they get different variations of
    the prompt: no two rows share an answer, and no prompt is sent twice.
    """

    name, old_name, file_name = "write-pseudo-documents", "tail-samples", FILE_NAME

    def __init__(
        self,
        train: Sequence[Document],
        descriptions: Mapping[str, str],
        prompts: PromptBuilder,
        settings: RequestSettings,
        options: PseudoDocumentOptions,
        excluded: Sequence[Document] = (),
        more_labels: Iterable[str] = (),
    ) -> None:
        self.prompts, self.settings, self.options, self.descriptions = prompts, settings, options, descriptions
        self.notes: list[str] = []
        counts = collections.Counter(label for document in train for label in document.labels)
        known = {*counts, *more_labels}
        self._check_descriptions(known)
        self.tail = self._tail_labels(counts, known)
        self.demonstrations = Demonstrations(train, excluded, self.tail, options)
        self.notes += self.demonstrations.notes
        self.default_length = typical_length([document.text for document in train[:1000]], options.max_document_tokens)
        self._drop_labels_without_demonstration()
        if not self.tail:
            self.notes.append(
                f"There is no tail label: none has fewer than {options.tail_threshold} training documents (`tail_threshold`)."
            )
        self._variations = self._other_variations()

    def _check_descriptions(self, known: set[str]) -> None:
        for label in sorted(set(self.descriptions) - known):
            near = difflib.get_close_matches(label, known, 1)
            self.notes.append(
                f"The label descriptions have a label {label!r} that no training document has"
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
                f"{len(bare)} of {len(tail)} tail labels have no description ({', '.join(bare[:5])}"
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

    def _other_variations(self) -> dict[int, int]:
        """
        The items whose variation is not their number, because another item has that one of the same prompt already.

        Numbers are dealt out round by round, so that a larger `per_label` leaves those of the earlier rounds as they are.
        """
        prompts = self._shared_prompts()
        used: dict[Any, set[int]] = collections.defaultdict(set)
        free: collections.Counter[Any] = collections.Counter()
        found: dict[int, int] = {}
        for number in range(self.options.per_label if prompts else 0):
            for place, label in enumerate(self.tail):
                prompt = prompts.get(id(self.demonstrations.of(label, number)))
                if prompt is None:
                    continue
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

    def row_id(self, index: int) -> str:
        """The id of an item's row."""
        label, number, _ = self._place(index)
        return f"pseudo:{label}:{number}"

    def identity(self, index: int) -> dict[str, Any]:
        label, number, document = self._place(index)
        return {"tail_label": label, "number": number, "demonstration_id": document.id if document else None}

    def request(self, index: int) -> Request:
        label, number, document = self._place(index)
        text = self.demonstrations.text(document)[0] if document else None
        labels = document.labels if document else (label,)
        length = approximate_tokens(text) if text else self.default_length
        variation = self._variations.get(index, number)
        return Request(
            messages=self.prompts.pseudo_document(
                [(name, self.descriptions.get(name, "")) for name in labels], text, length, variation
            ),
            model=self.settings.model,
            parameters=self.settings.request_parameters(TEMPERATURE, 2 * length + 128),
            field="text",
            variation=variation,
            expected_tokens=length + 12,
            origin={"template": self.prompts.name, "template_hash": self.prompts.template_hash},
        )

    def follow_up(self, index: int, request: Request, entry: dict[str, Any]) -> Request | None:
        """Asks once more after an empty answer or a refusal; all else is for the review."""
        text, _ = answer_text(entry, request.field)
        if text and not is_refusal(text):
            return None
        return request.again(
            text, "The text itself is wanted. Write it now, without any remark; it only trains a classifier."
        )

    def row(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        label, _, document = self._place(index)
        text, cut = answer_text(entries[-1], "text")
        if not text or is_refusal(text):
            raise ItemError(f"no usable answer, also when asked again: {text[:80]!r}")
        marks = ["cut_off"] if cut else []
        if document and self.demonstrations.text(document)[1]:
            marks.append("demonstration_cut")
        return {
            "id": self.row_id(index),
            "text": text,
            "labels": list(document.labels) if document else [label],
            "tail_label": label,
            "demonstration_id": document.id if document else None,
            "marks": " ".join(marks),
            "provenance": provenance(entries),
        }


def write_pseudo_documents(
    train: str | Path | Sequence[str | Path],
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
) -> RunSummary | Plan:
    """
    Writes `pseudo_documents.jsonl`: `{"id", "text", "labels", "tail_label", "demonstration_id", "marks", "provenance"}` (Eq. 3-4).

    A pseudo-document carries the whole label set of the training document that demonstrates it; the documents of a label are
    used in turn. Only training documents enter a prompt: none that has the id or nearly the text of a document in `exclude`.

    Args:
        train: Training file or files, `{"text", "labels", "id"?}`.
        output_dir: Folder of the output and the journal.
        settings (`RequestSettings`): Model, endpoint and limits.
        label_descriptions (path, *optional*): `label_descriptions.jsonl` of `describe_labels`.
        prompts (`PromptBuilder`, *optional*): Template and what it is filled with.
        options (`PseudoDocumentOptions`, *optional*): Which pseudo-documents are wanted.
        exclude: Files of validation and test documents (`text`, or `id`, or both).
        labels (path, *optional*): File with all labels, where some have no training document.
        dry_run, partial (`bool`): As in `describe_labels`.
        label_delimiter (`str`, *optional*): Separator of joined labels in a training table.

    Returns:
        `RunSummary`, or `Plan` for a dry run; `notes` says which labels and documents were left out.

    Raises:
        AugmentationError: bad input, an endpoint that refuses or cannot be reached.
    """
    trains = [train] if isinstance(train, (str, Path)) else list(train)
    task = PseudoDocuments(
        read_documents(trains, label_delimiter=label_delimiter),
        read_label_descriptions(label_descriptions) if label_descriptions else {},
        prompts or PromptBuilder(),
        settings,
        options or PseudoDocumentOptions(),
        read_documents(exclude, need_labels=False),
        read_labels(labels, label_delimiter) if labels else (),
    )
    others = [path for path in (label_descriptions, labels) if path is not None]
    result = run_task(task, settings, output_dir, dry_run, partial, (*trains, *exclude, *others))
    result.notes += task.notes
    return result
