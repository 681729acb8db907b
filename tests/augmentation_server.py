"""A chat completions endpoint on loopback whose every answer a test decides, and which keeps the books."""

import asyncio
import collections
import hashlib
import json
import threading

from aiohttp import web


WORD_BANK = (
    "the model learns how documents of this field describe their methods and results with care while earlier work only "
    "looked at a small part of the question and left the larger one open for others to study in detail"
).split()


def prose(seed: str, words: int = 20) -> str:
    """English-looking text that differs for each seed."""
    digest = hashlib.sha256(seed.encode()).digest() * (words // 32 + 1)
    return " ".join(WORD_BANK[byte % len(WORD_BANK)] for byte in digest[:words]).capitalize() + "."


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
        return prose(json.dumps(body["messages"]))

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
