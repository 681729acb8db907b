"""Documents from one file: loading in one call, stratified splits, the data report, and bad rows."""

import json
import time
from collections import Counter

import numpy as np
import pytest
from data_files import jsonl, parquet, table, write
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import inspect_documents, load_documents, split_documents
from trainer.data import DataFileError, load_splits
from trainer.data.near_duplicates import duplicate_groups, signatures
from trainer.data.splitting import _stratify


def text_of(number, words=40):
    """Words that no two documents share in runs of three."""
    rng = np.random.default_rng(number)
    return " ".join(f"w{word}" for word in rng.integers(10_000, size=words))


def documents_with(labels):
    return Dataset.from_dict({"text": [text_of(i) for i in range(len(labels))], "labels": labels})


# --- load_documents ----------------------------------------------------------------


def test_a_csv_file_gives_documents_ids_names_and_counts_in_one_call(tmp_path):
    file = write(tmp_path / "train.csv", "title;body;tags\nA;first;b, a\nB;second;b\n")
    found = load_documents(file, ["title", "body"], "tags", ",", cache_dir=str(tmp_path / "cache"))
    assert found.labels == ["a", "b"] and json.dumps(found.label_counts) == "[1, 2]"
    assert found.dataset["text"][:] == ["A first", "B second"]
    assert found.dataset["label_indices"][:] == [[0, 1], [1]]


def test_a_tab_as_a_shell_passes_it_separates_labels(tmp_path):
    file = write(tmp_path / "train.jsonl", jsonl([{"text": "x", "labels": "b\ta"}]))
    for delimiter in ("\t", r"\t"):
        found = load_documents(file, label_delimiter=delimiter, cache_dir=str(tmp_path / "cache"))
        assert found.labels == ["a", "b"]


def test_test_documents_take_the_labels_of_the_training_documents(tmp_path, caplog):
    file = write(tmp_path / "test.jsonl", jsonl([{"text": "x", "labels": ["new", "b"]}]))
    found = load_documents(file, labels=["a", "b"], cache_dir=str(tmp_path / "cache"))
    assert found.labels == ["a", "b"] and found.dataset["label_indices"][:] == [[1]]
    assert "'new' (1)" in caplog.text


@pytest.mark.parametrize(
    "printed", [str, json.dumps, lambda names: "[" + " ".join(map(repr, names)) + "]", lambda names: str(names) + "\n"]
)
def test_lists_that_pandas_and_numpy_print_into_a_table_are_lists(tmp_path, printed):
    rows = [{"text": "x", "labels": ["it's", "b, c"]}, {"text": "y", "labels": []}]
    file = write(tmp_path / "t.csv", table(rows, join=printed))
    for delimiter in (None, ";"):
        found = load_documents(file, label_delimiter=delimiter, cache_dir=str(tmp_path / "cache"))
        assert found.labels == ["b, c", "it's"] and found.label_counts == [1, 1]


def test_escapes_of_a_json_list_in_a_table_are_those_of_json(tmp_path):
    file = write(
        tmp_path / "t.csv", 'text,labels\nx,"[""\\ud83d\\ude00"", ""TCP\\/IP""]"\n'
    )  # as Python and PHP write them
    assert load_documents(file, cache_dir=str(tmp_path / "cache")).labels == ["TCP/IP", "\N{GRINNING FACE}"]


# --- bad rows ----------------------------------------------------------------


def bad_file(tmp_path, count, name="t.jsonl"):
    rows = [{"text": "x", "labels": ["a"]}] + [{"text": "", "labels": ["a"]}] * count
    return write(tmp_path / name, jsonl(rows) + "{\n") if name == "t.jsonl" else write(tmp_path / name, parquet(rows))


