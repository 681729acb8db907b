"""examples/predict.py: documents in any form go in, JSON Lines come out, and no crash loses or repeats a document."""

import csv
import gc
import gzip
import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answers import assert_same_answers
from scripts import CLOSED, fork, load_example, run_example, run_forked
from tiny_models import WORDS, tiny_backbone, tiny_model, tiny_tokenizer

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "examples" / "predict.py")


predict = load_example("predict")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def documents():
    """40 documents of very different lengths, two of them empty, one longer than a window."""
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 60))) for _ in range(40)]
    texts[5], texts[6], texts[7] = "", " ", " ".join(WORDS * 10)
    return [{"id": f"d{i}", "text": text, "title": f"star {i}"} for i, text in enumerate(texts)]


def write_jsonl(path, documents):
    opened = gzip.open(path, "wt") if str(path).endswith(".gz") else open(path, "w")
    with opened as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
    return str(path)


def arguments(model_folder, source, output, *more):
    base = [
        "--model_name_or_path",
        model_folder,
        "--input_file",
        str(source),
        "--output_file",
        str(output),
        "--device",
        "cpu",
        "--num_workers",
        "1",
    ]
    return [*base, *map(str, more)]


def run(*args):
    """Run the command in this process; a final error message is raised as ValueError."""
    try:
        predict.main(arguments(*args))
    except SystemExit as error:
        raise ValueError(error.code) from None
    return read(args[2])


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def expected_labels(model_folder, texts, **kwargs):
    from modeling_sep_mldc import SepMldcForMultiLabelClassification

    classify = MultiLabelDocumentClassificationPipeline(
        model=SepMldcForMultiLabelClassification.from_pretrained(model_folder),
        tokenizer=tiny_tokenizer(),
        device="cpu",
    )
    return [classify(text, **kwargs) for text in texts]


def assert_same_labels(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        assert {e["label"]: e["score"] for e in one} == pytest.approx(
            {e["label"]: e["score"] for e in other}, abs=1e-4
        )


# ---- Forms of input ----


def test_every_document_gets_its_line_in_order_with_its_id_and_the_labels_of_the_pipeline(
    model_folder, documents, tmp_path
):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    lines = run(model_folder, source, tmp_path / "out.jsonl", "--look_ahead", 7, "--batch_size", 4)
    assert [line["index"] for line in lines] == list(range(40))
    assert [line["id"] for line in lines] == [document["id"] for document in documents]
    assert lines[5]["labels"] == lines[6]["labels"] == []
    assert_same_labels(
        [line["labels"] for line in lines], expected_labels(model_folder, [d["text"] for d in documents])
    )
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "out.jsonl.journal"]


def test_all_forms_of_the_same_documents_give_the_same_lines(model_folder, documents, tmp_path):
    forms = {}
    forms["jsonl"] = write_jsonl(tmp_path / "a.jsonl", documents)
    forms["jsonl.gz"] = write_jsonl(tmp_path / "a.jsonl.gz", documents)
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        forms[name] = str(tmp_path / f"a.{name}")
        with open(forms[name], "w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "title", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(documents)
    forms["parquet"] = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(documents), forms["parquet"])
    forms["json"] = str(tmp_path / "a.json")
    Path(forms["json"]).write_text(json.dumps(documents))
    results = {name: run(model_folder, path, tmp_path / f"{name}.out") for name, path in forms.items()}
    for result in results.values():
        assert_same_answers(result, results["jsonl"])
    text_file = tmp_path / "a.txt"
    text_file.write_text("".join(document["text"] + "\n" for document in documents))
    plain = run(model_folder, text_file, tmp_path / "txt.out")
    assert plain == [{k: v for k, v in line.items() if k != "id"} for line in results["jsonl"]]


def test_several_files_are_one_stream_and_several_columns_one_text(model_folder, documents, tmp_path):
    write_jsonl(tmp_path / "part-0.jsonl", documents[:25])
    write_jsonl(tmp_path / "part-1.jsonl", documents[25:])
    lines = run(
        model_folder,
        tmp_path / "part-*.jsonl",
        tmp_path / "out",
        "--text_columns",
        "title",
        "text",
        "--id_column",
        "title",
    )
    assert [line["id"] for line in lines] == [document["title"] for document in documents]
    texts = [" ".join(t for t in (d["title"], d["text"]) if t) for d in documents]
    assert_same_labels([line["labels"] for line in lines], expected_labels(model_folder, texts))


