"""One endpoint that speaks the OpenAI chat protocol: what is sent, what comes back, and what an error means."""

import email.utils
import json
import os
import re
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .files import AugmentationError, clean
from .journal import Request
from .pricing import prompt_tokens
from .prompts import approximate_tokens


@dataclass
class RequestSettings:
    """
    How to reach a model, and within which limits.

    Args:
        model (`str`): Model name that the endpoint knows.
        base_url (`str`, *optional*): Address of an OpenAI-compatible endpoint, such as `http://localhost:8000/v1`;
            without it, OpenAI's own.
        api_key_env (`str`, defaults to `"OPENAI_API_KEY"`): Environment variable that holds the key.
        temperature (`float`, *optional*): Overrides the task's temperature.
        max_tokens (`int`, *optional*): Overrides the task's limit of an answer's length. Reasoning models need more.
        parameters (`dict`): More fields of the request body, sent as they are.
        structured_output (`str`): `"json_schema"`, `"text"`, or `"auto"`: JSON schema until the endpoint refuses it.
        concurrency (`int`): Requests under way at the same time.
        requests_per_minute, tokens_per_minute (`float`, *optional*): Rate limits; tokens are prompt plus answer.
        max_requests (`int`, *optional*): Most HTTP requests of this run, retries included.
        max_cost (`float`, *optional*): Most money for the whole journal, earlier runs included.
        max_retries (`int`): Further attempts for a request after an error that may pass.
        initial_backoff (`float`): Seconds before the first retry; doubles each time, up to 60, plus jitter.
        max_wait (`float`): Longest `Retry-After` in seconds that is waited for; a longer one stops the run.
        timeout (`float`): Seconds that one attempt may take.
        prices (path, *optional*): Price file that overrides the package's.
        batch (`bool`): Use the Batch API: half the price, answers within a day.
        batch_poll_seconds (`float`): Seconds between two looks at a batch.
        progress (`bool`): Show a progress bar.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = None
    max_tokens: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    structured_output: str = "auto"
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_requests: int | None = None
    max_cost: float | None = None
    max_retries: int = 6
    initial_backoff: float = 1.0
    max_wait: float = 900.0
    timeout: float = 120.0
    prices: str | Path | None = None
    batch: bool = False
    batch_poll_seconds: float = 30.0
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.model:
            raise AugmentationError("no model is named, but every request needs one; give it with `--model`.")
        for name in ("concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "batch_poll_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise AugmentationError(f"`{name}` is {value}, but must be above 0; leave it out for the default.")
        if self.structured_output not in ("auto", "json_schema", "text"):
            raise AugmentationError(
                f"`structured_output` is {self.structured_output!r}, but must be auto, json_schema or text; choose one."
            )
        if self.base_url and urlsplit(self.base_url).scheme not in ("http", "https"):
            raise AugmentationError(
                "`base_url` does not begin with http:// or https://; write it like http://localhost:8000/v1."
            )
        if self.base_url and urlsplit(self.base_url).username is not None:
            raise AugmentationError(
                "`base_url` holds a user name or a password, but secrets are read from the environment only; put the key into "
                f"{self.api_key_env} and take it out of the address."
            )

    def request_parameters(self, temperature: float, max_tokens: int) -> dict[str, Any]:
        """Parameters of a request whose task wants this temperature and length; part of the journal's key."""
        return {
            **self.parameters,
            "temperature": float(temperature if self.temperature is None else self.temperature),
            "max_tokens": max_tokens if self.max_tokens is None else self.max_tokens,
        }


class FatalError(AugmentationError):
    """Every further request would fail in the same way."""


class ItemError(Exception):
    """This request failed for good; others may succeed."""


class TryAgain(Exception):
    """This attempt failed, another may succeed; `maybe_paid` where the endpoint may have done the work."""

    def __init__(self, reason: str, retry_after: float | None = None, maybe_paid: bool = False, reached: bool = True):
        super().__init__(reason)
        self.retry_after = retry_after
        self.maybe_paid = maybe_paid
        self.reached = reached


def retry_after_seconds(headers) -> float | None:
    """Seconds that the headers `retry-after-ms` or `Retry-After` (seconds or a date) ask to wait."""
    try:
        if headers.get("retry-after-ms"):
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


