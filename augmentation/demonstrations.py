"""Training documents that are shown to the model as demonstrations."""

import collections
import random
from collections.abc import Iterable, Sequence

from .files import Document
from .near_duplicates import NearDuplicateIndex, index_of
from .tokens import cut_to_tokens


CACHED_DEMONSTRATIONS = 1000


class Demonstrations:
    """
    The training documents that may be shown as demonstrations, by tail label.

    Args:
        train, excluded: Training documents, and validation and test documents. A training document without text, with the id
            of an excluded one or nearly its text is not used; `notes` says how many.
        labels: The tail labels.
        longest (`int`): Maximum length of a demonstration in tokens; longer ones are truncated.
        seed (`int`): Random seed of the order in which the documents of a label are used as demonstrations.
    """

    def __init__(
        self,
        train: Sequence[Document],
        excluded: Sequence[Document],
        labels: Iterable[str],
        longest: int,
        seed: int,
    ) -> None:
        self.notes: list[str] = []
        self._longest = longest
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
            random.Random(f"{seed} {label}").shuffle(documents)

    def all_of(self, label: str) -> Sequence[Document]:
        """The demonstrations of a label."""
        return self._by_label.get(label, ())

    def of(self, label: str, number: int) -> Document | None:
        """The demonstration of a label's pseudo-document: its documents in turn, or None if it has none."""
        documents = self.all_of(label)
        return documents[number % len(documents)] if documents else None

    def text(self, document: Document) -> tuple[str, bool]:
        """The part of a document that is shown, and whether it was truncated."""
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
