"""Sends what is missing: concurrency, pace, retries, limits, and an orderly stop."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tqdm import tqdm

from .client import Endpoint, FatalError, ItemError, RequestSettings, TryAgain
from .files import AugmentationError
from .journal import Journal, Request
from .pricing import Price, PriceList, prompt_tokens


FAILURES_IN_A_ROW = 10  # requests that failed for good, with no success between them, before the run stops
FIRST_FAILURES = 3  # the same, as long as the endpoint has not answered once
ESTIMATE_MARGIN = 1.25  # the approximate token count may be too low; limits must hold all the same


class Task(Protocol):
    """What the runner needs to know of a task; items are numbered, so that nothing of them is kept in memory."""

    name: str

    def __len__(self) -> int: ...

    def identity(self, index: int) -> dict[str, Any]:
        """Names the item in `failed_requests.jsonl`."""

    def request(self, index: int) -> Request:
        """The item's request."""

    def follow_up(self, index: int, request: Request, entry: dict[str, Any]) -> Request | None:
        """One more request where the answer will not do."""

    def row(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """The output row; raises `ItemError` where the answers are of no use."""


class StopRun(Exception):
    """No further request is to be sent; those under way are finished."""


@dataclass
class RunState:
    """What a run has done: `failed` maps item numbers to reasons, `stopped` says why it ended early."""

    failed: dict[int, str] = field(default_factory=dict)
    sent: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    spent: float = 0.0
    stopped: str | None = None
    fatal: AugmentationError | None = None


@contextlib.contextmanager
def on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Calls `callback` on Ctrl-C and SIGTERM, where the thread and the system allow it."""
    loop, names = asyncio.get_running_loop(), []
    for name in (signal.SIGINT, signal.SIGTERM):
        # asyncio has no signal handlers on Windows (NotImplementedError) and none beside the main thread (RuntimeError): there
        # Ctrl-C ends the run as it ends any program, and the journal resumes it.
        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.add_signal_handler(name, callback)
            names.append(name)
    try:
        yield
    finally:
        for name in names:
            loop.remove_signal_handler(name)


def budget(settings: RequestSettings, journal: Journal) -> tuple[PriceList, Price | None, float]:
    """
    The price list, the model's price, and, where `max_cost` needs it, what the journal's answers have cost.

    Raises:
        AugmentationError: if `max_cost` is given for a model without a price.
    """
    prices = PriceList(settings.prices)
    price = prices.get(settings.model)
    if settings.max_cost is None:
        return prices, price, 0.0
    if price is None:
        raise AugmentationError(
            f"the price of {settings.model!r} is unknown, so `--max-cost` cannot be kept; name it in a file given with "
            "`--prices`, or use `--max-requests`."
        )
    return prices, price, sum(prices.cost_of(entry) or 0.0 for entry in journal.entries())


def highest_cost(request: Request, price: Price | None, batch: bool = False) -> float:
    """What a request costs if its answer is as long as it can be; 0 without a price."""
    if price is None:
        return 0.0
    longest = request.parameters.get("max_tokens") or request.expected_tokens
    return price.cost(int(prompt_tokens(request) * ESTIMATE_MARGIN), longest, batch)


class Pacer:
    """Spreads an amount per minute evenly over time."""

    def __init__(self, per_minute: float | None) -> None:
        self.seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def delay(self, amount: float = 1.0) -> float:
        """Books an amount; returns the seconds until it may be used."""
        now = time.monotonic()
        begin = max(now, self._free_at)
        self._free_at = begin + amount * self.seconds_each
        return begin - now

    def give_back(self, amount: float) -> None:
        """Returns what was booked and not used."""
        self._free_at -= amount * self.seconds_each


class Runner:
    """
    Answers every item of a task through the journal.

    The first request goes alone: it shows a bad key, a wrong address or an unknown model before anything else is sent, and what
    the endpoint accepts. A `Retry-After` holds back all requests.
    """

    def __init__(self, task: Task, settings: RequestSettings, journal: Journal) -> None:
        self.task, self.settings, self.journal = task, settings, journal
        self.endpoint = Endpoint(settings)
        self.state = RunState()
        self.prices, self.price, self._spent_before = budget(settings, journal)
        self._reserved = 0.0
        self._in_flight = 0
        self._failures = 0
        self._not_before = 0.0
        self._requests = Pacer(settings.requests_per_minute)
        self._tokens = Pacer(settings.tokens_per_minute)

    # ------------------------------------------------------------------------------------------------- the run

    async def run(self) -> RunState:
        """Returns when every item is answered or has failed, or after a stop, with nothing left under way."""
        self._stop = asyncio.Event()
        self._first = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._indices = iter(range(len(self.task)))
        self._bar = tqdm(
            total=len(self.task), desc=self.task.name, unit="item", disable=not self.settings.progress, smoothing=0.1
        )
        workers = [asyncio.create_task(self._work()) for _ in range(min(self.settings.concurrency, len(self.task)))]

        def interrupt() -> None:
            if self._stop.is_set():
                for worker in workers:
                    worker.cancel()
            self._end("interrupted")
            tqdm.write("Finishing the requests under way; press Ctrl-C again to drop them.")

        with on_interrupt(interrupt):
            results = await asyncio.gather(*workers, return_exceptions=True)
        self._bar.close()
        await self.endpoint.close()
        await self.journal.synced()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result
        if self.state.fatal:
            raise self.state.fatal
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
                self.state.failed[index] = str(error)
                self._failures += 1
                limit = FAILURES_IN_A_ROW if self.endpoint.answered else FIRST_FAILURES
                if self._failures >= limit:
                    problem = f"the last {self._failures} requests all failed ({error}); correct the cause and run the same command again."
                    self._end(problem, AugmentationError(problem))
            except StopRun:
                return
            except AugmentationError as error:
                self._end(str(error), error)
                return
            except Exception as error:  # a defect: the other workers must not go on and pay
                self._end(repr(error))
                raise
            finally:
                self._show()
            self._bar.update()

    def _show(self) -> None:
        shown = {"failed": len(self.state.failed)}
        if self.price:
            shown["cost"] = f"{self.state.spent:.4f} {self.price.currency}"
        self._bar.set_postfix(shown, refresh=False)

    async def _item(self, index: int) -> None:
        request = self.task.request(index)
        entry = await self._answer(request)
        entries = [entry]
        further = self.task.follow_up(index, request, entry)
        if further is not None:
            entries.append(await self._answer(further))
        self.task.row(index, entries)

    # --------------------------------------------------------------------------------------------- one request

    async def _answer(self, request: Request) -> dict[str, Any]:
        entry = self.journal.get(request.key)
        if entry is not None:
            return entry
        if not self.endpoint.answered:
            async with self._first:
                if not self.endpoint.answered:
                    return await self._with_retries(request)
        return await self._with_retries(request)

    async def _with_retries(self, request: Request) -> dict[str, Any]:
        attempts = self.settings.max_retries + 1
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(TryAgain),
                stop=lambda state: self._give_up(state, attempts),
                wait=self._backoff,
                sleep=self._pause,
                reraise=True,
            ):
                with attempt:
                    return await self._once(request)
        except TryAgain as error:
            if not error.reached and not self.endpoint.answered:
                raise FatalError(
                    f"the endpoint {self.endpoint.host} cannot be reached ({error}); start the server, or correct "
                    "`--base-url`."
                ) from None
            raise ItemError(f"{error}, after {attempts} attempts") from None

    def _give_up(self, state: RetryCallState, attempts: int) -> bool:
        error = state.outcome.exception()
        if not error.reached and not self.endpoint.answered:
            attempts = min(attempts, 3)  # nothing has ever answered there: do not wait for long
        return stop_after_attempt(attempts)(state)

    def _backoff(self, state: RetryCallState) -> float:
        asked = state.outcome.exception().retry_after
        if asked is not None:
            if asked > self.settings.max_wait:
                raise FatalError(
                    f"{self.endpoint.host} asks to wait {asked:.0f} s; run the same command again after that time."
                )
            self._not_before = max(self._not_before, time.monotonic() + asked)
            return asked
        wait = min(60.0, self.settings.initial_backoff * 2 ** (state.attempt_number - 1))
        return wait * random.uniform(0.5, 1.5)

    async def _pause(self, seconds: float) -> None:
        if self._stop.is_set():
            raise StopRun
        if seconds > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
        if self._stop.is_set():
            raise StopRun

    async def _once(self, request: Request) -> dict[str, Any]:
        most = highest_cost(request, self.price)
        booked = 0
        if self.settings.tokens_per_minute:
            booked = prompt_tokens(request) + request.expected_tokens
        await self._pause(max(self._requests.delay(), self._tokens.delay(booked)))
        while (wait := self._not_before - time.monotonic()) > 0:
            await self._pause(wait)
        await self._reserve(most)
        try:
            entry = await self.endpoint.ask(request)
            self.journal.append(entry)
        except TryAgain as error:
            if error.maybe_paid and self.price:
                self.state.spent += self.price.cost(prompt_tokens(request), request.expected_tokens)
            raise
        finally:
            self._in_flight -= 1
            self._reserved -= most
            async with self._changed:
                self._changed.notify_all()
        usage = entry["usage"]
        self._tokens.give_back(booked - sum(usage.values()))
        self.state.answered += 1
        self.state.prompt_tokens += usage["prompt_tokens"]
        self.state.completion_tokens += usage["completion_tokens"]
        if self.price:
            self.state.spent += self.price.cost(usage["prompt_tokens"], usage["completion_tokens"])
        return entry

    async def _reserve(self, most: float) -> None:
        """Waits until the request fits the limits even if its answer is as long as can be; stops the run if it never will."""
        limit = self.settings.max_cost

        def exceeds() -> bool:
            return limit is not None and self._spent_before + self.state.spent + self._reserved + most > limit

        async with self._changed:
            while exceeds() and self._in_flight:
                await self._changed.wait()
            if self._stop.is_set():
                raise StopRun
            if exceeds():
                self._end(f"the next request could exceed the limit of {limit:g} {self.price.currency} (`--max-cost`)")
                raise StopRun
            if self.settings.max_requests is not None and self.state.sent >= self.settings.max_requests:
                self._end(f"the limit of {self.settings.max_requests} requests is reached (`--max-requests`)")
                raise StopRun
            self.state.sent += 1
            self._in_flight += 1
            self._reserved += most
