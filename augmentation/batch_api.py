"""Client for the OpenAI Batch API, with retries and validation of the responses."""

import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from .client import Endpoint
from .errors import AugmentationError, FatalError, ItemError, NotFound, TryAgain
from .waiting import seconds_to_wait


FINISHED = ("completed", "failed", "expired", "cancelled")
UNDER_WAY = ("validating", "in_progress", "finalizing", "cancelling")
MAX_LISTED = 10_000  # maximum number of batches to search for one with a given token

T = TypeVar("T")


@dataclass
class BatchLook:
    """The status of a batch."""

    status: str
    completed: int = 0
    total: int = 0
    files: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.status in FINISHED


class BatchApi:
    """
    Uploads, creates, finds, inspects and downloads batches.

    Every method raises `NotFound` if the endpoint does not know the requested object, and another `AugmentationError` if it cannot be
    reached.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.settings = endpoint, endpoint.settings

    async def upload(self, token: str, data: bytes) -> str:
        """Uploads an input file; returns its id."""
        client = self.endpoint.client
        try:
            return await self._call(
                lambda: client.files.create(file=(f"{token}.jsonl", io.BytesIO(data)), purpose="batch"), _id_of
            )
        except NotFound:
            raise FatalError(
                f"{self.endpoint.host} does not offer the Batch API (status 404 for an upload); leave out `batch`."
            ) from None

    async def create(self, file_id: str, token: str) -> str:
        """Creates the batch for an uploaded file; returns its id, even if a response was lost in transit."""
        attempts = 0

        async def create() -> Any:
            nonlocal attempts
            attempts += 1
            found = (
                await self.find(token) if attempts > 1 else None
            )  # an attempt whose response was lost may have created it
            if found is not None:
                return found
            return await self.endpoint.client.batches.create(
                input_file_id=file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"sep_mldc": token},
            )

        return await self._call(create, lambda made: made if isinstance(made, str) and attempts > 1 else _id_of(made))

    async def find(self, token: str) -> str | None:
        """The id of the batch that was created with this token, or None."""

        async def search() -> str | None:
            seen = 0
            async for batch in self.endpoint.client.batches.list(limit=100):
                metadata = getattr(batch, "metadata", None)
                if isinstance(metadata, dict) and metadata.get("sep_mldc") == token:
                    return _id_of(batch)
                seen += 1
                if seen >= MAX_LISTED:
                    break
            return None

        return await self._call(search)

    async def look(self, batch_id: str) -> BatchLook:
        """The status of a batch."""
        return await self._call(lambda: self.endpoint.client.batches.retrieve(batch_id), self._look_of)

    def _look_of(self, batch: Any) -> BatchLook:
        status = getattr(batch, "status", None)
        if status not in (*FINISHED, *UNDER_WAY):
            raise TryAgain(f"the batch has no known status ({self.endpoint.redact.line(status, 40)})")
        counts, errors = getattr(batch, "request_counts", None), getattr(batch, "errors", None)
        files = (getattr(batch, name, None) for name in ("output_file_id", "error_file_id"))
        listed = getattr(errors, "data", None)
        return BatchLook(
            status=status,
            completed=_whole(getattr(counts, "completed", 0)),
            total=_whole(getattr(counts, "total", 0)),
            files=[name for name in files if isinstance(name, str) and name],
            errors=[
                self.endpoint.redact.line(getattr(error, "message", error))
                for error in (listed if isinstance(listed, list) else [])[:3]
            ],
        )

    async def lines(self, file_id: str, at_least: int = 0) -> tuple[list[Any], int]:
        """
        The JSON values of a file, and how many of its lines are not JSON after all attempts.

        An incomplete download is repeated.

        Args:
            file_id (`str`): As the endpoint names it.
            at_least (`int`): Expected number of lines, according to the counts of the batch.
        """
        best: tuple[list[Any], int] | None = None

        def parse(content: Any) -> tuple[list[Any], int]:
            nonlocal best
            values, bad = [], 0
            for line in content.content.split(b"\n"):
                try:
                    if line.strip():
                        values.append(json.loads(line))
                except (ValueError, RecursionError):
                    bad += 1
            if best is None or len(values) > len(best[0]):
                best = values, bad
            if bad or len(values) < at_least:
                raise TryAgain(f"the download of file {file_id} was incomplete")
            return values, bad

        try:
            return await self._call(lambda: self.endpoint.client.files.content(file_id), parse)
        except NotFound:
            raise
        except AugmentationError:
            if best is None:
                raise
            return best

    async def _call(self, function: Callable[[], Awaitable[Any]], read: Callable[[Any], T] | None = None) -> Any:
        """Calls the endpoint and parses its response, with retries after transient errors."""
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(TryAgain),
                stop=stop_after_attempt(self.settings.max_retries + 1),
                wait=lambda state: seconds_to_wait(state, self.settings, self.endpoint.host),
                reraise=True,
            ):
                with attempt:
                    try:
                        answer = await function()
                        return answer if read is None else read(answer)
                    except self.endpoint.errors as error:
                        raise self.endpoint.problem(error, {}) from None
                    except (AttributeError, TypeError, ValueError, KeyError) as error:  # an unexpected response format
                        raise TryAgain(
                            f"unexpected format of the response: {self.endpoint.redact.line(error, 80)}"
                        ) from None
        except (TryAgain, ItemError) as error:
            raise AugmentationError(
                f"{self.endpoint.host} does not answer as the Batch API does ({error}); run the same command again, or leave "
                "out `batch`."
            ) from None
        raise AssertionError("tenacity returns or raises")


def _id_of(thing: Any) -> str:
    name = getattr(thing, "id", None)
    if not isinstance(name, str) or not name:
        raise TryAgain("the answer has no id")
    return name


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
