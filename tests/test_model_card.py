"""The model card reports what was measured and nothing private, whatever the label names are."""

import os
import sys
from html.parser import HTMLParser

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from modeling_sep_mldc import SepMldcConfig
from trainer.hub.model_card import build_model_card, is_generated_card, save_model_card, summarize_provenance
from trainer.hub.model_card_text import headline_metrics
from trainer.training_arguments import SepMldcTrainingArguments


HOSTILE_LABELS = [
    "pipe | bar",
    "comma, semicolon; \"quotes\" 'single' `code`",
    "new\nline",
    "emoji 👩‍🔬 🏳️‍🌈",
    "עברית (חוק) العربية",
    "{{ 7 * 7 }}{% raw %}{{ cycler.__init__ }}",
    "<script>alert(1)</script> <!-- comment --> &amp;",
    "*star* _under_ ~~tilde~~ [link](javascript:x) ![i](x) \\ back",
    "# heading $x^2$",
    "---",
]
METRICS = {
    "eval_p@1": 0.8712345678901,
    "eval_ndcg@5": 0.61,
    "eval_psp@5": 0.4,
    "eval_f1_micro": 0.7,
    "eval_head_recall@5": 0.9,
    "eval_body_recall@5": 0.5,
    "eval_tail_recall@5": 0.1,
    "test_p@1": 0.85,
    "eval_loss": 3.2,
    "eval_runtime": 12.0,
    "eval_p@3": float("nan"),
    "epoch": 2.0,
}
LOG_HISTORY = [
    {"loss": 3.0, "classification_loss": 2.9, "label_contrastive_loss": -1.0, "step": 10},
    {"loss": 2.0, "step": 20},
    {"eval_loss": 2.0, "eval_p@1": 0.5, "step": 20},
    {"eval_p@1": 0.87, "step": 40},
]
DECILES = [
    {"min_train_count": 9 - i, "max_train_count": 9 - i, "recall@1": 0.1, "recall@5": 1 - i / 10} for i in range(10)
]


def make_config(labels=("a", "b", "c"), **kwargs):
    return SepMldcConfig(
        backbone_config={"model_type": "bert", "num_hidden_layers": 1},
        id2label=dict(enumerate(labels)),
        **kwargs,
    )


def table_cells(card):
    """The text of each cell, row by row, as a reader of the rendered card sees it."""

    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.rows, self.tags, self.inside = [], set(), False

        def handle_starttag(self, tag, attrs):
            self.tags.add(tag)
            if tag == "tr":
                self.rows.append([])
            elif tag in ("td", "th"):
                self.rows[-1].append("")
                self.inside = True
            elif tag == "br":
                self.rows[-1][-1] += "\n"

        def handle_endtag(self, tag):
            self.inside = self.inside and tag not in ("td", "th")

        def handle_data(self, data):
            if self.inside:
                self.rows[-1][-1] += data

    parser = Cells()
    parser.feed(MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(card.text))
    return [[cell.strip("\u2068\u2069 \n") for cell in row] for row in parser.rows], parser.tags


def test_the_card_round_trips_and_its_results_are_those_measured(tmp_path):
    path = save_model_card(tmp_path, make_config(), metrics=METRICS, datasets="user/documents", model_name="Model")
    card = ModelCard.load(path)
    assert {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results} == {
        ("test", "p@1"): 0.85
    }
    assert {result.dataset_type for result in card.data.eval_results} == {"user/documents"}
    assert card.content == path.read_text()


def test_the_metadata_is_what_the_hub_asks_for(tmp_path):
    card = build_model_card(
        make_config(), base_model="user/encoder", license="apache-2.0", language=["en", "de"], datasets=["user/one"]
    )
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-classification"
    assert data["base_model"] == "user/encoder" and data["license"] == "apache-2.0"
    assert data["language"] == ["en", "de"] and data["datasets"] == ["user/one"]
    assert "sep-mldc" in data["tags"] and "model-index" not in data


def test_nothing_is_made_up():
    card = build_model_card(make_config())
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "Not measured yet." in card.text and "None were tuned." in card.text
    assert "Training documents" not in card.text


def test_hostile_labels_and_descriptions_are_shown_letter_by_letter():
    descriptions = {label: f"about {label}" for label in HOSTILE_LABELS}
    card = build_model_card(make_config(HOSTILE_LABELS, label_descriptions=descriptions))
    rows, tags = table_cells(card)
    rows = [row for row in rows if row and row[0] in HOSTILE_LABELS]
    assert [row[0] for row in rows] == HOSTILE_LABELS
    assert [row[1] for row in rows] == [descriptions[label] for label in HOSTILE_LABELS]
    assert all(len(row) == 2 for row in rows) and not tags & {"script", "img", "em", "del", "h6"}


