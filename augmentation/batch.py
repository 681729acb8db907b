"""The OpenAI Batch API: answers within a day at half the price, across as many processes as it takes."""

import asyncio
import collections
import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .batch_api import BatchApi, BatchLook
from .batch_notes import OpenBatch, open_batches
from .client import Endpoint
from .errors import AugmentationError, FatalError, ItemError, NotFound, TryAgain
from .journal import Journal
from .pricing import Budget
from .progress import progress_bar
from .request import Request
from .runner import RunState, Task, on_interrupt
from .settings import RequestSettings
from .writing import encoded


MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000  # of one input file; the documented limits are 50,000 and 200 MB
SUBMISSIONS = 4  # maximum number of attempts per request
OK = 200


class BatchRunner:
    """Answers every item of a task through batches."""

    def __init__(self, task: Task, settings: RequestSettings, journal: Journal) -> None:
        self.task, self.settings, self.journal = task, settings, journal
        self.budget = Budget(settings, journal)
        self.endpoint = Endpoint(settings)
        self.api = BatchApi(self.endpoint)
        self.state = RunState()
        self._reserved: dict[str, float] = {}
        self._submissions: collections.Counter[str] = collections.Counter()
        self._reasons: dict[str, str] = {}
        self._collected: set[str] = set()

    async def run(self) -> RunState:
        """Returns when every item is answered or has failed, when a limit is reached, or after Ctrl-C; batches continue at the provider."""
        return await self._until_done(self._round)

    async def settle(self) -> RunState:
        """
        Collects finished batches without submitting anything.

        Raises:
            AugmentationError: if a batch with requests of this task is still in progress, because they must not be paid for twice.
        """
        return await self._until_done(self._settle_round)

    async def _until_done(self, round_of: Any) -> RunState:
        self._stop = asyncio.Event()
        self._bar = progress_bar(total=len(self.task), desc=self.task.name, unit="item", show=self.settings.progress)

        def interrupt() -> None:
            self.state.stopped = "interrupted"
            self._stop.set()

        try:
            with on_interrupt(interrupt):
                while not self._stop.is_set() and await round_of():
                    pass
        finally:
            self._bar.close()
            await self.endpoint.close()
        await self.journal.synced()
        return self.state

    # ------------------------------------------------------------------------------------------------ one round

    async def _round(self) -> bool:
        """Submits requests that no batch covers, waits for the batches, and stores their answers; False if nothing is left to do."""
        pending = self._pending()
        batches = await self._open(pending)
        covered = {key for key, (_, request) in pending.items() if any(batch.covers(request) for batch in batches)}
        for key in covered - set(self._reserved):
            self._set_aside(pending[key][1], requests=0)
        for part in self._parts({key: value for key, value in pending.items() if key not in covered}):
            batches.append(await self._submit(part))
        if not batches:
            return False
        for batch in batches:
            look = await self._wait(batch)
            if look is None:
                return False
            await self._collect(batch, look, pending)
        return self.state.stopped is None

    async def _settle_round(self) -> bool:
        pending = self._pending()
        for batch in await self._open(pending):
            look = await self._look(batch)
            if look is not None and not look.finished:
                number = sum(batch.covers(request) for _, request in pending.values())
                raise AugmentationError(
                    f"{number} requests are in progress in {batch.name} at {self.endpoint.host} ({look.status}) and would be "
                    "paid for twice; set `batch` to wait for it, or cancel it at the provider first."
                )
            await self._collect(batch, look or BatchLook("abandoned"), pending)
        return False

    def _pending(self) -> dict[str, tuple[int, Request]]:
        """The next request of each item that lacks an answer; items that have failed are noted in the state."""
        pending: dict[str, tuple[int, Request]] = {}
        done = 0
        for index in range(len(self.task)):
            request = self.task.request(index)
            entries = [self.journal.answer(request)]
            if entries[0] is not None:
                further = self.task.follow_up(index, request, entries[0])
                if further is not None:
                    request = further
                    entries.append(self.journal.answer(further))
            answers = [entry for entry in entries if entry is not None]
            if len(answers) == len(entries):
                done += 1
                try:
                    self.task.row(index, answers)
                except ItemError as error:
                    self.state.failed[index] = str(error)
            elif request.key in self._reasons and self._submissions[request.key] >= SUBMISSIONS:
                self.state.failed[index] = self._reasons[request.key]
            else:
                pending[request.key] = (index, request)
        self._bar.n = done
        self._bar.refresh()
        return pending

    async def _open(self, pending: dict[str, tuple[int, Request]]) -> list[OpenBatch]:
        found = []
        for batch in open_batches(self.journal, (request for _, request in pending.values())):
            if batch.token in self._collected:
                continue
            if batch.endpoint not in (None, self.endpoint.host):
                await self._cannot_look(
                    batch,
                    f"which was sent to {batch.endpoint}, not to {self.endpoint.host}; give that `base_url` again",
                )
                continue
            if batch.dialect is not None:
                self.endpoint.dialect = batch.dialect
            try:
                batch = batch if batch.id else replace(batch, id=await self.api.find(batch.token))
            except NotFound:
                await self._cannot_look(
                    batch, f"and {self.endpoint.host} does not list its batches; correct `base_url`"
                )
                continue
            if batch.id is not None:
                found.append(batch)
            else:  # the process was killed before the submission
                await self._note("batch_done", token=batch.token, status="never submitted")
        return found

    async def _cannot_look(self, batch: OpenBatch, problem: str) -> None:
        """
        Abandons a batch if the user allows it.

        Raises:
            AugmentationError: otherwise, because its requests may be in progress and must not be paid for twice.
        """
        if not self.settings.abandon_batches:
            raise AugmentationError(
                f"requests of this command are part of {batch.name}, {problem}, or set `abandon_batches` to have them sent "
                "(and paid) again."
            )
        await self._note("batch_done", token=batch.token, status="abandoned")
        self.state.notes.append(f"{batch.name.capitalize()} was abandoned; its requests are sent again.")

    def _parts(self, to_send: dict[str, tuple[int, Request]]) -> Iterator[dict[str, bytes]]:
        """Input files, `{key: line}`, within the limits of the Batch API and of the user."""
        part: dict[str, bytes] = {}
        size = 0
        for key, (_, request) in to_send.items():
            refusal = self.budget.refusal(self.budget.highest_cost(request, batch=True))
            if refusal is not None:
                self.state.stopped = self.state.stopped or refusal
                break
            self._set_aside(request)
            body = self.endpoint.body(request)
            line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
            data = encoded(line)
            if part and (len(part) == MAX_REQUESTS or size + len(data) > MAX_BYTES):
                yield part
                part, size = {}, 0
            part[key] = data
            size += len(data)
        if part:
            yield part

    def _set_aside(self, request: Request, requests: int = 1) -> None:
        self._reserved[request.key] = cost = self.budget.highest_cost(request, batch=True)
        self.budget.reserve(cost, requests)

    async def _submit(self, part: dict[str, bytes]) -> OpenBatch:
        token = uuid.uuid4().hex
        dialect, host = self.endpoint.dialect, self.endpoint.host
        file_id = await self.api.upload(token, b"".join(part.values()))
        await self._note("batch_intent", token=token, keys=list(part), dialect=dialect, endpoint=host)
        self._submissions.update(part.keys())
        batch_id = await self.api.create(file_id, token)
        await self._note("batch", token=token, id=batch_id)
        return OpenBatch(token, frozenset(part), dialect, host, batch_id)

    # ------------------------------------------------------------------------------------------------ collecting

    async def _look(self, batch: OpenBatch) -> BatchLook | None:
        """The status of a batch; None if it was abandoned."""
        assert batch.id is not None
        try:
            return await self.api.look(batch.id)
        except NotFound:
            await self._cannot_look(
                batch,
                f"which {self.endpoint.host} does not know (any more, or not with this key); use the key and the `base_url` it "
                "was submitted with",
            )
            return None

    async def _wait(self, batch: OpenBatch) -> BatchLook | None:
        """The final status of a batch, after waiting for its end; None after a stop."""
        while True:
            look = await self._look(batch)
            if look is None:
                return BatchLook("abandoned")
            total = f" {look.completed}/{look.total}" if look.total else ""
            self._bar.set_postfix_str(f"batch {look.status}{total}")
            if look.finished:
                return look
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self.settings.batch_poll_seconds)
            if self._stop.is_set():
                return None

    async def _collect(self, batch: OpenBatch, look: BatchLook, pending: dict[str, tuple[int, Request]]) -> None:
        """Stores the answers of a finished batch, and the reasons why requests were not answered."""
        answered: set[str] = set()
        for file_id in look.files:
            at_least = look.completed if file_id == look.files[0] else 0
            answered |= self._store(await self._lines(batch, file_id, at_least), batch, pending)
        for key, (_, request) in pending.items():
            if batch.covers(request):
                if key not in answered:
                    self._reasons.setdefault(key, f"the batch ended as {look.status} without an answer")
                self.budget.release(self._reserved.pop(key, 0.0))
        self._collected.add(batch.token)
        # another command may still need the other answers of the batch
        known = {name for _, request in pending.values() for name in request.keys}
        if look.status != "abandoned" and all(key in known or self.journal.get(key) for key in batch.keys or ()):
            await self._note("batch_done", token=batch.token, status=look.status)
        if self.state.fatal is not None:
            raise self.state.fatal
        if look.status == "failed":
            reasons = "; ".join(look.errors) or "no reason given"
            raise FatalError(
                f"{self.endpoint.host} refuses the batch ({reasons}); correct the cause, or send fewer requests at a time with "
                "`max_requests`."
            )

    async def _lines(self, batch: OpenBatch, file_id: str, at_least: int) -> list[Any]:
        try:
            lines, bad = await self.api.lines(file_id, at_least)
        except NotFound:
            self.state.notes.append(
                f"The file {file_id} of {batch.name} is gone at {self.endpoint.host}; what it answered is sent again."
            )
            return []
        if bad:
            self.state.notes.append(f"{bad} lines of the file {file_id} of {batch.name} cannot be read.")
        return lines

    def _store(self, lines: list[Any], batch: OpenBatch, pending: dict[str, tuple[int, Request]]) -> set[str]:
        """Stores the usable answers of a file, and the failure reasons of the others; returns the keys of both."""
        requests = {name: request for _, request in pending.values() for name in request.keys}
        found = set()
        for line in lines:
            name = line.get("custom_id") if isinstance(line, dict) else None
            request = requests.get(name) if isinstance(name, str) else None
            if request is None or request.key in found or request in self.journal:
                continue
            found.add(request.key)
            try:
                entry = self._entry(request, line, batch)
            except ItemError as error:
                self._reasons[request.key] = str(error)
                self._submissions[request.key] = SUBMISSIONS
            except TryAgain as error:
                self._reasons[request.key] = f"{error}, after {SUBMISSIONS} submissions"
            except FatalError as error:  # raised later, after the usable answers are stored
                self.state.fatal = error
            else:
                self.state.count(entry)
                self.budget.pay(entry)
                self.journal.append(entry)
        return found

    def _entry(self, request: Request, line: dict[str, Any], batch: OpenBatch) -> dict[str, Any]:
        """The journal entry of an output line; raises what its error stands for."""
        response = line.get("response")
        response = response if isinstance(response, dict) else {}
        sent = self._body(request, batch)
        try:  # an answer is used regardless of the rest of the line
            return self.endpoint.entry(request, response.get("body"), sent, batch=True)
        except TryAgain:
            status, problem = response.get("status_code"), line.get("error")
            code = status if isinstance(status, int) and status != OK else 500
            raise self.endpoint.judge(
                code, {"error": problem} if problem else response.get("body"), {}, sent
            ) from None

    def _body(self, request: Request, batch: OpenBatch) -> dict[str, Any]:
        """What was sent with a request, in the dialect of its batch (the endpoint's dialect may have been updated since)."""
        now = self.endpoint.dialect
        self.endpoint.dialect = batch.dialect or now
        body = self.endpoint.body(request)
        self.endpoint.dialect = now
        return body

    async def _note(self, kind: str, **values: Any) -> None:
        self.journal.append({"note": kind, "command": self.task.name, **values})
        await self.journal.synced()
