"""Exports reviewed answers as training data for an open language model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .answers import answer_text
from .errors import AugmentationError
from .files import read_rows
from .journal import Journal
from .kinds import PLAIN
from .writing import check_output, write_json_lines


FILE_NAME = "sft.jsonl"
FORMS = ("messages", "prompt-completion")


def export_sft(
    reviewed: str | Path | Sequence[str | Path],
    journal: str | Path,
    output: str | Path = FILE_NAME,
    form: str = "messages",
) -> int:
    """
    Writes the prompt and the accepted answer of each reviewed row as a chat.

    The prompt is always the first one of the item, even if the accepted answer came from a second request, because the fine-tuned model
    should give it immediately.

    Args:
        reviewed: `pseudo_documents_kept.jsonl`, `label_descriptions.jsonl` or several such files.
        journal: The `journal.jsonl` of the runs that wrote them; it holds the prompts.
        output: File to write.
        form (`str`): `"messages"`: `{"messages": [...]}`; `"prompt-completion"`: `{"prompt": [...], "completion": [...]}`, for
            which TRL computes the loss on the answer only.

    Returns:
        The number of chats. Rows of `label_descriptions.jsonl` that are marked (too long, another language) are left out, and so are hard
        pseudo-documents and those of several labels that took a second request.

    Raises:
        AugmentationError: if the journal lacks the prompt of a row.
    """
    if form not in FORMS:
        raise AugmentationError(f"`form` is {form!r}, but must be {' or '.join(FORMS)}; choose one.")
    files = [reviewed] if isinstance(reviewed, (str, Path)) else list(reviewed)
    check_output(output, (*files, journal))
    with Journal(journal, read_only=True) as book:
        book.check_is_journal()
        return write_json_lines(output, _chats(files, book, form))


def _chats(files: Sequence[str | Path], journal: Journal, form: str) -> Iterator[dict[str, Any]]:
    for path in files:
        for where, row in read_rows(path):
            description = row.get("description", row.get("expansion"))  # the latter in files of version 0.1
            answer, origin = row.get("text") or description, row.get("provenance")
            entry = journal.get(str(origin.get("request_key"))) if isinstance(origin, dict) else None
            if not isinstance(answer, str) or entry is None:
                raise AugmentationError(
                    f"{where}: its prompt is not in the journal {journal.path}; give the `journal` of the run "
                    "that wrote the file."
                )
            if description is not None and row.get("marks"):
                continue
            if row.get("kind", PLAIN) != PLAIN:
                # The prompt asks for a line about labels, which is not part of the row's text.
                if isinstance(origin, dict) and origin["requests"] > 1:  # the accepted answer has another key
                    continue
                answer, _ = answer_text(entry, "text")
            reply = [{"role": "assistant", "content": answer}]
            if form == "messages":
                yield {"messages": [*entry["messages"], *reply]}
            else:
                yield {"prompt": entry["messages"], "completion": reply}