def test_an_error_lists_the_first_twenty_bad_rows(tmp_path):
    with pytest.raises(DataFileError) as error:
        load_splits(train_file=bad_file(tmp_path, 30), cache_dir=str(tmp_path / "cache"))
    lines = str(error.value).splitlines()
    assert "The first 20 bad rows of train" in lines[0] and 'on_bad_rows="skip"' in lines[0]
    assert len(lines) == 21 and "line 2: the document has no text" in lines[1] and "line 21:" in lines[20]
    with pytest.raises(DataFileError) as error:
        load_splits(train_file=bad_file(tmp_path, 2), cache_dir=str(tmp_path / "cache"))
    assert str(error.value).startswith("3 bad rows of train") and "line 4: not valid JSON" in str(error.value)


def test_bad_rows_are_skipped_counted_and_written_also_when_documents_come_from_the_cache(tmp_path, caplog):
    file = bad_file(tmp_path, 30)
    for _ in range(2):
        caplog.clear()
        splits = load_splits(
            train_file=file,
            cache_dir=str(tmp_path / "cache"),
            on_bad_rows="skip",
            bad_rows_file=tmp_path / "bad.jsonl",
        )
        assert len(splits["train"]) == 1 and "train: 31 bad rows are skipped" in caplog.text
        problems = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        assert len(problems) == 31 and problems[0]["split"] == "train" and "line 2" in problems[0]["problem"]
        (tmp_path / "bad.jsonl").unlink()


def test_bad_rows_of_a_dataset_are_skipped(tmp_path, caplog):
    (tmp_path / "hub").mkdir()
    bad_file(tmp_path / "hub", 5, "train.parquet")
    splits = load_splits(dataset_name=str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"), on_bad_rows="skip")
    assert len(splits["train"]) == 1 and "5 bad rows are skipped" in caplog.text


def test_a_stream_skips_or_ends_at_a_bad_row(tmp_path):
    stream = load_splits(train_file=bad_file(tmp_path, 3), streaming=True, on_bad_rows="skip")["train"]
    assert len(list(stream)) == 1
    with pytest.raises(DataFileError, match="line 2: the document has no text"):
        list(load_splits(train_file=bad_file(tmp_path, 3), streaming=True)["train"])


def test_nothing_but_bad_rows_is_an_error(tmp_path):
    file = write(tmp_path / "t.jsonl", jsonl([{"text": "", "labels": []}]))
    with pytest.raises(DataFileError, match="contains no documents"):
        load_splits(train_file=file, cache_dir=str(tmp_path / "cache"), on_bad_rows="skip")


def test_contradicting_arguments_about_bad_rows_are_refused(tmp_path):
    file = bad_file(tmp_path, 1)
    with pytest.raises(ValueError, match="`on_bad_rows` is 'drop'"):
        load_splits(train_file=file, on_bad_rows="drop")
    with pytest.raises(ValueError, match="`bad_rows_file`"):
        load_splits(train_file=file, bad_rows_file=tmp_path / "bad.jsonl")


# --- splits ----------------------------------------------------------------


def random_labels(count, num_labels, seed=0):
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, num_labels + 1)
    return [sorted(set(rng.choice(num_labels, 3, p=weights / weights.sum()).tolist())) for _ in range(count)]


def test_a_split_is_reproducible_and_each_label_has_its_share():
    labels = random_labels(3000, 100)
    dataset = documents_with([[f"l{label}" for label in ids] for ids in labels])
    train, held_out = split_documents(dataset, 0.2, seed=3)
    again, other = split_documents(dataset, 0.2, seed=3), split_documents(dataset, 0.2, seed=4)
    assert held_out["text"][:] == again.held_out["text"][:] != other.held_out["text"][:]
    assert len(held_out) == 600 and sorted([*train["text"], *held_out["text"]]) == sorted(dataset["text"])
    total = Counter(name for names in dataset["labels"] for name in names)
    held = Counter(name for names in held_out["labels"] for name in names)
    shares = [held[name] / count for name, count in total.items() if count >= 50]
    assert min(shares) > 0.17 and max(shares) < 0.23
    chance = np.random.default_rng(0).permutation(3000)[:600].tolist()
    by_chance = Counter(name for names in dataset.select(chance)["labels"] for name in names)
    assert np.std(shares) < 0.5 * np.std([by_chance[name] / count for name, count in total.items() if count >= 50])


