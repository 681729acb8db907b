"""Sends missing requests, with concurrency, rate limits, retries, spending limits, and a clean stop."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from .client import Endpoint
from .errors import Adapted, AugmentationError, FatalError, ItemError, TryAgain
from .journal import Journal
from .pricing import Budget, most_completion_tokens, prompt_tokens
from .progress import progress_bar, remark
from .request import Request
from .settings import RequestSettings
from .waiting import error_of, seconds_to_wait


FAILURES_IN_A_ROW = 10  # consecutive failed requests before the run stops
FIRST_FAILURES = 3  # the same, until the endpoint has answered once
FIRST_ATTEMPTS = 3  # attempts until there was a readable answer, to avoid long waits and unnecessary cost
TOKEN_BYTES, LINE_BYTES = 16, 2048  # maximum bytes in the journal per token of an answer, and for the rest of its line


class Task(Protocol):
    """The interface of a task for the runner. Items are numbered, so that they need not be kept in memory."""

    name: str
    old_name: str
    file_name: str

    def __len__(self) -> int: ...

    def identity(self, index: int) -> dict[str, Any]:
        """Names the item in `failed_requests.jsonl`."""

    def request(self, index: int) -> Request:
        """The item's request."""

    def follow_up(self, index: int, request: Request, entry: dict[str, Any]) -> Request | None:
        """A follow-up request if the answer is not usable, else None."""

    def row(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """The output row; raises `ItemError` if the answers are not usable."""


class StopRun(Exception):
    """Raised when no further requests may be sent; those in progress are finished."""


@dataclass
class RunState:
    """The state of a run: `failed` maps item numbers to reasons, `stopped` says why it ended early."""

    failed: dict[int, str] = field(default_factory=dict)
    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stopped: str | None = None
    fatal: AugmentationError | None = None
    notes: list[str] = field(default_factory=list)

    def count(self, entry: dict[str, Any]) -> None:
        """Counts an answer."""
        self.answered += 1
        self.prompt_tokens += entry["usage"]["prompt_tokens"]
        self.completion_tokens += entry["usage"]["completion_tokens"]


@contextlib.contextmanager
def on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Calls `callback` on Ctrl-C and SIGTERM, where the thread and the system allow it."""
    loop, names = asyncio.get_running_loop(), []
    for name in (signal.SIGINT, signal.SIGTERM):
        # asyncio has no signal handlers on Windows (NotImplementedError) or outside the main thread (RuntimeError). There, Ctrl-C ends the run
        # as usual, and the journal allows resuming it.
        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.add_signal_handler(name, callback)
            names.append(name)
    try:
        yield
    finally:
        for name in names:
            loop.remove_signal_handler(name)


class Pacer:
    """Spreads an amount per minute evenly over time."""

    def __init__(self, per_minute: float | None) -> None:
        self.seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def delay(self, amount: float = 1.0) -> float:
        """Reserves an amount; returns the seconds until it may be used."""
        now = time.monotonic()
        begin = max(now, self._free_at)
        self._free_at = begin + amount * self.seconds_each
        return begin - now

    def give_back(self, amount: float) -> None:
        """Releases an amount that was reserved but not used."""
        self._free_at -= amount * self.seconds_each


class Runner:
    """
    Answers every item of a task through the journal.

    The first request is sent alone: it reveals a bad key, a wrong address or an unknown model, and what the endpoint accepts, before
    anything else is sent. A `Retry-After` delays all requests. Equal requests are sent only once.
    """

    def __init__(self, task: Task, settings: RequestSettings, journal: Journal) -> None:
        self.task, self.settings, self.journal = task, settings, journal
        self.budget = Budget(settings, journal)
        self.endpoint = Endpoint(settings)
        self.state = RunState()
        self._in_flight = 0
        self._failures = 0
        self._not_before = 0.0
        self._under_way: dict[str, asyncio.Event] = {}
        self._requests = Pacer(settings.requests_per_minute)
        self._tokens = Pacer(settings.tokens_per_minute)

    # ------------------------------------------------------------------------------------------------- the run

    async def run(self) -> RunState:
        """Returns when every item is answered or has failed, or after a stop, when no requests are in progress."""
        self._stop = asyncio.Event()
        self._first = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._indices = iter(range(len(self.task)))
        self._bar = progress_bar(
            total=len(self.task), desc=self.task.name, unit="item", show=self.settings.progress, smoothing=0.1
        )
        workers = [asyncio.create_task(self._work()) for _ in range(min(self.settings.concurrency, len(self.task)))]

        def interrupt() -> None:
            if self._stop.is_set():
                for worker in workers:
                    worker.cancel()
            self._end("interrupted")
            remark("Finishing the requests in progress; press Ctrl-C again to abort them.")

        with on_interrupt(interrupt):
            results = await asyncio.gather(*workers, return_exceptions=True)
        self._bar.close()
        await self.endpoint.close()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result
        if self.state.fatal:
            raise self.state.fatal
        await self.journal.synced()
        return self.state

    def _end(self, reason: str, fatal: AugmentationError | None = None) -> None:
        self.state.stopped = self.state.stopped or reason
        self.state.fatal = self.state.fatal or fatal
        self._stop.set()

    async def _work(self) -> None:
        for index in self._indices:
            if self._stop.is_set():
                return
            try:
                await self._item(index)
                self._failures = 0
            except ItemError as error:
                self._fail(index, error)
            except StopRun:
                return
            except AugmentationError as error:
                self._end(str(error), error)
                return
            except Exception as error:  # a bug: the other workers must not continue and cause cost
                self._end(repr(error))
                raise
            finally:
                self._show()
            self._bar.update()

    def _fail(self, index: int, error: ItemError) -> None:
        self.state.failed[index] = str(error)
        self._failures += 1
        if self._failures >= (FAILURES_IN_A_ROW if self.endpoint.answered else FIRST_FAILURES):
            problem = f"the last {self._failures} requests all failed ({error}); correct the cause and run the same command again."
            self._end(problem, AugmentationError(problem))

    def _show(self) -> None:
        shown: dict[str, Any] = {"failed": len(self.state.failed)}
        if self.budget.price:
            shown["cost"] = f"{self.budget.spent:.4f} {self.budget.prices.currency}"
        self._bar.set_postfix(shown, refresh=False)

    async def _item(self, index: int) -> None:
        request = self.task.request(index)
        entries = [await self._answer(request)]
        further = self.task.follow_up(index, request, entries[0])
        if further is not None:
            entries.append(await self._answer(further))
        self.task.row(index, entries)

    # --------------------------------------------------------------------------------------------- one request

    async def _answer(self, request: Request) -> dict[str, Any]:
        while (entry := self.journal.answer(request)) is None and request.key in self._under_way:
            await self._under_way[request.key].wait()
        if entry is not None:
            return entry
        self._under_way[request.key] = asyncio.Event()
        try:
            if not self.endpoint.answered:
                async with self._first:
                    if not self.endpoint.answered:
                        return await self._with_retries(request)
            return await self._with_retries(request)
        finally:
            self._under_way.pop(request.key).set()

    async def _with_retries(self, request: Request) -> dict[str, Any]:
        failed = 0

        def give_up(state: RetryCallState) -> bool:
            nonlocal failed
            error = error_of(state)
            failed += not isinstance(error, Adapted)
            retries = self.settings.max_retries
            return failed > (min(retries, FIRST_ATTEMPTS - 1) if self._never_answered(error) else retries)

        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(TryAgain), stop=give_up, wait=self._wait, sleep=self._pause, reraise=True
            ):
                with attempt:
                    return await self._once(request)
        except TryAgain as error:
            if self._never_answered(error):
                what = "gives no answer that can be read" if error.reached else "cannot be reached"
                raise FatalError(
                    f"the endpoint {self.endpoint.host} {what} ({error}); start the server, or correct `base_url`."
                ) from None
            raise ItemError(f"{error}, after {failed} attempts") from None
        raise AssertionError("tenacity returns or raises")

    def _never_answered(self, error: TryAgain) -> bool:
        """Whether there has been no readable answer from the endpoint yet."""
        return not self.endpoint.answered and (error.maybe_paid or not error.reached)

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt; a `Retry-After` delays all requests."""
        wait = seconds_to_wait(state, self.settings, self.endpoint.host)
        asked = error_of(state).retry_after
        if asked is not None:
            self._not_before = max(self._not_before, time.monotonic() + asked)
        return wait

    async def _pause(self, seconds: float) -> None:
        if self._stop.is_set():
            raise StopRun
        if seconds > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
        if self._stop.is_set():
            raise StopRun

    async def _once(self, request: Request) -> dict[str, Any]:
        booked = prompt_tokens(request) + request.expected_tokens if self.settings.tokens_per_minute else 0
        await self._pause(max(self._requests.delay(), self._tokens.delay(booked)))
        while (wait := self._not_before - time.monotonic()) > 0:
            await self._pause(wait)
        with self.journal.room(most_bytes(request)):
            entry = await self._sent(request)
        self._tokens.give_back(booked - sum(entry["usage"].values()))
        return entry

    async def _sent(self, request: Request) -> dict[str, Any]:
        """Sends a request within the limits. The answer is accounted for and written to the journal before anything else."""
        most = self.budget.highest_cost(request)
        await self._reserve(most)
        try:
            entry = await self.endpoint.ask(request)
            self.state.count(entry)
            self.budget.pay(entry)
            self.journal.append(entry)
            return entry
        except (TryAgain, asyncio.CancelledError) as error:
            if getattr(error, "maybe_paid", True):
                self.journal.append(self.budget.lose(request))
            raise
        finally:
            self._in_flight -= 1
            self.budget.release(most)
            async with self._changed:
                self._changed.notify_all()

    async def _reserve(self, most: float) -> None:
        """Waits until the request is within the limits even with the longest possible answer; stops the run if it never will be."""
        async with self._changed:
            while self.budget.exceeds(most) and self._in_flight:
                await self._changed.wait()
            if self._stop.is_set():
                raise StopRun
            reason = self.budget.refusal(most)
            if reason is not None:
                self._end(reason)
                raise StopRun
            self.budget.reserve(most)
            self._in_flight += 1


def most_bytes(request: Request) -> int:
    """The maximum number of bytes of the answer's line in the journal, with every second character of the prompt escaped."""
    prompt = sum(len(message["content"].encode("utf-8", "backslashreplace")) for message in request.messages)
    return 2 * prompt + TOKEN_BYTES * most_completion_tokens(request) + LINE_BYTES
