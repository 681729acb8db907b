"""Reviewed answers as training data for an open language model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .files import AugmentationError, read_json_lines, write_json_lines
from .journal import Journal


FILE_NAME = "sft.jsonl"


def export_sft(
    reviewed: str | Path | Sequence[str | Path],
    journal: str | Path,
    output: str | Path = FILE_NAME,
    form: str = "messages",
) -> int:
    """
    Writes the prompt and the accepted answer of each reviewed row as one chat.

    The prompt is the first one of the item, also where a second request gave the accepted answer: the tuned model shall give it at
    once.

    Args:
        reviewed: `pseudo_samples_kept.jsonl`, `label_descriptions.jsonl` or several such files.
        journal: The `journal.jsonl` of the runs that wrote them; it holds the prompts.
        output: File to write.
        form (`str`): `"messages"`: `{"messages": [...]}`; `"prompt-completion"`: `{"prompt": [...], "completion": [...]}`, with
            which TRL computes the loss on the answer only.

    Returns:
        The number of chats. Rows of `label_descriptions.jsonl` that are marked (too long, another language) are left out.

    Raises:
        AugmentationError: if the journal lacks the prompt of a row.
    """

    def chats(book: Journal) -> Iterator[dict[str, Any]]:
        for path in [reviewed] if isinstance(reviewed, (str, Path)) else reviewed:
            for number, row in read_json_lines(path):
                answer = row.get("text") or row.get("expansion")
                entry = book.get(str((row.get("provenance") or {}).get("request_key")))
                if not isinstance(answer, str) or entry is None:
                    raise AugmentationError(
                        f"{path}, line {number}: its prompt is not in the journal {journal}; name the journal of the run "
                        "that wrote the file with `--journal`."
                    )
                if "expansion" in row and row.get("marks"):
                    continue
                reply = [{"role": "assistant", "content": answer}]
                if form == "messages":
                    yield {"messages": [*entry["messages"], *reply]}
                else:
                    yield {"prompt": entry["messages"], "completion": reply}

    if form not in ("messages", "prompt-completion"):
        raise AugmentationError(f"the form {form!r} is not known; use messages or prompt-completion.")
    if not Path(journal).exists():
        raise AugmentationError(f"there is no journal {journal}; name the one of the run with `--journal`.")
    with Journal(journal, read_only=True) as book:
        return write_json_lines(output, chats(book))
