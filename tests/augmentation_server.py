"""Endpoints on loopback whose answers a test decides and which record what was paid for; and helpers that the tests of augmentation share."""

import asyncio
import collections
import hashlib
import json
import resource
import sys
import threading

from aiohttp import web

from augmentation import RequestSettings
from augmentation.cli import main
from augmentation.language import is_language


WORD_BANK = (
    "the model learns how documents of this field describe their methods and results with care while earlier work only "
    "looked at a small part of the question and left the larger one open for others to study in detail"
).split()


def prose(seed: str, words: int = 20) -> str:
    """English-looking text that differs for each seed."""
    digest = hashlib.sha256(seed.encode()).digest() * (words // 32 + 1)
    return " ".join(WORD_BANK[byte % len(WORD_BANK)] for byte in digest[:words]).capitalize() + "."


def obedient(body, text, labels="1", near="no"):
    """The text with the line on labels that the prompt asks for, if it does."""
    prompt = body["messages"][1]["content"]
    if '"labels:"' in prompt:
        text = f"labels: {labels}\n{text}"
    return f"{text}\nnear label: {near}" if '"near label: no"' in prompt else text


def completion(text, body, finish_reason="stop", **fields):
    """A `chat.completion` object."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": f"{body['model']}-2026-01-01",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        **fields,
    }


def structured(text, body):
    """The text as the endpoint's JSON, if the request asks for JSON."""
    if "response_format" not in body:
        return text
    (field,) = body["response_format"]["json_schema"]["schema"]["properties"]
    return json.dumps({field: text})


def error(status, message, headers=None, **fields):
    return web.json_response({"error": {"message": message, **fields}}, status=status, headers=headers)


def settings(server, **options):
    options = {"model": "gpt-4o", "concurrency": 4, "initial_backoff": 0.01, "progress": False, **options}
    return RequestSettings(base_url=server.base_url, **options)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def document(number, labels, text=None):
    return {"id": f"d{number}", "text": text or f"Document {number}. {prose(f'train {number}', 60)}", "labels": labels}


class ChatServer:
    """
    `answer(body, attempt, request)` is a coroutine that gives a text (sent as a good answer), a response, or None (the
    connection is cut after half of the answer). `attempt` counts the requests with one prompt from 1.

    `requests` lists the bodies, `attempts` counts them by prompt, `paid` counts by prompt what a provider would bill: answers that
    it has made, whether or not they arrived.
    """

    def __init__(self, answer=None):
        self.answer = answer or self.good
        self.requests, self.headers = [], []
        self.attempts, self.paid = collections.Counter(), collections.Counter()
        self.under_way, self.most_under_way = 0, 0

    @staticmethod
    async def good(body, attempt, request):
        return obedient(body, prose(json.dumps(body["messages"])))

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        def serve():
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._start())
            started.set()
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def routes(self, app):
        app.router.add_post("/v1/chat/completions", self._chat)

    async def _start(self):
        app = web.Application(client_max_size=2**28)
        self.routes(app)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"

    def __exit__(self, *exception):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @staticmethod
    def prompt_of(body):
        return hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()

    async def _chat(self, request):
        body = await request.json()
        prompt = self.prompt_of(body)
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.attempts[prompt] += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            result = await self.answer(body, self.attempts[prompt], request)
        finally:
            self.under_way -= 1
        if isinstance(result, web.StreamResponse):
            if result.status == 200:
                self.paid[prompt] += 1
            return result
        self.paid[prompt] += 1
        if result is None:
            data = json.dumps(completion("lost", body)).encode()
            response = web.StreamResponse(
                headers={"Content-Type": "application/json", "Content-Length": str(len(data))}
            )
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            request.transport.close()
            return response
        return web.json_response(completion(structured(result, body), body))


class BatchServer(ChatServer):
    """
    `line(body, attempt)` gives a text, or (status, error), or None for a request that the batch leaves out. A batch ends as
    `status` when it was looked at `polls` times.
    """

    def __init__(self, line=None, polls=1, status="completed"):
        super().__init__()
        self.line = line or (lambda body, attempt: obedient(body, prose(json.dumps(body["messages"]))))
        self.polls, self.status = polls, status
        self.files, self.batches, self.seen = {}, {}, {}
        self.fail_creation = self.cut_download = 0

    def routes(self, app):
        super().routes(app)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._download)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{id}", self._retrieve)

    async def _upload(self, request):
        form = await request.post()
        assert form["purpose"] == "batch"
        name = f"file-{len(self.files)}"
        self.files[name] = form["file"].file.read()
        return web.json_response({"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "x",
                                  "purpose": "batch", "status": "processed"})  # fmt: skip

    async def _download(self, request):
        data = self.files[request.match_info["id"]]
        if self.cut_download:
            self.cut_download -= 1
            data = data[: len(data) // 2]
        return web.Response(body=data, content_type="application/octet-stream")

    async def _create(self, request):
        body = await request.json()
        assert body["endpoint"] == "/v1/chat/completions" and body["completion_window"] == "24h"
        name = f"batch_{len(self.batches)}"
        out, bad = [], []
        for text in self.files[body["input_file_id"]].split(b"\n"):
            if text and self.status != "failed":
                self._answer_line(json.loads(text), out, bad)
        self.batches[name] = batch = {
            "id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
            "completion_window": "24h", "status": "in_progress", "created_at": 1, "metadata": body["metadata"],
            "request_counts": {"total": len(out) + len(bad), "completed": 0, "failed": 0},
        }  # fmt: skip
        self.seen[name] = 0
        for field, lines in (("output_file_id", out), ("error_file_id", bad)):
            self.files[f"{name}-{field}"] = "".join(
                json.dumps(line, ensure_ascii=False) + "\n" for line in lines
            ).encode()
            batch[field] = f"{name}-{field}" if lines else None
        if self.status == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "x", "message": "the file is not acceptable"}]}
        if self.fail_creation:
            self.fail_creation -= 1
            return error(500, "made it, but cannot say so")
        return web.json_response(batch)

    def _answer_line(self, line, out, bad):
        body, prompt = line["body"], self.prompt_of(line["body"])
        self.requests.append(body)
        self.attempts[prompt] += 1
        result = self.line(body, self.attempts[prompt])
        if result is None:
            return
        if isinstance(result, tuple):
            response = {"status_code": result[0], "request_id": "r", "body": {"error": {"message": result[1]}}}
            bad.append({"id": "b", "custom_id": line["custom_id"], "response": response, "error": None})
            return
        self.paid[prompt] += 1
        response = {"status_code": 200, "request_id": "r", "body": completion(structured(result, body), body)}
        # in another order than asked, and one of them twice
        out.insert(0, {"id": "b", "custom_id": line["custom_id"], "response": response, "error": None})
        if len(out) == 3:
            out.append(out[0])

    async def _list(self, request):
        data = [self._at(batch) for batch in self.batches.values()]
        return web.json_response({"object": "list", "data": data, "has_more": False})

    async def _retrieve(self, request):
        batch = self.batches[request.match_info["id"]]
        self.seen[batch["id"]] += 1
        return web.json_response(self._at(batch))

    def _at(self, batch):
        return {**batch, "status": self.status if self.seen[batch["id"]] >= self.polls else "in_progress"}


def on_a_small_disk(size, command):
    """The program `augmentation` in an environment where no file can be larger than `size` bytes; for a separate process."""
    is_language("The model of the languages is unpacked to a file.", "en")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.exit(main(list(map(str, command))))
