"""Findings as a csv file for review, the decisions about them, and the corrected documents."""

import contextlib
import csv
import gzip
import io
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from ..data.bad_rows import BadRows
from ..data.columns import Columns
from ..data.label_names import normalize_label, read_delimiter
from ..data.readers import expand_files, file_signature, find_format, read_records
from ..data.text_lines import DataFileError, DataFileNotFoundError
from ..files import atomic_write, digest, harmless_cell, write_csv
from .findings import ADD, CHANGES, DROP, KINDS, REMOVE, Finding


COLUMNS = tuple(field.name for field in fields(Finding))
ACCEPT, REJECT = "accept", "reject"
DECISIONS = {
    **dict.fromkeys(("accept", "accepted", "a", "yes", "y"), ACCEPT),
    **dict.fromkeys(("reject", "rejected", "r", "no", "n"), REJECT),
    "": "",
}
OUTPUT_FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class AuditedFiles:
    """
    The documents that findings are about: the arguments of [`~trainer.load_documents`] with which they were loaded, and a digest of their
    texts. Saved next to the findings, in a JSON file of the same name.
    """

    files: list[str]
    text_columns: list[str]
    label_column: str | list[str]
    label_delimiter: str | None = None
    id_column: str | None = None
    data_format: str = "auto"
    on_bad_rows: str = "error"
    texts: str = ""

    def columns(self) -> Columns:
        label_column = self.label_column if isinstance(self.label_column, str) else tuple(self.label_column)
        return Columns(tuple(self.text_columns), label_column, self.id_column, self.label_delimiter)


def digest_of_texts(texts: Iterable[str]) -> str:
    """A digest of the texts of documents in their order."""
    return digest(*texts)


def description_path(path: str | os.PathLike) -> Path:
    """The JSON file next to a findings file."""
    path = Path(path)
    if path.suffix.lower() != ".csv":
        raise ValueError(
            f"The findings file is {os.fspath(path)!r}, but findings are a csv file. Name it findings.csv."
        )
    return path.with_suffix(".json")


def check_findings_file(path: str | os.PathLike, files: Iterable[str | os.PathLike]) -> None:
    """
    Check that neither the findings nor their description would overwrite one of the `files` that the audit reads.

    Raises:
        ValueError: one of them would be, or `path` does not end in `.csv`.
    """
    read = {os.path.realpath(name) for name in files}
    for written in (os.fspath(path), os.fspath(description_path(path))):
        if os.path.realpath(written) in read:
            raise ValueError(
                f"The findings {os.fspath(path)!r} would overwrite {written!r}, which the audit reads. Specify another findings file."
            )


def write_findings(path: str | os.PathLike, findings: Sequence[Finding], source: AuditedFiles) -> None:
    """
    Write findings as csv, and next to it which documents they are about.

    Args:
        path (`str` or path): a name that ends in `.csv`.
        findings (`list[Finding]`): in their order.
        source ([`AuditedFiles`]): the documents.

    Raises:
        ValueError: the file has a different extension, or would overwrite one of the audited documents.
        OSError: a file cannot be written.
    """
    check_findings_file(path, source.files)
    with atomic_write(description_path(path)) as file:
        json.dump(asdict(source), file, indent=2, ensure_ascii=False)
    _write_rows(path, findings)


def _write_rows(path: str | os.PathLike, findings: Sequence[Finding]) -> None:
    write_csv(path, COLUMNS, ([_cell(getattr(f, name)) for name in COLUMNS] for f in findings))


