"""The OpenAI Batch API: answers within a day at half the price, across as many processes as it takes."""

import asyncio
import collections
import contextlib
import io
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
from tqdm import tqdm

from .client import Endpoint, FatalError, ItemError, RequestSettings, TryAgain
from .files import AugmentationError
from .journal import Journal, Request
from .runner import RunState, Task, budget, highest_cost, on_interrupt


MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000  # of one input file; the documented limits are 50,000 and 200 MB
SUBMISSIONS = 4  # of one request, before it has failed for good
FINISHED = ("completed", "failed", "expired", "cancelled")


class BatchRunner:
    """
    Answers every item of a task through batches.

    The journal also keeps notes: the intention to submit a batch (with its keys), its id, and that it was collected. A new process
    finds a batch whose id was never noted by the token in its metadata, so no batch is submitted twice.
    """

    def __init__(self, task: Task, settings: RequestSettings, journal: Journal) -> None:
        self.task, self.settings, self.journal = task, settings, journal
        self.endpoint = Endpoint(settings)
        self.state = RunState()
        self.prices, self.price, self._spent_before = budget(settings, journal)
        self._submissions: collections.Counter[str] = collections.Counter()
        self._reasons: dict[str, str] = {}
        self._collected: set[str] = set()
        self._open_cost = 0.0

    async def run(self) -> RunState:
        """Returns when every item is answered or has failed, a limit is reached, or after Ctrl-C; batches then go on."""
        self._stop = asyncio.Event()
        self._bar = tqdm(total=len(self.task), desc=self.task.name, unit="item", disable=not self.settings.progress)

        def interrupt() -> None:
            self.state.stopped = "interrupted"
            self._stop.set()

        try:
            with on_interrupt(interrupt):
                while not self._stop.is_set() and await self._round():
                    pass
        finally:
            self._bar.close()
            await self.endpoint.close()
            await self.journal.synced()
        return self.state

    # ------------------------------------------------------------------------------------------------ one round

    async def _round(self) -> bool:
        """Submits what no batch covers, waits for the batches, and stores their answers; False when nothing is left."""
        wanted = self._wanted()
        open_batches = await self._open_batches(set(wanted))
        covered = {key for note in open_batches for key in note["keys"]}
        to_send = {key: value for key, value in wanted.items() if key not in covered}
        under_way = (request for key, (_, request) in wanted.items() if key in covered)
        self._open_cost = sum(highest_cost(request, self.price, batch=True) for request in under_way)
        for part in self._parts(to_send):
            open_batches.append(await self._submit(part))
        if not open_batches:
            return False
        for note in open_batches:
            await self._wait_and_collect(note, wanted)
            if self._stop.is_set():
                return False
        return self.state.stopped is None

    def _wanted(self) -> dict[str, tuple[int, Request]]:
        """The next request of each item that lacks an answer; items that have failed are noted in the state."""
        wanted, done = {}, 0
        for index in range(len(self.task)):
            request = self.task.request(index)
            entries = [self.journal.get(request.key)]
            if entries[0] is not None:
                further = self.task.follow_up(index, request, entries[0])
                if further is not None:
                    request = further
                    entries.append(self.journal.get(further.key))
            if entries[-1] is not None:
                done += 1
                try:
                    self.task.row(index, entries)
                except ItemError as error:
                    self.state.failed[index] = str(error)
            elif request.key in self._reasons and self._submissions[request.key] >= SUBMISSIONS:
                self.state.failed[index] = self._reasons[request.key]
            else:
                wanted[request.key] = (index, request)
        self._bar.n = done
        self._bar.refresh()
        return wanted

    async def _open_batches(self, wanted: set[str]) -> list[dict[str, Any]]:
        notes = [note for note in self.journal.notes if note.get("command") == self.task.name]
        ids = {note["token"]: note["id"] for note in notes if note["note"] == "batch"}
        done = {note["token"] for note in notes if note["note"] == "batch_done"} | self._collected
        found = []
        for note in notes:
            if note["note"] != "batch_intent" or note["token"] in done or not wanted.intersection(note["keys"]):
                continue
            self.endpoint.dialect = note["dialect"]
            batch_id = ids.get(note["token"]) or await self._find(note["token"])
            if batch_id is not None:
                found.append({**note, "id": batch_id})
            else:  # the kill came before the submission
                await self._note("batch_done", token=note["token"], status="never submitted")
        return found

    def _parts(self, to_send: dict[str, tuple[int, Request]]) -> Iterator[dict[str, bytes]]:
        """Input files, `{key: line}`, within the limits of the Batch API and of the user."""
        part, size = {}, 0
        for key, (_, request) in to_send.items():
            most = highest_cost(request, self.price, batch=True)
            limit = self.settings.max_cost
            if self.settings.max_requests is not None and self.state.sent >= self.settings.max_requests:
                self.state.stopped = (
                    f"the limit of {self.settings.max_requests} requests is reached (`--max-requests`)"
                )
                break
            if limit is not None and self._spent_before + self.state.spent + self._open_cost + most > limit:
                self.state.stopped = (
                    f"the next request could exceed the limit of {limit:g} {self.prices.currency} (`--max-cost`)"
                )
                break
            self.state.sent += 1
            self.state.spent += most  # replaced by the true cost when the answer comes
            body = self.endpoint.body(request)
            line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
            data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
            if part and (len(part) == MAX_REQUESTS or size + len(data) > MAX_BYTES):
                yield part
                part, size = {}, 0
            part[key] = data
            size += len(data)
        if part:
            yield part

    async def _submit(self, part: dict[str, bytes]) -> dict[str, Any]:
        token = uuid.uuid4().hex
        note = {"token": token, "keys": list(part), "dialect": self.endpoint.dialect, "endpoint": self.endpoint.host}
        client, data = self.endpoint.client, b"".join(part.values())
        file = await self._call(
            lambda: client.files.create(file=(f"{token}.jsonl", io.BytesIO(data)), purpose="batch")
        )
        await self._note("batch_intent", **note)
        for key in part:
            self._submissions[key] += 1

        async def create() -> str:
            # an attempt whose answer was lost may have made the batch
            made = await self._find(token) if attempts else None
            attempts.append(token)
            if made is None:
                batch = await client.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={"sep_mldc": token},
                )
                made = batch.id
            return made

        attempts: list[str] = []
        batch_id = await self._call(create)
        await self._note("batch", token=token, id=batch_id)
        return {**note, "id": batch_id}

    async def _find(self, token: str) -> str | None:
        async def search() -> str | None:
            async for batch in self.endpoint.client.batches.list(limit=100):
                if (batch.metadata or {}).get("sep_mldc") == token:
                    return batch.id
            return None

        return await self._call(search)

    async def _wait_and_collect(self, note: dict[str, Any], wanted: dict[str, tuple[int, Request]]) -> None:
        while True:
            batch = await self._call(lambda: self.endpoint.client.batches.retrieve(note["id"]))
            counts = batch.request_counts
            self._bar.set_postfix_str(
                f"batch {batch.status}" + (f" {counts.completed}/{counts.total}" if counts else "")
            )
            if batch.status in FINISHED:
                break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self.settings.batch_poll_seconds)
            if self._stop.is_set():
                return
        answered = set()
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                answered |= await self._collect(await self._lines(file_id), note, wanted)
        for key in set(note["keys"]) - answered:
            self._reasons.setdefault(key, f"the batch ended as {batch.status} without an answer")
        self._collected.add(note["token"])
        # another command line may still want the other answers of the batch
        if all(key in wanted or key in self.journal for key in note["keys"]):
            await self._note("batch_done", token=note["token"], status=batch.status)
        if self.state.fatal is not None:
            raise self.state.fatal
        if batch.status == "failed":
            errors = [error.message for error in (batch.errors.data if batch.errors else None) or []]
            raise FatalError(
                f"{self.endpoint.host} refuses the batch ({self.endpoint.redact('; '.join(map(str, errors[:3])) or 'no reason given')}); "
                "correct the cause, or send fewer requests at a time with `--max-requests`."
            )

    async def _lines(self, file_id: str) -> list[dict[str, Any]]:
        async def download() -> list[dict[str, Any]]:
            content = (await self.endpoint.client.files.content(file_id)).content
            try:
                return [json.loads(line) for line in content.split(b"\n") if line.strip()]
            except ValueError:
                raise TryAgain(f"the file {file_id} came incomplete") from None

        return await self._call(download)

    async def _collect(
        self, lines: list[dict[str, Any]], note: dict[str, Any], wanted: dict[str, tuple[int, Request]]
    ) -> set[str]:
        """Stores the good answers of a file, and the reasons of the others; returns the keys that have one of the two."""
        entries: dict[str, dict[str, Any]] = {}
        found = set()
        for line in lines:
            key = line.get("custom_id")
            if key not in wanted or key in entries or key in self.journal:
                continue
            request = wanted[key][1]
            response = line.get("response") or {}
            sent = self._sent(request, note["dialect"])
            found.add(key)
            try:
                if line.get("error") or response.get("status_code") != 200:
                    problem = {"error": line["error"]} if line.get("error") else response.get("body")
                    raise self.endpoint.judge(int(response.get("status_code") or 500), problem, {}, sent)
                entries[key] = self.endpoint.entry(request, response.get("body"), sent, batch=True)
            except ItemError as error:
                self._reasons[key] = str(error)
                self._submissions[key] = SUBMISSIONS
            except TryAgain as error:
                self._reasons[key] = f"{error}, after {SUBMISSIONS} submissions"
            except FatalError as error:  # raised when the good answers are safe
                self.state.fatal = error
        for entry in entries.values():
            self.journal.append(entry)
            self.state.answered += 1
            self.state.prompt_tokens += entry["usage"]["prompt_tokens"]
            self.state.completion_tokens += entry["usage"]["completion_tokens"]
        self._settle()
        return found

    def _sent(self, request: Request, dialect: dict[str, Any]) -> dict[str, Any]:
        """What was sent with a request, in the dialect of its batch (another one may have been learnt since)."""
        now, self.endpoint.dialect = self.endpoint.dialect, dialect
        body = self.endpoint.body(request)
        self.endpoint.dialect = now
        return body

    def _settle(self) -> None:
        """The true cost of this run's answers takes the place of what was reserved for them."""
        if self.price:
            self.state.spent = self.price.cost(self.state.prompt_tokens, self.state.completion_tokens, batch=True)

    # ------------------------------------------------------------------------------------------------- plumbing

    async def _note(self, kind: str, **values: Any) -> None:
        self.journal.append({"note": kind, "command": self.task.name, **values})
        await self.journal.synced()

    async def _call(self, function: Callable) -> Any:
        """Calls the endpoint, again after errors that may pass."""
        errors = self.endpoint._openai.APIError
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(TryAgain),
                stop=stop_after_attempt(self.settings.max_retries + 1),
                wait=wait_exponential_jitter(
                    self.settings.initial_backoff, 60.0, jitter=self.settings.initial_backoff
                ),
                reraise=True,
            ):
                with attempt:
                    try:
                        return await function()
                    except errors as error:
                        raise self.endpoint.problem(error, {}) from None
        except (TryAgain, ItemError) as error:
            raise AugmentationError(
                f"{self.endpoint.host} does not answer as the Batch API does ({error}); run the same command again, or leave "
                "out `--batch`."
            ) from None
