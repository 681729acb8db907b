"""Complete checkpoints: a manifest with a digest of each file is written last, and the files must match it when a run is resumed."""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .files import atomic_write, sync_folder


MANIFEST_NAME = "checkpoint_manifest.json"
CHECKPOINT_FOLDER = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")


def write_manifest(folder: str | os.PathLike) -> None:
    """
    Record name, size and SHA-256 of every file of a finished checkpoint, after all of them have been synced to disk.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_NAME:
            _flush(path)
            files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": _digest(path)}
    with atomic_write(folder / MANIFEST_NAME) as file:
        json.dump({"files": files}, file, indent=1)
    sync_folder(folder)
    sync_folder(folder.absolute().parent)


def remove_manifest(folder: str | os.PathLike) -> None:
    """Mark a folder as unfinished before it is written to again."""
    (Path(folder) / MANIFEST_NAME).unlink(missing_ok=True)


def damaged_files(folder: str | os.PathLike) -> list[str]:
    """
    Names of the files of a checkpoint that are missing or differ from the manifest; the name of the manifest if it cannot be
    read. Empty for a complete checkpoint.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        # Manifests of version 0.1 hold sizes only.
        recorded = {name: value if isinstance(value, dict) else {"size": value} for name, value in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [MANIFEST_NAME]
    # Sizes first, so that a truncated file is found without reading the others.
    damaged = [name for name, record in recorded.items() if _size(folder / name) != record.get("size")]
    if damaged:
        return damaged
    return [
        name for name, record in recorded.items() if "sha256" in record and _digest(folder / name) != record["sha256"]
    ]


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint folder holds every file that its manifest names, unchanged."""
    return not damaged_files(folder)


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest checkpoint of a run that is complete and undamaged, or `None`.

    `transformers.trainer_utils.get_last_checkpoint` returns the checkpoint with the highest number, even if the process was killed while writing it.
    """
    if not os.path.isdir(output_dir):
        return None
    numbers = [int(match[1]) for name in os.listdir(output_dir) if (match := CHECKPOINT_FOLDER.match(name))]
    folders = (os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{n}") for n in sorted(numbers, reverse=True))
    return next((folder for folder in folders if is_complete(folder)), None)


class CheckpointGuard(TrainerCallback):
    """
    Writes the manifest of each checkpoint, and only then deletes older checkpoints (`save_total_limit`), so that there is always a complete
    one.
    """

    def __init__(self):
        self._folder: str | None = None
        self._postponed = contextlib.ExitStack()

    def begin(self, folder: str, args: Any) -> None:
        """Called before the first file of a checkpoint is written."""
        self.close()
        self._folder = folder
        if args.should_save:
            remove_manifest(folder)
        self._postponed.enter_context(args.postponed_rotation())

    def close(self) -> None:
        """Restores `save_total_limit` of the arguments; also called if saving failed."""
        self._folder = None
        self._postponed.close()

    def on_save(self, args, state, control, **kwargs):
        folder = self._folder
        self.close()
        if folder is None:
            return
        PartialState().wait_for_everyone()  # every process has written its random state
        if args.should_save:
            write_manifest(folder)
            rotate_checkpoints(
                output_dir=os.path.dirname(folder),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )


def _digest(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _flush(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as file:  # some file systems cannot
        os.fsync(file.fileno())
