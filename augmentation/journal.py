"""An append-only file of paid answers, so that no answer is lost or paid for twice."""

import asyncio
import contextlib
import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from trainer.files import sync_folder

from .errors import AugmentationError
from .journal_lines import JournalLineError, decode_line, encode_line
from .request import Request
from .reserve import Reserve
from .writing import check_output, check_writable


# Minimum time between two syncs. Each sync switches threads, which is slow on a busy machine.
SYNC_SECONDS = 0.05
SHOWN_WARNINGS = 3

logger = logging.getLogger(__name__)


class Journal:
    """
    Answers by the key of their request, in an append-only JSON Lines file.

    Answers stay on disk; only the position of each line is kept in memory (about 150 bytes per answer). Each line contains its own digest,
    so that a damaged line is skipped and costs only one answer. A line truncated by a kill is removed on opening. If two lines have the
    same key, the first one is used. Use as a context manager, which holds a lock.

    Args:
        path: The file; it is created if it does not exist. The lock is the file `{path}.lock`.
        read_only (`bool`): Do not lock or repair the journal (for reports).

    Raises:
        AugmentationError: if another process uses the journal, or if it cannot be read or written.
    """

    def __init__(self, path: str | Path, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self.notes: list[dict[str, Any]] = []
        self.reserve = Reserve(Path(f"{self.path}.reserve"))
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._stream: BinaryIO | None = None
        self._reader: BinaryIO | None = None
        self._lock: FileLock | None = None
        self._unsynced = False
        self._syncer: asyncio.Task | None = None
        self._hurry: asyncio.Event | None = None
        self._problem: AugmentationError | None = None
        self._rescue_file: Path | None = None

    # --------------------------------------------------------------------------------------------- opening

    def __enter__(self) -> "Journal":
        try:
            if not self.read_only:
                self._open_for_writing()
            # answers are read through a separate handle, because the other one only appends
            if self.path.exists():
                self._reader = open(self.path, "rb")
                self._load(self._reader)
            if not self.read_only:
                self._absorb_rescued()
        except OSError as error:
            self.__exit__()
            raise AugmentationError(
                f"the journal {self.path} cannot be opened ({error.strerror or error}); check the path and its permissions, or "
                "choose another `output_dir`."
            ) from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open_for_writing(self) -> None:
        check_writable(self.path.parent)
        check_output(self.path, special=False)
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise AugmentationError(
                f"the journal {self.path} is in use by another process, and two would pay for the same answers; wait for the "
                "other one or choose another `output_dir`."
            ) from None
        except NotImplementedError:
            raise AugmentationError(
                f"the journal {self.path} cannot be locked on this file system; choose another `output_dir`."
            ) from None
        self._lock = lock
        self.reserve.remove()  # left over from a killed process
        is_new = not self.path.exists()
        self._stream = open(self.path, "ab", buffering=0)
        if is_new:
            sync_folder(self.path.parent)

    def __exit__(self, *exception: object) -> None:
        for stream in (self._stream, self._reader):
            if stream is not None:
                stream.close()
        if self._lock is not None:
            self.reserve.remove()
            self._lock.release()
            self._lock = None

    def _load(self, stream: BinaryIO) -> None:
        place, good, damaged = 0, 0, 0
        for number, line in enumerate(stream, start=1):
            is_complete = line.endswith(b"\n")
            try:
                if line.strip():
                    self._remember(decode_line(line if is_complete else line + b"\n"), place, len(line))
                good = place + len(line)
            except JournalLineError as problem:
                good = place + len(line) if is_complete else good
                damaged += is_complete
                if is_complete and damaged <= SHOWN_WARNINGS:
                    logger.warning("%s, line %d is left out: %s.", self.path, number, problem)
            place += len(line)
        if damaged > SHOWN_WARNINGS:
            logger.warning("%s: %d lines are left out; their requests are sent again.", self.path, damaged)
        self._end = good
        if self._stream is not None and place:
            self._repair_end(stream, place)

    def _repair_end(self, stream: BinaryIO, size: int) -> None:
        """Removes a line that was truncated by a kill; adds a missing line end."""
        assert self._stream is not None
        if self._end < size:
            logger.warning("%s ended in mid-line (%d bytes) and was repaired.", self.path, size - self._end)
            self._stream.truncate(self._end)
            os.fsync(self._stream.fileno())
        stream.seek(max(0, self._end - 1))
        if self._end and stream.read(1) != b"\n":
            self._write(b"\n")
            self._end += 1

    def _remember(self, entry: dict[str, Any], place: int, length: int) -> None:
        if "key" in entry:
            self._places.setdefault(entry["key"], (place, length))
        else:
            self.notes.append(entry)

    # --------------------------------------------------------------------------------------------- reading

    def __contains__(self, request: Request) -> bool:
        return any(key in self._places for key in request.keys)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of a key, or None."""
        if key not in self._places or self._reader is None:
            return None
        place, length = self._places[key]
        self._reader.seek(place)
        line = self._reader.read(length)
        return decode_line(line if line.endswith(b"\n") else line + b"\n")

    def answer(self, request: Request) -> dict[str, Any] | None:
        """The answer to a request, or None; answers of version 0.1 count too."""
        found = (self.get(key) for key in request.keys)
        return next((entry for entry in found if entry is not None), None)

    def check_is_journal(self) -> None:
        """
        Checks a journal that the user has specified.

        Raises:
            AugmentationError: if there is no such file, or no line of it is one of a journal.
        """
        if not self.path.exists():
            raise AugmentationError(f"there is no journal {self.path}; give the journal.jsonl of a run.")
        if self.path.stat().st_size and not self._places and not self.notes:
            raise AugmentationError(f"{self.path} is not a journal; give the journal.jsonl of a run.")

    def entries(self) -> Iterator[dict[str, Any]]:
        """All answers, in the order in which they arrived."""
        for key in self._places:
            entry = self.get(key)
            if entry is not None:
                yield entry

    # --------------------------------------------------------------------------------------------- writing

    def check(self) -> None:
        """
        Checks that answers can be stored; called before anything is sent.

        Raises:
            AugmentationError: if an earlier answer could not be stored in the journal.
        """
        if self._problem is not None:
            raise self._problem

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """
        Reserves disk space for one answer while its request is in progress.

        Args:
            size (`int`): Length in bytes of the longest possible line.

        Raises:
            AugmentationError: if the disk is full, before anything is sent.
        """
        self.check()
        try:
            self.reserve.book(size)
        except OSError as error:
            raise self._failure(error) from None
        try:
            yield
        finally:
            self.reserve.give_back(size)

    def append(self, entry: dict[str, Any]) -> None:
        """
        Writes an entry as one line, which then survives the end of the process, and has it synced to disk in the background (concurrent
        entries share one `fsync`); `synced` waits for that.

        If the disk is full, reserved space is freed for the entry; `check` then stops the run.

        Raises:
            AugmentationError: if the line could not be written to the journal. If it was written elsewhere, the message names that file.
        """
        line = encode_line(entry)
        try:
            self._write(line)
        except OSError as error:
            self._problem = self._problem or self._failure(error)
            self.reserve.release()
            try:
                self._write(line)
            except OSError:
                self._rescue(line)
                raise self._problem from None
        self._remember(entry, self._end, len(line))
        self._end += len(line)
        self._unsynced = True
        if self._syncer is None or self._syncer.done():
            self._hurry = asyncio.Event()
            self._syncer = asyncio.create_task(self._sync(self._hurry))

    def _write(self, line: bytes) -> None:
        assert self._stream is not None, "the journal is open for reading only"
        try:
            if self._stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._stream.fileno(), self._end)  # so that no line follows a partial one
            raise

    def _rescue(self, line: bytes) -> None:
        """Keeps a paid answer that the journal has no room for in another file."""
        places = [Path(f"{self.path}.rescued")]
        if self._rescue_file is None:
            with contextlib.suppress(OSError):
                handle, name = tempfile.mkstemp(prefix="sep-mldc-answers-", suffix=".jsonl")
                os.close(handle)
                self._rescue_file = Path(name)
        if self._rescue_file is not None:
            places.append(self._rescue_file)
        for place in places:
            with contextlib.suppress(OSError):
                size = place.stat().st_size if place.exists() else 0
                try:
                    with open(place, "ab", buffering=0) as stream:
                        if stream.write(line) == len(line):
                            os.fsync(stream.fileno())
                            self._tell_rescued(place)
                            return
                except OSError:
                    pass
                os.truncate(place, size)

    def _tell_rescued(self, place: Path) -> None:
        hint = (
            f"what did not fit is in {place}"
            if place.parent == self.path.parent
            else f"what did not fit is in {place}: first add it with `cat {place} >> {self.path}`"
        )
        if hint not in str(self._problem):
            self._problem = AugmentationError(f"{self._problem} Paid answers are kept: {hint}.")

    def _absorb_rescued(self) -> None:
        """Adds answers that an earlier run could not write here."""
        path = Path(f"{self.path}.rescued")
        if not path.exists() or self._stream is None:
            return
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(JournalLineError):
                entry = decode_line(line)
                if entry.get("key") not in self._places:
                    self._write(line)
                    self._remember(entry, self._end, len(line))
                    self._end += len(line)
        os.fsync(self._stream.fileno())
        if self._reader is None:
            self._reader = open(self.path, "rb")
        path.unlink()

    async def synced(self) -> None:
        """
        Waits until all appended entries are on disk.

        Raises:
            AugmentationError: if it is not.
        """
        if self._syncer is not None and self._hurry is not None:
            self._hurry.set()
            await self._syncer
        self.check()

    async def _sync(self, hurry: asyncio.Event) -> None:
        while self._unsynced and self._stream is not None:
            self._unsynced = False
            try:
                await asyncio.to_thread(os.fsync, self._stream.fileno())
            except OSError as error:
                self._problem = self._problem or self._failure(error)
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(hurry.wait(), SYNC_SECONDS)

    def _failure(self, error: OSError) -> AugmentationError:
        return AugmentationError(
            f"the journal {self.path} cannot be written ({error.strerror or error}); make room on the disk and run the same "
            "command again."
        )
