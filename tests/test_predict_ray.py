"""examples/predict_ray.py on a cluster of two nodes: the lines of predict.py, whatever happens to a worker."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from answers import assert_same_answers
from tiny_models import WORDS, tiny_model, tiny_tokenizer


pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NUM_DOCUMENTS = 3000


@pytest.fixture(scope="module")
def cluster():
    """Address of a cluster of two nodes with one processor each, so that two labeling workers are on two nodes."""
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=size)
    nodes.add_node(**size)
    try:
        yield nodes.address
    finally:
        nodes.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and documents in a large and a small file."""
    folder = tmp_path_factory.mktemp("data")
    tiny_model(thresholds=[0.5] * 5).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(0, 40))) for _ in range(NUM_DOCUMENTS)]
    rows = [json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(rows[:2500]))
    (folder / "b.jsonl").write_text("".join(rows[2500:]))
    return folder


def start(script, folder, output, *more, address=""):
    command = [sys.executable, str(EXAMPLES / script), "--model_name_or_path", "model", "--output_file", str(output)]
    command += ["--input_file", "a.jsonl", "b.jsonl", "--look_ahead", "50", *more]
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def expected(folder):
    process = start("predict.py", folder, folder / "expected.jsonl", "--num_workers", "1")
    assert process.wait() == 0, process.stderr.read()
    return read(folder / "expected.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_lines(found, expected):
    assert [(line["id"], line["index"]) for line in found] == [(line["id"], line["index"]) for line in expected]
    assert_same_answers([line["labels"] for line in found], [line["labels"] for line in expected])


def labelers():
    """Processes of this test's cluster that hold a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "Labeler" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_killed_worker_loses_nothing(cluster, folder, expected):
    output = folder / "killed.jsonl"
    process = start("predict_ray.py", folder, output, address=cluster)
    partial, killed = Path(f"{output}.partial"), None
    while process.poll() is None and killed is None:
        time.sleep(0.01)
        if partial.exists() and partial.stat().st_size:
            workers = labelers()
            assert len(workers) == 2 and workers[0].ppid() != workers[1].ppid(), "one on each node"
            killed = workers[0]
            os.kill(killed.pid, signal.SIGKILL)
            assert len(partial.read_text().splitlines()) < NUM_DOCUMENTS, "in the middle"
    error = process.communicate()[1]
    assert process.returncode == 0 and killed is not None, error
    assert_same_lines(read(output), expected)


def test_a_killed_command_resumes(cluster, folder, expected):
    output = folder / "resumed.jsonl"
    partial = Path(f"{output}.partial")
    process = start("predict_ray.py", folder, output, address=cluster)
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = len(partial.read_text().splitlines())
    assert 0 < done < NUM_DOCUMENTS
    process = start("predict_ray.py", folder, output, "--resume", address=cluster)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    assert_same_lines(read(output), expected)
    process = start("predict.py", folder, output, "--resume")
    assert "nothing to resume" in process.communicate()[1]


def test_bad_input_is_a_one_sentence_error_and_nothing_is_lost(cluster, folder, expected):
    output, bad = folder / "bad.jsonl", folder / "bad_input.jsonl"
    bad.write_text((folder / "b.jsonl").read_text() + '{"id": "x", "body": "no text"}\n')
    arguments = ["--input_file", "a.jsonl", "bad_input.jsonl"]
    process = start("predict_ray.py", folder, output, *arguments, address=cluster)
    error = process.communicate()[1]
    last = error.strip().splitlines()[-1]
    assert process.returncode == 1 and last.startswith("predict_ray.py: ") and "bad_input.jsonl" in last, error
    assert not output.exists()
    assert_same_lines(read(Path(f"{output}.partial")), expected)  # all documents before the bad one
    process = start("predict_ray.py", folder, output, "--num_workers", "9", "--overwrite_output_file", address=cluster)
    error = process.communicate()[1]
    assert process.returncode == 1 and "Lower `--num_workers`" in error.strip().splitlines()[-1]
