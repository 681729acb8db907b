#!/usr/bin/env python
"""
A page to try a trained model: paste or upload a document, see its labels as bars, move the threshold, see which tokens matter.

    python examples/app.py --model outputs/quickstart

Also runs as a Gradio Space of the Hub: copy this file as `app.py`, list `torch` and `transformers` in `requirements.txt`, and name the
model in the variable SEP_MLDC_MODEL of the Space. Needs the extra `demo`.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from transformers import Pipeline, pipeline


try:
    from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline

    CODE = {"pipeline_class": MultiLabelDocumentClassificationPipeline}
except ImportError:
    # In a Space the code comes with the checkpoint.
    CODE = {"trust_remote_code": True}

TASK = "multi-label-document-classification"
SHOWN_LABELS = 20
HIGHLIGHTED_TOKENS = 25
ATTENDED_LABELS = 5
MAX_CHARACTERS = 100_000
NUM_EXAMPLES = 3
CSS = """
.label-row {display: grid; grid-template-columns: minmax(8em, 30%) 1fr 4em; gap: .6em; align-items: center; margin: .25em 0}
.label-row .track {position: relative; height: 1.1em; background: var(--background-fill-secondary); border-radius: 3px}
.label-row .fill {height: 100%; background: #9ca3af; border-radius: 3px}
.label-row.chosen .fill {background: #2563eb}
.label-row.chosen .name {font-weight: 600}
.label-row .mark {position: absolute; top: -2px; bottom: -2px; width: 2px; background: #dc2626}
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
    The best labels of a text, `{"label", "score", "threshold"}` each, best first; none for an empty text.

    `threshold` is the label's own, 0.5 in a model without tuned ones, and None if the model only ranks labels.
    """
    found = pipe(text[:MAX_CHARACTERS], top_k=SHOWN_LABELS)
    config = pipe.model.config
    stored = config.thresholds or [0.5] * config.num_labels
    return [
        {
            "label": entry["label"],
            "score": entry["score"],
            "threshold": None if config.is_ranking else stored[config.label2id[entry["label"]]],
        }
        for entry in found
    ]


def letters(text: str) -> str:
    """A text that comes with a checkpoint or a file as HTML that is shown letter by letter, in a component for Markdown, too."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)


def draw_bars(labels: list[dict[str, Any]], threshold: float | None = None) -> str:
    """
    HTML with one bar per label. Labels that reach `threshold`, or their own threshold if it is None, are blue. The bars of a
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
        mark = "" if is_ranking else f'<div class="mark" style="left: {100 * needed:.1f}%"></div>'
        rows.append(
            f'<div class="label-row{" chosen" if chosen else ""}"><span class="name">{letters(entry["label"])}</span>'
            f'<div class="track"><div class="fill" style="width: {100 * share:.1f}%"></div>{mark}</div>'
            f'<span class="score">{entry["score"]:.2f}</span></div>'
        )
    note = "<p>This model ranks labels; its scores are not probabilities.</p>" if is_ranking else ""
    return note + "".join(rows)


def explain(pipe: Pipeline, text: str, labels: list[dict[str, Any]], label: str | None):
    """
    Explain a label: the text in pieces `(piece, weight)`, as `gradio.HighlightedText` takes them, and HTML with the labels that
    have the largest attention weights (Eq. 16). Weights are from -1 to 1, positive where a token speaks for the label, and None
    outside the tokens that matter most.
    """
    names = [entry["label"] for entry in labels]
    if label not in names:
        return [], ""
    text = text[:MAX_CHARACTERS]
    # The pipeline explains the labels that it returns: all down to this one.
    found = pipe(text, top_k=names.index(label) + 1, return_explanation=True, explanation_size=HIGHLIGHTED_TOKENS)
    tokens = sorted(found["tokens"][label], key=lambda token: token["start"])
    largest = max((abs(token["score"]) for token in tokens), default=0.0) or 1.0
    pieces: list[tuple[str, float | None]] = []
    position = 0
    for token in tokens:
        if token["start"] > position:
            pieces.append((text[position : token["start"]], None))
        pieces.append((text[token["start"] : token["end"]], token["score"] / largest))
        position = token["end"]
    if position < len(text):
        pieces.append((text[position:], None))
    attended = ", ".join(
        f"{letters(entry['label'])} ({100 * entry['weight']:.0f}%)"
        for entry in found["attended_labels"][:ATTENDED_LABELS]
        if entry["weight"] >= 0.005
    )
    return pieces, f"The document attends to the labels: {attended}" if attended else ""


def examples_of(config) -> list[str]:
    """Texts to try the page with: the descriptions of the first labels that have one."""
    descriptions = config.label_descriptions or {}
    return [descriptions[label] for label in config.labels if descriptions.get(label)][:NUM_EXAMPLES]


def build_page(pipe: Pipeline):
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    config = pipe.model.config
    tuned = config.thresholds is not None and not config.is_ranking
    name = os.path.basename(os.path.normpath(config._name_or_path or "")) or "SEP-MLDC"

    def on_upload(path):
        try:
            return read_document(path)
        except ValueError as error:
            raise gr.Error(letters(str(error))) from None

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

    with gr.Blocks(title=f"Labels by {name}", analytics_enabled=False) as page:
        gr.HTML(f"<h1>Labels of a document</h1><p>Model {letters(name)}, {config.num_labels:,} labels.</p>")
        labels, classified = gr.State(None), gr.State("")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(label="Document", lines=14, max_lines=24, elem_id="document")
                with gr.Row():
                    upload = gr.UploadButton("Upload a text file", elem_id="upload", size="md")
                    button = gr.Button("Find labels", variant="primary", elem_id="classify", size="md")
                if examples := examples_of(config):
                    gr.Examples(examples, text, label="Examples: descriptions of labels")
            with gr.Column():
                own = gr.Checkbox(tuned, label="Use the tuned threshold of each label", visible=tuned, elem_id="own")
                slider = gr.Slider(
                    0, 1, 0.5, step=0.01, label="Threshold", visible=not config.is_ranking, elem_id="threshold"
                )
                bars = gr.HTML(label="Labels", elem_id="labels")
        choice = gr.Dropdown(label="Why this label?", choices=[], interactive=False, elem_id="choice")
        highlighted = gr.HighlightedText(
            label="Tokens that matter most: positive ones speak for the label, negative ones against it",
            show_legend=True,
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
        # Moving the slider selects one threshold for all labels.
        slider.release(lambda: False, None, own, api_name=False).then(
            on_threshold, [labels, slider, own], bars, api_name=False
        )
        own.input(on_threshold, [labels, slider, own], bars, api_name=False)
        choice.input(
            lambda text, labels, label: explain(pipe, text, labels, label),
            [classified, labels, choice],
            [highlighted, attended],
            api_name=False,
        )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "--model",
        default=os.environ.get("SEP_MLDC_MODEL"),
        help="folder or Hub name of a trained model; defaults to SEP_MLDC_MODEL",
    )
    parser.add_argument(
        "--port", type=int, default=None, help="defaults to GRADIO_SERVER_PORT, or the first free port from 7860"
    )
    options = parser.parse_args()
    if not options.model:
        raise ValueError("No model is given. Pass `--model`, or set the variable SEP_MLDC_MODEL.")
    build_page(load(options.model)).launch(server_port=options.port, **LAUNCH)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"app.py: {error}")
