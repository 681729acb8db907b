"""review, export-sft and report."""

import json

import pytest
from augmentation_server import ChatServer, document, prose, rows, settings, write_rows

from augmentation import (
    AugmentationError,
    PseudoDocumentOptions,
    ReviewOptions,
    describe_labels,
    export_sft,
    report,
    review,
    write_pseudo_documents,
)
from augmentation.cli import main
from augmentation.near_duplicates import NearDuplicateIndex


TRAIN = [document(i, ["big", "rare"]) for i in range(4)]
GOOD = [
    "We measure how rivers of meltwater carve channels below a glacier and compare three seasons of radar images. The "
    "channels move toward the valley floor each spring, and a simple model of pressure explains the direction, the speed "
    "and the yearly return of this motion within the error of the instruments that we used on both sides.",
    "A new estimator for the tail of claim sizes in motor insurance is proposed. It needs only quarterly sums, keeps its "
    "accuracy when small claims are not reported, and is computed in closed form. On two portfolios with ten years of "
    "claims it predicts the reserve better than the method that regulators ask for, at the same cost.",
]


def pseudo(text, number=0, **columns):
    return {"id": f"pseudo:rare:{number}", "text": text, "labels": ["big", "rare"], "tail_label": "rare",
            "demonstration_id": "d0", "marks": "", **columns}  # fmt: skip


def judge(tmp_path, documents, exclude=(), train=TRAIN, **options):
    """{text: reason or None} of a review, after checking that each ends in exactly one file."""
    path = write_rows(tmp_path / "pseudo.jsonl", documents)
    files = [write_rows(tmp_path / "test.jsonl", exclude)] if exclude else []
    scores = options.pop("scores", None)
    summary = review(
        path, tmp_path, write_rows(tmp_path / "train.jsonl", train), files, ReviewOptions(**options), scores=scores
    )
    kept, rejected = rows(summary.kept_file), rows(summary.rejected_file)
    assert len(kept) + len(rejected) == len(documents) == summary.kept + sum(summary.rejected.values())
    assert kept == [row for row in documents if row in kept] or scores
    return [{row["id"]: row["reason"] for row in rejected}.get(row["id"]) for row in documents]


def test_good_pseudo_documents_are_kept_as_they_are(tmp_path):
    assert judge(tmp_path, [pseudo(text, i) for i, text in enumerate(GOOD)]) == [None, None]


@pytest.mark.parametrize(
    "reason,text",
    [
        ("empty", "  "),
        ("refusal", "I'm sorry, but I can't help with that request about glaciers and rivers of meltwater in spring."),
        ("refusal", "As an AI language model, I do not have access to the dataset of abstracts that you describe."),
        ("boilerplate", f"Sure, here is an abstract. {GOOD[0]}"),
        ("boilerplate", f"Here is a new abstract on glaciers:\n\n{GOOD[0]}"),
        ("boilerplate", f"{GOOD[0]} Let me know if you would like any changes."),
        ("boilerplate", f"{GOOD[0]} [insert citation]"),
        ("prompt_echo", f"{GOOD[0]} Every label must follow from the content; do not write the labels themselves."),
        ("prompt_echo", f"<document-0a1b2c3d>\n{GOOD[0]}\n</document-0a1b2c3d>"),
        ("too_short", "We measure how rivers carve channels below a glacier in spring."),
        ("too_long", " ".join(f"{GOOD[0]} {i}" for i in range(6))),
        ("wrong_language", "Wir messen, wie das Schmelzwasser unter einem Gletscher Rinnen gräbt, und vergleichen dazu "
         "Radarbilder aus drei Jahren. Die Rinnen wandern in jedem Frühling zum Talboden, und ein einfaches Modell erklärt "
         "die Richtung und die Geschwindigkeit dieser Bewegung innerhalb der Genauigkeit der Geräte."),
        ("copy_of_demonstration", f"{TRAIN[0]['text'][:250]} {GOOD[0][:150]}"),
        ("duplicate_of_train", TRAIN[2]["text"].upper()),
        ("near_duplicate_of_train", TRAIN[2]["text"].replace("Document 2", "Paper two", 1)),
    ],
)  # fmt: skip
def test_a_bad_pseudo_document_is_rejected_with_its_reason_and_good_ones_beside_it_are_kept(tmp_path, reason, text):
    assert judge(tmp_path, [pseudo(GOOD[0], 0), pseudo(text, 1), pseudo(GOOD[1], 2)]) == [None, reason, None]


