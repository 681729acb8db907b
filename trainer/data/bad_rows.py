"""Invalid rows: the first twenty are listed in one error, or all are skipped and written to a file."""

import json
import logging
from typing import IO, Any

from .text_lines import DataFileError


logger = logging.getLogger(__name__)
MAX_LISTED = 20
SKIPPING = '`--on_bad_rows skip` of run_mldc.py and audit_labels.py, or `on_bad_rows="skip"` in Python'


class BadRows:
    """
    Collects the invalid rows of a split, those that are not documents.

    Args:
        on_bad_rows (`"error"` or `"skip"`): whether [`finish`] raises.
        split (`str`): for messages and in the file.
        file (text stream, *optional*): gets a line `{"split", "problem"}` of JSON Lines for every bad row that is skipped.
        max_listed (`int`): maximum number of rows listed in one error; with 1, reading stops at the first one.

    Raises:
        ValueError: if `on_bad_rows` is another word.
    """

    def __init__(
        self,
        on_bad_rows: str = "error",
        split: str = "train",
        file: IO[str] | None = None,
        max_listed: int = MAX_LISTED,
    ) -> None:
        if on_bad_rows not in ("error", "skip"):
            raise ValueError(f"`on_bad_rows` is {on_bad_rows!r}, but it is 'error' or 'skip'. Use one of them.")
        self.on_bad_rows, self.split, self.max_listed = on_bad_rows, split, max_listed
        self.count = 0
        self.was_used = False
        self._first: list[DataFileError] = []
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        """State for cache keys and worker processes, without the collected rows."""
        return BadRows, (self.on_bad_rows, self.split, None, self.max_listed)

    def add(self, error: DataFileError) -> None:
        """
        Records a bad row.

        Raises:
            DataFileError: if bad rows are errors and `max_listed` is reached.
        """
        self.count += 1
        if len(self._first) < self.max_listed:
            self._first.append(error)
        if self.on_bad_rows == "error" and self.count == self.max_listed:
            self._raise()
        if self._file is not None:
            self._file.write(json.dumps({"split": self.split, "problem": str(error)}, ensure_ascii=False) + "\n")

    def _raise(self) -> None:
        if len(self._first) == 1:
            raise DataFileError(f"{self._first[0]} Or leave such rows out: {SKIPPING}.")
        count = f"The first {self.count} bad rows" if self.count == self.max_listed else f"{self.count} bad rows"
        raise DataFileError(
            f"{count} of {self.split} are listed below. Correct or remove them, or leave them out: {SKIPPING}.\n"
            + "\n".join(f"- {error}" for error in self._first)
        )

    def finish(self) -> None:
        """
        Raises:
            DataFileError: that lists the bad rows, if there are any and they are errors.
        """
        if self._first and self.on_bad_rows == "error":
            self._raise()
        if self._first:
            count = "1 bad row is" if self.count == 1 else f"{self.count} bad rows are"
            logger.warning(f"{self.split}: {count} skipped. The first: {self._first[0]}")
