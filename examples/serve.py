#!/usr/bin/env python
"""
Serve a trained model over HTTP, with JSON requests and responses and dynamic batching.

    python examples/serve.py --model_name_or_path outputs/quickstart --port 8000
    curl localhost:8000/predict -H "Content-Type: application/json" \
        -d '{"inputs": ["A new proof of an old theorem."], "parameters": {"top_k": 3}}'

Requests and responses have the same format as for Inference Endpoints (`handler.py` in the checkpoint). Documents of concurrent requests are
batched together. Needs the extra `serve`. See docs/deploy.md.
"""

import asyncio
import logging
import math
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from transformers import HfArgumentParser


try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as error:
    sys.exit(f'serve.py: {error.name} is not installed. Install the extra: pip install "sep-mldc[serve]"')

from modeling_sep_mldc.pipeline_sep_mldc import check_characters
from trainer.inference import load_pipeline


logger = logging.getLogger("uvicorn.error")


@dataclass
class ServeArguments:
    """Which model to serve, where, and within which limits."""

    model_name_or_path: str = field(
        metadata={"help": "A trained SEP-MLDC model: folder or Hub name of a checkpoint, or folder of an ONNX export."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub model."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for a free one."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... Defaults to the best available."})
    batch_size: int = field(default=32, metadata={"help": "Documents per batch, and windows per forward pass."})
    max_wait_ms: float = field(
        default=5.0, metadata={"help": "How long a batch waits for more documents, in milliseconds."}
    )
    max_documents: int = field(
        default=256, metadata={"help": "Maximum number of documents per request; exceeding it gives status 422."}
    )
    max_body_bytes: int = field(
        default=4_000_000, metadata={"help": "Maximum size of a request in bytes; exceeding it gives status 413."}
    )
    max_waiting: int = field(
        default=2048,
        metadata={"help": "Maximum number of waiting documents; a request that would exceed it gets status 429."},
    )
    timeout_s: float = field(
        default=60.0,
        metadata={"help": "Seconds after which a request gets status 504; also the time limit for a shutdown."},
    )

    def __post_init__(self):
        for name in ("batch_size", "max_documents", "max_body_bytes", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}, but it must be at least 1.")
        if not (0 <= self.max_wait_ms < math.inf and 0 < self.timeout_s < math.inf):
            raise ValueError(
                f"`--max_wait_ms` is {self.max_wait_ms} and `--timeout_s` {self.timeout_s}, but times must be positive and finite. "
                "Leave them out for 5 milliseconds and 60 seconds."
            )
        if not 0 <= self.port <= 65535:
            raise ValueError(
                f"`--port` is {self.port}, but it must be from 0 to 65535. Try 8000, or 0 for a free one."
            )


class Parameters(BaseModel):
    """Which labels to return, as in the pipeline."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    min_score: float | None = None
    min_labels: Annotated[int, Field(ge=0)] | None = None
    min_expected_f1: Annotated[float, Field(ge=0, le=1)] | None = None


class PredictRequest(BaseModel):
    """A document or several."""

    model_config = ConfigDict(extra="forbid")

    inputs: str | list[str]
    parameters: Parameters = Parameters()


class RequestError(Exception):
    """An error response, with a one-sentence message."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class QueuedDocument:
    """A document that waits to be added to a batch."""

    __slots__ = ("answer", "parameters", "text")

    def __init__(self, text: str, parameters: tuple[tuple[str, Any], ...], answer: asyncio.Future):
        self.text, self.parameters, self.answer = text, parameters, answer


class Batcher:
    """
    Labels documents in batches, in the order in which they arrived. The documents of a batch have the same parameters. A batch starts when the
    previous one is done and either it is full or its oldest document has waited `max_wait_ms`.
    """

    def __init__(self, classify: Any, args: ServeArguments, batch_sizes: Histogram):
        self.classify, self.args, self.batch_sizes = classify, args, batch_sizes
        self.waiting: deque[QueuedDocument] = deque()
        self.num_running = 0
        self.closing = False
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Label the waiting documents, then stop."""
        self.closing = True
        self._came.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def label(self, texts: list[str], parameters: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """
        Raises:
            RequestError: too many documents are waiting, the request takes too long, or the parameters are invalid for this model.
        """
        if self.closing:
            raise RequestError(503, "The server is shutting down.")
        if len(self.waiting) + self.num_running + len(texts) > self.args.max_waiting:
            raise RequestError(
                429,
                f"{len(self.waiting)} documents are already waiting. Try again in a second.",
                **{"Retry-After": "1"},
            )
        key, loop = tuple(sorted(parameters.items())), asyncio.get_running_loop()
        answers = [loop.create_future() for _ in texts]
        self.waiting.extend(QueuedDocument(text, key, answer) for text, answer in zip(texts, answers, strict=True))
        self._came.set()
        try:
            return await asyncio.wait_for(asyncio.gather(*answers), self.args.timeout_s)
        except TimeoutError:
            raise RequestError(
                504, f"No answer within {self.args.timeout_s:g} seconds. Send fewer documents."
            ) from None

    async def _run(self) -> None:
        while not (self.closing and not self.waiting):
            if not self.waiting:
                self._came.clear()
                await self._came.wait()
                continue
            if len(self.waiting) < self.args.batch_size and not self.closing:
                await asyncio.sleep(self.args.max_wait_ms / 1000)
            await self._answer(self._next_batch())

    def _next_batch(self) -> list[QueuedDocument]:
        """The oldest documents with the same parameters; the others keep their positions. Canceled requests are skipped."""
        batch, others = [], []
        while self.waiting and len(batch) < self.args.batch_size:
            one = self.waiting.popleft()
            if one.answer.done():
                continue
            if batch and one.parameters != batch[0].parameters:
                others.append(one)
            else:
                batch.append(one)
        self.waiting.extendleft(reversed(others))
        return batch

    async def _answer(self, batch: list[QueuedDocument]) -> None:
        if not batch:
            return
        self.num_running = len(batch)
        self.batch_sizes.observe(len(batch))
        # Sorted by length, to reduce padding.
        batch.sort(key=lambda one: len(one.text))
        texts, parameters = [one.text for one in batch], dict(batch[0].parameters)
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._thread, lambda: self.classify(texts, batch_size=self.args.batch_size, **parameters)
            )
            for one, labels in zip(batch, found, strict=True):
                if not one.answer.done():
                    one.answer.set_result(labels)
        except Exception as error:
            if not isinstance(error, ValueError):
                logger.exception("A batch failed")
            response = (
                RequestError(422, str(error))
                if isinstance(error, ValueError)
                else RequestError(500, f"The model failed ({type(error).__name__}).")
            )
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(response)
        finally:
            self.num_running = 0


class BodyLimit:
    """ASGI middleware: reads the body of a request, and answers with 413 as soon as it has more than `limit` bytes."""

    def __init__(self, app: Any, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        size, messages, more = int(length) if length.isdigit() else 0, deque[Any](), True
        while more and size <= self.limit:
            message = await receive()
            messages.append(message)
            more = message.get("more_body", False)
            size = max(size, sum(len(one.get("body", b"")) for one in messages))
        if size > self.limit:
            error = f"The request has more than {self.limit} bytes. Send fewer or shorter documents."
            await JSONResponse({"error": error}, 413)(scope, receive, send)
            return

        async def replay():
            return messages.popleft() if messages else await receive()

        await self.app(scope, replay, send)


def create_app(classify: Any, args: ServeArguments) -> FastAPI:
    """The ASGI application for a pipeline; `classify` may be any callable with the pipeline's arguments and a `model.config`."""
    registry = CollectorRegistry()
    requests = Counter("sep_mldc_requests", "Requests by path and status", ["path", "status"], registry=registry)
    seconds = Histogram("sep_mldc_request_seconds", "Time to answer /predict", registry=registry)
    documents = Counter("sep_mldc_documents", "Documents labeled", registry=registry)
    batch_sizes = Histogram(
        "sep_mldc_batch_documents", "Documents per batch", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64, 128)
    )
    waiting = Gauge("sep_mldc_waiting_documents", "Documents that wait for a batch", registry=registry)
    batcher = Batcher(classify, args, batch_sizes)
    waiting.set_function(lambda: len(batcher.waiting))
    config = classify.model.config

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        batcher.start()
        yield
        await batcher.close()

    app = FastAPI(title="sep-mldc", lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=args.max_body_bytes)
    paths = {"/predict", "/labels", "/health", "/metrics"}

    @app.middleware("http")
    async def count(request: Request, call_next):
        response = await call_next(request)
        path = request.url.path if request.url.path in paths else "other"
        requests.labels(path, response.status_code).inc()
        return response

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError):
        return JSONResponse({"error": error.message}, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "str", "list[str]"))
        what = "it is not valid JSON" if first["type"] == "json_invalid" else f"{where or 'the body'}: {first['msg']}"
        message = f'The request cannot be read: {what}. Send {{"inputs": ["a document", ...], "parameters": {{...}}}}.'
        return JSONResponse({"error": message}, 422)

    @app.post("/predict")
    async def predict(request: PredictRequest) -> list[Any]:
        """Labels and scores of each document, best first; for a single text, just its labels and scores."""
        started = time.perf_counter()
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        if len(texts) > args.max_documents:
            raise RequestError(
                422,
                f"The request has {len(texts)} documents, but at most {args.max_documents} are allowed. Send several requests.",
            )
        for text in texts:  # a failed batch would also fail the requests of others
            try:
                check_characters(text)
            except ValueError as error:
                raise RequestError(422, str(error)) from None
        found = await batcher.label(texts, request.parameters.model_dump(exclude_none=True))
        documents.inc(len(texts))
        seconds.observe(time.perf_counter() - started)
        return found[0] if isinstance(request.inputs, str) else found

    @app.get("/labels")
    async def labels() -> list[dict[str, Any]]:
        """Names, descriptions, parents and decision thresholds of the labels."""
        descriptions, thresholds = config.label_descriptions or {}, config.thresholds
        parents = config.label_parents or {}
        names = [config.id2label[index] for index in range(config.num_labels)]
        return [
            {
                "label": name,
                "description": descriptions.get(name),
                "parents": parents.get(name, []),
                "threshold": None if thresholds is None else thresholds[index],
            }
            for index, name in enumerate(names)
        ]

    @app.get("/health")
    async def health():
        if batcher.closing:
            return JSONResponse({"status": "closing"}, 503)
        return {"status": "ok", "model": args.model_name_or_path, "waiting": len(batcher.waiting)}

    @app.get("/metrics")
    async def metrics():
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(ServeArguments, description=__doc__.splitlines()[1])
    try:
        (args,) = parser.parse_args_into_dataclasses(args=arguments)
        classify = load_pipeline(args.model_name_or_path, args.model_revision, args.device)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"serve.py: {error}")
    # Requests are handled in one thread, while the model runs in another.
    torch.set_grad_enabled(False)
    app = create_app(classify, args)
    uvicorn.run(
        app, host=args.host, port=args.port, timeout_graceful_shutdown=int(args.timeout_s) + 1, access_log=False
    )


if __name__ == "__main__":
    main()
