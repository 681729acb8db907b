"""Reserved disk space for expected answers."""

import contextlib
import errno
import os
from pathlib import Path


STEP = 65536  # bytes


class Reserve:
    """
    Disk space that is reserved for expected answers, as a file next to the journal.

    Args:
        path: The file; it is removed when the journal is closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._booked = self._size = 0
        self._closed = False

    def book(self, size: int) -> None:
        """
        Keeps `size` more bytes free.

        Raises:
            OSError: if there is no room for them.
        """
        if self._closed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        needed = self._booked + size
        if needed > self._size:
            try:
                self._allocate(max(needed, self._size + STEP))
            except OSError:
                self._allocate(needed)
        self._booked = needed

    def give_back(self, size: int) -> None:
        """Releases reserved space that has been used or is not needed."""
        self._booked -= size

    def release(self) -> None:
        """Frees the space permanently, because the disk is full and the expected answers need it."""
        self._closed = True
        self.remove()

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._size = 0

    def _allocate(self, size: int) -> None:
        with open(self.path, "ab", buffering=0) as stream:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, size)
                elif stream.write(bytes(size - self._size)) != size - self._size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(stream.fileno(), self._size)
                raise
        self._size = size
