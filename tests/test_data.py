"""Documents: every common format gives the same table, and every error is one sentence that names its place."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import jsonl, parquet, table, write
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from datasets import List as ListFeature
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.cold_start import labels_without_documents
from trainer.data import (
    add_pseudo_documents,
    build_label_list,
    count_unknown_labels,
    encode_labels,
    label_counts,
    load_label_descriptions,
    load_pseudo_documents,
    load_splits,
    num_real_documents,
    split_documents,
    tokenize,
)


DOCUMENTS = [
    {"text": 'Über "graphs", trees;\nand more', "labels": ["cs.DS", "math.CO"]},
    {"text": "a text of one label", "labels": ["NA"]},
    {"text": "a text of none", "labels": []},
]
SAMPLE = Path(__file__).parents[1] / "examples" / "data"


@pytest.fixture
def load(tmp_path):
    """`load_splits` of one train file, with a cache of its own."""

    def run(file, **kwargs):
        return load_splits(train_file=file, cache_dir=str(tmp_path / "cache"), **kwargs)["train"]

    return run


@pytest.fixture
def tokenizer():
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "one": 2, "two": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_max_length=8)


# --- forms ----------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_file_form_gives_the_same_documents(tmp_path, load, form, compression):
    content = {
        "jsonl": lambda: jsonl(DOCUMENTS),
        "json": lambda: json.dumps(DOCUMENTS, indent=1),
        "csv": lambda: table(DOCUMENTS, ","),
        "tsv": lambda: table(DOCUMENTS, "\t"),
        "parquet": lambda: parquet(DOCUMENTS),
    }[form]()
    file = write(tmp_path / f"train.{form}{compression}", content)
    delimiter = ";" if form in ("csv", "tsv") else None
    for streaming in (False, True):
        dataset = load(file, label_delimiter=delimiter, streaming=streaming)
        assert isinstance(dataset, IterableDataset if streaming else Dataset)
        assert list(dataset) == DOCUMENTS


def test_json_lines_are_read_under_the_name_json_and_with_a_byte_order_mark(tmp_path, load):
    assert len(load(write(tmp_path / "train.json", "\ufeff" + jsonl(DOCUMENTS)))) == 3


def test_a_csv_value_longer_than_the_limit_of_the_csv_module_is_read(tmp_path, load):
    text = "word " * 60_000
    assert load(write(tmp_path / "long.csv", f"text,labels\n{text},a\n"), label_delimiter=",")[0]["text"] == text


def test_several_text_columns_are_joined_and_empty_ones_left_out(tmp_path, load):
    records = [
        {"title": "T", "body": "B", "labels": ["a"]},
        {"title": "", "body": "B", "labels": []},
        {"body": "C", "labels": []},
    ]
    dataset = load(write(tmp_path / "t.jsonl", jsonl(records)), text_columns=("title", "body"), text_separator=" | ")
    assert dataset["text"][:] == ["T | B", "B", "C"]


def test_ids_are_kept_as_strings_from_the_column_named_or_one_called_id(tmp_path, load):
    file = write(tmp_path / "t.jsonl", jsonl([{"id": 7, "key": "k", "text": "x", "labels": []}]))
    assert load(file)["id"][:] == ["7"]
    assert load(file, id_column="key")["id"][:] == ["k"]


def test_a_label_named_twice_counts_once_and_blanks_around_it_are_dropped(tmp_path, load):
    dataset = load(write(tmp_path / "t.jsonl", jsonl([{"text": "x", "labels": ["b ", "a", "b"]}])))
    assert dataset["labels"][:] == [["b", "a"]]


def test_multi_hot_columns_become_label_names(tmp_path, load):
    file = write(tmp_path / "t.csv", "text,toxic,rude,kind\nx,1,0,True\ny,0,0.0,false\n")
    assert load(file, label_column=["toxic", "rude", "kind"])["labels"][:] == [["toxic", "kind"], []]
    file = write(
        tmp_path / "t.parquet", parquet([{"text": "x", "a": 1, "b": False}, {"text": "y", "a": 0, "b": True}])
    )
    assert load(file, label_column=("a", "b"))["labels"][:] == [["a"], ["b"]]


def test_class_label_ids_become_names_from_parquet_and_from_a_dataset(tmp_path, load):
    names = ClassLabel(names=["neg", "pos"])
    features = Features({"text": Value("string"), "labels": ListFeature(names), "one": names})
    records = [{"text": "x", "labels": [1, 0], "one": 1}, {"text": "y", "labels": [], "one": 0}]
    file = write(tmp_path / "t.parquet", parquet(records, features))
    assert load(file)["labels"][:] == [["pos", "neg"], []]
    assert load(file, label_column="one")["labels"][:] == [["pos"], ["neg"]]
    folder = tmp_path / "hub"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.parquet").write_bytes(parquet(records, features))
    for streaming in (False, True):
        splits = load_splits(dataset_name=str(folder), cache_dir=str(tmp_path / "cache"), streaming=streaming)
        assert set(splits) == {"train", "validation"}
        assert list(splits["validation"]) == [{"text": "x", "labels": ["pos", "neg"]}, {"text": "y", "labels": []}]


def test_a_bad_row_or_column_of_a_dataset_is_reported_by_split_and_row(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(parquet([{"text": "x", "labels": ["a"]}, {"text": " ", "labels": []}]))
    with pytest.raises(ValueError, match="split train, row 2: the document has no text"):
        load_splits(dataset_name=str(folder), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="split train: no column 'body'"):
        load_splits(dataset_name=str(folder), cache_dir=str(tmp_path / "cache"), text_columns="body")


def test_globs_and_lists_of_files_make_one_split(tmp_path, load):
    for i in range(3):
        write(tmp_path / f"part{i}.jsonl", jsonl([{"text": f"text {i}", "labels": []}]))
    assert load(str(tmp_path / "part*.jsonl"))["text"][:] == ["text 0", "text 1", "text 2"]
    assert len(load([str(tmp_path / "part2.jsonl"), str(tmp_path / "part0.jsonl")])) == 2


def test_unlabeled_documents_load_without_a_label_column(tmp_path, load):
    assert load(write(tmp_path / "t.csv", "text\nx\n"), label_column=None).column_names == ["text"]


def test_a_changed_file_is_read_again_and_an_unchanged_one_comes_from_the_cache(tmp_path, load):
    path = tmp_path / "t.jsonl"
    first = load(write(path, jsonl([{"text": "old", "labels": []}])))
    assert load(str(path)).cache_files == first.cache_files
    assert load(write(path, jsonl([{"text": "new", "labels": []}])))["text"][:] == ["new"]


# --- published forms ----------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_aapd_is_read_from_text_and_label_lines(tmp_path, load, compression):
    write(tmp_path / f"label_train{compression}", "cs.it math.it\nmath.NT\n")
    file = write(
        tmp_path / f"text_train{compression}", "the relation between capacities is studied\nprimes are infinite\n"
    )
    assert list(load(file, data_format="aapd")) == [
        {"text": "the relation between capacities is studied", "labels": ["cs.it", "math.it"]},
        {"text": "primes are infinite", "labels": ["math.NT"]},
    ]


def test_eurlex_is_read_from_raw_text_and_label_lines(tmp_path, load):
    write(tmp_path / "train_labels.txt", "889 1203 2771\n\n")
    text = "Commission Decision of 1 July 1999\ncouncil regulation on olive oil\n"
    for name in ("train_raw_texts.txt", "train_texts.txt"):
        dataset = load(write(tmp_path / name, text), data_format="eurlex")
        assert dataset["labels"][:] == [["889", "1203", "2771"], []]
        assert dataset["text"][1] == "council regulation on olive oil"


def test_rcv1_is_read_from_token_files_and_qrels(tmp_path, load):
    write(tmp_path / "rcv1-v2.topics.qrels.gz", "E11 2286 1\nECAT 2286 1\nM11 2287 1\nC15 2288 1\n")
    write(
        tmp_path / "lyrl2004_tokens_test_pt0.dat",
        ".I 2286\n.W\nrecov recov excit\nmexic econom\n\n.I 2287\n.W\nstock\n\n",
    )
    write(tmp_path / "lyrl2004_tokens_test_pt1.dat", ".I 2288\n.W\nprofit\n")
    assert list(load(str(tmp_path / "lyrl2004_tokens_test_pt*.dat"), data_format="rcv1")) == [
        {"id": "2286", "text": "recov recov excit mexic econom", "labels": ["E11", "ECAT"]},
        {"id": "2287", "text": "stock", "labels": ["M11"]},
        {"id": "2288", "text": "profit", "labels": ["C15"]},
    ]


def test_a_changed_label_file_of_a_published_form_is_read_again(tmp_path, load):
    write(tmp_path / "label_train", "a\n")
    file = write(tmp_path / "text_train", "x\n")
    assert load(file, data_format="aapd")["labels"][:] == [["a"]]
    write(tmp_path / "label_train", "a b\n")
    assert load(file, data_format="aapd")["labels"][:] == [["a", "b"]]


@pytest.mark.parametrize(
    "files, data_format, message",
    [
        (
            {"text_train": "x\ny\n", "label_train": "a\n"},
            "aapd",
            r"label_train: has 1 lines, but .*text_train has more",
        ),
        (
            {"text_train": "x\n", "label_train": "a\nb\n"},
            "aapd",
            r"label_train: has more lines than .*text_train, which has 1",
        ),
        ({"text_train": "x\n"}, "aapd", "labels are read from `label_train`"),
        ({"abstracts": "x\n"}, "aapd", "named like `text_train`"),
        ({"train.txt": "x\n"}, "eurlex", "named like `train_raw_texts.txt`"),
        ({"tokens.dat": ".I 1\n.W\nx\n"}, "rcv1", r"0 are there"),
        (
            {"tokens.dat": ".I 1\n.W\nx\n", "topics.qrels": "A 2 1\n"},
            "rcv1",
            "tokens.dat, line 1: document 1 has no topic",
        ),
        (
            {"tokens.dat": ".I 1\n.W\nx\n", "topics.qrels": "A 1 1\nA 2\n"},
            "rcv1",
            "topics.qrels, line 2: 'A 2' is not",
        ),
        ({"tokens.dat": "x\n.I 1\n", "topics.qrels": "A 1 1\n"}, "rcv1", "tokens.dat, line 1: 'x' comes before"),
    ],
)
def test_a_bad_published_form_is_reported(tmp_path, load, files, data_format, message):
    first, *_ = [write(tmp_path / name, content) for name, content in files.items()]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(first, data_format=data_format)


# --- bad input ----------------------------------------------------------------

GOOD = '{"text": "x", "labels": ["a"]}\n'


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_malformed_line_is_reported_by_file_and_line_also_in_a_compressed_file(tmp_path, load, compression):
    file = write(tmp_path / f"t.jsonl{compression}", GOOD * 1500 + "\n" + '{"text": "x", "labels": ["a"\n' + GOOD)
    with pytest.raises(
        ValueError, match=rf"t\.jsonl{compression}, line 1502: not valid JSON .* Write one JSON object per line"
    ):
        load(file)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.jsonl", GOOD + "[1]\n", "line 2: .1. is not a JSON object"),
        ("t.json", '[\n{"text": "x",\n "labels": [}]', "t.json, line 3: not valid JSON"),
        ("t.json", '[{"text": "x", "labels": []}, 3]', "t.json, item 2: 3 is not a JSON object"),
        ("t.jsonl", GOOD + '{"labels": ["a"]}\n', "line 2: the document has no text in 'text'"),
        ("t.jsonl", GOOD + '{"text": " ", "labels": ["a"]}\n', "line 2: the document has no text in 'text'"),
        ("t.jsonl", GOOD + '{"text": 5, "labels": ["a"]}\n', "line 2: `text` is 5, but a text is needed"),
        (
            "t.jsonl",
            GOOD + '{"text": "x", "labels": "a;b"}\n',
            "line 2: `labels` is 'a;b', but a list .*`label_delimiter`",
        ),
        ("t.jsonl", GOOD + '{"text": "x", "labels": [1, 0]}\n', r"line 2: `labels` is \[1, 0\], but a list"),
        ("t.jsonl", GOOD + '{"text": "x", "labels": [""]}\n', r"line 2: `labels` is \[''\], but a list"),
        ("t.jsonl", GOOD + '{"text": "x"}\n', "line 2: `labels` is None, but a list"),
        ("t.jsonl", GOOD + '{"text": "\\ud800", "labels": []}\n', "line 2: the text contains an unpaired surrogate"),
        ("t.jsonl", GOOD.encode() + b'{"text": "caf\xe9", "labels": []}\n', "line 2: byte 0xe9 is not UTF-8"),
        (
            "t.jsonl",
            '{"body": "x", "labels": []}\n',
            r"line 1: no column 'text'. The columns are 'body', 'labels'.*`text_columns`",
        ),
        ("t.jsonl", '{"text": "x", "tags": []}\n', "no column 'labels'.*`label_column`"),
        ("t.jsonl", "", "t.jsonl: contains no documents"),
        ("t.csv", "text,labels\n", "t.csv: contains no documents"),
        ("t.csv", 'text,labels\nx,"a\n', "t.csv, line 2: unexpected end of data"),
        ("t.csv", "text,labels,text\nx,a,y\n", "line 1: the header .* names a column twice"),
        ("t.csv", "text,labels\nx,a\n", "line 2: `labels` is 'a', but a list"),
        ("t.parquet", b"PAR1 not really", "t.parquet: not a whole Parquet file"),
        ("t.doc", "x\n", "the format is not known from the name"),
    ],
)
def test_bad_input_is_reported_with_its_place_and_a_remedy(tmp_path, load, name, content, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / name, content))


def test_a_csv_row_with_too_many_columns_is_reported_by_its_line_also_after_a_line_break_in_a_value(tmp_path, load):
    file = write(tmp_path / "t.csv", 'text,labels\n"x\ny",a\nx,b,c\n')
    with pytest.raises(ValueError, match=r"t.csv, line 4: 3 columns, but the header has 2 \(text, labels\)"):
        load(file, label_delimiter=";")


def test_a_multi_hot_value_that_is_neither_0_nor_1_is_reported(tmp_path, load):
    with pytest.raises(ValueError, match="line 3: label column `a` is '2', but 0 or 1 is needed"):
        load(write(tmp_path / "t.csv", "text,a\nx,1\ny,2\n"), label_column=["a"])


def test_an_unlabeled_class_id_is_reported(tmp_path, load):
    features = Features({"text": Value("string"), "labels": ListFeature(ClassLabel(names=["a"]))})
    file = write(tmp_path / "t.parquet", parquet([{"text": "x", "labels": [-1]}], features))
    with pytest.raises(ValueError, match="row 1: `labels` contains -1, but its 1 classes"):
        load(file)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_cut_short_is_reported(tmp_path, load, compression):
    rng = np.random.default_rng(0)
    records = [{"text": rng.bytes(200).hex(), "labels": []} for _ in range(2000)]
    path = tmp_path / f"t.jsonl{compression}"
    write(path, jsonl(records))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="(cannot be decompressed after line|not valid JSON)"):
        load(str(path))


def test_a_missing_file_is_reported(load):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: no such file"):
        load("nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"nowhere\*.jsonl: no such file"):
        load("nowhere*.jsonl")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({}, "one source is needed"),
        ({"train_file": "x.jsonl", "dataset_name": "y"}, "one source is needed"),
        ({"train_file": "x.jsonl", "label_column": []}, "none may be empty"),
        ({"train_file": "x.jsonl", "label_delimiter": ""}, "none may be empty"),
    ],
)
def test_contradicting_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_splits(**kwargs)


def test_a_bad_document_of_a_stream_is_reported_when_it_is_reached(tmp_path, load):
    dataset = load(write(tmp_path / "t.jsonl", GOOD * 2 + '{"text": "", "labels": []}\n'), streaming=True)
    with pytest.raises(ValueError, match="line 3: the document has no text"):
        build_label_list(dataset)


# --- labels ----------------------------------------------------------------


@pytest.fixture
def train():
    features = Features({"text": Value("string"), "labels": ListFeature(Value("string"))})
    labels = [["b", "a"], [], ["c", "b"], ["b"]]
    return Dataset.from_list(
        [{"text": f"one two {i}", "labels": names} for i, names in enumerate(labels)], features=features
    )


@pytest.fixture(params=["table", "stream"])
def any_train(request, train):
    return train if request.param == "table" else train.to_iterable_dataset(num_shards=2)


def test_labels_are_learned_from_train_in_sorted_order(any_train):
    assert build_label_list(any_train) == ["a", "b", "c"]


def test_documents_without_any_label_cannot_be_trained_on(train):
    with pytest.raises(ValueError, match="no labels, but at least one is needed"):
        build_label_list(train.select([1]))


def test_a_label_list_file_fixes_the_order_and_refuses_a_name_twice(tmp_path, train):
    assert build_label_list(train, write(tmp_path / "labels.txt", "c\n\nz\na\n")) == ["c", "z", "a"]
    with pytest.raises(ValueError, match="line 3: label 'c' already appears in line 1"):
        build_label_list(train, write(tmp_path / "labels.txt", "c\na\nc\n"))
    with pytest.raises(ValueError, match="contains no labels"):
        build_label_list(train, write(tmp_path / "labels.txt", "\n"))


def test_labels_that_train_does_not_have_are_counted_reported_and_never_added(any_train, caplog):
    with caplog.at_level(logging.WARNING):
        assert count_unknown_labels(any_train, ["a"], "test") == {"b": 3, "c": 1}
    assert "test: 2 labels with 4 assignments" in caplog.text and "'b' (3), 'c' (1)" in caplog.text
    assert list(encode_labels(any_train, {"a": 0})["label_indices"]) == [[0], [], [], []]
    caplog.clear()
    assert count_unknown_labels(any_train, ["a", "b", "c"]) == {} and not caplog.text


def test_label_indices_are_sorted_distinct_and_replace_the_names(any_train):
    encoded = encode_labels(any_train, {"a": 2, "b": 0, "c": 1})
    assert list(encoded["label_indices"]) == [[0, 2], [], [0, 1], [0]]
    assert set(encoded.column_names) == {"text", "label_indices"}


@pytest.mark.parametrize("function", [lambda rows: encode_labels(rows, {"a": 0}), split_documents])
def test_documents_that_are_no_dataset_are_refused(function):
    with pytest.raises(ValueError, match="The documents are a list, but a dataset is needed"):
        function([{"text": "x", "labels": ["a"]}])


@pytest.mark.parametrize("value", ["a;b", 0, None])
def test_labels_that_are_no_list_are_not_encoded(value):
    for function in (build_label_list, lambda dataset: encode_labels(dataset, {"a": 0})):
        with pytest.raises(ValueError, match=f"`labels` is {value!r}, but a list of label names is needed"):
            function(Dataset.from_dict({"labels": [value]}))


def test_labels_of_all_splits_are_encoded():
    splits = encode_labels(DatasetDict(test=Dataset.from_dict({"labels": [["b"]]})), {"a": 0, "b": 1})
    assert isinstance(splits, DatasetDict) and splits["test"]["label_indices"][:] == [[1]]


def test_texts_in_numpy_format_are_tokenized():
    dataset = Dataset.from_dict({"text": ["the star", "x"]})
    expected = tokenize(dataset, tiny_tokenizer())["input_ids"][:]
    assert tokenize(dataset.with_format("numpy"), tiny_tokenizer()).with_format(None)["input_ids"][:] == expected


def test_labels_encode_where_no_document_of_a_batch_has_any(train):
    encoded = encode_labels(train.select([1]), {"a": 0})
    assert encoded.features["label_indices"] == ListFeature(Value("int32"))


def test_label_counts_hold_real_documents_only(any_train, tmp_path):
    file = write(
        tmp_path / "pseudo.jsonl.gz", jsonl([{"text": "made up", "labels": ["c", "a"], "tail_label": "c"}] * 2)
    )
    pseudo = load_pseudo_documents(file, ["a", "b", "c"], cache_dir=str(tmp_path / "cache"))
    assert pseudo["is_pseudo"][:] == [True, True]
    both = encode_labels(add_pseudo_documents(any_train, pseudo), {"a": 0, "b": 1, "c": 2})
    assert list(both["is_pseudo"]) == [False] * 4 + [True] * 2
    assert list(both["label_indices"])[4:] == [[0, 2]] * 2
    assert label_counts(both, 4).tolist() == [1, 3, 1, 0]
    assert num_real_documents(both) == 4
    plain = encode_labels(any_train, {"a": 0, "b": 1, "c": 2})
    assert label_counts(plain, 3).tolist() == [1, 3, 1] and num_real_documents(plain) == 4


def test_pseudo_documents_get_ids_of_their_own_where_documents_have_ids(train, tmp_path):
    pseudo = load_pseudo_documents(
        write(tmp_path / "p.jsonl", jsonl([{"text": "x", "labels": ["a"]}])), ["a"], str(tmp_path / "cache")
    )
    train = train.add_column("id", list("wxyz"))
    assert add_pseudo_documents(train, pseudo)["id"][:] == ["w", "x", "y", "z", "pseudo-0"]
    assert list(add_pseudo_documents(train.to_iterable_dataset(), pseudo))[-1]["id"] == "pseudo-0"


def test_a_pseudo_sample_with_an_unknown_label_is_refused(tmp_path):
    file = write(tmp_path / "p.jsonl", jsonl([{"text": "x", "labels": ["cs.CL"]}, {"text": "x", "labels": ["cs.CX"]}]))
    with pytest.raises(ValueError, match="p.jsonl, line 2: there is no label 'cs.CX'. The closest is 'cs.CL'"):
        load_pseudo_documents(file, ["cs.CL", "math.AG"], cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "name, content",
    [
        (
            "d.jsonl",
            jsonl([{"label": "a", "expansion": "the first"}, {"label": "b", "name": "B", "expansion": "the second"}]),
        ),
        ("d.jsonl.gz", jsonl([{"label": "a", "description": "the first"}, {"label": "b", "expansion": "the second"}])),
        ("d.csv", "label,expansion\na,the first\nb,the second\n"),
        ("d.json", '[{"label": "a", "expansion": "the first"}, {"label": "b", "expansion": "the second"}]'),
        ("d.json", '{"a": "the first",\n "b": {"name": "B", "description": "the second"}}'),
        ("d.json", jsonl([{"label": "a", "expansion": "the first"}, {"label": "b", "expansion": "the second"}])),
    ],
)
def test_label_descriptions_are_read_in_every_form(tmp_path, name, content):
    assert load_label_descriptions(write(tmp_path / name, content), ["a", "b"]) == {
        "a": "the first",
        "b": "the second",
    }


@pytest.mark.parametrize(
    "name, content",
    [("d.csv", "label,description\na,\nb,the second\n"), ("d.tsv", "label\tdescription\na\t \nb\tthe second\n")],
)
def test_a_label_of_a_table_may_have_an_empty_description(tmp_path, name, content, caplog):
    file = write(tmp_path / name, content)
    with caplog.at_level(logging.WARNING):
        assert load_label_descriptions(file, ["a", "b"]) == {"b": "the second"}
    assert "1 of 2 labels have no description and are encoded by name: 'a'" in caplog.text
    assert labels_without_documents(None, file) == ["a", "b"]


def test_a_description_of_an_unknown_label_is_left_out_with_a_warning_that_names_the_closest(tmp_path, caplog):
    file = write(tmp_path / "d.json", json.dumps({"cs.CL": "language", "cs.lg": "learning"}))
    with caplog.at_level(logging.WARNING):
        assert load_label_descriptions(file, ["cs.CL", "cs.LG"]) == {"cs.CL": "language"}
    assert "'cs.lg' (closest: 'cs.LG')" in caplog.text
    assert "1 of 2 labels have no description and are encoded by name: 'cs.LG'" in caplog.text


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "d.jsonl",
            jsonl([{"label": "a", "expansion": "x"}] * 2),
            "d.jsonl, line 2: label 'a' is described a second time",
        ),
        ("d.json", '{"a": "x", "a": "y"}', "d.json, 'a': label 'a' is described a second time"),
        ("d.jsonl", jsonl([{"label": "a", "expansion": "  "}]), "line 1: `expansion` is '  ', but a text is needed"),
        ("d.jsonl", jsonl([{"label": "a", "text": "x"}]), "line 1: `description` is None, but a text is needed"),
        ("d.json", '{"a": 1}', "d.json, 'a': `description` is 1, but a text is needed. Write {.label.: "),
        (
            "d.csv",
            "label,text\na,x\n",
            "line 2: `description` is None, but a text is needed. Name the columns `label` and",
        ),
        ("d.csv", "label,description\na,\na,x\n", "line 3: label 'a' is described a second time"),
        ("d.csv", "name,expansion\na,x\n", "line 2: `label` is None, but a label name is needed"),
        ("d.json", '{"a": "x",\n "b": }', "d.json, line 2: not valid JSON"),
    ],
)
def test_bad_label_descriptions_are_reported(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_label_descriptions(write(tmp_path / name, content), ["a"])


# --- tokens ----------------------------------------------------------------


def test_tokens_are_truncated_unpadded_and_their_number_is_kept(any_train, tokenizer):
    rows = list(tokenize(any_train, tokenizer, max_length=2))
    assert [row["input_ids"] for row in rows] == [[2, 3]] * 4 and [row["length"] for row in rows] == [2] * 4
    rows = list(tokenize(any_train, tokenizer))
    assert rows[0]["input_ids"] == [2, 3, 0] and rows[0]["length"] == 3 and "text" not in rows[0]


def test_documents_are_cut_at_what_the_model_takes_with_a_warning(train, tokenizer, caplog):
    long = Dataset.from_dict({"text": ["one " * 20]})
    assert tokenize(long, tokenizer)["length"][:] == [8]
    assert not caplog.text
    assert tokenize(long, tokenizer, max_length=100)["length"][:] == [8]
    assert "`max_length` is 100, but the model reads at most 8 tokens" in caplog.text
    with pytest.raises(ValueError, match="`max_length` is 0"):
        tokenize(train, tokenizer, max_length=0)
    with pytest.raises(ValueError, match="`max_length` is 2, but a document has 2 special tokens .* at least 3"):
        tokenize(train, tiny_tokenizer(), max_length=2)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([{"text": "one"}], "The documents are a list, but a dataset is needed"),
        (Dataset.from_dict({"body": ["one"]}), "columns 'body', but no `text`. Name the column .* with `text_column`"),
        (Dataset.from_dict({"text": ["one", None]}), "A document has None as its `text`, but that must be a text"),
        (Dataset.from_dict({"text": [1, 2]}), "A document has 1 as its `text`"),
    ],
)
def test_documents_that_are_not_texts_are_not_tokenized(tokenizer, documents, message):
    with pytest.raises(ValueError, match=message):
        tokenize(documents, tokenizer)


def test_another_process_takes_loaded_and_tokenized_documents_from_the_cache(tmp_path, tokenizer):
    file = write(tmp_path / "t.jsonl", jsonl(DOCUMENTS))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    train = load_splits(train_file=file, cache_dir=str(tmp_path / "cache"))["train"]
    here = tokenize(train, AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), 4)
    code = (
        "import sys; from transformers import AutoTokenizer; from trainer.data import load_splits, tokenize\n"
        "folder, file = sys.argv[1:]\n"
        "train = load_splits(train_file=file, cache_dir=folder + '/cache')['train']\n"
        "print(tokenize(train, AutoTokenizer.from_pretrained(folder + '/tokenizer'), 4).cache_files)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), file]
    there = subprocess.run(command, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here.cache_files)
    assert "Tokenizing" not in there.stderr and "Generating" not in there.stderr


# --- the sample ----------------------------------------------------------------


def test_the_sample_is_small_and_whole(tmp_path):
    assert sum(file.stat().st_size for file in SAMPLE.iterdir()) < 2 * 1024**2
    splits = load_splits(
        *(str(SAMPLE / f"{split}.jsonl.gz") for split in ("train", "validation", "test")),
        text_columns=("title", "text"),
        cache_dir=str(tmp_path),
    )
    assert {split: len(dataset) for split, dataset in splits.items()} == {
        "train": 2500,
        "validation": 300,
        "test": 500,
    }
    ids = [document for dataset in splits.values() for document in dataset["id"]]
    assert len(set(ids)) == len(ids)
    labels = build_label_list(splits["train"])
    assert len(labels) == 76
    assert all(count_unknown_labels(splits[split], labels) == {} for split in ("validation", "test"))
    assert set(load_label_descriptions(SAMPLE / "label_descriptions.jsonl", labels)) == set(labels)
    train = add_pseudo_documents(
        splits["train"], load_pseudo_documents(SAMPLE / "pseudo_documents.jsonl.gz", labels, str(tmp_path))
    )
    counts = label_counts(encode_labels(train, {name: i for i, name in enumerate(labels)}), len(labels))
    assert counts.min() >= 2 and num_real_documents(train) == 2500 and len(train) == 2950


def test_no_pseudo_sample_is_a_near_copy_of_a_held_out_document_of_the_sample():
    def runs(text, width=8):
        words = text.lower().split()
        return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}

    def texts(name):
        with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            return [runs(json.loads(line)["text"]) for line in lines]

    held_out = set().union(*texts("validation"), *texts("test"))
    assert all(len(sample & held_out) <= 0.05 * len(sample) for sample in texts("pseudo_documents"))
