"""
Throughput of the augmentation client compared with the ideal: 5,000 requests at concurrency 64 to a local server with a latency of 200 ms.

    python benchmarks/augmentation_throughput.py

The ideal is requests / concurrency x latency. Memory is the resident size of the client's process, whose growth between the first
and the last tenth of the run must be zero. A bare aiohttp loop, run right afterward, shows what is possible on the machine at that time
(on a busy machine, neither comes close to the ideal). Every answer is written to the journal before the next request takes its place.
"""

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import aiohttp
import psutil
from aiohttp import web

from augmentation import RequestSettings, describe_labels
from augmentation.writing import write_json_lines


RESULT = Path(__file__).with_name("results") / "augmentation_throughput.json"
ANSWER = "Papers on how documents of this field are found, ranked and recommended to readers."


async def serve(latency: float) -> None:
    """Answers every request after `latency` seconds; prints its port first. Runs in a separate process."""
    answer = json.dumps(
        {
            "object": "chat.completion",
            "model": "local",
            "choices": [{"message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 150, "completion_tokens": 20},
        }
    )

    async def chat(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(latency)
        return web.Response(text=answer, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


async def bare(base_url: str, requests: int, concurrency: int) -> float:
    """Wall time of a minimal client: the same requests in an aiohttp loop that discards the answers."""
    body = {"model": "local", "messages": [{"role": "user", "content": "x" * 900}]}
    numbers = iter(range(requests))

    async def work(session: aiohttp.ClientSession) -> None:
        for _ in numbers:
            async with session.post(f"{base_url}/chat/completions", json=body) as response:
                await response.json()

    began = time.monotonic()
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(work(session) for _ in range(concurrency)))
    return time.monotonic() - began


def measure(requests: int, concurrency: int, latency: float) -> dict:
    """Wall time, CPU time and memory of one run of `describe_labels` on as many labels as there are requests."""
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", "--latency", str(latency)], stdout=subprocess.PIPE, text=True
    )
    process, sizes, stop = psutil.Process(), [], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            sizes.append(process.memory_info().rss / 2**20)

    try:
        base_url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        settings = RequestSettings("local", base_url=base_url, concurrency=concurrency, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            describe_labels(["warm up"], folder, settings)  # imports and the language model are loaded once
            watcher = threading.Thread(target=watch)
            watcher.start()
            cpu, began = time.process_time(), time.monotonic()
            summary = describe_labels([f"label {i}" for i in range(requests)], folder, settings)
            wall, cpu = time.monotonic() - began, time.process_time() - cpu
            stop.set()
            watcher.join()
            assert summary.sent == summary.done == requests
        bare_wall = asyncio.run(bare(base_url, requests, concurrency))
    finally:
        server.terminate()
        server.wait()
    ideal = requests / concurrency * latency
    tenth = max(1, len(sizes) // 10)
    return {
        "requests": requests,
        "concurrency": concurrency,
        "latency_seconds": latency,
        "ideal_seconds": round(ideal, 2),
        "wall_seconds": round(wall, 2),
        "wall_over_ideal": round(wall / ideal, 3),
        "bare_loop_wall_over_ideal": round(bare_wall / ideal, 3),
        "client_cpu_ms_per_request": round(1000 * cpu / requests, 2),
        "memory_mib_first_tenth": round(sum(sizes[:tenth]) / tenth, 1),
        "memory_mib_last_tenth": round(sum(sizes[-tenth:]) / tenth, 1),
        "memory_mib_peak": round(max(sizes), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.latency))
    result = measure(args.requests, args.concurrency, args.latency)
    result |= {
        "python": platform.python_version(),
        "cpu_cores": psutil.cpu_count(),
        "load_before": psutil.getloadavg()[0],
    }
    for name, value in result.items():
        print(f"{name:<24} {value}")
    write_json_lines(args.output, [result])
    return 0


if __name__ == "__main__":
    sys.exit(main())
