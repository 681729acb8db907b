"""Writing files: completely or not at all; other than regular files are not replaced; tables contain no formulas."""

import csv
import os
import resource
import stat
import threading

import pytest

from trainer.files import atomic_write, digest, harmless_cell, write_csv


def test_a_file_appears_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as file:
        file.write("größe\n")
        assert not path.exists()
    assert path.read_bytes() == "größe\n".encode() and os.listdir(tmp_path) == ["a.txt"]
    with atomic_write(path, "wb") as file:
        file.write(b"\x00")
    assert path.read_bytes() == b"\x00"


def test_after_an_error_the_former_file_is_still_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("former")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as file:
            file.write("half")
            raise KeyboardInterrupt
    assert path.read_text() == "former" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_former_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("former")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError):
            with atomic_write(path) as file:
                file.write("x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "former" and os.listdir(tmp_path) == ["a.txt"]


def test_permissions_are_those_of_the_former_file_or_of_any_new_one(tmp_path):
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "new") as file:
            file.write("a")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    with atomic_write(tmp_path / "new") as file:
        file.write("b")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_a_link_is_followed_even_to_a_file_that_does_not_exist_yet(tmp_path):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to("folder/target")
    for text in ("one", "two"):
        with atomic_write(link) as file:
            file.write(text)
        assert link.is_symlink() and (tmp_path / "folder" / "target").read_text() == text


def test_a_fifo_and_a_device_are_written_to_and_stay_unchanged(tmp_path):
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
    reader.start()
    with atomic_write(fifo) as file:
        file.write("through")
    reader.join(timeout=60)
    assert read == ["through"] and stat.S_ISFIFO(fifo.stat().st_mode)
    with atomic_write(os.devnull) as file:
        file.write("gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_directory_a_circle_of_links_and_a_missing_folder_are_refused(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in (tmp_path, tmp_path / "circle", tmp_path / "missing" / "file"):
        with pytest.raises(OSError):
            with atomic_write(path) as file:
                file.write("a")
    assert os.listdir(tmp_path) == ["circle"]
    with pytest.raises(ValueError, match="only 'w' and 'wb'"):
        with atomic_write(tmp_path / "a", "a"):
            pass


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1", "=cmd|' /C calc'!A0"]
)
def test_a_text_that_a_spreadsheet_would_run_gets_an_apostrophe(text, tmp_path):
    assert harmless_cell(text) == "'" + text
    write_csv(tmp_path / "t.csv", [text, "n"], [[text, -0.5], ["x;=1+1", None]])
    with open(tmp_path / "t.csv", newline="") as file:
        raw = file.read()
    assert list(csv.reader(raw.splitlines(keepends=True))) == [
        ["'" + text, "n"],
        ["'" + text, "-0.5"],
        ["x;=1+1", ""],
    ]
    # Where a semicolon separates cells, quotes keep the text in one.
    assert '"x;=1+1"' in raw


def test_harmless_texts_and_numbers_stay_unchanged():
    for value in ("cs.AI", "a=b", "", "'quoted", -1, -0.5, None, "1-2"):
        assert harmless_cell(value) == value


def test_a_digest_knows_where_its_parts_end():
    assert digest("ab", "c") != digest("a", "bc") and digest("ab", "c") == digest("ab", b"c")
    assert len(digest("\ud800")) == 64