def _cell(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def read_findings(path: str | os.PathLike) -> list[Finding]:
    """
    Read findings from a csv file, including one saved by a spreadsheet program.

    Raises:
        DataFileError: a column is missing or a value is invalid, with file, line, rule and remedy. It is a `ValueError`.
        DataFileNotFoundError: there is no such file.
    """
    description_path(path)
    found: list[Finding] = []
    for where, record in read_records(path, "csv"):
        missing = [name for name in COLUMNS if name not in record]
        if missing:
            raise DataFileError(
                f"{where}: no column {', '.join(map(repr, missing))}. Findings have the columns {', '.join(COLUMNS)}: write them again with "
                "examples/audit_labels.py."
            )
        found.append(_parse(record, where))
    if not found and os.path.getsize(path) == 0:
        raise DataFileError(f"{os.fspath(path)}: is empty. Write the findings again with examples/audit_labels.py.")
    return found


def _parse(record: dict[str, str], where: str) -> Finding:
    decision = DECISIONS.get(record["decision"].strip().lower())
    for name, value, known in (
        ("decision", decision, "'accept', 'reject' or nothing"),
        ("kind", record["kind"] if record["kind"] in KINDS else None, ", ".join(map(repr, KINDS))),
        ("change", record["change"] if record["change"] in CHANGES else None, ", ".join(map(repr, CHANGES))),
    ):
        if value is None:
            raise DataFileError(f"{where}: `{name}` is {record[name]!r}, but it must be {known}. Correct it.")
    try:
        number, score = int(record["number"]), float(record["score"].replace(",", "."))
        row = int(record["row"]) if record["row"].strip() else None
    except ValueError:
        raise DataFileError(
            f"{where}: `number` is {record['number']!r}, `row` {record['row']!r} and `score` {record['score']!r}, but they must be numbers. "
            "Restore them."
        ) from None
    if (row is None) != (record["change"] == DROP) or (row is not None and row < 1):
        raise DataFileError(
            f"{where}: `row` is {record['row']!r} and `change` {record['change']!r}, but a row from 1 belongs to 'add' and 'remove', and none "
            "to 'drop'. Restore them."
        )
    return Finding(
        number=number,
        kind=record["kind"],
        change=record["change"],
        label=_raw(record["label"]),
        score=score,
        reason=_raw(record["reason"]),
        row=row,
        id=_raw(record["id"]) or None,
        text=_raw(record["text"]),
        decision=decision or "",
    )


def _raw(cell: str) -> str:
    """The inverse of [`~trainer.files.harmless_cell`]."""
    bare = cell[1:]
    return bare if cell.startswith("'") and harmless_cell(bare) == cell else cell


def read_source(path: str | os.PathLike) -> AuditedFiles:
    """
    The documents that a findings file is about.

    Raises:
        DataFileNotFoundError: the JSON file next to it is missing.
        DataFileError: it is damaged.
    """
    beside = description_path(path)
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
        return AuditedFiles(**values)
    except FileNotFoundError:
        raise DataFileNotFoundError(
            f"There is no file {beside}, which says which documents the findings in {Path(path).name} are about. Keep both in one folder."
        ) from None
    except (ValueError, TypeError):
        raise DataFileError(
            f"{beside}: does not say which documents the findings are about. Write the findings again with examples/audit_labels.py."
        ) from None


class FindingsFile:
    """
    A findings file in which each decision is saved to disk before `decide` returns. Thread-safe. Changes made by another program, such as a
    spreadsheet, are read before the next decision is written.

    Args:
        path (`str` or path): the csv file.

    Raises:
        DataFileError, DataFileNotFoundError: as [`read_findings`].
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._findings: list[Finding] = []
        self._signature: tuple | None = None
        self._refresh()

    def _refresh(self) -> None:
        if not self.path.exists():
            raise DataFileNotFoundError(
                f"There is no file {self.path}. Specify the findings that audit_labels.py wrote."
            )
        signature = file_signature(str(self.path))
        if signature != self._signature:
            self._findings, self._signature = read_findings(self.path), signature

    def read(self) -> list[Finding]:
        """The findings with their decisions, as they are on the disk."""
        with self._lock:
            self._refresh()
            return list(self._findings)

    def decide(self, number: int, decision: str) -> None:
        """
        Save a decision.

        Args:
            number (`int`): of the finding.
            decision (`str`): `"accept"`, `"reject"` or `""`.

        Raises:
            ValueError: there is no such finding or decision.
            OSError: the file cannot be written; it is unchanged then.
        """
        if decision not in DECISIONS.values():
            raise ValueError(f"`decision` is {decision!r}, but it must be 'accept', 'reject' or ''.")
        with self._lock:
            self._refresh()
            places = [i for i, finding in enumerate(self._findings) if finding.number == number]
            if not places:
                raise ValueError(f"{self.path} has no finding {number}. Read the file again.")
            changed = list(self._findings)
            changed[places[0]] = replace(changed[places[0]], decision=decision)
            _write_rows(self.path, changed)
            self._findings, self._signature = changed, file_signature(str(self.path))


def default_output_file(path: str | os.PathLike) -> str:
    """The default file for corrected documents: next to the findings, in the format of the documents."""
    source = read_source(path)
    ending = "." + find_format(source.files[0], source.data_format)
    return str(Path(path).with_suffix(f".corrected{ending if ending in OUTPUT_FORMATS else '.jsonl'}"))


def apply_findings(path: str | os.PathLike, output_file: str | os.PathLike) -> dict[str, int]:
    """
    Write the documents with the accepted findings applied. All other columns, and the labels of all other documents, are unchanged. Rows
    that the audit skipped (`on_bad_rows="skip"`) are left out.

    Args:
        path (`str` or path): the findings, a csv file.
        output_file (`str` or path): .jsonl, .csv, .tsv or .parquet; the first three also with .gz.

    Returns:
        `dict[str, int]`: `documents`, `changed` documents, and how many labels were removed (`"remove"`), added (`"add"`) or dropped from all
        documents (`"drop"`).

    Raises:
        DataFileError: the findings are invalid, or the documents have changed since the audit. It is a `ValueError`.
        ValueError: the format is unknown, or the output file is one of the audited files.
        OSError: a file is missing or cannot be written.
    """
    writer = _writer(output_file)
    source, findings = read_source(path), read_findings(path)
    files = expand_files(source.files)
    for used in (*files, os.fspath(path), description_path(path)):
        if os.path.realpath(used) == os.path.realpath(output_file):
            raise ValueError(
                f"`output_file` is {os.fspath(output_file)!r}, which is read for the corrections. Specify another file."
            )
    accepted = [finding for finding in findings if finding.decision == ACCEPT]
    dropped = {normalize_label(finding.label) for finding in accepted if finding.change == DROP}
    edits: dict[int, list[Finding]] = {}
    for finding in accepted:
        if finding.row is not None:
            edits.setdefault(finding.row, []).append(finding)
    records, texts, counts = [], [], {"documents": 0, "changed": 0, REMOVE: 0, ADD: 0, DROP: len(dropped)}
    for number, (record, text, names, columns) in enumerate(_documents(source, files), start=1):
        texts.append(text)
        corrected = _corrected(names, edits.pop(number, []), dropped, counts)
        if corrected != names:
            counts["changed"] += 1
            record = _with_labels(record, names, corrected, columns)
        records.append(record)
    counts["documents"] = len(records)
    if edits or digest_of_texts(texts) != source.texts:
        raise DataFileError(
            f"{', '.join(files)}: the documents are not those that were audited. Restore the files, or audit them again with "
            "examples/audit_labels.py."
        )
    with atomic_write(output_file, "wb") as file:
        writer(file, records, str(output_file))
    return counts


def _documents(source: AuditedFiles, files: list[str]) -> Iterable[tuple[dict[str, Any], str, list[str], Columns]]:
    """Record, text, label names and columns of every document, without rows that the audit skipped."""
    bad_rows = BadRows(source.on_bad_rows)
    for path in files:
        columns: Columns | None = None
        for where, record in read_records(path, source.data_format, on_error=bad_rows.add):
            columns = source.columns().check(list(record), where) if columns is None else columns
            try:
                document = columns.normalize(record, where)
            except DataFileError as error:
                bad_rows.add(error)
                continue
            yield record, document["text"], document["labels"], columns
    bad_rows.finish()


def _corrected(names: list[str], edits: list[Finding], dropped: set[str], counts: dict[str, int]) -> list[str]:
    """Label names after the edits; edits that change nothing are not counted."""
    kept = list(names)
    for finding in edits:
        label = normalize_label(finding.label)
        if finding.change == REMOVE and label in kept:
            kept.remove(label)
            counts[REMOVE] += 1
        elif finding.change == ADD and label not in kept and label not in dropped:
            kept.append(label)
            counts[ADD] += 1
    return [name for name in kept if name not in dropped]


def _with_labels(record: dict[str, Any], former: list[str], names: list[str], columns: Columns) -> dict[str, Any]:
    """A record with the labels `names` instead of `former`, in the same format."""
    if isinstance(columns.labels, tuple):
        changed = dict(record)
        for column in columns.labels:
            label, value = normalize_label(column), record.get(column)
            has = label in names
            if has != (label in former):
                # keep the column's own representation of 0 and 1
                changed[column] = (
                    has if isinstance(value, bool) else str(int(has)) if isinstance(value, str) else int(has)
                )
        return changed
    column = str(columns.labels)
    value = record.get(column)
    if not isinstance(value, str):
        return {**record, column: names}
    if columns.label_delimiter is not None and not value.strip().startswith("["):
        return {**record, column: read_delimiter(columns.label_delimiter).join(names)}
    return {**record, column: str(names)}


# ---- Formats of corrected documents ----


def _writer(output_file: str | os.PathLike) -> Any:
    name = os.fspath(output_file).lower()
    ending = Path(name.removesuffix(".gz")).suffix
    if ending not in OUTPUT_FORMATS or (ending == ".parquet" and name.endswith(".gz")):
        raise ValueError(
            f"`output_file` is {os.fspath(output_file)!r}, but corrected documents are written as {', '.join(OUTPUT_FORMATS)}, the first three "
            "also with .gz. Name such a file."
        )
    return {".jsonl": _write_jsonl, ".csv": _write_table, ".tsv": _write_table, ".parquet": _write_parquet}[ending]


@contextlib.contextmanager
def _text(file: IO[bytes], name: str) -> Iterator[IO[str]]:
    zipped = gzip.GzipFile(fileobj=file, mode="wb", mtime=0) if name.lower().endswith(".gz") else None
    stream = io.TextIOWrapper(zipped or file, encoding="utf-8", newline="")
    yield stream
    stream.flush()
    stream.detach()
    if zipped is not None:
        zipped.close()


def _write_jsonl(file: IO[bytes], records: list[dict[str, Any]], name: str) -> None:
    with _text(file, name) as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def _write_table(file: IO[bytes], records: list[dict[str, Any]], name: str) -> None:
    header = list(dict.fromkeys(column for record in records for column in record))
    delimiter = "\t" if name.lower().removesuffix(".gz").endswith(".tsv") else ","
    with _text(file, name) as stream:
        rows = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        rows.writerow(header)
        rows.writerows(
            ["" if record.get(column) is None else record[column] for column in header] for record in records
        )


def _write_parquet(file: IO[bytes], records: list[dict[str, Any]], name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), file)