def test_characters_that_turn_the_reading_direction_are_spelled_out():
    card = build_model_card(make_config(["user\u202etxt.exe", "bell\x07", "ok"]))
    assert "\u202e" not in card.content and "\x07" not in card.content and "u202e" in card.text


def test_a_description_of_100_kilobytes_is_cut():
    card = build_model_card(make_config(label_descriptions={"a": "word " * 20_000}))
    assert len(card.content) < 10_000 and "word…" in card.text.replace(" …", "…")


def test_of_many_labels_the_most_frequent_are_listed():
    labels = [f"label {i}" for i in range(3201)]
    card = build_model_card(make_config(labels, label_counts=list(range(3201))))
    rows, _ = table_cells(card)
    listed = [row[0] for row in rows if row[0].startswith("label ")]
    assert listed == [f"label {i}" for i in range(3200, 3150, -1)]
    assert "50 of 3201 labels" in card.text


def test_thresholds_and_how_they_were_tuned_are_reported():
    config = make_config(thresholds=[0.25, 0.5, 0.75], threshold_info={"objective": "macro F1", "documents": 500})
    rows, _ = table_cells(build_model_card(config))
    assert ["a", "0.250"] in rows and ["objective", "macro F1"] in rows and ["documents", "500"] in rows


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"classification_loss": "softmax"}, True),
        ({"classification_loss": "softmax", "score_calibration": {"scale": 1.0, "bias": 0.0}}, False),
        ({"classification_loss": "bce+softmax"}, False),
    ],
)
def test_scores_that_are_not_probabilities_are_called_so(kwargs, told):
    assert ("not probabilities" in build_model_card(make_config(**kwargs)).text) is told


def test_metrics_stand_overall_and_by_head_body_and_tail():
    rows, _ = table_cells(build_model_card(make_config(), metrics=METRICS))
    assert ["Metric", "test", "validation"] in rows
    assert ["P@1", "85.00", "87.12"] in rows and ["nDCG@5", "", "61.00"] in rows and ["Micro F1", "", "70.00"] in rows
    assert ["Recall@5", "validation", "90.00", "50.00", "10.00"] in rows


def test_loss_settings_are_reported_and_secrets_and_folders_are_not(tmp_path):
    arguments = SepMldcTrainingArguments(
        str(tmp_path / "private-folder"), hub_token="hf_secret", label_loss_weight=0.03, run_name="private-run"
    )
    base_model, data = tmp_path / "folders" / "MiniLM", tmp_path / "folders" / "train.jsonl"
    base_model.mkdir(parents=True)
    folder = tmp_path / "card"
    save_model_card(
        folder,
        make_config(),
        training_args=arguments,
        base_model=str(base_model),
        datasets=[str(data), "data/dev.jsonl"],
        metrics=METRICS,
        log_history=LOG_HISTORY,
        deciles=DECILES,
    )
    card = ModelCard.load(folder / "README.md")
    rows, _ = table_cells(card)
    assert ["weight of the label contrastive loss, β", "0.03"] in rows
    assert "MiniLM" in card.text and "train.jsonl" in card.text and card.data.base_model is None
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    for secret in (b"hf_secret", b"private", str(tmp_path).encode(), b"folders"):
        assert secret not in written


@pytest.mark.parametrize("token_attention", [True, False])
def test_dimensions_of_token_attention_are_reported_where_there_is_one(token_attention):
    card = build_model_card(make_config(token_attention=token_attention))
    assert ("dimensions of label-wise attention" in card.text) == token_attention


def test_f1_of_the_documents_that_are_kept_is_in_the_card_with_the_share_that_is_abstained():
    row = {
        "f1_micro": 0.5,
        "precision_micro": 0.25,
        "recall_micro": 0.75,
        "num_documents": 10,
        "min_expected_f1": 0.4321,
    }
    kept = [{"share_kept": share, **row} for share in (1.0, 0.95)]
    metrics = {**METRICS, "eval_share_abstained": 0.5, "test_share_abstained": 0.125}
    card = build_model_card(make_config(), metrics=metrics, kept=kept)
    rows, _ = table_cells(card)
    assert ["95%", "0.432", "50.00", "25.00", "75.00"] in rows and "(12.50% of the documents)" in card.text
    assert "abstains" not in build_model_card(make_config(), metrics=METRICS).text


