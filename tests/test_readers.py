"""The one reader: every format, compression and encoding gives the same records, and every error is one sentence."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import jsonl, parquet, table, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import run_forked

from trainer.data.label_files import read_label_descriptions, read_labels
from trainer.data.readers import FORMATS, DataFileError, read_records


DOCUMENTS = [
    {"text": 'Über "graphs", trees; and more', "labels": ["cs.DS", "math.CO"]},
    {"text": "a text of one label", "labels": ["économie"]},
]
TEXTS = [document["text"] for document in DOCUMENTS]
CONTENTS = {
    "jsonl": jsonl(DOCUMENTS),
    "json": json.dumps(DOCUMENTS, indent=1, ensure_ascii=False),
    "csv": table(DOCUMENTS, ","),
    "tsv": table(DOCUMENTS, "\t"),
    "txt": "\n".join(TEXTS) + "\n",
}
ENCODINGS = {
    "utf-8": str.encode,
    "utf-8-sig": lambda text: text.encode("utf-8-sig"),
    "utf-16-le": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "utf-16-be": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
}
CASES = [(form, encoding) for form in CONTENTS for encoding in ENCODINGS] + [("parquet", "")]


def content_of(form, encoding):
    return parquet(DOCUMENTS) if form == "parquet" else ENCODINGS[encoding](CONTENTS[form])


def texts_of(path, *args, **kwargs):
    return [record["text"] for _, record in read_records(path, *args, **kwargs)]


# --- formats ----------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form, encoding", CASES)
def test_every_format_compression_and_encoding_gives_the_same_texts(tmp_path, form, encoding, compression):
    path = write(tmp_path / f"t.{form}{compression}", content_of(form, encoding))
    assert texts_of(path) == TEXTS
    os.rename(path, tmp_path / f"t.{form}")  # compression is known from the contents, whatever the name
    assert texts_of(tmp_path / f"t.{form}") == TEXTS


@pytest.mark.parametrize("form, encoding", CASES)
def test_standard_input_is_read_in_every_format(tmp_path, form, encoding):
    def program():
        print(json.dumps([[where, record["text"]] for where, record in read_records("-", form)]))

    for content in (content_of(form, encoding), gzip.compress(content_of(form, encoding))):
        (tmp_path / "in").write_bytes(content)
        code, message = run_forked(program, folder=tmp_path, stdin=tmp_path / "in", stdout=tmp_path / "out")
        assert code == 0, message
        records = json.loads((tmp_path / "out").read_text())
        assert [text for _, text in records] == TEXTS
        assert all(where.startswith("standard input, ") for where, _ in records)


def test_a_closed_standard_input_is_reported():
    code = "from trainer.data.readers import read_records; list(read_records('-'))"
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" <&-', sys.executable, code], capture_output=True)
    assert b"standard input is closed" in done.stderr


def test_a_pipe_is_read_like_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", 'printf "a\\nb\\n" > "$0"', str(tmp_path / "pipe")]):
        assert texts_of(tmp_path / "pipe", "txt") == ["a", "b"]


def test_the_reader_imports_no_heavy_package(tmp_path):
    file = write(tmp_path / "t.csv.gz", CONTENTS["csv"])
    code = (
        "import sys; from trainer.data import columns, label_descriptions, label_files, readers\n"
        f"assert len(list(readers.read_records({file!r}))) == 2\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'datasets', 'pyarrow', 'pandas', 'numpy', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- tables as spreadsheets write them ----------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("first", ["", "sep={}\r\n"])
def test_the_delimiter_of_a_csv_file_is_found(tmp_path, delimiter, first):
    content = first.format(delimiter) + table(DOCUMENTS, delimiter, join=" | ".join)
    records = list(read_records(write(tmp_path / "t.csv", content)))
    assert [record["labels"] for _, record in records] == ["cs.DS | math.CO", "économie"]
    assert records[0][0].endswith("line 3" if first else "line 2")


def test_blank_columns_of_a_table_are_left_out(tmp_path):
    path = write(tmp_path / "t.csv", " text ,labels,,\nx,a,,\n")
    assert [record for _, record in read_records(path)] == [{"text": "x", "labels": "a"}]


def test_a_large_field_is_read(tmp_path):
    assert texts_of(write(tmp_path / "t.csv", f'text\n"{"word " * 60_000}"\n')) == ["word " * 60_000]


# --- Parquet ----------------------------------------------------------------


def test_only_the_columns_that_are_needed_are_read_from_parquet(tmp_path):
    columns = {
        "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int32())),
        "uuid": pa.array([b"0" * 16, b"1" * 16], pa.uuid()),
        "struct": pa.array([{"a": 1}, None]),
    }
    pq.write_table(pa.table({"text": ["a", "b"], **columns}), tmp_path / "t.parquet")
    assert [record for _, record in read_records(tmp_path / "t.parquet", columns=["text", "labels"])] == [
        {"text": "a"},
        {"text": "b"},
    ]
    assert texts_of(tmp_path / "t.parquet") == ["a", "b"]


def test_damaged_pages_of_a_parquet_file_are_a_one_sentence_error(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"text {i} " * 50 for i in range(500)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[40:400] = b"\xff" * 360
    path.write_bytes(data)
    with pytest.raises(DataFileError, match="t.parquet: what follows cannot be read"):
        texts_of(path)


# --- errors ----------------------------------------------------------------

GOOD = '{"text": "x"}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.jsonl", GOOD + '{"text": ' + "[" * 100_000, "line 2: not valid JSON"),
        ("t.jsonl", GOOD + '{"id": ' + "9" * 5000 + "}", "line 2: not valid JSON"),
        ("t.jsonl", GOOD.encode() + b'{"text": "a\x00b"}', "line 2: contains a NUL character"),
        ("t.csv", b"t\x00e\x00x\x00t\x00\n\x00", "line 1: contains a NUL character.*UTF-16"),
        ("t.csv", b"text\ncaf\xe9\n", "line 2: byte 0xe9 is not UTF-8.*iconv -f cp1252.*CSV UTF-8"),
        ("t.csv", b"\xff\xfe" + "text\nabc".encode("utf-16-le") + b"a", "after line 1: is not UTF-16"),
        ("t.csv", b"PK\x03\x04....", "is an Excel workbook or a zip archive"),
        ("t.csv", 'text;labels\n"x;a\n', "line 2: unexpected end of data. Separate the columns with semicolons"),
        ("t.csv", "text;labels\nx;a;b\n", "line 2: 3 columns, but the header has 2"),
        ("t.parquet", b"", "not a whole Parquet file"),
        ("t.doc", b"", "the format is not known from the name"),
        ("t.xlsx", b"", "t.xlsx: spreadsheets are not read.*CSV UTF-8"),
    ],
)
def test_errors_are_reported_with_their_place(tmp_path, name, content, message):
    with pytest.raises(DataFileError, match=message):
        list(read_records(write(tmp_path / name, content)))


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_of_0_bytes_is_not_an_empty_one(tmp_path, compression):
    path = tmp_path / f"t.jsonl{compression}"
    assert list(read_records(write(path, ""))) == []
    path.write_bytes(b"")
    with pytest.raises(DataFileError, match="has 0 bytes"):
        list(read_records(path))


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_torn_compressed_file_is_reported_in_every_format(tmp_path, compression):
    rows = [{"text": os.urandom(300).hex(), "labels": []} for _ in range(300)]
    for form, content in {"jsonl": jsonl(rows), "csv": table(rows), "txt": "\n".join(r["text"] for r in rows)}.items():
        path = tmp_path / f"t.{form}{compression}"
        write(path, content)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataFileError, match=rf"t.{form}{compression}: cannot be decompressed after line \d+"):
            list(read_records(path))


def test_a_folder_and_a_missing_file_are_reported(tmp_path):
    with pytest.raises(DataFileError, match="is a folder"):
        read_records(tmp_path, "csv")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_records(tmp_path / "t.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_reported(tmp_path):
    path = write(tmp_path / "t.csv", "text\nx\n")
    os.chmod(path, 0)
    with pytest.raises(DataFileError, match="t.csv: cannot be read"):
        list(read_records(path))


def test_bad_lines_are_reported_and_skipped_on_request(tmp_path):
    errors = []
    path = write(tmp_path / "t.jsonl", GOOD.encode() + b"{\n" + b'{"text": "\xff"}\n[]\n' + GOOD.encode())
    assert texts_of(path, on_error=errors.append) == ["x", "x"]
    assert [str(error).split(":")[0].rpartition(" ")[2] for error in errors] == ["2", "3", "4"]
    path = write(tmp_path / "t.csv", 'text,labels\nx,a\nx\n"x"y,a\nx,b\n')
    errors.clear()
    assert texts_of(path, on_error=errors.append) == ["x", "x"] and len(errors) == 2


@given(
    name=st.sampled_from(["t.txt", "t.csv", "t.tsv", "t.json", "t.jsonl", "t.jsonl.gz", "t.parquet", "t.csv.zst"]),
    content=st.one_of(
        st.binary(max_size=80),
        st.sampled_from([b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xff\xfe", b"PAR1"]).flatmap(
            lambda start: st.binary(max_size=60).map(lambda rest: start + rest)
        ),
        st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")),
    ),
)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_read_or_gives_a_one_sentence_error_with_its_name(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (lambda path: list(read_records(path)), read_labels, read_label_descriptions):
        try:
            read(path)
        except DataFileError as error:
            assert str(path) in str(error)


def test_every_format_has_a_row_in_the_table_of_this_test():
    assert set(FORMATS) - {"aapd", "eurlex", "rcv1"} == {form for form, _ in CASES}