def test_a_cut_off_pseudo_document_is_rejected(tmp_path):
    assert judge(tmp_path, [pseudo(GOOD[0], marks="cut_off")]) == ["cut_off"]


def test_the_first_of_near_duplicate_pseudo_documents_is_kept(tmp_path):
    near = GOOD[0].replace("We measure", "We now measure")
    documents = [pseudo(GOOD[0], 0), pseudo(GOOD[0] + " ", 1), pseudo(near, 2)]
    assert judge(tmp_path, documents) == [None, "duplicate_of_pseudo_document", "near_duplicate_of_pseudo_document"]


def test_a_pseudo_document_close_to_an_excluded_document_is_rejected(tmp_path):
    excluded = [{"text": GOOD[1]}, {"text": GOOD[0].replace("three seasons", "two seasons")}]
    found = judge(tmp_path, [pseudo(GOOD[0], 0), pseudo(GOOD[1], 1)], excluded)
    assert found == ["near_duplicate_of_excluded", "duplicate_of_excluded"]


def test_agreement_with_a_model_needs_its_mean_score_of_the_intended_labels(tmp_path):
    scores = write_rows(
        tmp_path / "scores.jsonl",
        [
            {"id": "pseudo:rare:1", "labels": [{"label": "big", "score": 0.2}]},
            {"id": "pseudo:rare:0", "labels": [{"label": "big", "score": 0.9}, {"label": "rare", "score": 0.5}]},
        ],
    )
    documents = [pseudo(GOOD[0], 0), pseudo(GOOD[1], 1)]
    assert judge(tmp_path, documents, scores=scores, min_agreement=0.6) == [None, "disagreement"]
    assert rows(tmp_path / "pseudo_documents_kept.jsonl")[0]["agreement"] == 0.7
    called = judge(
        tmp_path, documents, scores=lambda texts: [{"big": 1.0, "rare": 1.0}] * len(texts), min_agreement=0.6
    )
    assert called == [None, None]
    by_line = write_rows(
        tmp_path / "s.jsonl", [{"index": 1, "labels": []}, {"index": 0, "labels": [{"label": "big", "score": 1}]}]
    )
    assert judge(tmp_path, documents, scores=by_line, min_agreement=0.5) == [None, "disagreement"]


def test_scores_that_lack_a_pseudo_document_are_refused(tmp_path):
    scores = write_rows(tmp_path / "scores.jsonl", [{"id": "other", "labels": []}])
    with pytest.raises(AugmentationError, match="no scores for the pseudo-document 'pseudo:rare:0'"):
        judge(tmp_path, [pseudo(GOOD[0])], scores=scores)


def test_a_file_without_pseudo_documents_is_refused(tmp_path):
    with pytest.raises(AugmentationError, match="has no pseudo-documents"):
        judge(tmp_path, [])
    assert not (tmp_path / "pseudo_documents_kept.jsonl").exists()


def test_near_duplicates_agree_with_the_jaccard_similarity_of_all_pairs():
    import random

    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(400)]
    texts = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(30)]
    changed = []
    for text in texts:
        words = text.split()
        for place in rng.sample(range(60), rng.choice([1, 2, 4, 8, 16])):
            words[place] = rng.choice(vocabulary)
        changed.append(" ".join(words))
    index = NearDuplicateIndex(0.6)
    for number, text in enumerate(texts):
        index.add(str(number), text)

    def runs(text):
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    for number, text in enumerate(changed):
        similar = len(runs(text) & runs(texts[number])) / len(runs(text) | runs(texts[number])) >= 0.6
        assert (index.find(text) == str(number)) == similar


