"""Files of documents in every format, compression and encoding, for tests."""

import csv
import gzip
import io
import json

import pyarrow as pa
from datasets import Dataset


def write(path, content):
    """Writes text or bytes, compressed as the name says; returns the path as a string."""
    data = content if isinstance(content, bytes) else content.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
        return str(path)
    path.write_bytes(data)
    return str(path)


def jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def table(documents, delimiter=",", join="; ".join):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerow(["text", "labels"])
    writer.writerows([d["text"], join(d["labels"])] for d in documents)
    return buffer.getvalue()


def parquet(documents, features=None):
    buffer = io.BytesIO()
    Dataset.from_list(documents, features=features).to_parquet(buffer)
    return buffer.getvalue()
