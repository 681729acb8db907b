"""Which checkpoints are whole: a manifest is written last, and resuming trusts only folders that match theirs."""

import json
import os
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


MANIFEST_NAME = "checkpoint_manifest.json"


def write_manifest(folder: str | os.PathLike) -> None:
    """Record name and size of every file of a finished checkpoint. Written to a temporary name first, then renamed."""
    folder = Path(folder)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    temporary = folder / f".{MANIFEST_NAME}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST_NAME)


def is_whole(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint folder holds every file that its manifest names, in full length."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest checkpoint of a run that was saved to its end, or `None`.

    `transformers.trainer_utils.get_last_checkpoint` takes the highest number, also of a folder that a kill left half
    written.
    """
    pattern = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
    if not os.path.isdir(output_dir):
        return None
    numbers = sorted(
        (int(match[1]) for name in os.listdir(output_dir) if (match := pattern.match(name))), reverse=True
    )
    for number in numbers:
        folder = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{number}")
        if is_whole(folder):
            return folder
    return None
