"""Code shared by the two generating commands: dry run, journal, run, output files and summary."""

import asyncio
import contextlib
import warnings
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .batch_notes import any_open, open_batches
from .errors import AugmentationError, ItemError
from .files import read_rows
from .journal import Journal
from .pricing import PriceList, prompt_tokens, token_counter
from .redaction import Redactor
from .request import Request
from .runner import Runner, RunState, Task
from .settings import RequestSettings
from .summary import Plan, RunSummary
from .writing import check_output, check_writable, write_json_lines


JOURNAL = "journal.jsonl"
FAILED = "failed_requests.jsonl"
SHOWN_PROMPTS = 5


def provenance(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The provenance of a row: that of the last answer, with the total usage of all answers for the item."""
    last = entries[-1]
    return {
        "model": last["model"],
        "endpoint": last["endpoint"],
        "template": last["template"],
        "template_hash": last["template_hash"],
        "parameters": last["parameters"],
        "time": last["time"],
        "usage": {
            name: sum(entry["usage"][name] for entry in entries) for name in ("prompt_tokens", "completion_tokens")
        },
        "requests": len(entries),
        "batch": last["batch"],
        "request_key": entries[0]["key"],
    }


def run_task(
    task: Task,
    settings: RequestSettings,
    output_dir: str | Path,
    dry_run: bool = False,
    partial: bool = False,
    inputs: tuple[str | Path, ...] = (),
) -> RunSummary | Plan:
    """
    Answers every item and writes the task's file, or only counts (`dry_run`).

    The output is written when every item is answered or has failed; with `partial`, also before. Nothing that this function writes or
    returns contains a key.

    Args:
        task (`Task`): The task.
        settings (`RequestSettings`): Model, endpoint and limits.
        output_dir: Folder of the output and the journal.
        dry_run, partial (`bool`): See above.
        inputs: Input files, which the output must not replace.

    Raises:
        AugmentationError: with the reason, after all received answers are stored in the journal.
    """
    output_dir = Path(output_dir)
    redact = Redactor.of_environment(settings.api_key_env)
    try:
        for name in (task.file_name, FAILED, JOURNAL):
            check_output(output_dir / name, inputs, special=name == task.file_name)
        if dry_run:
            if output_dir.exists() and not output_dir.is_dir():
                raise AugmentationError(f"the output folder {output_dir} is a file; choose another `output_dir`.")
            with Journal(output_dir / JOURNAL, read_only=True) as journal:
                return plan(task, settings, journal, redact)
        check_writable(output_dir)
        with Journal(output_dir / JOURNAL) as journal:
            return _run(task, settings, journal, output_dir, partial, redact)
    except AugmentationError as error:
        raise type(error)(redact(str(error))) from None


def _run(
    task: Task, settings: RequestSettings, journal: Journal, output_dir: Path, partial: bool, redact: Redactor
) -> RunSummary:
    notes = [] if settings.batch else _settle(task, settings, journal)
    runner = _runner(task, settings, journal)
    try:
        state = _run_coroutine(runner.run)
    except BaseException:
        with contextlib.suppress(AugmentationError):  # the first problem is reported
            _write_failed(output_dir / FAILED, task, runner.state, redact)
        raise
    _write_failed(output_dir / FAILED, task, state, redact)
    output: Path | None = output_dir / task.file_name
    done, origins = 0, Origins()
    try:
        may_lack = set(range(len(task)) if partial else state.failed)
        rows = _rows(task, journal, may_lack, origins)
        done = write_json_lines(output_dir / task.file_name, map(redact, rows))
    except _Incomplete:
        output = None
        done = sum(output_row(task, journal, index) is not None for index in range(len(task)))
    return RunSummary(
        output=output,
        total=len(task),
        done=done,
        failed=len(state.failed),
        sent=runner.budget.sent,
        answered=state.answered,
        prompt_tokens=state.prompt_tokens,
        completion_tokens=state.completion_tokens,
        cost=runner.budget.spent if runner.budget.price else None,
        currency=runner.budget.prices.currency,
        stopped=None if state.stopped is None else redact(state.stopped),
        notes=redact([*notes, *state.notes, *runner.budget.notes, *origins.notes(runner.endpoint.host)]),
    )


def _runner(task: Task, settings: RequestSettings, journal: Journal) -> Any:
    if not settings.batch:
        return Runner(task, settings, journal)
    from .batch import BatchRunner

    return BatchRunner(task, settings, journal)


def _settle(task: Task, settings: RequestSettings, journal: Journal) -> list[str]:
    """Collects batches of an earlier run with `batch`, so that their requests are not sent individually and paid for twice."""
    if not any_open(journal):
        return []
    from .batch import BatchRunner

    return _run_coroutine(BatchRunner(task, settings, journal).settle).notes


@dataclass
class Origins:
    """Where the answers behind the rows come from."""

    hosts: set[str] = field(default_factory=set)
    old: int = 0

    def add(self, request: Request, row: dict[str, Any]) -> None:
        """Counts a row."""
        self.hosts.add(row["provenance"]["endpoint"])
        self.old += row["provenance"]["request_key"] != request.key

    def notes(self, host: str) -> list[str]:
        """Notes and warnings about answers from an endpoint other than `host` or from version 0.1."""
        if self.old:
            warnings.warn(
                f"{self.old} answers in the journal are in the format of version 0.1; the next version will request them again.",
                FutureWarning,
                stacklevel=2,
            )
        others = sorted(self.hosts - {host})
        return [f"Some answers in the journal come from {', '.join(others[:5])}, not from {host}."] if others else []


def plan(task: Task, settings: RequestSettings, journal: Journal, redact: Redactor) -> Plan:
    """Counts what a run would send, without sending anything."""
    count, name = token_counter(settings.model)
    batches = open_batches(journal, (task.request(index) for index in range(len(task))))
    missing: dict[str, int] = {}
    answered = under_way = prompt = completion = 0
    for index in range(len(task)):
        request = task.request(index)
        if request in journal:
            answered += 1
        elif any(batch.covers(request) for batch in batches):
            under_way += 1
        elif request.key not in missing:  # equal requests are sent once
            missing[request.key] = index
            prompt += prompt_tokens(request, count)
            completion += request.expected_tokens
    indices = list(missing.values())
    number = min(SHOWN_PROMPTS, len(indices))
    shown = [task.request(indices[place * len(indices) // number]).messages for place in range(number)]
    prices = PriceList(settings.prices)
    price = prices.get(settings.model)
    return Plan(
        total=len(task),
        missing=len(indices),
        answered=answered,
        under_way=under_way,
        prompt_tokens=prompt,
        completion_tokens=completion,
        counted_with=name,
        cost=price.cost(prompt, completion, settings.batch) if price else None,
        currency=prices.currency,
        model=redact(settings.model),
        prompts=redact(shown),
    )


class _Incomplete(Exception):
    """An item that has not failed has no answer."""


def _rows(task: Task, journal: Journal, may_lack: set[int], origins: Origins) -> Iterator[dict[str, Any]]:
    """Output rows in the order of the task."""
    for index in range(len(task)):
        row = output_row(task, journal, index)
        if row is not None:
            origins.add(task.request(index), row)
            yield row
        elif index not in may_lack:
            raise _Incomplete


def output_row(task: Task, journal: Journal, index: int) -> dict[str, Any] | None:
    """The output row of an item, from the journal only; None if an answer is missing or not usable."""
    request = task.request(index)
    entry = journal.answer(request)
    if entry is None:
        return None
    further = task.follow_up(index, request, entry)
    second = journal.answer(further) if further else None
    if further and second is None:
        return None
    try:
        return task.row(index, [entry, second] if second else [entry])
    except ItemError:
        return None


def _write_failed(path: Path, task: Task, state: RunState, redact: Redactor) -> None:
    """Failed items of this command; those of other commands in the same folder stay."""
    names = (task.name, task.old_name)
    others = []
    if path.exists():
        try:
            others = [row for _, row in read_rows(path) if row.get("command") not in names]
        except AugmentationError:  # an unreadable list is rewritten
            pass
    own = [
        {"command": task.name, **task.identity(index), "reason": reason}
        for index, reason in sorted(state.failed.items())
    ]
    if others or own:
        write_json_lines(path, map(redact, [*others, *own]))
    else:
        path.unlink(missing_ok=True)


def _run_coroutine(function: Callable[[], Coroutine[Any, Any, RunState]]) -> RunState:
    """`asyncio.run`, also from within a running loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(function())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, function()).result()
