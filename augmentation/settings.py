"""The model, its endpoint, and the limits of requests."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from .checks import check_number
from .errors import AugmentationError


# Request fields that have their own argument, or that would change the cost, the prompt or the format of the answer.
_OWN_ARGUMENT = {"model": "model", "temperature": "temperature", "max_tokens": "max_tokens"} | dict.fromkeys(
    ("max_completion_tokens", "max_output_tokens", "max_new_tokens", "max_length", "num_predict", "n_predict"),
    "max_tokens",
)
_RESERVED = {
    "the prompt": {"messages", "prompt", "input", "system", "instructions", "prediction", "functions", "function_call", "tools",
                   "tool_choice", "parallel_tool_calls", "documents", "previous_response_id", "conversation"},
    "the number of answers that are paid": {"n", "best_of", "num_completions", "num_return_sequences", "candidate_count",
                                            "use_beam_search", "beam_width", "num_beams"},
    "what is paid per answer": {"service_tier", "models", "route", "provider", "plugins", "web_search_options", "modalities",
                                "audio", "fallbacks", "options"},
    "the form of the answer": {"stream", "stream_options", "response_format", "guided_json", "guided_regex", "guided_choice",
                               "guided_grammar", "grammar", "json_schema", "echo", "background", "logit_bias", "format"},
    "the headers or the key of the request": {"extra_headers", "extra_query", "extra_body", "headers", "authorization"},
}  # fmt: skip
_SECRET_NAME = re.compile(r"api[-_]?key|secret|password|authorization|access[-_]?token|\A(token|key)\Z", re.I)


@dataclass
class RequestSettings:
    """
    The model, its endpoint, and the limits of requests.

    Args:
        model (`str`): Model name that the endpoint knows.
        base_url (`str`, *optional*): Address of an OpenAI-compatible endpoint, such as `http://localhost:8000/v1`;
            without it, OpenAI's own.
        api_key_env (`str`, defaults to `"OPENAI_API_KEY"`): Environment variable that holds the key.
        temperature (`float`, *optional*): Overrides the task's temperature.
        max_tokens (`int`, *optional*): Overrides the task's maximum length of an answer. Reasoning models need more.
        parameters (`dict`): Additional fields of the request body, sent unchanged. Fields that would change the cost, the prompt or
            the format of the answer are refused.
        structured_output (`str`): `"json_schema"`, `"text"`, or `"auto"`: JSON schema until the endpoint refuses it.
        concurrency (`int`): Maximum number of concurrent requests.
        requests_per_minute, tokens_per_minute (`float`, *optional*): Rate limits; tokens are prompt plus answer.
        max_requests (`int`, *optional*): Maximum number of HTTP requests of this run, retries included.
        max_cost (`float`, *optional*): Maximum cost of the whole journal, earlier runs included.
        max_retries (`int`): Maximum number of retries of a request after transient errors.
        initial_backoff (`float`): Seconds before the first retry; doubles each time, up to 60, plus jitter.
        max_wait (`float`): Maximum `Retry-After`, in seconds, to wait for; a longer one stops the run.
        timeout (`float`): Timeout of one attempt in seconds.
        prices (path, *optional*): Price file that overrides the package's.
        batch (`bool`): Use the Batch API: half the price, answers within a day.
        batch_poll_seconds (`float`): Seconds between two status checks of a batch.
        abandon_batches (`bool`): Resend the requests of batches that can no longer be accessed.
        progress (`bool`): Show a progress bar.

    Raises:
        AugmentationError: if a value has the wrong type or is outside its range.
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
    abandon_batches: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise AugmentationError(f"`model` is {self.model!r}, but every request needs a model name; give one.")
        check_number("concurrency", self.concurrency, 1, 10_000, integer=True)
        check_number("max_tokens", self.max_tokens, 1, integer=True, optional=True)
        check_number("max_requests", self.max_requests, integer=True, optional=True)
        check_number("max_retries", self.max_retries, maximum=1000, integer=True)
        for name in ("temperature", "max_cost"):
            check_number(name, getattr(self, name), optional=True)
        for name in ("initial_backoff", "max_wait"):
            check_number(name, getattr(self, name))
        for name in ("timeout", "batch_poll_seconds"):
            check_number(name, getattr(self, name), above=True)
        for name in ("requests_per_minute", "tokens_per_minute"):
            check_number(name, getattr(self, name), above=True, optional=True)
        if self.structured_output not in ("auto", "json_schema", "text"):
            raise AugmentationError(
                f"`structured_output` is {self.structured_output!r}, but must be auto, json_schema or text; choose one."
            )
        _check_parameters(self.parameters)
        _check_address(self.base_url, self.api_key_env)

    def request_parameters(self, temperature: float, max_tokens: int) -> dict[str, Any]:
        """Parameters of a request for a task with this temperature and length; part of the journal key."""
        return {
            **self.parameters,
            "temperature": float(temperature if self.temperature is None else self.temperature),
            "max_tokens": max_tokens if self.max_tokens is None else self.max_tokens,
        }


def _check_parameters(parameters: Any) -> None:
    if not isinstance(parameters, dict) or not all(isinstance(name, str) for name in parameters):
        raise AugmentationError(
            f'`parameters` is a {type(parameters).__name__}, but must be an object of fields; write {{"top_p": 0.9}}.'
        )
    for name in parameters:
        plain = name.strip().lower()
        if plain in _OWN_ARGUMENT:
            raise AugmentationError(
                f"`parameters` must not hold {name!r}; use the argument `{_OWN_ARGUMENT[plain]}` instead."
            )
        if _SECRET_NAME.search(plain):
            raise AugmentationError(
                f"`parameters` must not hold {name!r}: parameters are stored with each answer, and secrets are read from the "
                "environment only; specify the variable with `api_key_env`."
            )
        for what, names in _RESERVED.items():
            if plain in names:
                raise AugmentationError(f"`parameters` must not hold {name!r}, which changes {what}; leave it out.")
    try:
        json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AugmentationError(f"`parameters` cannot be sent as JSON ({error}); correct the value.") from None


def _check_address(base_url: Any, api_key_env: str) -> None:
    if base_url is None:
        return
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except (ValueError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise AugmentationError(
            "`base_url` must begin with http:// or https:// and name a host; write it like http://localhost:8000/v1."
        )
    if parts.username is not None or any(_SECRET_NAME.search(name) for name, _ in parse_qsl(parts.query)):
        raise AugmentationError(
            "`base_url` contains a user name, a password or a key, but secrets are read from the environment only; put the key "
            f"into {api_key_env} and take it out of the address."
        )
