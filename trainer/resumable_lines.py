"""Resumable output: lines written in blocks, and a journal that records what they depend on."""

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from typing import IO, Any

from .files import sync_folder


try:
    import fcntl
except ImportError:  # Windows has no advisory locks on descriptors
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

PIECE_SIZE = 1 << 20


class ResumableLines:
    """
    A file of lines that are written in blocks, one block after another, each on disk before the next begins.

    Blocks are written to `PATH.partial`, which is renamed to `PATH` after the last one: a file of that name is always complete.
    `PATH.journal` is kept next to it. Its first line is the fingerprint of the result: everything that it depends on. Each further line
    records a block: how many items are done, how long the output is, and digests of the output and of the input so far. A process that
    resumes thus knows which blocks are complete, and whether its input and settings are the same as before. The journal is locked during
    writing, so that two processes never write to the same output.

    Args:
        path (`str`): the output. Symbolic links are followed.
        resume (`bool`, defaults to `False`): continue the output of an earlier process.
        overwrite (`bool`, defaults to `False`): replace a complete output, and drop a partial one unless it is resumed.

    Attributes:
        num_done (`int`): number of items whose lines are written.
        input_digest (`str`, *optional*): digest of the input up to there.
        is_complete (`bool`): whether there is nothing left to write.

    Raises:
        ValueError: there is an output already, or another process is writing it.
        OSError: the folder is missing or not writable.

    Example:

    ```python
    with ResumableLines("labels.jsonl", resume=True) as output:
        output.begin({"model": digest_of_model})
        ...
        output.write([b"one line\\n"], num_items=1, input_digest=digest_so_far)
        output.finish()
    ```
    """

    def __init__(self, path: str, resume: bool = False, overwrite: bool = False):
        self.path = os.path.realpath(path)
        self.partial, self.journal = self.path + ".partial", self.path + ".journal"
        self.num_done = 0
        self.input_digest: str | None = None
        self.is_complete = False
        self._stream: IO[bytes] | None = None
        self._fingerprint: dict[str, Any] = {}
        self._digest = hashlib.sha256()
        self._length = 0
        self._journal = self._lock_journal()
        try:
            self._resumed = self._choose_what_to_resume(resume, overwrite)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _lock_journal(self) -> IO[bytes]:
        try:
            journal = open(os.open(self.journal, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise ValueError(
                f"{self.journal} cannot be written ({error.strerror}). Specify another output, in a folder that exists and is writable."
            ) from None
        locked = True
        if fcntl is not None:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = os.fstat(journal.fileno()).st_nlink > 0  # another process may just have removed it
            except BlockingIOError:
                locked = False
            except OSError:
                pass  # a file system without locks
        if not locked:
            journal.close()
            raise ValueError(f"Another process is writing {self.path}. Wait until it ends, or specify another output.")
        return journal

    def _choose_what_to_resume(self, resume: bool, overwrite: bool) -> str | None:
        """The file to continue, or None to start from the beginning."""
        exists = os.path.lexists(self.path)
        started = os.path.exists(self.partial) and os.path.getsize(self.partial) > 0
        if started and exists and resume and not overwrite:
            raise ValueError(
                f"{self.path} exists, and {self.partial} contains a part of a later run. To continue that run and replace the output, "
                "resume and overwrite."
            )
        if started and not resume and not overwrite:
            raise ValueError(
                f"{self.partial} contains a part of an earlier run. Resume it, or overwrite it to start from the beginning."
            )
        if exists and not resume and not overwrite:
            raise ValueError(f"{self.path} exists. Specify another output, or overwrite it.")
        if not resume:
            return None
        if started:
            return self.partial
        return self.path if exists and not overwrite else None

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """
        Start the output or, when resuming, move to the end of the last complete block.

        Args:
            fingerprint (`dict`): names and JSON values of everything that the result depends on, except the input.

        Raises:
            ValueError: the run to resume has another fingerprint, or none.
        """
        self._fingerprint = fingerprint = json.loads(json.dumps(fingerprint))
        if self._resumed is None:
            return  # files are opened for the first block; until then, existing files are not changed
        stored, blocks = self._read_journal()
        if stored is None:
            raise ValueError(
                f"{self._resumed} has no readable {os.path.basename(self.journal)} next to it, so the settings it was made with are unknown. "
                "Overwrite it to start from the beginning."
            )
        changes = _differences(stored, fingerprint)
        if changes:
            raise ValueError(
                f"{self._resumed} was made with different settings: {'; '.join(changes)}. Resume with the same settings, or overwrite "
                "it to start from the beginning."
            )
        last = self._last_intact_block(blocks)
        self.num_done, self.input_digest = last["items"], last["input"]
        if self._resumed == self.path:
            if os.path.getsize(self.path) != last["bytes"] or not blocks:
                raise ValueError(f"{self.path} was changed after it was written. Overwrite it to write it again.")
            self.is_complete = True
            return
        stream = self._open_partial("r+b")
        stream.truncate(last["bytes"])
        stream.seek(0, os.SEEK_END)
        self._journal.truncate(last["end"])
        self._journal.seek(0, os.SEEK_END)

    def _start(self) -> IO[bytes]:
        stream = self._open_partial("wb")
        self._journal.truncate(0)
        self._add_to_journal({"fingerprint": self._fingerprint})
        return stream

    def _open_partial(self, mode: str) -> IO[bytes]:
        try:
            # Unbuffered, so that after a failed write, closing the file does not fail again.
            self._stream = open(self.partial, mode, buffering=0)
            return self._stream
        except OSError as error:
            raise ValueError(f"{self.partial} cannot be written ({error.strerror}). Specify another output.") from None

    def _read_journal(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The fingerprint and the records of blocks, each with the end position of its line, up to the first damaged line."""
        fingerprint, blocks, end = None, [], 0
        self._journal.seek(0)
        for line in self._journal.read().splitlines(keepends=True):
            end += len(line)
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if fingerprint is None:
                if not isinstance(record, dict) or not isinstance(record.get("fingerprint"), dict):
                    return None, []
                fingerprint = record["fingerprint"]
                blocks.append({"items": 0, "bytes": 0, "output": None, "input": None, "end": end})
            elif isinstance(record, dict) and {"items", "bytes", "output", "input"} <= record.keys():
                blocks.append({**record, "end": end})
            else:
                break
        return fingerprint, blocks

    def _last_intact_block(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        """The last block up to which the output matches the recorded digest."""
        last = blocks[0]
        with open(str(self._resumed), "rb") as stream:
            for block in blocks[1:]:
                ahead = self._digest.copy()
                for piece in _pieces(stream, block["bytes"] - last["bytes"]):
                    ahead.update(piece)
                if ahead.hexdigest() != block["output"]:
                    logger.warning(
                        f"{self._resumed} is damaged or truncated after item {last['items']}; the {blocks[-1]['items'] - last['items']} "
                        "items that followed are processed again."
                    )
                    break
                last, self._digest, self._length = block, ahead, block["bytes"]
        return last

    def write(self, lines: list[bytes], num_items: int, input_digest: str) -> None:
        """
        Write a block and sync it to disk.

        Args:
            lines (`list[bytes]`): lines, each with its line end.
            num_items (`int`): number of input items that the lines are for.
            input_digest (`str`): digest of the input up to the last of these items.

        Raises:
            OSError: for example, the disk is full. The output can be resumed from the last block.
        """
        stream = self._stream or self._start()
        data = b"".join(lines)
        with self._named_error(self.partial):
            _write_all(stream, data)
            os.fsync(stream.fileno())
        self._digest.update(data)
        self._length += len(data)
        self.num_done += num_items
        self.input_digest = input_digest
        self._add_to_journal(
            {
                "items": self.num_done,
                "bytes": self._length,
                "output": self._digest.hexdigest(),
                "input": self.input_digest,
            }
        )

    def _add_to_journal(self, record: dict[str, Any]) -> None:
        with self._named_error(self.journal):
            self._journal.seek(0, os.SEEK_END)
            _write_all(self._journal, json.dumps(record).encode() + b"\n")
            os.fsync(self._journal.fileno())

    @contextlib.contextmanager
    def _named_error(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{path} cannot be written any further ({error.strerror}). Make room, then resume: {self.num_done} are done."
            ) from None

    def finish(self) -> None:
        """Rename the output to its final name. If it replaces an existing file, the permissions of that file are kept."""
        if self.is_complete:
            return
        stream = self._stream or self._start()
        with self._named_error(self.partial):
            stream.close()
            with contextlib.suppress(FileNotFoundError):
                os.chmod(self.partial, stat.S_IMODE(os.stat(self.path).st_mode))
            os.replace(self.partial, self.path)
        sync_folder(os.path.dirname(self.path))
        self.is_complete = True

    def close(self) -> None:
        """Unlock the output for other processes. An empty journal is removed."""
        if self._stream is not None:
            self._stream.close()
        if not self._journal.closed:
            if os.fstat(self._journal.fileno()).st_size == 0:
                with contextlib.suppress(OSError):
                    os.remove(self.journal)
            self._journal.close()


def _write_all(stream: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def _pieces(stream: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (piece := stream.read(min(PIECE_SIZE, size))):
        yield piece
        size -= len(piece)


def _differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The differences in words. For digests, only that they differ."""
    changes = []
    for name in sorted(stored.keys() | current.keys()):
        former, now = stored.get(name), current.get(name)
        if former != now:
            digests = any(isinstance(value, str) and len(value) == 64 for value in (former, now))
            changes.append(f"another {name}" if digests else f"`{name}` was {former!r} and is {now!r}")
    return changes