def test_reviewed_answers_become_chats_with_the_prompt_that_was_sent(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", TRAIN)
    with ChatServer() as server:
        write_pseudo_documents(
            train, tmp_path, settings(server), options=PseudoDocumentOptions(per_label=2, tail_labels=["rare"])
        )
        describe_labels(["rare"], tmp_path, settings(server))
        sent = [body["messages"] for body in server.requests]
    files = [tmp_path / "pseudo_documents.jsonl", tmp_path / "label_descriptions.jsonl"]
    assert export_sft(files, tmp_path / "journal.jsonl", tmp_path / "sft.jsonl") == 3
    chats = [row["messages"] for row in rows(tmp_path / "sft.jsonl")]
    assert sorted(map(json.dumps, (chat[:-1] for chat in chats))) == sorted(map(json.dumps, sent))
    assert chats[0][-1] == {"role": "assistant", "content": rows(files[0])[0]["text"]}
    export_sft(files, tmp_path / "journal.jsonl", tmp_path / "pc.jsonl", "prompt-completion")
    assert [row["prompt"] + row["completion"] for row in rows(tmp_path / "pc.jsonl")] == chats
    with pytest.raises(AugmentationError, match="not in the journal"):
        export_sft(
            write_rows(tmp_path / "x.jsonl", [pseudo(GOOD[0])]), tmp_path / "journal.jsonl", tmp_path / "y.jsonl"
        )
    assert not (tmp_path / "y.jsonl").exists()


@pytest.mark.pictures
def test_the_report_counts_labels_before_and_after_and_what_was_paid(tmp_path, capsys):
    items = [document(i, ["big"] + (["rare"] if i < 2 else []) + (["mid"] if i < 7 else [])) for i in range(20)]
    train = write_rows(tmp_path / "train.jsonl", items)
    with ChatServer() as server:
        options = PseudoDocumentOptions(per_label=3, tail_labels=["rare"])
        write_pseudo_documents(train, tmp_path, settings(server), options=options)
    result = report(
        train, tmp_path, tmp_path / "pseudo_documents.jsonl", [tmp_path / "journal.jsonl"], tail_threshold=5
    )
    assert (result.tail_labels_before, result.tail_labels_after, result.pseudo_documents) == (1, 0, 3)
    means = {row["before"]: row["after"] for row in result.deciles}
    assert means == {
        2.0: 5.0,
        7.0: pytest.approx(7.0 + sum("mid" in r["labels"] for r in rows(tmp_path / "pseudo_documents.jsonl"))),
        20.0: 23.0,
    }
    (paid,) = result.models
    assert paid["answers"] == 3 and paid["prompt_tokens"] == 300 and paid["cost"] == pytest.approx(3 * 450e-6)
    stored = json.loads((tmp_path / "augmentation_report.json").read_text())
    assert stored["models"] == result.models
    assert (tmp_path / "label_histogram.png").read_bytes().startswith(b"\x89PNG")
    command = ["report", "--train", str(train), "--output-dir", str(tmp_path), "--no-picture"]
    assert main(command) == 0 and "20 training documents" in capsys.readouterr().out


def test_the_review_command_prints_a_table(tmp_path, capsys):
    path = write_rows(tmp_path / "s.jsonl", [pseudo(GOOD[0], 0), pseudo("", 1)])
    train = write_rows(tmp_path / "train.jsonl", TRAIN)
    assert main(["review", str(path), "--train", str(train), "--output-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "kept" in shown and "empty" in shown and "50.0%" in shown


def test_the_test_servers_texts_pass_the_review(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", TRAIN)
    assert judge(tmp_path, [pseudo(prose("a", 60), 0), pseudo(prose("b", 60), 1)], train=rows(train)) == [None, None]


def test_near_duplicates_are_found_under_names_that_repeat_and_in_chinese():
    index = NearDuplicateIndex()
    index.add("same", GOOD[0])
    index.add("same", GOOD[1])
    index.add("zh", "我们测量冰川下的融水如何形成通道并比较三个季节的雷达图像结果显示通道每年春季向谷底移动")
    assert index.find(GOOD[1] + " Indeed.") == "same"
    assert index.find("我们测量冰川下的融水如何形成通道并比较四个季节的雷达图像结果显示通道每年春季向谷底移动") == "zh"
