"""examples/serve.py: a trained model over HTTP."""

import asyncio
import json
import signal
import sys
import threading
import time

import httpx
import pytest
from answers import assert_same_answers
from scripts import EXAMPLES, fork, run_example
from tiny_models import tiny_model, tiny_tokenizer


pytest.importorskip("fastapi")
sys.path.insert(0, str(EXAMPLES))
import serve  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from modeling_sep_mldc import is_abstained  # noqa: E402
from trainer.inference import load_pipeline  # noqa: E402


TEXTS = ["learning to search images", "stars and galaxies", "a proof of the theorem by a robot", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    model = tiny_model()
    model.config.thresholds = [0.3] * model.config.num_labels
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def classify(folder):
    return load_pipeline(folder)


def arguments(folder, **kwargs):
    return serve.ServeArguments(str(folder), **kwargs)


@pytest.fixture
def client(classify, folder):
    with TestClient(serve.create_app(classify, arguments(folder))) as client:
        yield client


def test_answers_are_those_of_the_pipeline(client, classify):
    def ask(inputs, **parameters):
        answer = client.post("/predict", json={"inputs": inputs, "parameters": parameters})
        assert answer.status_code == 200
        return answer.json()

    assert_same_answers(ask(TEXTS, top_k=2), classify(TEXTS, top_k=2))
    assert_same_answers(ask(TEXTS[0]), classify(TEXTS[0]))
    assert ask([]) == []


@pytest.mark.parametrize(
    "body, status, words",
    [
        ("{", 422, "not valid JSON"),
        ('{"texts": ["a"]}', 422, "inputs: Field required"),
        ('{"inputs": [7]}', 422, "valid string"),
        ('{"inputs": "a", "parameters": {"top_k": 0}}', 422, "parameters.top_k"),
        ('{"inputs": "a", "parameters": {"topk": 1}}', 422, "parameters.topk"),
        ('{"inputs": ["a", "b", "c", "d", "e"]}', 422, "has 5 documents, but at most 4"),
        (json.dumps({"inputs": ["a", "b \ud800"]}), 422, "unpaired surrogate"),
        (json.dumps({"inputs": "a" * 1000}), 413, "more than 300 bytes"),
    ],
)
def test_a_bad_request_gets_a_one_sentence_error_and_the_next_one_an_answer(classify, folder, body, status, words):
    app = serve.create_app(classify, arguments(folder, max_documents=4, max_body_bytes=300))
    with TestClient(app) as client:
        answer = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status and list(answer.json()) == ["error"] and words in answer.json()["error"]
        in_chunks = client.post(
            "/predict", content=iter([body.encode()]), headers={"Content-Type": "application/json"}
        )
        assert in_chunks.status_code == status and in_chunks.json() == answer.json()
        assert client.post("/predict", json={"inputs": "cell"}).status_code == 200


class Slow:
    """A pipeline that waits until it may answer, and records its batches."""

    def __init__(self, classify):
        self.model, self.go, self.batches = classify.model, threading.Event(), []
        self.error = None

    def __call__(self, texts, batch_size, **parameters):
        self.batches.append((list(texts), parameters))
        self.go.wait(30)
        if self.error:
            raise self.error
        return [[{"label": text, "score": 1.0}] for text in texts]


async def talk(app, talker):
    """Run `talker(client)` against an app whose lifespan has begun."""
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await talker(client)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def post(client, inputs, **parameters):
    return asyncio.ensure_future(client.post("/predict", json={"inputs": inputs, "parameters": parameters}))


def test_requests_share_batches_and_each_gets_its_own_answer(classify, folder):
    slow = Slow(classify)

    async def talker(client):
        first = post(client, "first")
        await until(lambda: slow.batches)
        others = [post(client, [f"a{i}", f"b{i}"], **({"top_k": 1} if i == 1 else {})) for i in range(3)]
        metrics = ""
        while "sep_mldc_waiting_documents 6.0" not in metrics:
            metrics = (await client.get("/metrics")).text
        slow.go.set()
        return [(await one).json() for one in (first, *others)], (await client.get("/metrics")).text

    (first, *others), metrics = asyncio.run(talk(serve.create_app(slow, arguments(folder)), talker))
    assert first == [{"label": "first", "score": 1.0}]
    assert [[labels[0]["label"] for labels in answer] for answer in others] == [[f"a{i}", f"b{i}"] for i in range(3)]
    # Requests with the same parameters went together; the other one kept its own.
    assert [(sorted(texts), given) for texts, given in slow.batches[1:]] == [
        (["a0", "a2", "b0", "b2"], {}),
        (["a1", "b1"], {"top_k": 1}),
    ]
    assert "sep_mldc_documents_total 7.0" in metrics
    assert 'sep_mldc_requests_total{path="/predict",status="200"} 4.0' in metrics


def test_too_many_waiting_documents_and_too_slow_answers_are_refused(classify, folder):
    slow = Slow(classify)

    async def talker(client):
        first = post(client, ["a", "b"])
        await until(lambda: slow.batches)
        full = await client.post("/predict", json={"inputs": ["c", "d"]})
        late = await first
        slow.go.set()
        await until(lambda: len(slow.batches) == 1)
        return full, late, await post(client, "e")

    settings = arguments(folder, max_waiting=3, timeout_s=0.3)
    full, late, after = asyncio.run(talk(serve.create_app(slow, settings), talker))
    assert (
        full.status_code == 429
        and full.headers["retry-after"] == "1"
        and "are already waiting" in full.json()["error"]
    )
    assert late.status_code == 504 and "within 0.3 seconds" in late.json()["error"]
    assert after.status_code == 200


def test_a_failing_model_is_an_error_of_its_requests_only(classify, folder):
    slow = Slow(classify)
    slow.go.set()

    async def talker(client):
        answers = []
        for error in (ValueError("The model computes scores that are not finite numbers."), MemoryError(), None):
            slow.error = error
            answers.append(await post(client, "a"))
        return answers

    refused, failed, fine = asyncio.run(talk(serve.create_app(slow, arguments(folder)), talker))
    assert refused.status_code == 422 and "not finite" in refused.json()["error"]
    assert failed.status_code == 500 and "MemoryError" in failed.json()["error"]
    assert fine.status_code == 200


def test_labels_and_health_say_what_is_served(client, classify, folder):
    labels = client.get("/labels").json()
    assert [one["label"] for one in labels] == list(classify.model.config.id2label.values())
    assert {one["threshold"] for one in labels} == {0.3}
    assert client.get("/health").json() == {"status": "ok", "model": str(folder), "waiting": 0}


def test_labels_come_with_their_parents_and_abstentions_with_a_mark(folder, tmp_path):
    classify = load_pipeline(folder)
    model, names = classify.model, classify.model.config.labels
    model.config.thresholds = [0.3, *[0.999] * (len(names) - 1)]
    model.set_hierarchy({names[1]: [names[0]]}, "closure")
    texts = ["a proof of the theorem", "stars and galaxy", ""]
    with TestClient(serve.create_app(classify, arguments(folder))) as client:
        parents = {one["label"]: one["parents"] for one in client.get("/labels").json()}
        assert parents == {name: [names[0]] if name == names[1] else [] for name in names}
        for parameters in ({}, {"threshold": 0.999, "min_labels": 2}):
            found = client.post("/predict", json={"inputs": texts, "parameters": parameters}).json()
            expected = classify(texts, **parameters)
            assert [[one["label"] for one in row] for row in found] == [
                [one["label"] for one in row] for row in expected
            ]
            assert [[one["score"] for one in row] for row in found] == [
                pytest.approx([one["score"] for one in row], abs=1e-6) for row in expected
            ]
        assert [is_abstained(row) for row in found] == [True] * 3 and found[0][0]["below_threshold"] is True


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"max_waiting": 0}, {"timeout_s": 0}, {"max_wait_ms": -1}])
def test_limits_must_be_positive(folder, kwargs):
    with pytest.raises(ValueError, match=f"`--{next(iter(kwargs))}`"):
        arguments(folder, **kwargs)


