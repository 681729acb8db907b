#!/usr/bin/env python
"""
A demo page for a trained model: paste or upload a document, view its labels as bars, move the threshold, and see which words matter.

    python examples/app.py --model outputs/quickstart
    python examples/app.py --audit findings.csv      # review findings of audit_labels.py; with --model, both pages as tabs

Also runs as a Gradio Space of the Hub: copy this file as `app.py`, list `torch` and `transformers` in `requirements.txt`, and specify the
model in the variable SEP_MLDC_MODEL of the Space. Needs the extra `demo`.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Pipeline, pipeline


try:
    from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline

    CODE = {"pipeline_class": MultiLabelDocumentClassificationPipeline}
except ImportError:
    # In a Space the code comes with the checkpoint.
    CODE = {"trust_remote_code": True}

TASK = "multi-label-document-classification"
SHOWN_LABELS = 20
HIGHLIGHTED_WORDS = 25
ATTENDED_LABELS = 5
LISTED_WORDS = 8
# Meanings of the two colors of words.
FOR, AGAINST = "supports the label", "contradicts the label"
COLORS = {FOR: "#2563eb", AGAINST: "#d97706"}
ON, OFF = (
    "One threshold for all labels",
    "One threshold for all labels (off: the tuned threshold of each label is used)",
)
MAX_CHARACTERS = 100_000
NUM_EXAMPLES = 3
CSS = """
.label-row {display: grid; grid-template-columns: minmax(8em, 30%) 1fr 4em; gap: .6em; align-items: center; margin: .25em 0}
.label-row .track {position: relative; height: 1.1em; background: var(--background-fill-secondary); border-radius: 3px}
.label-row .fill {height: 100%; background: #9ca3af; border-radius: 3px}
.label-row.chosen .fill {background: #2563eb}
.label-row.chosen .name {font-weight: 600}
.label-row .mark {position: absolute; top: -2px; bottom: -2px; width: 2px; background: #dc2626}
.parts td {padding: 0 1em 0 0; border: none}
.label-row .score {text-align: right; font-variant-numeric: tabular-nums}
"""
LAUNCH = {"css": CSS, "max_file_size": "2mb"}


def load(model: str) -> Pipeline:
    """The pipeline of a checkpoint, with the code of the installed package, or with the checkpoint's own if there is none."""
    return pipeline(TASK, model=model, **CODE)


def read_document(path: str) -> str:
    """
    The text of an uploaded file.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{Path(path).name} has the byte 0x{error.object[error.start]:02x} at position {error.start}, but it must be UTF-8. Save "
            "it as UTF-8, or paste the text."
        ) from None


def classify(pipe: Pipeline, text: str) -> list[dict[str, Any]]:
    """
    The best labels of a text, `{"label", "score", "threshold", "assigned"}` each, best first; none for an empty text.

    `threshold` is the label's own threshold, 0.5 for a model without tuned thresholds, and None if the model only ranks labels. With a hierarchy
    or constraints, `assigned` says whether the label is in the label set that the pipeline returns; otherwise, it is None.
    """
    found = pipe(text[:MAX_CHARACTERS], top_k=SHOWN_LABELS)
    config = pipe.model.config
    stored = config.thresholds or [0.5] * config.num_labels
    decided = None
    if not config.is_ranking and (config.hierarchy is not None or config.label_constraints):
        decided = {entry["label"] for entry in pipe(text[:MAX_CHARACTERS])}
    return [
        {
            "label": entry["label"],
            "score": entry["score"],
            "threshold": None if config.is_ranking else stored[config.label2id[entry["label"]]],
            "assigned": None if decided is None else entry["label"] in decided,
        }
        for entry in found
    ]


def escape_html(text: str) -> str:
    """Text from a checkpoint or a file as HTML that is shown literally, even in components that render Markdown."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)


def draw_bars(labels: list[dict[str, Any]], threshold: float | None = None) -> str:
    """
    HTML with one bar per label. Labels that reach `threshold`, or if it is None those of the label set, are blue. The bars of a
    ranking run from the score of the last label shown to that of the first.
    """
    if not labels:
        return "<p>No labels: the text is empty.</p>"
    is_ranking = labels[0]["threshold"] is None
    lowest, highest = labels[-1]["score"], labels[0]["score"]
    rows = []
    for entry in labels:
        needed = entry["threshold"] if threshold is None else threshold
        share = (entry["score"] - lowest) / ((highest - lowest) or 1.0) if is_ranking else entry["score"]
        chosen = not is_ranking and entry["score"] >= needed
        if threshold is None and entry.get("assigned") is not None:
            chosen = entry["assigned"]
        mark = "" if is_ranking else f'<div class="mark" style="left: {100 * needed:.1f}%"></div>'
        rows.append(
            f'<div class="label-row{" chosen" if chosen else ""}"><span class="name">{escape_html(entry["label"])}</span>'
            f'<div class="track"><div class="fill" style="width: {100 * share:.1f}%"></div>{mark}</div>'
            f'<span class="score">{entry["score"]:.2f}</span></div>'
        )
    note = "<p>This model ranks labels; its scores are not probabilities.</p>" if is_ranking else ""
    return note + "".join(rows)


def explain(pipe: Pipeline, text: str, labels: list[dict[str, Any]], label: str | None):
    """
    Explain a label: the text in pieces `(piece, side)`, as `gradio.HighlightedText` takes them, and HTML with the parts of the
    label's logit and the labels that have the largest attention weights (Eq. 16). The side of a word is `FOR` or `AGAINST`, and
    None outside the words that matter most.
    """
    names = [entry["label"] for entry in labels]
    if label not in names:
        return [], ""
    text = text[:MAX_CHARACTERS]
    # The pipeline explains the labels that it returns, so all labels down to this one are requested.
    found = pipe(text, top_k=names.index(label) + 1, return_explanation=True, explanation_size=HIGHLIGHTED_WORDS)
    if "explanations" not in found:  # in a Space, with the code of a checkpoint saved by an older version
        return (
            [],
            "<p>The code in this checkpoint does not explain labels. Save it again with sep-mldc 0.2 or newer.</p>",
        )
    explanation = found["explanations"][label]
    pieces: list[tuple[str, str | None]] = []
    position = 0
    for word in sorted(explanation["words"], key=lambda word: word["start"]):
        if not word["score"]:
            continue
        if word["start"] > position:
            pieces.append((text[position : word["start"]], None))
        pieces.append((text[word["start"] : word["end"]], FOR if word["score"] > 0 else AGAINST))
        position = word["end"]
    if position < len(text):
        pieces.append((text[position:], None))
    return pieces, draw_parts(explanation) + draw_attention(found["attended_labels"])


def draw_parts(explanation: dict[str, Any]) -> str:
    """HTML with the parts of a label's logit, and the words with the largest scores."""
    parts = "".join(
        f"<tr><td>{name}</td><td>{explanation[part]:+.2f}</td></tr>"
        for part, name in (
            ("bias", "A document without words"),
            ("lexical", "Words, by the lexical scores"),
            ("encoder", "Words, by the encoder"),
            ("remainder", "Words together, beyond the sum of single ones"),
            ("logit", "<b>Sum: the logit of the label</b>"),
        )
    )
    words = ", ".join(
        f"{escape_html(word['word'])} ({word['score']:+.2f})" for word in explanation["words"][:LISTED_WORDS]
    )
    size = explanation["words_per_group"]
    note = f" Up to {size} neighboring words were masked together." if size > 1 else ""
    return f'<table class="parts">{parts}</table><p>Largest: {words}.{note}</p>'


def draw_attention(attended: list[dict[str, Any]]) -> str:
    """HTML with the labels that the document attends to; empty without label attention."""
    shown = ", ".join(
        f"{escape_html(entry['label'])} ({100 * entry['weight']:.0f}%)"
        for entry in attended[:ATTENDED_LABELS]
        if entry["weight"] >= 0.005
    )
    return f"<p>The document attends to the labels: {shown}</p>" if shown else ""


def examples_of(config) -> list[str]:
    """
    Example texts: those under `widget` in the model card, or else the descriptions of the first labels that have one.
    """
    texts = [entry.get("text") for entry in card_data(config).get("widget") or [] if isinstance(entry, dict)]
    descriptions = config.label_descriptions or {}
    texts = [text for text in texts if isinstance(text, str)] or [descriptions.get(label) for label in config.labels]
    return [text for text in texts if text][:NUM_EXAMPLES]


def card_data(config) -> dict[str, Any]:
    """The metadata of the model card; empty without a card or a connection."""
    name = config._name_or_path
    if not name or (os.path.isdir(name) and not os.path.exists(os.path.join(name, "README.md"))):
        return {}
    try:
        card = ModelCard.load(os.path.join(name, "README.md") if os.path.isdir(name) else name)
        return card.data.to_dict()
    except (OSError, ValueError):
        return {}


def import_gradio():
    """
    The module `gradio`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError(
            'The page needs gradio, which is not installed. Run `pip install "sep-mldc[demo]"`, or `pip install "gradio>=6.0"`.'
        ) from None
    return gradio


def build_page(pipe: Pipeline):
    """The page, a `gradio.Blocks`."""
    gr = import_gradio()
    config = pipe.model.config
    tuned = config.thresholds is not None and not config.is_ranking
    name = os.path.basename(os.path.normpath(config._name_or_path or "")) or "SEP-MLDC"

    def on_upload(path):
        try:
            return read_document(path)
        except ValueError as error:
            raise gr.Error(escape_html(str(error))) from None

    def on_classify(text, threshold, own):
        if len(text) > MAX_CHARACTERS:
            gr.Warning(f"The text has {len(text):,} characters; the first {MAX_CHARACTERS:,} are read.")
        labels = classify(pipe, text)
        names = [entry["label"] for entry in labels]
        best = names[0] if names else None
        choice = gr.Dropdown(choices=names, value=best, interactive=bool(names))
        return labels, text, on_threshold(labels, threshold, own), choice, *explain(pipe, text, labels, best)

    def on_threshold(labels, threshold, own):
        return draw_bars(labels, None if own else threshold) if labels is not None else ""

    def on_own(labels, threshold, own):
        return gr.Slider(interactive=not own, label=OFF if own else ON), on_threshold(labels, threshold, own)

    with gr.Blocks(title=f"Labels by {name}", analytics_enabled=False) as page:
        gr.HTML(f"<h1>Labels of a document</h1><p>Model {escape_html(name)}, {config.num_labels:,} labels.</p>")
        labels, classified = gr.State(None), gr.State("")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(label="Document", lines=14, max_lines=24, elem_id="document")
                with gr.Row():
                    upload = gr.UploadButton("Upload a text file", elem_id="upload", size="md")
                    button = gr.Button("Find labels", variant="primary", elem_id="classify", size="md")
                if examples := examples_of(config):
                    gr.Examples(examples, text, label="Examples")
            with gr.Column():
                own = gr.Checkbox(tuned, label="Use the tuned threshold of each label", visible=tuned, elem_id="own")
                slider = gr.Slider(
                    0,
                    1,
                    0.5,
                    step=0.01,
                    label=OFF if tuned else ON,
                    visible=not config.is_ranking,
                    interactive=not tuned,
                    elem_id="threshold",
                )
                bars = gr.HTML(label="Labels", elem_id="labels")
        choice = gr.Dropdown(label="Why this label?", choices=[], interactive=False, elem_id="choice")
        highlighted = gr.HighlightedText(
            label="The words that matter most",
            show_legend=True,
            color_map=COLORS,
            combine_adjacent=False,
            elem_id="explanation",
        )
        attended = gr.HTML(elem_id="attended")
        upload.upload(on_upload, upload, text, api_name=False)
        gr.on(
            [button.click, text.submit],
            on_classify,
            [text, slider, own],
            [labels, classified, bars, choice, highlighted, attended],
            api_name="classify",
        )
        slider.release(on_threshold, [labels, slider, own], bars, api_name=False)
        own.input(on_own, [labels, slider, own], [slider, bars], api_name=False)
        choice.input(
            lambda text, labels, label: explain(pipe, text, labels, label),
            [classified, labels, choice],
            [highlighted, attended],
            api_name=False,
        )
    return page


def build_tabs(pipe: Pipeline | None, findings: str | None):
    """The demo page of a model, the page for reviewing findings, or both in tabs."""
    gr = import_gradio()
    pages = {} if pipe is None else {"Labels of a document": build_page(pipe)}
    if findings is not None:
        try:
            from trainer.audit.page import build_audit_page
        except ImportError as error:
            raise ImportError(f'`--audit` needs the package: run `pip install "sep-mldc[audit]"` ({error}).') from None
        pages["Label audit"] = build_audit_page(findings, gr)
    if len(pages) == 1:
        return next(iter(pages.values()))
    return gr.TabbedInterface(list(pages.values()), list(pages), analytics_enabled=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "--model",
        default=os.environ.get("SEP_MLDC_MODEL"),
        help="folder or Hub name of a trained model; defaults to SEP_MLDC_MODEL",
    )
    parser.add_argument("--audit", default=None, help="csv file with findings of audit_labels.py to review")
    parser.add_argument(
        "--port", type=int, default=None, help="defaults to GRADIO_SERVER_PORT, or the first free port from 7860"
    )
    options = parser.parse_args()
    import_gradio()  # before a model is loaded
    if not options.model and not options.audit:
        raise ValueError("No model is given. Pass `--model`, or set the variable SEP_MLDC_MODEL.")
    pipe = load(options.model) if options.model else None
    build_tabs(pipe, options.audit).launch(server_port=options.port, **LAUNCH)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"app.py: {error}")