class Endpoint:
    """
    Sends requests to one endpoint through the `openai` client and turns what happens into an answer or one of the errors above.

    What the endpoint does not accept is learnt from its first refusals: JSON schema, `max_tokens` (then
    `max_completion_tokens`), `temperature`.

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
        self._key = os.environ.get(settings.api_key_env, "").strip()
        if not self._key and settings.base_url is None:
            raise AugmentationError(
                f"the environment variable {settings.api_key_env} is empty, but OpenAI's endpoint needs a key; set it, or "
                "name another endpoint with `--base-url`."
            )
        try:
            transport = openai.DefaultAioHttpClient(timeout=settings.timeout)  # half the work for each request
        except RuntimeError:  # aiohttp is not installed
            transport = None
        self.client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=settings.base_url,
            max_retries=0,  # retries are counted, paced and paid for here
            timeout=settings.timeout,
            http_client=transport,
        )
        self.host = urlsplit(str(self.client.base_url)).netloc.rpartition("@")[2]
        self.structured = settings.structured_output != "text"
        self.token_parameter = "max_tokens"
        self.dropped: set[str] = set()
        self.answered = False

    async def close(self) -> None:
        await self.client.close()

    def redact(self, text: str) -> str:
        """Text without the key, on one line."""
        text = " ".join(str(text).split())
        return (text.replace(self._key, "***") if self._key else text)[:500]

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
        return {"model": request.model, "messages": request.messages, **body}

    @property
    def dialect(self) -> dict[str, Any]:
        """What was learnt about the endpoint, so that a later process can go on with it."""
        return {
            "structured": self.structured,
            "token_parameter": self.token_parameter,
            "dropped": sorted(self.dropped),
        }

    @dialect.setter
    def dialect(self, value: dict[str, Any]) -> None:
        self.structured, self.token_parameter = value["structured"], value["token_parameter"]
        self.dropped = set(value["dropped"])

    def problem(self, error: Exception, sent: dict[str, Any]) -> Exception:
        """What an exception of the `openai` client means."""
        openai = self._openai
        if isinstance(error, openai.APITimeoutError):
            return TryAgain(f"no answer within {self.settings.timeout:g} s", maybe_paid=True, reached=False)
        if isinstance(error, openai.APIStatusError):
            return self.judge(error.status_code, error.body, error.response.headers, sent)
        cause = error.__cause__ or error
        never_sent = "connect" in type(cause).__name__.lower()
        return TryAgain(f"no connection ({self.redact(str(cause))})", maybe_paid=not never_sent, reached=False)

    async def ask(self, request: Request) -> dict[str, Any]:
        """
        One attempt.

        Returns:
            The journal entry of the answer.

        Raises:
            TryAgain, ItemError, FatalError: as the names say. `TryAgain(retry_after=0)` after something was learnt.
        """
        began = time.monotonic()
        body = self.body(request)
        text = ""
        try:
            # as text: whatever the content type says, the answer is looked at here
            text = await self.client.post("/chat/completions", cast_to=str, body=body)
            answer = json.loads(text)
        except self._openai.APIError as error:
            raise self.problem(error, body) from None
        except ValueError:  # JSONDecodeError, UnicodeDecodeError
            raise TryAgain(f"the answer is not JSON: {self.redact(text[:80])!r}", maybe_paid=True) from None
        entry = self.entry(request, answer, body)
        self.answered = True
        entry["seconds"] = round(time.monotonic() - began, 3)
        return entry

    def judge(self, status: int, body: Any, headers: Any, sent: dict[str, Any]) -> Exception:
        """The error that a refusal stands for, after learning from it."""
        error = body.get("error", body) if isinstance(body, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        message = self.redact(error.get("message") or body or "no message")
        code = str(error.get("code") or error.get("type") or "")
        model = self.settings.model
        if status == 401 or (status == 403 and not self.answered):  # later on, a 403 is about one prompt (moderation)
            return FatalError(
                f"{self.host} refuses the key in {self.settings.api_key_env} ({status}: {message}); set a valid key and run "
                "the same command again."
            )
        if status == 404:
            return FatalError(
                f"{self.host} does not know the model {model!r} or the address ({status}: {message}); correct `--model` or "
                "`--base-url`."
            )
        if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached"):
            return FatalError(
                f"the account at {self.host} has no credit left ({message}); add some and run the same command again."
            )
        if status in (400, 422, 501) and self.learn(f"{message} {error.get('param') or ''}".lower(), sent):
            return TryAgain(f"adapted to the endpoint ({message})", retry_after=0.0)
        if status in (408, 409, 425, 429) or status >= 500:
            return TryAgain(f"status {status}: {message}", retry_after_seconds(headers))
        return ItemError(f"status {status}: {message}")

    def learn(self, message: str, sent: dict[str, Any]) -> bool:
        """Whether a refusal is about a part of the request that can be left out, which is then left out from now on."""
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

    def entry(self, request: Request, answer: Any, sent: dict[str, Any], batch: bool = False) -> dict[str, Any]:
        """
        The journal entry of an answer (a `chat.completion` object).

        Raises:
            TryAgain: if the object is not one, so that its answer has not arrived.
        """
        try:
            choice = answer["choices"][0]
            content = choice["message"]["content"] or choice["message"].get("refusal") or ""
            usage = answer.get("usage") or {}
            if not isinstance(content, str):
                raise TypeError
            counts = {
                # an endpoint that does not count is paid by the estimate
                "prompt_tokens": int(usage.get("prompt_tokens") or prompt_tokens(request)),
                "completion_tokens": int(usage.get("completion_tokens") or approximate_tokens(content)),
            }
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise TryAgain(
                f"the answer is not a chat completion: {self.redact(json.dumps(answer))[:80]!r}", maybe_paid=True
            ) from None
        return {
            "key": request.key,
            "content": content,
            "finish_reason": choice.get("finish_reason"),
            "model": str(answer.get("model") or request.model),
            "requested_model": request.model,
            "endpoint": self.host,
            "parameters": {
                name: value for name, value in sent.items() if name not in ("model", "messages", "response_format")
            },
            "structured": "response_format" in sent,
            "usage": counts,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "batch": batch,
            "messages": request.messages,
            **request.origin,
        }


def answer_text(entry: dict[str, Any], field_name: str) -> tuple[str, bool]:
    """
    The text of an answer, whether it came as JSON, as JSON cut short, in a Markdown fence or as plain text.

    Returns:
        The text, and whether the answer was cut off by its limit of tokens.
    """
    content = re.sub(r"<think>.*?(</think>|\Z)", "", entry["content"], flags=re.S).strip()
    content = re.sub(r"\A```\w*\s*\n(.*?)\n?```\Z", r"\1", content, flags=re.S).strip()
    cut = entry.get("finish_reason") == "length"
    if content.startswith("{"):
        unescaped = re.sub(r"\\(u[0-9a-fA-F]{0,3})?\Z", "", content)  # a string may be cut within an escape sequence
        for text, whole in ((content, True), (unescaped + '"}', False), (content + "}", False)):
            try:
                value, _ = json.JSONDecoder(strict=False).raw_decode(text)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get(field_name), str):
                return clean(value[field_name]), cut or not whole
    return clean(content), cut
