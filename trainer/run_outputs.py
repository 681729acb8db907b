"""The output files of a run: results, predictions and tables, each written atomically."""

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import atomic_write, make_writable_folder, write_csv


def check_output_folder(folder: str | os.PathLike, files: Iterable[str] = ()) -> None:
    """
    Check that output can be written to a folder, before anything is computed. The folder is created if it is missing.

    Args:
        folder (path): the output folder.
        files (`Iterable[str]`): names that will be written into it.

    Raises:
        OSError: the folder is a file or not writable, one of `files` is a directory, or the folder contains a pipe or a device, which
            would block writing.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise OSError(f"The output folder {os.fspath(folder)!r} is a file. Choose another `output_dir`.")
    try:
        make_writable_folder(path)
    except OSError as error:
        raise OSError(
            f"The output folder {os.fspath(folder)!r} cannot be written ({error.strerror or error}). Choose another `output_dir`."
        ) from None
    for name in files:
        if (path / name).is_dir():
            raise OSError(f"{path / name} is a folder, but a file of that name will be written. Rename the folder.")
    for entry in path.iterdir():
        try:
            mode = entry.stat().st_mode
        except OSError:  # a dangling link, whose target is created by writing
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(
                f"{entry} is a device or a pipe, but must be a file. Remove it, or choose another `output_dir`."
            )


@contextlib.contextmanager
def removed_if_empty(folder: str | os.PathLike) -> Iterator[None]:
    """
    Within this context, a run that fails leaves no empty folders behind: neither `folder` nor those above it that are missing at the start.
    """
    path = Path(folder).absolute()
    missing = [one for one in (path, *path.parents) if not one.exists()]
    try:
        yield
    except BaseException:
        for one in missing:
            with contextlib.suppress(OSError):  # not empty, or not created
                one.rmdir()
        raise


def save_model_atomically(trainer: Any) -> None:
    """
    Save the model to `args.output_dir`. It is written to a temporary folder first, so that an existing model is kept until the new one is
    complete. Must be called by every process.

    Args:
        trainer ([`SepMldcTrainer`]): its model, tokenizer, arguments and card are saved.

    Raises:
        OSError: the disk is full or the folder is not writable. An existing model is unchanged.
    """
    folder = Path(trainer.args.output_dir)
    staged = folder / "_unfinished_model"  # "_*" is never pushed
    if trainer.args.should_save:
        shutil.rmtree(staged, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(staged), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            new = {path.name for path in staged.iterdir()}
            for path in staged.iterdir():
                if path.name != "README.md":  # a card that a user has written is kept
                    os.replace(path, folder / path.name)
            for path in [*folder.glob("model*.safetensors"), *folder.glob("model*.index.json")]:
                if path.name not in new:  # shards of a previous model that had more of them
                    path.unlink()
    finally:
        if trainer.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
    trainer.create_model_card()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as indented JSON with sorted keys."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=4, sort_keys=True, ensure_ascii=False, default=float)


def save_metrics(folder: str | os.PathLike, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
    """
    Write `{split}_results.json` and add the metrics to `all_results.json`, as `Trainer.save_metrics` does, but
    atomically. An `all_results.json` without a valid JSON object (truncated by a full disk or a kill) is replaced.

    Args:
        folder (path): the output folder.
        split (`str`): `"train"`, `"eval"`, `"test"`, ...
        metrics (`dict[str, float]`): what training, evaluation or prediction returned.
        combined (`bool`, defaults to `True`): also update `all_results.json`.
    """
    write_json(Path(folder) / f"{split}_results.json", dict(metrics))
    if not combined:
        return
    path = Path(folder) / "all_results.json"
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        former = {}
    write_json(path, {**(former if isinstance(former, dict) else {}), **metrics})


def write_per_label_metrics(path: str | os.PathLike, metrics: Any, labels: Sequence[str]) -> None:
    """
    Write the metrics of each label as a csv table.

    Args:
        path (path): the file.
        metrics ([`~trainer.metrics.StreamingMetrics`]): of an evaluation, such as `trainer.last_metrics`.
        labels (`list[str]` of length `num_labels`): names.
    """
    columns = metrics.per_label()
    names = [n for n in ("train_count", "support", "precision", "recall", "f1", "threshold") if n in columns]
    rows = ([label, *(round(float(columns[name][i]), 6) for name in names)] for i, label in enumerate(labels))
    write_csv(path, ["label", *names], rows)


def write_predictions(
    path: str | os.PathLike,
    scores: Any,
    indices: Any,
    labels: Sequence[str],
    label_sets: Sequence[Sequence[int]] | None = None,
    ids: Sequence[Any] | None = None,
    gold: Iterable[Sequence[str]] | None = None,
    top_k: int | None = None,
) -> None:
    """
    Write predictions as JSON Lines, one document per line: `id`, `labels` (the best ones with their scores), `assigned` (the
    names of the label set), `abstained` (whether it is empty) and `gold` (the labels of the document, if they are known).

    Args:
        path (path): the file.
        scores, indices (arrays of shape `(num_documents, k)`): probabilities and label ids, best first, as `predict` returns them.
        labels (`list[str]` of length `num_labels`): names.
        label_sets (sequence of `Sequence[int]`, *optional*): label ids of the label set of each document; if not given, no labels are
            assigned.
        ids (`list`, *optional*): document ids; by default, numbers starting at 0.
        gold (iterable of `list[str]`, *optional*): gold labels of each document.
        top_k (`int`, *optional*): number of labels in `labels`; all k if not given.
    """
    ids = range(len(scores)) if ids is None else list(ids)
    gold = None if gold is None else iter(gold)
    with atomic_write(path) as file:
        for number, (identity, row_scores, row_indices) in enumerate(zip(ids, scores, indices)):
            ranked = [
                {"label": labels[index], "score": round(float(score), 6)}
                for score, index in zip(row_scores[:top_k], row_indices[:top_k])
            ]
            row: dict[str, Any] = {"id": identity, "labels": ranked}
            if label_sets is not None:
                row["assigned"] = [labels[i] for i in label_sets[number]]
                row["abstained"] = not row["assigned"]
            if gold is not None:
                row["gold"] = list(next(gold))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
