"""An append-only file of paid answers: nothing lost, nothing paid twice."""

import asyncio
import errno
import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import AugmentationError, check_writable


# Between two syncs: each hands the interpreter to a thread and back, which a busy machine does slowly.
SYNC_SECONDS = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """
    One question to the model.

    Args:
        messages (`list[dict[str, str]]`): Chat messages, `{"role", "content"}`.
        model (`str`): Name that the endpoint knows.
        parameters (`dict`): Sampling parameters, such as `temperature` and `max_tokens`.
        field (`str`): Name of the text's field where the answer is JSON.
        sample_index (`int`): Tells equal prompts apart.
        expected_tokens (`int`): Length of the usual answer, for estimates.
        origin (`dict`): Provenance that does not change the answer (template name and hash); not part of the key.
    """

    messages: list[dict[str, str]]
    model: str
    parameters: dict[str, Any]
    field: str
    sample_index: int = 0
    expected_tokens: int = 64
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """SHA-256 of prompt, model, parameters and sample index, in hexadecimal."""
        identity = [self.messages, self.model, self.parameters, self.field, self.sample_index]
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


class Journal:
    """
    Answers by the key of their request, in a JSON Lines file that is only ever appended to.

    Answers stay on disk; memory holds the place of each line (some 150 bytes for an answer). A line that a kill has cut is
    taken off on opening. Of two lines with one key the first counts. Use as a context manager: it holds a lock.

    Args:
        path: The file; it is made if it does not exist. The lock is the file `{path}.lock`.
        read_only (`bool`): Takes no lock and repairs nothing (for reports).

    Raises:
        AugmentationError: if another process uses the journal, or if it cannot be written.
    """

    def __init__(self, path: str | Path, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._places: dict[str, tuple[int, int]] = {}
        self._unsynced = False
        self._syncer: asyncio.Task | None = None
        self._sync_error: AugmentationError | None = None
        self.notes: list[dict[str, Any]] = []

    def __enter__(self) -> "Journal":
        if self.read_only:
            self._stream = None
        else:
            check_writable(self.path.parent)
            self._lock = FileLock(f"{self.path}.lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise AugmentationError(
                    f"the journal {self.path} is in use by another process, and two would pay for the same answers; wait "
                    "for the other one or choose another `--output-dir`."
                ) from None
            try:
                self._stream = open(self.path, "ab", buffering=0)
            except OSError as error:
                self._lock.release()
                raise AugmentationError(
                    f"the journal {self.path} cannot be opened ({error.strerror}); choose another `--output-dir`."
                ) from None
        # answers are read through a handle of its own: the other one only appends
        self._reader = open(self.path, "rb") if self.path.exists() else None
        if self._reader is not None:
            self._load()
        return self

    def __exit__(self, *exception) -> None:
        for stream in (self._stream, self._reader):
            if stream is not None:
                stream.close()
        if not self.read_only:
            self._lock.release()

    def _load(self) -> None:
        place, good = 0, 0
        for number, line in enumerate(self._reader, start=1):
            length = len(line)
            try:
                entry = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(entry, dict):
                    raise ValueError
            except ValueError:
                entry = None
                if line.endswith(b"\n"):  # a damaged line amid good ones costs one answer, not the journal
                    logger.warning(
                        "%s, line %d is damaged and left out; its request is sent again.", self.path, number
                    )
            if entry is not None:
                self._remember(entry, place, length)
            if line.endswith(b"\n"):
                good = place + length
            place += length
        if good < place and not self.read_only:
            logger.warning("%s ended in mid-line (%d bytes) and was repaired.", self.path, place - good)
            self._stream.truncate(good)
            os.fsync(self._stream.fileno())
        self._end = good

    def _remember(self, entry: dict[str, Any], place: int, length: int) -> None:
        if "key" in entry:
            self._places.setdefault(entry["key"], (place, length))
        else:
            self.notes.append(entry)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of a key, or None."""
        if key not in self._places:
            return None
        place, length = self._places[key]
        self._reader.seek(place)
        return json.loads(self._reader.read(length))

    def entries(self):
        """All answers, in the order in which they arrived."""
        for key in self._places:
            yield self.get(key)

    def append(self, entry: dict[str, Any]) -> None:
        """
        Writes an entry as one line, so that it outlives the process from here on, and has it synced to disk in the background
        (entries that come together share one `fsync`); `synced` waits for that.

        Raises:
            AugmentationError: if this line cannot be written, or an earlier one not be synced.
        """
        if self._sync_error is not None:
            raise self._sync_error
        # backslashreplace: a lone surrogate in an answer stays a JSON escape
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            written = self._stream.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._stream.fileno(), self._end)  # no later line may follow half a line
            raise self._problem(error) from None
        self._remember(entry, self._end, len(line))
        self._end += len(line)
        self._unsynced = True
        if self._syncer is None or self._syncer.done():
            self._syncer = asyncio.create_task(self._sync())

    async def synced(self) -> None:
        """Returns when all that was appended is on disk."""
        if self._syncer is not None:
            await self._syncer
        if self._sync_error is not None:
            raise self._sync_error

    async def _sync(self) -> None:
        while self._unsynced and self._sync_error is None:
            self._unsynced = False
            try:
                await asyncio.to_thread(os.fsync, self._stream.fileno())
            except OSError as error:
                self._sync_error = self._problem(error)
            await asyncio.sleep(SYNC_SECONDS)

    def _problem(self, error: OSError) -> AugmentationError:
        return AugmentationError(
            f"the journal {self.path} cannot be written ({error.strerror}); make room on the disk and run the same command "
            "again."
        )
