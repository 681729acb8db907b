"""Client for one endpoint with the OpenAI chat API: requests, responses, and classification of errors."""

import json
import math
import os
import re
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from .errors import Adapted, AugmentationError, FatalError, ItemError, NotFound, TryAgain
from .pricing import prompt_tokens
from .redaction import Redactor
from .request import Request
from .settings import RequestSettings
from .tokens import approximate_tokens
from .waiting import retry_after_seconds


MAX_COUNT = 10**9  # tokens; larger counts from an endpoint must be wrong
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")


class Endpoint:
    """
    Sends requests to one endpoint through the `openai` client, and returns an answer or raises an error from `errors.py`.

    If the endpoint refuses JSON schema, `max_tokens` (replaced by `max_completion_tokens`) or `temperature`, the client adapts from then
    on. Everything that comes from the endpoint passes through `redact`.

    Raises:
        AugmentationError: if the `openai` package or the key is missing.
    """

    def __init__(self, settings: RequestSettings) -> None:
        try:
            import openai
        except ImportError:
            raise AugmentationError(
                'the package openai is not installed, but requests go through it; run `pip install "sep-mldc[augment]"`.'
            ) from None
        self._openai = openai
        self.settings = settings
        self.redact = Redactor.of_environment(settings.api_key_env)
        self.client = _client(settings)
        self.host = urlsplit(str(self.client.base_url)).netloc.rpartition("@")[2]
        self.structured = settings.structured_output != "text"
        self.token_parameter = "max_tokens"
        self.dropped: set[str] = set()
        self.answered = False

    @property
    def errors(self) -> type[Exception]:
        """The base class of the client's exceptions."""
        return self._openai.APIError

    async def close(self) -> None:
        """Closes the connections."""
        await self.client.close()

    # ------------------------------------------------------------------------------------------- what is sent

    def body(self, request: Request) -> dict[str, Any]:
        """The request body, in the form that this endpoint accepts."""
        body = {name: value for name, value in request.parameters.items() if name not in self.dropped}
        if self.token_parameter != "max_tokens" and "max_tokens" in body:
            body[self.token_parameter] = body.pop("max_tokens")
        if self.structured:
            schema = {
                "type": "object",
                "properties": {request.field: {"type": "string"}},
                "required": [request.field],
                "additionalProperties": False,
            }
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": request.field, "strict": True, "schema": schema},
            }
        return {**body, "model": request.model, "messages": request.messages}

    @property
    def dialect(self) -> dict[str, Any]:
        """What was learned about the endpoint, for use by a later process."""
        return {
            "structured": self.structured,
            "token_parameter": self.token_parameter,
            "dropped": sorted(self.dropped),
        }

    @dialect.setter
    def dialect(self, value: dict[str, Any]) -> None:
        self.structured, self.token_parameter = value["structured"], value["token_parameter"]
        self.dropped = set(value["dropped"])

    async def ask(self, request: Request) -> dict[str, Any]:
        """
        One attempt.

        Returns:
            The journal entry of the answer.

        Raises:
            TryAgain, ItemError, FatalError: see `errors.py`; `Adapted` if the client has adapted to the endpoint.
        """
        began = time.monotonic()
        body = self.body(request)
        text = ""
        try:
            # as text: the content type may be wrong
            text = await self.client.post("/chat/completions", cast_to=str, body=body)
            answer = json.loads(text)
        except self.errors as error:
            raise self.problem(error, body) from None
        except (ValueError, RecursionError):  # JSONDecodeError, UnicodeDecodeError
            raise TryAgain(f"the answer is not JSON: {self.redact.line(text, 80)!r}", maybe_paid=True) from None
        if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):  # an error with status 200
            raise self.judge(_status_of(answer["error"]), answer, {}, body)
        entry = self.entry(request, answer, body)
        self.answered = True
        entry["seconds"] = round(time.monotonic() - began, 3)
        return entry

    # ------------------------------------------------------------------------------------ what an error means

    def problem(self, error: Exception, sent: dict[str, Any]) -> Exception:
        """What an exception of the `openai` client means."""
        openai = self._openai
        if isinstance(error, openai.APIStatusError):
            return self.judge(error.status_code, error.body, error.response.headers, sent)
        cause = error.__cause__ or error
        # the transport reports a refused connection as ConnectTimeout, which the client reports as a timeout
        never_sent = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")
        if isinstance(error, openai.APITimeoutError) and not never_sent:
            return TryAgain(f"no answer within {self.settings.timeout:g} s", maybe_paid=True, reached=False)
        return TryAgain(f"no connection ({self.redact.line(cause)})", maybe_paid=not never_sent, reached=False)

    def judge(self, status: int, body: Any, headers: Mapping[str, str], sent: dict[str, Any]) -> Exception:
        """Classifies a refusal as an error, after adapting to it if possible."""
        error = body.get("error", body) if isinstance(body, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        message = self.redact.line(error.get("message") or body or "no message")
        code = str(error.get("code") or error.get("type") or "")
        fatal = self._fatal_error(status, code, message)
        if fatal is not None:
            return fatal
        if status in (400, 422, 501) and self.learn(f"{message} {error.get('param') or ''}".lower(), sent):
            return Adapted(f"adapted to the endpoint ({message})")
        if status in (408, 409, 425, 429) or status >= 500:
            return TryAgain(f"status {status}: {message}", retry_after_seconds(headers))
        return ItemError(f"status {status}: {message}")

    def _fatal_error(self, status: int, code: str, message: str) -> FatalError | None:
        if status == 401 or (status == 403 and not self.answered):  # a later 403 is about a single prompt (moderation)
            return FatalError(
                f"{self.host} refuses the key in {self.settings.api_key_env} ({status}: {message}); set a valid key and run "
                "the same command again."
            )
        if status == 404:
            model = self.redact.line(self.settings.model)
            return NotFound(
                f"{self.host} does not know the model {model!r} or the address ({status}: {message}); correct `model` or "
                "`base_url`."
            )
        if status == 402 or code in _NO_CREDIT:
            return FatalError(
                f"the account at {self.host} has no credit left ({message}); add some and run the same command again."
            )
        return None

    def learn(self, message: str, sent: dict[str, Any]) -> bool:
        """Whether a refusal is about an optional part of the request; if so, this part is omitted from now on."""
        if "response_format" in sent and re.search(
            r"response.?format|json.?schema|grammar|structured|guided", message
        ):
            if self.settings.structured_output == "auto":
                self.structured = False
                return True
        elif "max_tokens" in sent and "max_completion_tokens" in message:
            self.token_parameter = "max_completion_tokens"
            return True
        elif "temperature" in sent and "temperature" in message:
            self.dropped.add("temperature")
            return True
        return False

    # ------------------------------------------------------------------------------------------ what comes back

    def entry(self, request: Request, answer: Any, sent: dict[str, Any], batch: bool = False) -> dict[str, Any]:
        """
        The journal entry of an answer (a `chat.completion` object), without secrets.

        Raises:
            TryAgain: if the object is not a chat completion, so that there is no answer.
        """
        try:
            choice = answer["choices"][0]
            content = _plain(choice["message"]["content"]) or choice["message"].get("refusal") or ""
            finish_reason, model = choice.get("finish_reason"), answer.get("model")
            usage = answer.get("usage")
            if not isinstance(content, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise TryAgain(
                f"the answer is not a chat completion: {self.redact.line(self.redact(answer), 80)!r}", maybe_paid=True
            ) from None
        usage = usage if isinstance(usage, dict) else {}
        entry = {
            "content": content,
            "finish_reason": finish_reason if isinstance(finish_reason, str) else None,
            "model": model if isinstance(model, str) and model else request.model,
            "requested_model": request.model,
            "endpoint": self.host,
            "parameters": {
                name: value for name, value in sent.items() if name not in ("model", "messages", "response_format")
            },
            "structured": "response_format" in sent,
            "usage": {
                # without counts from the endpoint, the estimate is used
                "prompt_tokens": _count(usage.get("prompt_tokens")) or prompt_tokens(request),
                "completion_tokens": _count(usage.get("completion_tokens")) or approximate_tokens(content),
            },
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "batch": batch,
            "messages": request.messages,
            **request.origin,
        }
        return {"key": request.key, **self.redact(entry)}


def _client(settings: RequestSettings) -> Any:
    """The `openai` client; its type is that of an optional package."""
    import openai

    key = os.environ.get(settings.api_key_env, "").strip()
    if not key and settings.base_url is None:
        raise AugmentationError(
            f"the environment variable {settings.api_key_env} is empty, but OpenAI's endpoint needs a key; set it, or "
            "specify another endpoint with `base_url`."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise AugmentationError(
            f"the key in {settings.api_key_env} contains spaces or other characters that cannot be part of a key; copy it again."
        )
    try:
        transport = openai.DefaultAioHttpClient(timeout=settings.timeout)  # half the CPU time per request
    except RuntimeError:  # aiohttp is not installed
        transport = None
    return openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=settings.base_url,
        max_retries=0,  # retries are handled here, with limits and pacing
        timeout=settings.timeout,
        http_client=transport,
    )


def _plain(content: Any) -> Any:
    """The text of a message that comes in parts."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _status_of(error: Any) -> int:
    """The actual status of an error that was returned with status 200."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _count(value: Any) -> int:
    """A token count from an endpoint; 0 if it is not a valid number."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return int(value) if valid and 0 < value <= MAX_COUNT else 0
