"""The demo page: its functions on a tiny model, and the page itself in a real browser."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from answers import assert_same_answers
from scripts import load_example, run_example
from tiny_models import tiny_model, tiny_tokenizer

from modeling_sep_mldc import MultiLabelDocumentClassificationPipeline


pytestmark = pytest.mark.numeric

SCRIPT = Path(__file__).parent.parent / "examples" / "app.py"
app = load_example("app")

LABELS = ["vision", "<b>bold</b>", "language", "graphs", "robots"]
TEXT = "The robot reads images, and speech.\nNo data of the market is needed; models search galaxies."


def make_pipe(**config):
    model = tiny_model(id2label=dict(enumerate(LABELS)), **config)
    return MultiLabelDocumentClassificationPipeline(model=model, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def pipe():
    return make_pipe(thresholds=[0.1, 0.2, 0.3, 0.4, 0.9])


def chosen(bars: str) -> list[str]:
    return re.findall(r'label-row chosen"><span class="name">(.*?)</span>', bars)


def test_classify_returns_all_labels_best_first_with_their_own_thresholds(pipe):
    labels = app.classify(pipe, TEXT)
    assert sorted(entry["label"] for entry in labels) == sorted(LABELS)
    assert [entry["score"] for entry in labels] == sorted((entry["score"] for entry in labels), reverse=True)
    own = dict(zip(LABELS, [0.1, 0.2, 0.3, 0.4, 0.9]))
    assert all(entry["threshold"] == own[entry["label"]] for entry in labels)


def test_bars_choose_by_own_thresholds_or_by_the_slider():
    labels = [
        {"label": "a", "score": 0.8, "threshold": 0.9},
        {"label": "b", "score": 0.6, "threshold": 0.6},
        {"label": "c", "score": 0.1, "threshold": 0.05},
    ]
    assert chosen(app.draw_bars(labels)) == ["b", "c"]
    assert chosen(app.draw_bars(labels, threshold=0.7)) == ["a"]
    assert chosen(app.draw_bars(labels, threshold=0.0)) == ["a", "b", "c"]
    assert "width: 80.0%" in app.draw_bars(labels) and "left: 70.0%" in app.draw_bars(labels, threshold=0.7)


def test_a_label_name_cannot_bring_markup_into_the_page(pipe):
    bars = app.draw_bars(app.classify(pipe, TEXT))
    assert "<b>bold" not in bars and html.unescape(bars).count("<b>bold</b>") == 1


@pytest.mark.parametrize("label", LABELS)
def test_an_explanation_is_the_whole_text_with_whole_words_for_and_against_the_label(pipe, label):
    labels = app.classify(pipe, TEXT)
    pieces, notes = app.explain(pipe, TEXT, labels, label)
    assert "".join(piece for piece, _ in pieces) == TEXT
    marked = {piece: side for piece, side in pieces if side is not None}
    assert set(marked) <= set(re.findall(r"\w+", TEXT)) and set(marked.values()) <= set(app.COLORS)
    names = [entry["label"] for entry in labels]
    found = pipe(TEXT, top_k=names.index(label) + 1, return_explanation=True, explanation_size=app.HIGHLIGHTED_WORDS)
    explanation = found["explanations"][label]
    assert len(marked) > 5 and all(
        (marked[word["word"]] == app.FOR) == (word["score"] > 0)
        for word in explanation["words"]
        if TEXT.count(word["word"]) == 1 and word["word"] in marked
    )
    for part in ("bias", "lexical", "encoder", "remainder", "logit"):
        assert f"<td>{explanation[part]:+.2f}</td>" in notes
    assert "The document attends to the labels: " in notes


def test_label_names_are_shown_letter_by_letter_never_as_markup():
    names = ["![p](http://127.0.0.1/pixel.png)", "<h1 style='position:fixed'>x</h1>", "[log in](http://127.0.0.1)"]
    pipe = MultiLabelDocumentClassificationPipeline(
        model=tiny_model(id2label=dict(enumerate(names)), thresholds=[0.01] * 3), tokenizer=tiny_tokenizer()
    )
    labels = app.classify(pipe, TEXT)
    _, attended = app.explain(pipe, TEXT, labels, labels[0]["label"])
    for markup in (attended, app.draw_bars(labels)):
        text = HTMLText()
        text.feed(markup)
        assert not {"h1", "img", "a"} & set(text.tags) and all(name in "".join(text.pieces) for name in names)
        assert not any(name in markup for name in names), "markup of HTML or Markdown"


class HTMLText(HTMLParser):
    """The tags and the text of some HTML, as a browser takes them."""

    def __init__(self):
        super().__init__()
        self.tags, self.pieces = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.pieces.append(data)


def test_the_examples_of_the_page_are_the_models_own():
    assert app.examples_of(make_pipe().model.config) == []
    described = make_pipe(label_descriptions={"language": "Texts.", "robots": "Robots.", "vision": ""}).model.config
    assert app.examples_of(described) == ["Texts.", "Robots."]


def test_examples_in_the_models_card_come_first(tmp_path):
    pipe = make_pipe(label_descriptions={"language": "Texts."})
    pipe.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nwidget:\n- text: A robot reads.\n- text: A galaxy.\n---\n# A model\n")
    assert app.examples_of(app.load(str(tmp_path)).model.config) == ["A robot reads.", "A galaxy."]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert app.examples_of(app.load(str(tmp_path)).model.config) == ["Texts."]


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = run_example("app", "--model", "x")
    assert done.returncode == 1 and "pip install" in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_with_code_of_an_older_version_says_so(pipe):
    labels = app.classify(pipe, TEXT)
    older = lambda *_, **__: {"labels": labels, "attended_labels": [], "tokens": {}}  # noqa: E731
    assert app.explain(older, TEXT, labels, labels[0]["label"])[1].startswith("<p>The code in this checkpoint")


def test_a_ranking_has_bars_but_no_chosen_labels():
    pipe = make_pipe(classification_loss="softmax")
    labels = app.classify(pipe, TEXT)
    bars = app.draw_bars(labels, threshold=0.0)
    assert "not probabilities" in bars and not chosen(bars) and 'class="mark"' not in bars
    assert "width: 100.0%" in bars


@pytest.mark.parametrize("text", ["", " \n "])
def test_an_empty_text_has_no_labels_and_nothing_to_explain(pipe, text):
    assert app.classify(pipe, text) == []
    assert "the text is empty" in app.draw_bars([])
    assert app.explain(pipe, text, [], None) == ([], "")


def test_a_long_text_is_read_up_to_the_limit(pipe, monkeypatch):
    monkeypatch.setattr(app, "MAX_CHARACTERS", 30)
    labels = app.classify(pipe, TEXT)
    assert_same_answers(labels, app.classify(pipe, TEXT[:30]))
    pieces, _ = app.explain(pipe, TEXT, labels, labels[0]["label"])
    assert "".join(piece for piece, _ in pieces) == TEXT[:30]


def test_an_uploaded_file_is_read_as_utf8_with_or_without_a_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("Über\n".encode("utf-8-sig"))
    assert app.read_document(tmp_path / "a.txt") == "Über\n"


def test_an_uploaded_file_that_is_not_utf8_ends_in_a_one_sentence_error(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="a.txt has the byte 0xef at position 2, but it must be UTF-8"):
        app.read_document(tmp_path / "a.txt")


def test_a_checkpoint_loads_as_the_page_loads_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert_same_answers(app.classify(app.load(str(tmp_path)), TEXT), app.classify(pipe, TEXT))


@pytest.mark.slow
def test_the_file_alone_runs_a_checkpoint_without_this_package_as_in_a_space(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    shutil.copy(SCRIPT, tmp_path / "app.py")
    script = (
        "import sys, json\n"
        "sys.modules.update({'modeling_sep_mldc': None, 'trainer': None})  # not installed\n"
        "import app\n"
        "print(json.dumps(app.classify(app.load('checkpoint'), sys.argv[1])))\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", script, TEXT], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert_same_answers(json.loads(printed.splitlines()[-1]), app.classify(pipe, TEXT))


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1100"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(pipe, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page = app.build_page(pipe)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **app.LAUNCH)
    yield url
    page.close()


@pytest.mark.slow
def test_the_page_labels_explains_and_moves_its_threshold_in_a_browser(browser, page, pipe, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(css):
        return browser.find_element(By.CSS_SELECTOR, css)

    def bold():
        return [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#labels .label-row.chosen .name")]

    wait = WebDriverWait(browser, 60)
    browser.get(page)
    wait.until(lambda _: find("#document textarea").is_displayed())
    # An upload fills the document's box.
    (tmp_path / "document.txt").write_text(TEXT)
    find("#upload input[type=file], input[type=file]").send_keys(str(tmp_path / "document.txt"))
    wait.until(lambda _: find("#document textarea").get_attribute("value") == TEXT)
    find("#classify").click()
    wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#labels .label-row"))

    labels = app.classify(pipe, TEXT)
    names = [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#labels .label-row .name")]
    assert names == [entry["label"] for entry in labels], "markup in a name is shown letter by letter"
    assert bold() == [entry["label"] for entry in labels if entry["score"] >= entry["threshold"]]
    wait.until(lambda _: "robot" in find("#explanation").text)
    assert "The document attends to the labels" in find("#attended").text

    # One threshold for all labels, once the tuned ones are switched off.
    assert "off" in find("#threshold").text and not find("#threshold input[type=number]").is_enabled()
    find("#own input[type=checkbox]").click()
    wait.until(lambda _: find("#threshold input[type=number]").is_enabled() and "off" not in find("#threshold").text)
    number = find("#threshold input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("0", Keys.TAB)
    wait.until(lambda _: bold() == names)
    find("#own input[type=checkbox]").click()
    wait.until(lambda _: bold() == [entry["label"] for entry in labels if entry["score"] >= entry["threshold"]])

    # Another label's explanation.
    before = find("#explanation").get_attribute("innerHTML")
    box = find("#choice input")
    box.click()
    box.send_keys(Keys.ARROW_DOWN, Keys.ENTER)
    wait.until(lambda _: find("#explanation").get_attribute("innerHTML") != before)
    errors = [entry for entry in browser.get_log("browser") if "pageerror" in entry["message"].lower()]
    assert errors == []
