"""The page for reviewing findings: which one comes next and what a click saves, through the server as a browser uses it."""

import json
from dataclasses import replace

import httpx
import pytest
from data_files import jsonl, write
from scripts import load_example, run_example
from test_label_audit import FINDINGS, RECORDS, write_all
from tiny_models import tiny_model, tiny_tokenizer

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline
from trainer.audit.files import read_findings
from trainer.audit.findings import Finding
from trainer.audit.page import draw, draw_progress, neighbor, select


def test_filters_choose_by_kind_label_and_decision():
    findings = [replace(f, decision=d) for f, d in zip(FINDINGS, ("accept", "", "reject"))]
    assert [f.number for f in select(findings, state="all")] == [1, 2, 3]
    assert [f.number for f in select(findings)] == [2]
    assert [f.number for f in select(findings, state="accepted")] == [1]
    assert [f.number for f in select(findings, state="rejected")] == [3]
    assert [f.number for f in select(findings, "wrong label", state="all")] == [1]
    assert [f.number for f in select(findings, label="c", state="all")] == [3]
    assert select(findings, "wrong label", "c", "all") == []


def test_the_next_finding_is_that_after_the_decided_one_which_left_the_list():
    findings = [replace(FINDINGS[0], number=number) for number in (2, 4, 6)]
    numbers = {
        (number, step): neighbor(findings, number, step).number
        for number, step in (
            (None, 0),
            (2, 1),
            (4, 1),
            (6, 1),
            (4, -1),
            (2, -1),
            (3, 1),
            (5, -1),
            (5, 1),
            (7, 1),
            (1, -1),
        )
    }
    assert numbers == {
        (None, 0): 2,
        (2, 1): 4,
        (4, 1): 6,
        (6, 1): 6,
        (4, -1): 2,
        (2, -1): 2,
        (3, 1): 4,
        (5, -1): 4,
        (5, 1): 6,
        (7, 1): 6,
        (1, -1): 2,
    }
    assert neighbor([], 3, 1) is None


def test_what_comes_from_a_file_is_shown_letter_by_letter():
    finding = Finding(
        1, "wrong label", "remove", "<b>x</b>", 0.5, "a reason", row=3, text="<img src=x> ![p](http://x)"
    )
    shown = draw(finding)
    assert not [part for part in ("<b>x", "<img", "![p]") if part in shown]
    assert "remove the label from this document" in shown and "no decision yet" in shown
    assert "No finding is left" in draw(None)
    assert "accepted" in draw(replace(finding, decision="accept"))


def test_progress_counts_decisions():
    findings = [replace(f, decision=d) for f, d in zip(FINDINGS, ("accept", "", "reject"))]
    assert "2 of 3 findings decided: 1 accepted, 1 rejected" in draw_progress(findings)


class Browser:
    """One session with a served page, over the protocol of its frontend."""

    def __init__(self, url, session):
        self.url, self.session = url, session
        config = httpx.get(f"{url}config").json()
        names = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
        self.actions = {}
        for dependency in config["dependencies"]:
            for target, event in dependency["targets"]:
                self.actions[names.get(target) if event != "load" else "load", event] = dependency

    def do(self, name, event, *values):
        """The response to an event: values of its outputs, or an error."""
        inputs = {"data": list(values), "fn_index": self.actions[name, event]["id"], "session_hash": self.session}
        assert httpx.post(f"{self.url}gradio_api/queue/join", json=inputs).status_code == 200
        address = f"{self.url}gradio_api/queue/data?session_hash={self.session}"
        with httpx.stream("GET", address, timeout=30) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return message["output"]
        raise AssertionError("no answer")

    def click(self, name, kind="all", label="", state="open"):
        return self.do(f"audit-{name}", "click", None, kind, label, state)["data"][1]


@pytest.fixture
def served(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    path = write_all(tmp_path, write(tmp_path / "train.jsonl", jsonl(RECORDS)), decisions=("", "", ""))
    app = load_example("app")
    model = tiny_model(num_labels=3)
    pipe = MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tiny_tokenizer())
    page = app.build_tabs(pipe, str(path))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **app.LAUNCH)
    yield path, url
    page.close()


def test_each_click_is_saved_at_once_and_a_new_session_continues(served):
    path, url = served
    browser = Browser(url, "first")
    assert "1. wrong label: a" in browser.do("load", "load", "all", "", "open")["data"][1]
    assert "2. missing label" in browser.click("accept")
    assert [f.decision for f in read_findings(path)] == ["accept", "", ""]
    assert "3. always together" in browser.click("reject")
    assert [f.decision for f in read_findings(path)] == ["accept", "reject", ""]
    # The browser is closed. Another one finds what is left.
    other = Browser(url, "second")
    assert "3. always together" in other.do("load", "load", "all", "", "open")["data"][1]
    assert "No finding is left" in other.click("accept")
    written = other.do("audit-write", "click")["data"][0]
    assert "3 documents, 2 of them changed" in written
    corrected = [json.loads(line) for line in (path.parent / "findings.corrected.jsonl").read_text().splitlines()]
    assert [record["labels"] for record in corrected] == [[], ["a"], ["=b"]]


def test_a_decision_can_be_taken_back_and_findings_are_turned_over(served):
    path, url = served
    browser = Browser(url, "third")
    browser.do("load", "load", "all", "", "all")
    browser.click("accept", state="all")
    assert "1. wrong label" in browser.click("back", state="all")
    browser.click("undo", state="all")
    assert [f.decision for f in read_findings(path)] == ["", "", ""]
    assert "3. always together" in browser.click("next", state="all")
    assert "2. missing label" in browser.do("audit-kind", "input", "missing label", "", "all")["data"][1]


def test_a_decision_that_cannot_be_saved_is_an_error_in_the_page(served):
    path, url = served
    browser = Browser(url, "fourth")
    browser.do("load", "load", "all", "", "open")
    path.write_text(path.read_text().replace('"accept"', '""').replace('"remove"', '"odd"'))
    found = browser.do("audit-accept", "click", None, "all", "", "open")
    assert "The decision is not saved" in found["error"]
    assert '"odd"' in path.read_text()


def test_a_click_in_a_session_that_the_server_forgot_saves_nothing(served):
    path, url = served
    assert "1. wrong label" in Browser(url, "unknown").click("accept")
    assert [f.decision for f in read_findings(path)] == ["", "", ""]


@pytest.mark.parametrize(
    "arguments, message", [(["--audit", "nothing.csv"], "nothing.csv"), ([], "No model is given")]
)
def test_bad_arguments_of_the_page_are_a_one_sentence_error(arguments, message, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEP_MLDC_MODEL", "")
    done = run_example("app", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
