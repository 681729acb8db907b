#!/usr/bin/env python
"""
Load test of `examples/serve.py` over loopback, compared with `examples/predict.py` on the same documents.

    python benchmarks/serving.py --model outputs/quickstart --documents examples/data/test.jsonl.gz

Clients run in a separate process, and each sends one document at a time. Rounds of the server and of
`predict.py` alternate; the throughput of `predict.py` is that of one process, without loading the model. Results: benchmarks/results/serving.json.
"""

import argparse
import asyncio
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np

from trainer.inference import load_pipeline


ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "serving.json"


def read_texts(path: str, limit: int) -> list[str]:
    opened = gzip.open(path, "rt") if path.endswith(".gz") else open(path)
    with opened as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return (texts * (limit // len(texts) + 1))[:limit]


class Server:
    """`examples/serve.py` in a process of its own."""

    def __init__(self, options):
        self.log = tempfile.NamedTemporaryFile(suffix=".log")
        command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--model_name_or_path", options.model]
        self.process = subprocess.Popen([*command, "--port", "0"], stderr=self.log, cwd=ROOT)
        while True:
            found = [line for line in Path(self.log.name).read_text().splitlines() if "running on http" in line]
            if found:
                self.address = found[0].split("running on ")[1].split()[0]
                return
            if self.process.poll() is not None:
                raise SystemExit(Path(self.log.name).read_text())
            time.sleep(0.1)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


async def load(address: str, texts: list[str], clients: int) -> dict[str, float]:
    """Documents per second, errors and latencies of `clients` that ask at the same time."""
    seconds, errors, rest = [], 0, iter(texts)

    async def client(session: httpx.AsyncClient) -> None:
        nonlocal errors
        for text in rest:
            started = time.perf_counter()
            answer = await session.post("/predict", json={"inputs": text})
            seconds.append(time.perf_counter() - started)
            errors += answer.status_code != 200

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        total = time.perf_counter() - started
    p50, p95, p99 = (1000 * np.percentile(seconds, [50, 95, 99])).round(1).tolist()
    rate = len(texts) / total
    return {"documents_per_second": rate, "errors": errors, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def predict_rate(classify, texts: list[str], folder: str) -> float:
    """Documents per second of `predict.py`, the model loaded."""
    sys.path.insert(0, str(ROOT / "examples"))
    import predict

    source, output = Path(folder, "texts.jsonl"), Path(folder, "labels.jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    args = predict.PredictArguments("-", [str(source)], str(output), overwrite_output_file=True, num_workers=1)
    predict.make_pipeline, predict.fingerprint_of = lambda args: classify, lambda *args: {}
    started = time.perf_counter()
    predict.predict(args)
    return len(texts) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", default=str(ROOT / "examples" / "data" / "test.jsonl.gz"))
    parser.add_argument("--num-documents", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=str(RESULTS))
    options = parser.parse_args()
    texts = read_texts(options.documents, options.num_documents)
    classify, server, rounds = load_pipeline(options.model), Server(options), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            asyncio.run(load(server.address, texts[:64], options.clients))
            for _ in range(options.rounds):
                found = asyncio.run(load(server.address, texts, options.clients))
                found["predict_documents_per_second"] = predict_rate(classify, texts, folder)
                found["ratio"] = found["documents_per_second"] / found["predict_documents_per_second"]
                rounds.append(found)
                print("  ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
        finally:
            server.stop()
    result = {
        "clients": options.clients,
        "num_documents": len(texts),
        "cpus": len(os.sched_getaffinity(0)),
        "rounds": rounds,
        "median_ratio": float(np.median([one["ratio"] for one in rounds])),
        "errors": sum(one["errors"] for one in rounds),
    }
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"median ratio to predict.py {result['median_ratio']:.2f}, {result['errors']} errors")


if __name__ == "__main__":
    main()
