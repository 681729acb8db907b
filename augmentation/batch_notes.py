"""
Notes on batches in the journal.

Each batch has up to three notes: the intention to submit it (with its keys), its id, and that it was collected. If the id was never noted,
a new process finds the batch by the token in its metadata, so that no batch is submitted twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .journal import Journal
from .request import Request


@dataclass(frozen=True)
class OpenBatch:
    """
    A batch that was not collected yet.

    Args:
        token (`str`): Token in the metadata of the batch.
        keys (`frozenset[str]`, *optional*): Keys of its requests; None if the line with them is damaged.
        dialect (`dict`, *optional*): The request format that was used.
        endpoint (`str`, *optional*): Host that it was sent to.
        id (`str`, *optional*): Id assigned by the endpoint; None if the process ended before receiving it.
    """

    token: str
    keys: frozenset[str] | None = None
    dialect: dict[str, Any] | None = None
    endpoint: str | None = None
    id: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"the batch {self.id}" if self.id else f"the batch with the token {self.token}"

    def covers(self, request: Request) -> bool:
        """Whether a request is, or may be, part of the batch."""
        return self.keys is None or not self.keys.isdisjoint(request.keys)


def any_open(journal: Journal) -> bool:
    """Whether the journal knows of a batch that was not collected yet."""
    done = {note["token"] for note in journal.notes if note["note"] == "batch_done"}
    return any(note["token"] not in done for note in journal.notes if note["note"] in ("batch_intent", "batch"))


def open_batches(journal: Journal, requests: Iterable[Request]) -> list[OpenBatch]:
    """The batches that were not collected yet and cover at least one of the requests."""
    ids = {note["token"]: note["id"] for note in journal.notes if note["note"] == "batch"}
    done = {note["token"] for note in journal.notes if note["note"] == "batch_done"}
    found = {
        note["token"]: OpenBatch(
            note["token"], frozenset(note["keys"]), note["dialect"], note["endpoint"], ids.get(note["token"])
        )
        for note in journal.notes
        if note["note"] == "batch_intent"
    }
    found |= {token: OpenBatch(token, id=name) for token, name in ids.items() if token not in found}
    left = [batch for token, batch in found.items() if token not in done]
    if not left:
        return []
    wanted = [request.keys for request in requests]
    keys = {key for names in wanted for key in names}
    return [batch for batch in left if wanted and (batch.keys is None or not batch.keys.isdisjoint(keys))]
