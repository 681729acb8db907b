"""Training, augmentation and prediction read the same file alike, in every format, compression and encoding."""

import itertools
import json

import pytest
from data_files import jsonl, parquet, table, write
from datasets import Dataset
from scripts import load_example

from augmentation import AugmentationError
from augmentation.files import read_documents, read_label_descriptions, read_labels
from trainer.data import build_label_list, load_label_descriptions, load_splits


DOCUMENTS = [
    {"text": 'Über "graphs", trees; and\tmore', "labels": ["cs.DS", "math.CO"]},
    {"text": "a text of one label", "labels": ["e\u0301conomie"]},
    {"text": "a text of none", "labels": []},
]
TEXTS = [document["text"] for document in DOCUMENTS]
LABELS = [["cs.DS", "math.CO"], ["économie"], []]
FORMS = {
    "jsonl": jsonl(DOCUMENTS),
    "json": json.dumps(DOCUMENTS, indent=1, ensure_ascii=False),
    "csv": table(DOCUMENTS, join=" | ".join),
    "csv with semicolons": table(DOCUMENTS, ";", join=" | ".join),
    "csv with tabs": table(DOCUMENTS, "\t", join=" | ".join),
    "csv with printed lists": table(DOCUMENTS, join=str),
    "tsv": table(DOCUMENTS, "\t", join=" | ".join),
    "txt": "\n".join(TEXTS) + "\n",
}
ENCODINGS = {
    "utf-8": str.encode,
    "utf-8 with mark": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
}


@pytest.fixture(scope="module")
def predict():
    return load_example("predict", "predict_of_one_reader")


def read_in_three_ways(path, predict, cache, has_labels=True):
    """The result of each reader for a file: documents, or the error message."""

    def training():
        labels = {"label_column": "labels", "label_delimiter": "|"} if has_labels else {"label_column": None}
        dataset = load_splits(train_file=path, cache_dir=cache, **labels)["train"]
        return dataset["text"][:], dataset["labels"][:] if has_labels else None

    def augmentation():
        documents = read_documents(path, need_labels=has_labels, label_delimiter="|")
        return [document.text for document in documents], [list(document.labels) for document in documents]

    def prediction():
        args = predict.PredictArguments(model_name_or_path="m", input_file=[path], output_file="o")
        return [document.text for document in predict.read_documents([path], args)]

    found = []
    for way in (training, augmentation, prediction):
        try:
            found.append(way())
        except (ValueError, AugmentationError) as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form, encoding", [*itertools.product(FORMS, ENCODINGS), ("parquet", "utf-8")])
def test_a_file_is_read_alike_by_training_augmentation_and_prediction(tmp_path, predict, form, encoding, compression):
    content = parquet(DOCUMENTS) if form == "parquet" else ENCODINGS[encoding](FORMS[form])
    path = write(tmp_path / f"t.{form.split()[0]}{compression}", content)
    training, augmentation, prediction = read_in_three_ways(path, predict, str(tmp_path / "cache"), form != "txt")
    assert training == (TEXTS, None if form == "txt" else LABELS)
    assert augmentation == (TEXTS, [[], [], []] if form == "txt" else LABELS)
    assert prediction == TEXTS


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.jsonl", '{"text": "x", "labels": []}\n{"text": ' + "[" * 100_000, "line 2: not valid JSON"),
        ("t.jsonl", b'{"text": "caf\xe9", "labels": []}\n', "line 1: byte 0xe9 is not UTF-8"),
        ("t.csv", b"text,labels\nx\x00,a\n", "line 2: contains a NUL character"),
        ("t.csv", 'text;labels\nx;"a\n', "line 2: unexpected end of data"),
        ("t.csv", b"PK\x03\x04", "is an Excel workbook"),
        ("t.csv.gz", b"", "has 0 bytes"),
        ("t.jsonl.gz", b"\x1f\x8b\x08\x00torn", "cannot be decompressed"),
        ("t.parquet", b"PAR1", "not a whole Parquet file"),
    ],
)
def test_a_bad_file_is_reported_in_the_same_words_by_all_three(tmp_path, predict, name, content, words):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = read_in_three_ways(str(path), predict, str(tmp_path / "cache"))
    assert all(isinstance(sentence, str) and words in sentence and str(path) in sentence for sentence in found), found
    # Training can leave a bad row out, and says so.
    problems = {sentence.split(" Or leave such rows out:")[0] for sentence in found}
    assert len(problems) == 1, found


LABEL_FILES = {
    "l.txt": "b\n e\u0301 \n",
    "l.csv": "label;description\nb;\ne\u0301;what\n",
    "l.tsv": "id\tlabel\n1\tb\n2\té\n",
    "l.json": '["b", "e\u0301"]',
    "l.jsonl": '{"label": "b"}\n{"label": "é"}\n',
    "train.csv": "text,labels\nx,\"['é', 'b']\"\n",
}


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("name", LABEL_FILES)
def test_a_label_file_holds_the_same_labels_for_training_and_augmentation(tmp_path, name, compression):
    train = load_splits(
        train_file=write(tmp_path / "t.jsonl", jsonl([{"text": "x", "labels": ["é", "b"]}])),
        cache_dir=str(tmp_path / "cache"),
    )["train"]
    path = write(tmp_path / f"{name}{compression}", LABEL_FILES[name])
    assert list(read_labels(path)) == build_label_list(train, path) == ["b", "é"]


@pytest.mark.parametrize("name, content", [("l.csv", "title,text\nA survey,We survey.\n"), ("l.doc", "a\n")])
def test_a_file_without_labels_is_refused_in_the_same_words(tmp_path, name, content):
    path = write(tmp_path / name, content)
    train = {"labels": [["a"]], "text": ["x"]}
    with pytest.raises(ValueError) as in_training:
        build_label_list(Dataset.from_dict(train), path)
    with pytest.raises(AugmentationError) as in_augmentation:
        read_labels(path)
    assert str(in_training.value) == str(in_augmentation.value) and path in str(in_training.value)


def test_label_descriptions_are_the_same_for_training_and_augmentation(tmp_path):
    for name, content in {
        "d.jsonl": '{"label": "e\u0301", "description": "money"}\n',
        "d.csv": "label;description\né;money\n",
        "d.json": '{"é": {"description": "money"}}',
    }.items():
        path = write(tmp_path / name, content)
        assert read_label_descriptions(path) == load_label_descriptions(path, ["é"]) == {"é": "money"}
        assert load_label_descriptions(path, ["e\u0301"]) == {"e\u0301": "money"}