def test_pseudo_documents_are_reported_with_their_model_prompts_and_dates():
    rows = [
        {
            "text": "t",
            "labels": ["a"],
            "kind": kind,
            "provenance": {"model": "m-1", "template": "law", "template_hash": "0123456789abcdef", "time": day},
        }
        for kind, day in (
            ("plain", "2026-01-05T10:00:00Z"),
            ("hard", "2026-02-01T00:00:00Z"),
            ("plain", "2026-01-20T00:00:00Z"),
        )
    ]
    summary = summarize_provenance(iter(rows))
    assert summary == {
        "count": 3,
        "models": ["m-1"],
        "templates": ["law (0123456789ab)"],
        "dates": ["2026-01-05", "2026-02-01"],
        "kinds": {"hard": 1, "plain": 2},
    }
    text = build_model_card(make_config(num_train_documents=9), pseudo_document_provenance=rows).text
    assert "3 of the training documents (25.0%)" in text and "2026-01-05 to 2026-02-01" in text
    assert "| kinds | 1 hard, 2 plain |" in text
    assert "None were used." in build_model_card(make_config(), pseudo_document_provenance=()).text
    assert "Not stated." in build_model_card(make_config()).text


def test_emissions_are_reported_where_codecarbon_measured_them(tmp_path):
    (tmp_path / "emissions.csv").write_text("run_id,emissions\none,0.0005\none,0.001\ntwo,0.002\n")
    path = save_model_card(tmp_path, make_config())
    assert ModelCard.load(path).data.co2_eq_emissions["emissions"] == pytest.approx(3.0)
    assert "3 g CO2eq" in path.read_text()


@pytest.mark.pictures
def test_pictures_are_drawn_and_do_not_change_without_a_reason(tmp_path):
    contents = []
    for _ in range(2):
        path = save_model_card(tmp_path, make_config(), metrics=METRICS, log_history=LOG_HISTORY, deciles=DECILES)
        contents.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"README.md", "training_curve.png", "decile_recall.png"}
    assert all(content.startswith(b"\x89PNG") for name, content in contents[0].items() if name.endswith("png"))
    assert "](training_curve.png)" in path.read_text() and "](decile_recall.png)" in path.read_text()


def test_without_matplotlib_there_is_a_card_and_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = save_model_card(tmp_path, make_config(), metrics=METRICS, log_history=LOG_HISTORY, deciles=DECILES)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"] and ".png" not in path.read_text()


def test_a_readme_of_the_user_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_model_card(tmp_path, make_config(), metrics=METRICS, log_history=LOG_HISTORY, deciles=DECILES)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text().endswith("# Mine\n")
    save_model_card(tmp_path, make_config(), overwrite=True)
    assert is_generated_card((tmp_path / "README.md").read_text())


@pytest.mark.parametrize("change", [lambda text: text + "A note.\n", lambda text: "---\nlicense: mit" + text[3:]])
def test_a_card_is_rewritten_until_someone_changes_it(tmp_path, change):
    path = save_model_card(tmp_path, make_config())
    save_model_card(tmp_path, make_config(), metrics=METRICS)
    assert "87.12" in path.read_text()
    path.write_text(change(path.read_text()))
    with pytest.raises(FileExistsError):
        save_model_card(tmp_path, make_config())
    ModelCard.load(path).save(path)  # what the Hub's tools do with a card does not make it ours again
    assert not is_generated_card(path.read_text())


def test_a_failed_write_leaves_the_old_card_whole(tmp_path):
    path = save_model_card(tmp_path, make_config())
    before = path.read_text()
    (tmp_path / f"_README.md.{os.getpid()}.tmp").mkdir()
    with pytest.raises(OSError):
        save_model_card(tmp_path, make_config(), metrics=METRICS)
    assert path.read_text() == before


def test_counts_that_do_not_fit_the_labels_are_refused():
    with pytest.raises(ValueError, match="2 values for 3 labels"):
        build_model_card(make_config(), label_counts=[1, 2])


def test_the_citation_and_the_limits_are_there():
    text = build_model_card(make_config()).text
    assert "title  = {{SEP-MLDC}: A Simple and Effective Paradigm for Multi-Label Document Classification}," in text
    assert "first 512 tokens" in text