def test_documents_without_labels_have_their_share_of_both_parts():
    # The rare labels leave the held-out part short, which documents without labels must not fill.
    labels = [[0]] * 150 + [[1 + i] for i in range(40)] + [[]] * 10
    held_out = [_stratify(labels, np.arange(200), 20, seed) for seed in range(10)]
    assert all(out.sum() == 20 for out in held_out)
    assert 5 <= sum(out[-10:].sum() for out in held_out) <= 25


@given(
    labels=st.lists(st.lists(st.integers(0, 6), max_size=3, unique=True), min_size=4, max_size=40),
    groups=st.lists(st.integers(0, 30), min_size=40, max_size=40),
    share=st.floats(0.05, 0.8),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=200)
def test_no_label_is_lost_and_no_group_is_cut_whatever_the_documents(labels, groups, share, seed):
    groups = np.unique(groups[: len(labels)], return_inverse=True)[1]
    held_out = _stratify(labels, groups, max(1, int(share * len(labels))), seed)
    assert {label for ids in labels for label in ids} == {
        label for ids, out in zip(labels, held_out) if not out for label in ids
    }
    assert all(len(set(held_out[groups == group])) == 1 for group in groups)


def test_near_duplicates_stay_on_one_side():
    texts = [text_of(i // 2) + (" and some more words" if i % 2 else "") for i in range(200)]
    dataset = Dataset.from_dict({"text": texts, "label_indices": [[i % 5] for i in range(200)]})
    train, held_out = split_documents(dataset, 0.2)
    starts = [{text[:40] for text in part["text"]} for part in (train, held_out)]
    assert not starts[0] & starts[1] and len(held_out) == 40
    apart = split_documents(dataset, 0.2, group_near_duplicates=False)
    assert {text[:40] for text in apart.train["text"]} & {text[:40] for text in apart.held_out["text"]}


def test_near_duplicates_are_distinguished_from_texts_that_share_words():
    base = text_of(0, 100)
    changed = base.replace(base.split()[50], "changed")
    half = " ".join(base.split()[:50]) + " " + text_of(1, 50)
    groups = duplicate_groups(
        signatures([base, changed, half, text_of(2), base.upper() + "!", "", "", "two words", "two words."])
    )
    assert groups[0] == groups[1] == groups[4] and groups[7] == groups[8]
    assert len(set(groups[[0, 2, 3, 5, 6, 7]])) == 6


@pytest.mark.parametrize(
    "labels, arguments, message",
    [
        ([[str(i)] for i in range(20)], {}, "only 0 can be: the others hold the last training document of a label"),
        (
            [["a"]] * 4 + [[str(i)] for i in range(20)],
            {"size": 10},
            "10 of 24 .* only 3 can be.*leave out labels with one",
        ),
        ([["a"]] * 4, {"fraction": 1.0}, "`fraction` is 1.0, but a share between 0 and 1"),
        ([["a"]] * 4, {"size": 4}, "4 of 4 documents are to be set aside"),
        ([["a"]], {}, "1 of 1 documents"),
        ([["a", "b"], ["c"], ["d"]], {}, "1 of 3 documents are to be set aside, but only 0 can be"),
        ([["a"]] * 4, {"size": 1, "fraction": 0.5}, "one decides"),
    ],
)
def test_an_impossible_split_is_refused(labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        split_documents(documents_with(labels), **arguments)


def test_a_split_without_labels_to_stratify_by_names_the_columns():
    with pytest.raises(ValueError, match="The columns are text, but `labels` or `label_indices`"):
        split_documents(Dataset.from_dict({"text": ["a", "b"]}), 0.5)


def test_the_time_of_a_split_grows_linearly():
    def seconds(count):
        labels = random_labels(count, count // 20)
        start = time.process_time()
        _stratify(labels, np.arange(count), count // 10, 0)
        return time.process_time() - start

    seconds(1000)
    assert seconds(32_000) < 4 * 8 * seconds(4000)  # quadratic would be 64 times as much


# --- the report ----------------------------------------------------------------


def test_the_report_names_labels_of_nearly_all_documents():
    rows = [["ticket", "a"]] * 19 + [["a"]] * 2
    report = inspect_documents(Dataset.from_dict({"text": [text_of(i) for i in range(20)], "labels": rows[:20]}))
    assert report.common_labels == ["ticket", "a"]
    assert "! labels on nearly all documents: 'ticket', 'a'." in str(report) and "bad rows" not in str(report)
    report = inspect_documents(Dataset.from_dict({"text": [text_of(i) for i in range(21)], "labels": rows}))
    assert report.common_labels == ["a"]


def test_the_report_has_the_right_counts(tmp_path):
    train = [{"id": str(i), "text": text_of(i), "labels": ["a", "b"] if i % 2 else ["a"]} for i in range(20)]
    train += [
        {"id": "0", "text": text_of(0).upper() + "!", "labels": ["A"]},
        {"id": "21", "text": text_of(1) + " some more words", "labels": ["b ; c", "NaN", "a/b"]},
        {"id": "22", "text": " ", "labels": []},
        {"id": "23", "text": text_of(23), "labels": "x"},
        {"id": "24", "text": 5, "labels": []},
    ]
    test = [{"id": "t", "text": text_of(2), "labels": ["a", "new"]}, {"id": "u", "text": text_of(99), "labels": []}]
    files = [write(tmp_path / f"{name}.jsonl", jsonl(rows)) for name, rows in (("train", train), ("test", test))]
    report = inspect_documents(files[0], test=files[1])
    found = report.splits["train"]
    assert (found.documents, found.bad_rows, found.empty, found.unlabeled) == (23, 2, 1, 1)
    assert (found.duplicates, found.near_duplicates, found.duplicate_ids) == (1, 4, 1)
    assert "line 24: `labels` is 'x'" in found.first_bad_rows[0]
    assert found.label_counts == {"a": 20, "b": 10, "A": 1, "b ; c": 1, "NaN": 1, "a/b": 1}
    assert found.labels_per_document[0] == 0 and found.labels_per_document[-1] == 3
    assert report.single_labels == 4 and report.alike_labels == [["A", "a"]] and report.missing_labels == ["NaN"]
    assert report.joined_labels == ["a/b", "b ; c"] and report.unseen_labels == {"test": {"new": 1}}
    assert report.overlap == {"train, test": 1} and report.near_overlap == {"train, test": 1}
    page = str(report)
    assert len(page.splitlines()) < 40
    report.alike_labels = [[f"A{i}", f"a{i}"] for i in range(8)]
    assert "labels that differ only in case or whitespace: 3 more groups." in str(report)
    for words in (
        "'A', 'a'",
        "'NaN'",
        "'new' (1)",
        "1 test documents are duplicates or near-duplicates of train documents (1 exact)",
        "line 24",
    ):
        assert words in page
    assert json.loads(json.dumps(report.to_dict()))["splits"]["train"]["labels"] == 6


def test_the_report_shows_the_share_of_truncated_documents(tmp_path):
    class Tokenizer:
        def __call__(self, texts, **kwargs):
            return {"input_ids": [text.split() for text in texts]}

    dataset = Dataset.from_dict(
        {"text": [text_of(i, 10 + 10 * (i % 2)) for i in range(10)], "label_indices": [[0]] * 10}
    )
    report = inspect_documents(dataset, labels=["a"], tokenizer=Tokenizer(), max_length=15)
    assert report.share_cut == 0.5 and "truncated at 15 tokens: 50%" in str(report)
    assert report.splits["train"].label_counts == {"a": 10}
    assert inspect_documents(dataset, max_length=15).share_cut is None


def test_the_report_names_a_missing_column(tmp_path):
    with pytest.raises(DataFileError, match="no column 'labels'.*`label_column`"):
        inspect_documents(write(tmp_path / "t.csv", "text,tags\nx,a\n"))
    with pytest.raises(DataFileError, match="train: contains no documents"):
        inspect_documents(write(tmp_path / "t.csv", "text,labels\n"))