def test_standard_input_and_output_work_as_in_a_pipe_of_commands(model_folder):
    command = [sys.executable, SCRIPT, *arguments(model_folder, "-", "-", "--top_k", 2)]
    done = subprocess.run(command, cwd=ROOT, input=b"star galaxy\n\nrobot\n", capture_output=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    expected = expected_labels(model_folder, ["star galaxy", "", "robot"], top_k=2)
    assert_same_labels([line["labels"] for line in lines], expected)
    assert b"Labeling" in done.stderr


def test_the_options_reach_the_pipeline(model_folder, documents, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    options = [
        "--threshold",
        0.2,
        "--min_score",
        0.3,
        "--top_k",
        3,
        "--window_stride",
        5,
        "--window_merge",
        "mean",
        "--max_length",
        20,
    ]
    lines = run(model_folder, source, tmp_path / "out", *options)
    kwargs = {"threshold": 0.2, "min_score": 0.3, "top_k": 3, "stride": 5, "window_merge": "mean", "max_length": 20}
    expected = expected_labels(model_folder, [d["text"] for d in documents], **kwargs)
    assert_same_labels([line["labels"] for line in lines], expected)


# ---- Abstained documents ----


@pytest.fixture(scope="module")
def cautious_folder(tmp_path_factory, documents):
    """A model whose best label of about every second document is below its threshold."""
    folder, model = tmp_path_factory.mktemp("cautious"), tiny_model()
    classify = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tiny_tokenizer(), device="cpu", top_k=1)
    best = sorted(labels[0]["score"] for labels in classify([d["text"] for d in documents]) if labels)
    model.config.thresholds = [(best[len(best) // 2 - 1] + best[len(best) // 2]) / 2] * 5
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_abstained_documents_are_marked_counted_and_listed_with_their_texts(
    cautious_folder, documents, tmp_path, capsys
):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    lines = run(cautious_folder, source, tmp_path / "out", "--abstained_file", tmp_path / "review", "--min_labels", 2)
    expected = expected_labels(cautious_folder, [d["text"] for d in documents])
    assert [line["abstained"] for line in lines] == [not labels for labels in expected]
    count = sum(line["abstained"] for line in lines)
    assert 10 < count < 30
    assert f"abstains on {count} of 40 documents" in capsys.readouterr().err
    listed = read(tmp_path / "review")
    assert [row["index"] for row in listed] == [line["index"] for line in lines if line["abstained"]]
    for row in listed:
        own = documents[row["index"]]
        assert (row["id"], row["text"]) == (own["id"], own["text"].strip())
        assert row["labels"] == lines[row["index"]]["labels"] and all(e["below_threshold"] for e in row["labels"])
        assert len(row["labels"]) == (2 if own["text"].strip() else 0)


def test_documents_with_a_low_expected_f1_are_listed_for_review_with_their_best_labels(
    cautious_folder, documents, tmp_path
):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    options = ("--threshold", 0.0, "--min_labels", 1, "--abstained_file", tmp_path / "review")
    for limit, number in ((0.0, 0), (1.0, len(documents))):
        lines = run(
            cautious_folder, source, tmp_path / "out", *options, "--min_expected_f1", limit, "--overwrite_output_file"
        )
        filled = [document["text"].strip() != "" for document in documents]
        assert sum(line["abstained"] and full for line, full in zip(lines, filled)) == (sum(filled) if number else 0)
    assert len(read(tmp_path / "review")) == len(documents)


def test_a_resumed_prediction_lists_the_abstained_documents_of_all_runs(cautious_folder, documents, tmp_path, capsys):
    broken = write_jsonl(tmp_path / "in.jsonl", [*documents, {"text": 3}])
    options = ("--abstained_file", tmp_path / "review", "--look_ahead", 8)
    with pytest.raises(ValueError, match="text"):
        run(cautious_folder, broken, tmp_path / "out", *options)
    assert not (tmp_path / "review").exists()
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    lines = run(cautious_folder, source, tmp_path / "out", *options, "--resume")
    count = sum(line["abstained"] for line in lines)
    assert len(read(tmp_path / "review")) == count and f"on {count} of 40" in capsys.readouterr().err
    with pytest.raises(ValueError, match="review exists. Specify another `--abstained_file`"):
        run(cautious_folder, source, tmp_path / "other", *options)
    (tmp_path / "review").unlink()
    run(cautious_folder, source, tmp_path / "out", *options, "--resume")  # complete: the list is written again
    assert len(read(tmp_path / "review")) == count


@pytest.mark.parametrize(
    "output, listed, message",
    [
        ("-", "review", "`--abstained_file` is made from the output"),
        ("out", "out", "which the output is written to"),
        ("out", "in.jsonl", "`--abstained_file` would write to .*in.jsonl, which is read"),
        ("out", "missing/review", "cannot be written. Specify a file in a folder that exists"),
        ("out.jsonl.gz", "review", "`--output_file` is out.jsonl.gz, but the file is not compressed"),
        ("out", "review.csv.zst", "`--abstained_file` is review.csv.zst, but the file is not compressed"),
    ],
)
def test_a_list_that_cannot_be_written_is_an_error_before_anything_is_read(
    cautious_folder, documents, tmp_path, monkeypatch, output, listed, message
):
    monkeypatch.chdir(tmp_path)
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    with pytest.raises(ValueError, match=message):
        run(cautious_folder, source, output, "--abstained_file", listed)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_bf16_gives_nearly_the_same_scores(model_folder, documents, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    full = run(model_folder, source, tmp_path / "full", "--top_k", 5)
    half = run(model_folder, source, tmp_path / "half", "--top_k", 5, "--bf16")
    assert full != half
    for one, other in zip(full, half):
        scores = {entry["label"]: entry["score"] for entry in other["labels"]}
        assert {e["label"]: e["score"] for e in one["labels"]} == pytest.approx(scores, abs=0.1)


# ---- Memory and order of work ----


def test_two_workers_write_the_same_lines_as_one_up_to_a_bad_document_and_one_continues_after_the_fix(
    model_folder, documents, tmp_path, monkeypatch
):
    whole = write_jsonl(tmp_path / "whole.jsonl", documents)
    run(model_folder, whole, tmp_path / "one", "--look_ahead", 5, "--batch_size", 4)
    source, output = write_jsonl(tmp_path / "in.jsonl", [*documents[:23], {"id": "bad", "text": 3}]), tmp_path / "two"
    options = ["--look_ahead", 5, "--batch_size", 4, "--num_workers", 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # one thread for each worker
    monkeypatch.chdir(ROOT)
    done = run_example("predict", *arguments(model_folder, source, output, *options))
    assert done.returncode == 1 and "line 24: `text` is 3" in done.stderr and "Traceback" not in done.stderr
    assert read(f"{output}.partial") == read(tmp_path / "one")[:23]
    write_jsonl(source, documents)
    run(model_folder, source, output, *options[:-1], 1, "--resume")
    assert output.read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_process_leaves_whole_blocks_and_no_worker(model_folder, documents, tmp_path, victim):
    many = [{**documents[i % 40], "id": f"n{i}"} for i in range(800)]
    source, output = write_jsonl(tmp_path / "in.jsonl", many), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    command = [sys.executable, SCRIPT, *arguments(model_folder, source, output, "--look_ahead", 10, "--batch_size", 2)]
    process = subprocess.Popen([*command, "--num_workers", "2"], cwd=ROOT, stderr=subprocess.PIPE)
    while not (partial.exists() and partial.stat().st_size > 2000):
        assert process.poll() is None
        time.sleep(0.005)
    children = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0] if victim == "worker" else process.pid, 9)
    message = process.communicate()[1].decode()
    if victim == "worker":
        assert process.returncode == 1 and "worker processes was killed" in message and "Traceback" not in message
    for worker in workers:
        end = time.monotonic() + 30
        while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{worker}").exists()
    assert 0 < partial.read_bytes().count(b"\n") < 800 and not output.exists()
    lines = run(model_folder, source, output, "--resume")
    assert [(line["index"], line["id"]) for line in lines] == [(i, d["id"]) for i, d in enumerate(many)]


def test_the_model_sees_documents_of_like_length_together_within_the_look_ahead(model_folder):
    class Recorder:
        device = predict.torch.device("cpu")

        def __call__(self, texts, batch_size):
            self.texts = texts
            return [[{"label": text, "score": 1.0}] for text in texts]

    recorder = Recorder()
    block = [predict.Document(i, None, "x" * length) for i, length in enumerate((5, 1, 9, 3))]
    args = predict.PredictArguments(model_name_or_path="", input_file=["a"], output_file="b")
    lines = [json.loads(line) for line in predict.label_block(recorder, block, args)]
    assert [len(text) for text in recorder.texts] == [1, 3, 5, 9]
    assert [(line["index"], len(line["labels"][0]["label"])) for line in lines] == [(0, 5), (1, 1), (2, 9), (3, 3)]


def test_a_block_ends_at_the_look_ahead_or_when_its_texts_become_too_large(monkeypatch):
    monkeypatch.setattr(predict, "MAX_BLOCK_CHARACTERS", 100)
    stream = [predict.Document(i, None, "x" * length) for i, length in enumerate([1] * 5 + [60, 60, 1, 1, 200, 1])]
    assert [[d.index for d in block] for block in predict.blocks_of(stream, 4)] == [
        [0, 1, 2, 3],
        [4, 5, 6],
        [7, 8, 9],
        [10],
    ]


def test_memory_does_not_grow_with_the_number_of_documents(model_folder, tmp_path, monkeypatch):
    source = tmp_path / "in.txt"
    source.write_text("".join(f"star galaxy number {i} of the data\n" for i in range(768)))
    sizes = []
    label_block = predict.label_block

    def measured(*args):
        if len(sizes) in (4, 11):
            gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
        return label_block(*args)

    monkeypatch.setattr(predict, "label_block", measured)
    tracemalloc.start()
    try:
        run(model_folder, source, tmp_path / "out", "--look_ahead", 64, "--batch_size", 64, "--top_k", 1)
    finally:
        tracemalloc.stop()
    # The texts of the seven blocks in between, kept, would be 40 kB, their answers 100 kB.
    assert len(sizes) == 12 and sizes[11] < sizes[4] + 30_000, sizes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_documents_leave_the_process_as_small_as_a_few_thousand(model_folder, tmp_path):
    source = tmp_path / "many.jsonl.gz"
    with gzip.open(source, "wt", compresslevel=1) as file:
        for i in range(100_000):
            file.write(
                json.dumps({"id": i, "text": f"star galaxy number {i} of the data " + "robot " * (i % 7)}) + "\n"
            )
    command = [
        sys.executable,
        SCRIPT,
        *arguments(model_folder, source, tmp_path / "out", "--batch_size", 128, "--look_ahead", 2048),
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    partial, sizes = tmp_path / "out.partial", {}
    while process.poll() is None:
        if partial.exists():
            lines = sum(1 for _ in open(partial, "rb"))
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes[lines] = next((int(row.split()[1]) for row in status.splitlines() if row.startswith("VmRSS")), None)
        time.sleep(2)
    assert process.returncode == 0
    assert sum(1 for _ in open(tmp_path / "out", "rb")) == 100_000
    early = max(size for lines, size in sizes.items() if size and 4_000 < lines < 30_000)
    late = max(size for lines, size in sizes.items() if size and lines > 70_000)
    assert late < early + 20_000, (early, late)  # kB


# ---- Resuming ----


def assert_whole(output, documents, model_folder):
    lines = read(output)
    assert [(line["index"], line["id"]) for line in lines] == [(i, d["id"]) for i, d in enumerate(documents)]
    assert_same_labels(
        [line["labels"] for line in lines], expected_labels(model_folder, [d["text"] for d in documents])
    )


def start(model_folder, source, output, *options):
    """The command in a process of its own."""
    return fork(predict.main, arguments(model_folder, source, output, *options))


def test_a_kill_in_mid_prediction_loses_and_repeats_nothing(model_folder, documents, tmp_path):
    many = [{**documents[i % 40], "id": f"n{i}"} for i in range(800)]
    source, output = write_jsonl(tmp_path / "in.jsonl", many), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    process = start(model_folder, source, output, "--look_ahead", 10, "--batch_size", 2)
    while process.exitcode is None and not (partial.exists() and partial.stat().st_size > 2000):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -9
    done = partial.read_bytes().count(b"\n")
    assert 0 < done < 800 and not output.exists()
    with pytest.raises(ValueError, match="contains a part of an earlier run. Resume it"):
        run(model_folder, source, output)
    assert len(run(model_folder, source, output, "--resume")) == 800
    assert not partial.exists()
    lines = read(output)
    assert [(line["index"], line["id"]) for line in lines] == [(i, d["id"]) for i, d in enumerate(many)]
    expected = expected_labels(model_folder, [d["text"] for d in documents])
    assert_same_labels([line["labels"] for line in lines], [expected[i % 40] for i in range(800)])


@pytest.fixture(scope="module")
def interrupted(model_folder, documents, tmp_path_factory):
    """A folder with the files of a prediction that stopped after 20 of 40 documents, in 4 blocks."""
    folder = tmp_path_factory.mktemp("interrupted")
    source = write_jsonl(folder / "in.jsonl", documents[:20])
    with open(source, "a") as file:
        file.write('{"id": "bad", "text": 3}\n')
    with pytest.raises(ValueError, match=r"in.jsonl, line 21: `text` is 3, but a text is needed"):
        run(model_folder, source, folder / "out.jsonl", "--look_ahead", 5)
    assert len(read(folder / "out.jsonl.partial")) == 20
    return folder


@pytest.fixture
def half_done(interrupted, documents, tmp_path):
    """A copy of it whose input is fixed: source, output and partial output."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    return source, tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"


def test_a_bad_document_stops_after_the_good_ones_before_it_and_can_be_fixed(model_folder, documents, half_done):
    source, output, _ = half_done
    run(model_folder, source, output, "--resume")
    assert_whole(output, documents, model_folder)


@pytest.mark.parametrize("rest", [b"", b"{", b'{"id": "d17", "index": 17, "labels": [{"lab', b"\0" * 9000])
def test_a_truncated_last_line_is_repaired(model_folder, documents, half_done, rest):
    source, output, partial = half_done
    whole = partial.read_bytes()
    position = sum(len(line) for line in whole.splitlines(keepends=True)[:17])
    partial.write_bytes(whole[:position] + rest)
    run(model_folder, source, output, "--resume")
    assert_whole(output, documents, model_folder)


@pytest.mark.parametrize("damage", ["partial", "journal", "both"])
def test_a_damaged_file_costs_the_blocks_after_the_damage_and_no_more(
    model_folder, documents, half_done, damage, monkeypatch
):
    source, output, partial = half_done
    journal = Path(f"{output}.journal")
    for path, line in ((partial, 11), (journal, 3)):  # both lie in the third block
        if damage in (path.suffix[1:], "both"):
            lines = path.read_bytes().splitlines(keepends=True)
            lines[line] = lines[line].replace(b"0", b"1").replace(b"5", b"6")
            path.write_bytes(b"".join(lines))
    labeled = []
    label_block = predict.label_block
    monkeypatch.setattr(
        predict,
        "label_block",
        lambda classify, block, args: labeled.extend(block) or label_block(classify, block, args),
    )
    run(model_folder, source, output, "--resume")
    assert_whole(output, documents, model_folder)
    assert [document.index for document in labeled] == list(range(10, 40))


def test_without_its_journal_a_part_is_not_continued(model_folder, documents, half_done):
    source, output, _ = half_done
    journal = Path(f"{output}.journal")
    for content in (None, b"", b"\0\0", b"[]\n"):
        journal.unlink()
        if content is not None:
            journal.write_bytes(content)
        with pytest.raises(ValueError, match="the settings it was made with are unknown"):
            run(model_folder, source, output, "--resume")
        journal.touch()
    run(model_folder, source, output, "--overwrite_output_file")
    assert_whole(output, documents, model_folder)


def test_a_full_disk_ends_in_a_one_sentence_error_and_resume_continues(model_folder, documents, tmp_path):
    source, output = write_jsonl(tmp_path / "in.jsonl", documents), tmp_path / "out.jsonl"
    # A limit on the size of files makes the write itself fail, in the middle of a line, as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))
    try:
        with pytest.raises(
            ValueError, match="cannot be written any further .* Make room, then resume: [0-9]+ are done"
        ):
            run(model_folder, source, output, "--look_ahead", 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    partial = tmp_path / "out.jsonl.partial"
    assert partial.stat().st_size == 2500 and not partial.read_bytes().endswith(b"\n")
    run(model_folder, source, output, "--resume")
    assert_whole(output, documents, model_folder)


def test_resuming_with_another_input_is_refused(model_folder, documents, half_done, tmp_path):
    source, output, partial = half_done
    before = partial.read_bytes()
    other_texts = [{**document, "text": documents[i - 1]["text"]} for i, document in enumerate(documents)]
    other_ids = [{**document, "id": f"x{i}"} for i, document in enumerate(documents)]
    for other in (other_texts, other_ids, documents[1:] + documents[:1]):
        with pytest.raises(ValueError, match="first 20 documents are not those"):
            run(model_folder, write_jsonl(tmp_path / "b.jsonl", other), output, "--resume")
    with pytest.raises(ValueError, match="has 20 lines, but the input has only 10 documents"):
        run(model_folder, write_jsonl(tmp_path / "c.jsonl", documents[:10]), output, "--resume")
    assert partial.read_bytes() == before
    run(model_folder, source, output, "--resume")
    assert_whole(output, documents, model_folder)


def test_resuming_with_another_model_or_other_options_is_refused(model_folder, documents, half_done, tmp_path):
    source, output, partial = half_done
    before = partial.read_bytes()
    copies = [str(shutil.copytree(model_folder, tmp_path / f"model {i}")) for i in range(4)]
    tiny_model(seed=3).save_pretrained(copies[0])
    tiny_model(thresholds=[0.1] * 5).save_pretrained(copies[1])
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(copies[2])
    for folder, changed in zip(copies, ("model weights", "model configuration", "tokenizer")):
        with pytest.raises(ValueError, match=f"was made with different settings: another {changed}"):
            run(folder, source, output, "--resume")
    for options, changed in (
        (["--top_k", 2], "`--top_k` was None and is 2"),
        (["--threshold", 0.5], "`--threshold` was None and is 0.5"),
        (
            ["--window_merge", "mean", "--bf16"],
            "`--bf16` was False and is True; `--window_merge` was 'max' and is 'mean'",
        ),
    ):
        with pytest.raises(ValueError, match=changed):
            run(model_folder, source, output, "--resume", *options)
    assert partial.read_bytes() == before
    # The same checkpoint in another folder, read in other batches, gives the same lines.
    run(copies[3], source, output, "--resume", "--batch_size", 3, "--look_ahead", 7)
    assert_whole(output, documents, model_folder)


def test_a_complete_output_is_neither_overwritten_nor_made_again_unless_asked(
    model_folder, documents, tmp_path, capsys
):
    source, output = write_jsonl(tmp_path / "in.jsonl", documents), tmp_path / "out.jsonl"
    output.write_text("{}\n")
    with pytest.raises(ValueError, match="exists. Specify another"):
        run(model_folder, source, output)
    with pytest.raises(ValueError, match="the settings it was made with are unknown"):
        run(model_folder, source, output, "--resume")
    output.chmod(0o600)
    run(model_folder, source, output, "--overwrite_output_file")
    assert_whole(output, documents, model_folder)
    assert output.stat().st_mode & 0o777 == 0o600
    before = output.read_bytes()
    capsys.readouterr()
    run(model_folder, source, output, "--resume")
    assert "is complete: nothing to resume" in capsys.readouterr().err and output.read_bytes() == before


def test_a_complete_output_of_another_run_is_not_taken_for_this_one(model_folder, documents, tmp_path):
    source, output = write_jsonl(tmp_path / "in.jsonl", documents[:9]), tmp_path / "out.jsonl"
    run(model_folder, source, output)
    with pytest.raises(ValueError, match="`--top_k` was None and is 1"):
        run(model_folder, source, output, "--resume", "--top_k", 1)
    with pytest.raises(ValueError, match="first 9 documents are not those"):
        run(model_folder, write_jsonl(tmp_path / "b.jsonl", documents[1:]), output, "--resume")
    with pytest.raises(ValueError, match="complete, but the input has grown"):
        run(model_folder, write_jsonl(tmp_path / "c.jsonl", documents), output, "--resume")
    output.write_bytes(output.read_bytes()[:-9])
    with pytest.raises(ValueError, match="was changed after it was written"):
        run(model_folder, source, output, "--resume")


def test_an_interrupted_overwrite_keeps_the_former_output_and_asks_before_replacing_it(
    model_folder, documents, half_done
):
    source, output, partial = half_done
    output.write_text("former\n")
    for options in ([], ["--resume"]):
        with pytest.raises(ValueError, match="resume and overwrite|Resume it, or overwrite it"):
            run(model_folder, source, output, *options)
    assert output.read_text() == "former\n" and len(read(partial)) == 20
    run(model_folder, source, output, "--resume", "--overwrite_output_file")
    assert_whole(output, documents, model_folder)


def test_two_predictions_never_share_an_output(model_folder, documents, tmp_path):
    fifo, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(fifo)
    first = start(model_folder, fifo, output, "--look_ahead", 5)
    with open(fifo, "w") as stream:  # waits until the first one reads, with its output open
        for options in ([], ["--resume"], ["--overwrite_output_file"]):
            with pytest.raises(ValueError, match="Another process is writing .*out.jsonl"):
                run(model_folder, write_jsonl(tmp_path / "b.jsonl", documents), output, *options)
        stream.writelines(json.dumps(document) + "\n" for document in documents)
    first.join(timeout=200)
    assert first.exitcode == 0
    assert_whole(output, documents, model_folder)


# ---- Special files ----


def test_a_pipe_and_a_device_are_written_to_and_stay_unchanged(model_folder, documents, tmp_path):
    source, fifo, received = write_jsonl(tmp_path / "in.jsonl", documents), tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: received.append(fifo.read_text()))
    reader.start()
    predict.main(arguments(model_folder, source, fifo))
    reader.join(timeout=60)
    assert [json.loads(line)["id"] for line in received[0].splitlines()] == [d["id"] for d in documents]
    for options in ([], ["--overwrite_output_file"]):
        predict.main(arguments(model_folder, source, os.devnull, *options))
    assert stat.S_ISFIFO(fifo.stat().st_mode) and stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "in.jsonl"]
    with pytest.raises(ValueError, match="is a pipe or a device"):
        run(model_folder, source, fifo, "--resume")
    with pytest.raises(ValueError, match="is a directory"):
        run(model_folder, source, tmp_path)
    if os.path.exists("/dev/full"):
        with pytest.raises(ValueError, match="/dev/full cannot be written any further"):
            run(model_folder, source, "/dev/full")


def test_a_link_is_followed(model_folder, documents, tmp_path):
    source, target, link = write_jsonl(tmp_path / "in.jsonl", documents), tmp_path / "target", tmp_path / "link"
    link.symlink_to("target")
    run(model_folder, source, link)
    assert link.is_symlink() and not target.is_symlink()
    assert_whole(target, documents, model_folder)


def test_no_file_that_is_read_is_written(model_folder, documents, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to("in.jsonl")
    os.link(source, tmp_path / "out.journal")
    weights = Path(model_folder, "model.safetensors")
    before = weights.read_bytes()
    for output in (source, tmp_path / "hard", tmp_path / "soft", tmp_path / "out", weights):
        with pytest.raises(ValueError, match="would write to .*, which is read as"):
            run(model_folder, source, output, "--overwrite_output_file")
    assert len(read(source)) == 40 and weights.read_bytes() == before


def test_an_input_that_is_a_pipe_is_read_once_and_to_its_end(model_folder, documents, tmp_path):
    fifo = tmp_path / "in.jsonl"
    os.mkfifo(fifo)
    writer = threading.Thread(
        target=lambda: fifo.write_text("".join(json.dumps(document) + "\n" for document in documents))
    )
    writer.start()
    run(model_folder, fifo, tmp_path / "out")
    writer.join(timeout=60)
    assert_whole(tmp_path / "out", documents, model_folder)
    os.rename(fifo, tmp_path / "in.parquet")
    with pytest.raises(ValueError, match="parquet cannot be read from a pipe"):
        run(model_folder, tmp_path / "in.parquet", tmp_path / "out")


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_standard_stream_is_an_error_only_where_it_is_needed(
    model_folder, documents, tmp_path, tmp_path_factory, closed
):
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    stream = {("stdin", "stdout", "stderr")[closed]: CLOSED}

    def command(*args):
        return run_forked(
            predict.main, arguments(model_folder, *args), folder=tmp_path_factory.mktemp("log"), **stream
        )

    assert command(source, tmp_path / "out")[0] == 0
    assert_whole(tmp_path / "out", documents, model_folder)
    if closed == 2:
        return
    code, message = command("-", tmp_path / "none") if closed == 0 else command(source, "-")
    assert code == 1 and f"tandard {('input', 'output')[closed]} is closed" in message
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out", "out.journal"]


# ---- Bad input ----


def test_bytes_that_are_not_utf8_are_reported_with_their_line(model_folder, tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(b"star\nna\xefve\n")
    with pytest.raises(ValueError, match="in.txt, line 2: byte 0xef is not UTF-8. Convert the file"):
        run(model_folder, path, tmp_path / "out")
    assert len(read(tmp_path / "out.partial")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "star"}\n', "line 1: no column 'text'. The columns are 'body'"),
        ('{"text": "star"\n', "line 1: not valid JSON"),
        ("[1]\n", "line 1: .* is not a JSON object"),
        ('{"text": "\\ud800"}\n', "an unpaired surrogate"),
        ('{"text": ["a"]}\n', "line 1: `text` is \\['a'\\], but a text is needed"),
    ],
)
def test_a_bad_line_is_reported_with_its_rule(model_folder, tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        run(model_folder, path, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", 2], "`--threshold` is 2.0, but it must be from 0 to 1"),
        (["--threshold", "nan"], "`--threshold` is nan, but it must be from 0 to 1"),
        (["--threshold", "-0.1"], "`--threshold` is -0.1"),
        (["--min_score", "nan"], "`--min_score` is nan, but it must be a finite number"),
        (["--min_score", "inf"], "`--min_score` is inf, but it must be a finite number"),
        (["--min_score", "-1"], "`min_score` is -1.0"),
        (["--top_k", 0], "`--top_k` is 0, but it must be at least 1"),
        (["--top_k", -1], "`--top_k` is -1, but it must be at least 1"),
        (["--window_stride", -1], "`--window_stride` is -1, but it must be at least 0"),
        (["--look_ahead", 0], "`--look_ahead` is 0"),
        (["--num_workers", 0], "`--num_workers` is 0"),
        (["--device", "xyz"], "`device` is 'xyz', which cannot be used"),
        (["--text_columns", "body"], "no column 'body'. The columns are 'id', 'text', 'title'"),
        (["--input_format", "txt", "--text_columns", "body"], "txt has none"),
        (["--max_length", 100000], "an integer from 3 to 128"),
        (["--batch_size", 0], "`--batch_size` is 0"),
        (["--input_format", "csv"], "line 1|no column"),
        (["--id_column", "key"], "no column 'key'"),
    ],
)
def test_an_option_out_of_its_range_is_reported_with_its_rule(model_folder, documents, tmp_path, options, message):
    source = write_jsonl(tmp_path / "in.jsonl", documents[:2])
    with pytest.raises(ValueError, match=message):
        run(model_folder, source, tmp_path / "out", *options)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_files_that_cannot_be_read_or_written_are_reported(model_folder, documents, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents[:2])
    with pytest.raises(ValueError, match="gone.jsonl: no such file"):
        run(model_folder, tmp_path / "gone.jsonl", tmp_path / "out")
    with pytest.raises(ValueError, match="in.doc: the format is not known"):
        os.link(source, tmp_path / "in.doc")
        run(model_folder, tmp_path / "in.doc", tmp_path / "out")
    with pytest.raises(ValueError, match="out.journal cannot be written .* Specify another output"):
        run(model_folder, source, tmp_path / "no" / "such" / "folder" / "out")
    with pytest.raises(ValueError, match="is a bert model, but a trained sep_mldc model is needed"):
        run(tiny_backbone(tmp_path / "bert"), source, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_reported(model_folder, documents, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents[:2])
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        run(model_folder, source, tmp_path / "closed" / "out")
