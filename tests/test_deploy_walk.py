"""The walkthrough of docs/deploy.md, as a new user: train, push, load elsewhere, serve, query, export, compare."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import HubServer
from tiny_models import tiny_backbone


httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).resolve().parents[1]
TOPICS = {"stars": "star galaxy stars", "robots": "robot robots speech", "markets": "market price data"}
# In a process with neither the package nor its folder on the path.
CLIENT = """
import importlib.util, json, sys
from transformers import pipeline
assert importlib.util.find_spec("modeling_sep_mldc") is None
classify = pipeline("multi-label-document-classification", model="alice/walk", trust_remote_code=True, device="cpu")
print(json.dumps(classify(json.loads(sys.argv[1]), top_k=3)))
"""
# An editable install would make the package importable.
BLOCK = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__name__', type(f).__name__).lower()]\n"


def wait_for_address(server, log):
    while True:
        assert server.poll() is None, log.read_text()
        found = [line for line in log.read_text().splitlines() if "running on http" in line]
        if found:
            return found[0].split("running on ")[1].split()[0]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_training_to_a_server_and_an_export_with_the_same_answers(tmp_path):
    tiny_backbone(tmp_path / "encoder")
    names = list(TOPICS)
    rows = [{"text": f"{TOPICS[names[i % 3]]} number {i}", "labels": [names[i % 3]]} for i in range(36)]
    for split, part in (("train", rows[:24]), ("validation", rows[24:30]), ("test", rows[30:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    texts = [row["text"] for row in rows[30:]]

    with HubServer({"hf_alice": "alice"}) as hub:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        clean |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}

        def example(name, *options, home="author"):
            environment = {**clean, "HF_HOME": str(tmp_path / home), "PYTHONPATH": str(ROOT)}
            command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, options)]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done

        def labels_of(model, output):
            options = ["--model_name_or_path", model, "--input_file", tmp_path / "test.jsonl", "--output_file", output]
            example("predict", *options, "--top_k", 3, "--device", "cpu")
            return [json.loads(line)["labels"] for line in output.read_text().splitlines()]

        def assert_same(answers, expected):
            assert len(answers) == len(expected) == len(texts)
            for one, other in zip(answers, expected):
                assert {e["label"]: e["score"] for e in one} == pytest.approx(
                    {e["label"]: e["score"] for e in other}, abs=1e-4
                )

        # Train and push.
        files = [f"--{split}_file={tmp_path / split}.jsonl" for split in ("train", "validation", "test")]
        example(
            "run_mldc", f"--model_name_or_path={tmp_path / 'encoder'}", f"--output_dir={tmp_path / 'run'}", *files,
            "--do_train", "True", "--num_train_epochs", 1, "--use_cpu", "True", "--report_to", "none",
            "--save_strategy", "no", "--push_to_hub", "True", "--hub_model_id", "alice/walk", "--hub_token", "hf_alice",
        )  # fmt: skip
        assert {"handler.py", "requirements.txt", "model.safetensors"} <= set(hub.files("alice/walk"))
        expected = labels_of(tmp_path / "run", tmp_path / "run.jsonl")

        # Load in a clean environment.
        done = subprocess.run(
            [sys.executable, "-I", "-c", BLOCK + CLIENT, json.dumps(texts)],
            cwd=tmp_path,
            env={**clean, "HF_HOME": str(tmp_path / "stranger")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert_same(json.loads(done.stdout.splitlines()[-1]), expected)

        # Serve from the Hub, and query.
        log = tmp_path / "log"
        with open(log, "wb") as stream:
            server = subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "examples" / "serve.py"),
                    "--model_name_or_path",
                    "alice/walk",
                    "--port",
                    "0",
                ],
                cwd=tmp_path,
                env={**clean, "HF_HOME": str(tmp_path / "server"), "PYTHONPATH": str(ROOT)},
                stderr=stream,
            )
        try:
            address = wait_for_address(server, log)
            request = {"inputs": texts, "parameters": {"top_k": 3}}
            answer = httpx.post(f"{address}/predict", json=request, timeout=60)
            assert answer.status_code == 200
            assert_same(answer.json(), expected)
            assert {one["label"] for one in httpx.get(f"{address}/labels").json()} == set(names)
        finally:
            server.kill()
            server.wait()

        # Export, and compare.
        example("export_onnx", "alice/walk", tmp_path / "onnx")
        assert_same(labels_of(tmp_path / "onnx", tmp_path / "onnx.jsonl"), expected)
