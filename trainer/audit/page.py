"""A web page to accept or reject findings one at a time. Each decision is saved immediately."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from .files import ACCEPT, REJECT, FindingsFile, apply_findings, default_output_file
from .findings import ADD, DROP, KINDS, REMOVE, Finding


ALL, OPEN, ACCEPTED, REJECTED = "all", "open", "accepted", "rejected"
STATES = {OPEN: "", ACCEPTED: ACCEPT, REJECTED: REJECT}
EFFECTS = {
    REMOVE: "Accept: remove the label from this document.",
    ADD: "Accept: add the label to this document.",
    DROP: "Accept: drop the label from all documents.",
}


def select(findings: Sequence[Finding], kind: str = ALL, label: str | None = None, state: str = OPEN) -> list[Finding]:
    """The findings of a kind, about a label (all for `None` and `""`), and in a state: `"all"`, `"open"`, `"accepted"` or `"rejected"`."""
    return [
        finding
        for finding in findings
        if kind in (ALL, finding.kind)
        and (not label or label == finding.label)
        and (state == ALL or finding.decision == STATES[state])
    ]


def neighbor(findings: Sequence[Finding], number: int | None, step: int) -> Finding | None:
    """
    The finding `step` places after the one with a number (before it if negative), which need not be in the list. The first or last finding
    if there are no more; the first one if no number is given. `None` for an empty list.
    """
    if not findings:
        return None
    if number is None:
        return findings[0]
    before = [finding for finding in findings if finding.number < number]
    here = [finding for finding in findings if finding.number == number]
    place = len(before) + step if here or step <= 0 else len(before) + step - 1
    return findings[min(max(place, 0), len(findings) - 1)]


def draw(finding: Finding | None) -> str:
    """HTML of a finding. Text from files is escaped and shown literally."""
    if finding is None:
        return "<p>No finding is left with this filter.</p>"
    where = "All documents" if finding.row is None else f"Document {finding.id or f'in row {finding.row}'}"
    decision = {ACCEPT: "accepted", REJECT: "rejected"}.get(finding.decision, "no decision yet")
    text = f"<blockquote>{_escape(finding.text)}</blockquote>" if finding.text else ""
    return (
        f"<h3>{finding.number}. {_escape(finding.kind)}: {_escape(finding.label)}</h3>"
        f"<p>{_escape(where)}. Score {finding.score:.2f}; {_escape(finding.reason)}.</p>{text}"
        f"<p><b>{EFFECTS[finding.change]}</b> ({decision})</p>"
    )


def _escape(text: str) -> str:
    """Text from a file as HTML that is shown literally, even in components that render Markdown."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)


def draw_progress(findings: Sequence[Finding]) -> str:
    """HTML with the number of decisions."""
    counts = Counter(finding.decision for finding in findings)
    decided = counts[ACCEPT] + counts[REJECT]
    return (
        f"<p>{decided:,} of {len(findings):,} findings decided: {counts[ACCEPT]:,} accepted, {counts[REJECT]:,} rejected. "
        "Each decision is saved immediately.</p>"
    )


class _Actions:
    """Event handlers of the page for a findings file. Each method returns the values of the output components."""

    def __init__(self, path: str | os.PathLike, gradio: Any):
        self.path, self.gradio = path, gradio
        self.store, self.output_file = FindingsFile(path), default_output_file(path)

    def read(self) -> list[Finding]:
        try:
            return self.store.read()
        except (OSError, ValueError) as error:
            raise self.gradio.Error(_escape(str(error))) from None

    def show(self, findings: Sequence[Finding], finding: Finding | None) -> tuple:
        usable = finding is not None
        buttons = [self.gradio.Button(interactive=usable) for _ in range(3)]
        return finding.number if finding else None, draw(finding), draw_progress(findings), *buttons

    def filter(self, kind: str, label: str | None, state: str) -> tuple:
        return self.move(0, None, kind, label, state)

    def move(self, step: int, number: int | None, kind: str, label: str | None, state: str) -> tuple:
        findings = self.read()
        return self.show(findings, neighbor(select(findings, kind, label, state), number, step))

    def decide(self, decision: str, number: int | None, kind: str, label: str | None, state: str) -> tuple:
        try:
            if number is not None:
                self.store.decide(number, decision)
        except (OSError, ValueError) as error:
            raise self.gradio.Error(f"The decision is not saved. {_escape(str(error))}") from None
        return self.move(1, number, kind, label, state)

    def write(self) -> str:
        try:
            counts = apply_findings(self.path, self.output_file)
        except (OSError, ValueError) as error:
            raise self.gradio.Error(_escape(str(error))) from None
        return (
            f"<p>{_escape(self.output_file)}: {counts['documents']:,} documents, {counts['changed']:,} of them changed; "
            f"{counts[REMOVE]:,} labels removed, {counts[ADD]:,} added, {counts[DROP]:,} dropped from all documents.</p>"
        )


def build_audit_page(path: str | os.PathLike, gradio: Any) -> Any:
    """
    The page for a findings file, a `gradio.Blocks`.

    Args:
        path (`str` or path): the findings, a csv file.
        gradio (module): the package `gradio`.

    Raises:
        ValueError, OSError: the findings, or the description next to them, cannot be read.
    """
    gr, actions = gradio, _Actions(path, gradio)
    labels = sorted({finding.label for finding in actions.store.read()})
    with gr.Blocks(title="Label audit", analytics_enabled=False) as page:
        gr.HTML(f"<h1>Label audit</h1><p>{_escape(os.path.basename(os.fspath(path)))}</p>")
        number = gr.State(None)
        with gr.Row():
            kind = gr.Dropdown([ALL, *KINDS], value=ALL, label="Kind", elem_id="audit-kind")
            label = gr.Dropdown([("all", ""), *labels], value="", label="Label", elem_id="audit-label")
            state = gr.Radio([OPEN, ACCEPTED, REJECTED, ALL], value=OPEN, label="Decision", elem_id="audit-state")
        progress = gr.HTML(elem_id="audit-progress")
        shown = gr.HTML(elem_id="audit-finding")
        with gr.Row():
            accept = gr.Button("Accept", variant="primary", elem_id="audit-accept")
            reject = gr.Button("Reject", elem_id="audit-reject")
            undo = gr.Button("No decision", elem_id="audit-undo")
            back = gr.Button("Previous", elem_id="audit-back")
            on = gr.Button("Next", elem_id="audit-next")
        write = gr.Button("Write the corrected documents", elem_id="audit-write")
        written = gr.HTML(elem_id="audit-written")
        filters, outputs = [kind, label, state], [number, shown, progress, accept, reject, undo]
        options = {"api_name": False, "show_progress": "hidden"}
        for part in filters:
            part.input(actions.filter, filters, outputs, **options)
        for button, action in (
            (accept, partial(actions.decide, ACCEPT)),
            (reject, partial(actions.decide, REJECT)),
            (undo, partial(actions.decide, "")),
            (back, partial(actions.move, -1)),
            (on, partial(actions.move, 1)),
        ):
            button.click(action, [number, *filters], outputs, **options)
        write.click(actions.write, None, written, api_name=False)
        page.load(actions.filter, filters, outputs, **options)
    return page