def test_the_metadata_has_eight_metrics_of_the_test_documents_and_of_validation_only_without_them():
    names = [f"{m}@{k}" for m in ("p", "recall", "ndcg", "psp", "psndcg") for k in (1, 3, 5)]
    names += ["f1_micro", "f1_macro", "f1_sample", "head_recall@5", "tail_f1_macro"]
    metrics = {f"{split}_{name}": 0.5 for split in ("eval", "test") for name in names}
    for measured, split in ((metrics, "test"), ({k: v for k, v in metrics.items() if k[0] == "e"}, "validation")):
        results = build_model_card(make_config(), metrics=measured).data.eval_results
        assert [r.metric_type for r in results] == [
            "p@1", "p@3", "p@5", "ndcg@5", "psp@1", "psp@5", "f1_micro", "f1_macro"
        ]  # fmt: skip
        assert {r.dataset_split for r in results} == {split}


def test_of_few_labels_the_headline_takes_the_largest_k():
    assert headline_metrics(["p@1", "p@2", "ndcg@1", "ndcg@2", "f1_macro"]) == ["p@1", "p@2", "ndcg@2", "f1_macro"]
    assert headline_metrics(["p@1", "ndcg@1"]) == ["p@1", "ndcg@1"]


def test_groups_and_columns_without_anything_in_them_are_left_out():
    config = make_config(label_counts=[100, 3, 2], num_train_documents=100)
    rows, _ = table_cells(build_model_card(config, metrics=METRICS))
    assert ["Metric", "Split", "Head", "Tail"] in rows and ["Recall@5", "validation", "90.00", "10.00"] in rows
    assert ["Label", "Training documents"] in rows
    # All labels in one group: its figures are those of all labels.
    rows, _ = table_cells(build_model_card(make_config(label_counts=[1, 3, 2]), metrics=METRICS))
    assert not [row for row in rows if "Split" in row]


def test_several_evaluation_sets_have_a_column_each():
    metrics = {"eval_mail_p@1": 0.25, "eval_mail_new_p@1": 0.75, "eval_mail_loss": 1.0}
    card = build_model_card(make_config(), metrics=metrics, evaluation_sets=["mail", "mail_new"])
    rows, _ = table_cells(card)
    assert ["Metric", "validation (mail)", "validation (mail_new)"] in rows and ["P@1", "25.00", "75.00"] in rows
    assert {r.dataset_split for r in card.data.eval_results} == {"validation (mail)", "validation (mail_new)"}


def test_terms_are_explained_where_they_occur():
    text = build_model_card(make_config(), metrics=METRICS).text
    assert "**P@k**" in text and "**Micro F1**" in text and "**Recall@k**" not in text
    assert "**P@k**" not in build_model_card(make_config()).text


@pytest.mark.parametrize(
    ("kind", "positions", "max_length", "encoder_max_length", "told"),
    [("bert", 512, None, None, 512), ("roberta", 514, None, None, 512), ("bert", 512, 256, None, 256)]
    + [("bert", 512, 256, 96, 96), ("bert", 512, int(1e30), None, 512)],
)
def test_the_length_is_what_the_encoder_read(kind, positions, max_length, encoder_max_length, told):
    backbone = {"model_type": kind, "max_position_embeddings": positions, "pad_token_id": 1}
    config = SepMldcConfig(backbone_config=backbone, num_labels=2, encoder_max_length=encoder_max_length)
    assert f"read the first {told} tokens" in build_model_card(config, max_length=max_length).text


def test_the_card_of_20000_labels_with_long_descriptions_is_small():
    labels = [f"label {i}" for i in range(20_000)]
    config = make_config(
        labels,
        label_descriptions=dict.fromkeys(labels, "word " * 200),
        label_counts=list(range(20_000)),
        thresholds=[0.5] * 20_000,
    )
    assert len(build_model_card(config, metrics=METRICS).content) < 25_000


def test_provenance_that_is_not_a_dictionary_does_not_matter():
    assert summarize_provenance([{"provenance": "an LLM"}, {"provenance": None}])["count"] == 2


def test_settings_are_in_the_card_with_their_reasons():
    rows = [("recipe | of", 0.5, "few *documents*"), ("freeze_layers", 4, "specified by the user")]
    cells, _ = table_cells(build_model_card(make_config(), recipe="best", settings=rows))
    at = cells.index(["Setting", "Value", "Why"])
    assert cells[at + 1] == ["recipe | of", "0.5", "few *documents*"]
    assert cells[at + 2] == ["freeze_layers", "4", "specified by the user"]
    without, _ = table_cells(build_model_card(make_config()))
    assert ["Setting", "Value", "Why"] not in without