def test_a_server_that_is_told_to_stop_answers_what_it_has_begun(folder, tmp_path):
    log = tmp_path / "log"
    log.touch()
    server = fork(serve.main, ["--model_name_or_path", str(folder), "--port", "0"], stderr=log)
    try:
        address = None
        while address is None:
            assert server.exitcode is None, log.read_text()
            lines = [line for line in log.read_text().splitlines() if "http://127.0.0.1:" in line]
            address = lines[0].split("running on ")[1].split()[0] if lines else time.sleep(0.05)
        answers = []

        def ask():
            answers.append(
                httpx.post(f"{address}/predict", json={"inputs": ["a model of language"] * 200}, timeout=60)
            )

        thread = threading.Thread(target=ask)
        thread.start()
        while "sep_mldc_batch_documents_count 0.0" in httpx.get(f"{address}/metrics").text:
            time.sleep(0.01)
        server.terminate()
        thread.join()
        # uvicorn ends by the signal that it was sent, after it has answered.
        server.join(60)
        assert server.exitcode in (0, -signal.SIGTERM)
        assert answers[0].status_code == 200 and len(answers[0].json()) == 200
    finally:
        server.kill()
        server.join()


def test_an_unknown_model_is_a_one_sentence_error(tmp_path):
    done = run_example("serve", "--model_name_or_path", tmp_path / "none")
    assert done.returncode == 1 and "serve.py:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"timeout_s": float("nan")}, "finite"),
        ({"max_wait_ms": float("inf")}, "finite"),
        ({"port": 70000}, "0 to 65535"),
        ({"port": -1}, "0 to 65535"),
    ],
)
def test_impossible_times_and_ports_are_refused(folder, wrong, message):
    with pytest.raises(ValueError, match=message):
        arguments(folder, **wrong)
