"""What the two generating commands share: dry run, journal, run, output files and summary."""

import asyncio
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .client import ItemError, RequestSettings, answer_text
from .files import check_writable, read_json_lines, write_json_lines
from .journal import Journal, Request
from .pricing import PriceList, prompt_tokens, token_counter
from .runner import Runner, RunState, Task


JOURNAL = "journal.jsonl"
FAILED = "failed_requests.jsonl"
SHOWN_PROMPTS = 5


@dataclass
class RunSummary:
    """
    What a command has done.

    Args:
        output (`Path`, *optional*): The file written; None where items are missing.
        total, done, failed (`int`): Items.
        sent, answered (`int`): HTTP requests of this run, and answers that came.
        prompt_tokens, completion_tokens (`int`): As the provider counts them, this run.
        cost (`float`, *optional*): Of this run; None where the price is unknown.
        stopped (`str`, *optional*): Why the run ended before its end.
        notes (`list[str]`): What a user should know.
    """

    output: Path | None
    total: int
    done: int = 0
    failed: int = 0
    sent: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    currency: str = "USD"
    stopped: str | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cost = f", cost {self.cost:.4f} {self.currency}" if self.cost is not None else ""
        lines = [
            f"{self.done} of {self.total} items done, {self.failed} failed; {self.sent} requests sent, "
            f"{self.prompt_tokens} + {self.completion_tokens} tokens{cost}."
        ]
        if self.output:
            lines.append(f"Written: {self.output}")
        if self.stopped:
            lines.append(f"Stopped: {self.stopped}. The answers are kept; run the same command again to go on.")
        return "\n".join(lines + self.notes)


@dataclass
class Plan:
    """What a run would send: see `__str__`."""

    total: int
    missing: int
    prompt_tokens: int
    completion_tokens: int
    counted_with: str
    cost: float | None
    currency: str
    model: str
    prompts: list[list[dict[str, str]]]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for number, messages in enumerate(self.prompts, start=1):
            lines.append(f"──── prompt {number} of {len(self.prompts)} shown")
            lines += [f"[{message['role']}]\n{message['content']}\n" for message in messages]
        lines += self.notes
        lines.append(
            f"{self.missing} requests to send ({self.total} items, {self.total - self.missing} answers in the journal), about "
            f"{self.prompt_tokens} prompt tokens and {self.completion_tokens} answer tokens ({self.counted_with})."
        )
        if self.cost is None:
            lines.append(
                f"The price of {self.model} is unknown: name it in a file given with --prices to see the cost."
            )
        else:
            lines.append(f"Estimated cost: {self.cost:.4f} {self.currency}, repeated requests not counted.")
        return "\n".join([*lines, "Nothing was sent."])


def provenance(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a row comes from: the last answer, with the usage of all answers that the item took."""
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


def follow_up(request: Request, entry: dict[str, Any], complaint: str) -> Request:
    """The same conversation, with the answer and what is wrong with it."""
    text, _ = answer_text(entry, request.field)
    answer = [{"role": "assistant", "content": text}] if text else []
    # two user turns in a row are an error for many chat templates
    messages = [*request.messages, *answer, {"role": "user", "content": complaint}]
    if not answer:
        messages = [
            *request.messages[:-1],
            {"role": "user", "content": f"{request.messages[-1]['content']}\n\n{complaint}"},
        ]
    return Request(
        messages=messages,
        model=request.model,
        parameters=request.parameters,
        field=request.field,
        sample_index=request.sample_index,
        expected_tokens=request.expected_tokens,
        origin=request.origin,
    )


_REFUSAL = re.compile(
    r"\A\W*(as an? (ai|artificial|large language|language model)\b"
    r"|i('m| am) (sorry|unable|not able)|i (cannot|can't|can not|won't) (help|assist|provide|write|create|generate|fulfill)"
    r"|i apologi[sz]e\b|unfortunately, i\b|sorry, (but )?i\b)",
    re.I,
)


def is_refusal(text: str) -> bool:
    """Whether an answer begins as a refusal does."""
    return bool(_REFUSAL.match(text))


def plan(task: Task, settings: RequestSettings, journal: Journal) -> Plan:
    """Counts what a run would send; sends nothing."""
    count, name = token_counter(settings.model)
    missing, prompt, completion = [], 0, 0
    for index in range(len(task)):
        request = task.request(index)
        if request.key not in journal:
            missing.append(index)
            prompt += prompt_tokens(request, count)
            completion += request.expected_tokens
    number = min(SHOWN_PROMPTS, len(missing))
    prompts = [task.request(missing[place * len(missing) // number]).messages for place in range(number)]
    prices = PriceList(settings.prices)
    price = prices.get(settings.model)
    cost = price.cost(prompt, completion, settings.batch) if price else None
    return Plan(len(task), len(missing), prompt, completion, name, cost, prices.currency, settings.model, prompts)


def run_task(
    task: Task,
    settings: RequestSettings,
    output_dir: str | Path,
    file_name: str,
    dry_run: bool = False,
    partial: bool = False,
) -> RunSummary | Plan:
    """
    Answers every item and writes `file_name`, or counts only (`dry_run`).

    The output is written when every item is answered or has failed for good; with `partial` also before.

    Raises:
        AugmentationError: with the reason, after everything that was answered is safe in the journal.
    """
    output_dir = Path(output_dir)
    if dry_run:
        with Journal(output_dir / JOURNAL, read_only=True) as journal:
            return plan(task, settings, journal)
    check_writable(output_dir)
    with Journal(output_dir / JOURNAL) as journal:
        if settings.batch:
            from .batch import BatchRunner

            runner: Any = BatchRunner(task, settings, journal)
        else:
            runner = Runner(task, settings, journal)
        try:
            state: RunState = _run_coroutine(runner.run)
        finally:
            _write_failed(output_dir / FAILED, task, runner.state)
        path, done = output_dir / file_name, 0
        try:
            done = write_json_lines(path, _rows(task, journal, set(range(len(task)) if partial else state.failed)))
        except _Incomplete:
            path = None
            done = sum(output_row(task, journal, index) is not None for index in range(len(task)))
        return RunSummary(
            output=path,
            total=len(task),
            done=done,
            failed=len(state.failed),
            sent=state.sent,
            answered=state.answered,
            prompt_tokens=state.prompt_tokens,
            completion_tokens=state.completion_tokens,
            cost=state.spent if runner.price else None,
            currency=runner.prices.currency,
            stopped=state.stopped,
        )


class _Incomplete(Exception):
    """An item that has not failed has no answer."""


def _rows(task: Task, journal: Journal, may_lack: set[int]) -> Iterator[dict[str, Any]]:
    """Output rows in the task's order, whatever the order in which the answers came."""
    for index in range(len(task)):
        row = output_row(task, journal, index)
        if row is not None:
            yield row
        elif index not in may_lack:
            raise _Incomplete


def output_row(task: Task, journal: Journal, index: int) -> dict[str, Any] | None:
    """The output row of an item, from the journal alone; None where an answer is missing or of no use."""
    request = task.request(index)
    entry = journal.get(request.key)
    if entry is None:
        return None
    further = task.follow_up(index, request, entry)
    second = journal.get(further.key) if further else None
    if further and second is None:
        return None
    try:
        return task.row(index, [entry, second] if second else [entry])
    except ItemError:
        return None


def _write_failed(path: Path, task: Task, state: RunState) -> None:
    """Failed items of this command; those of other commands in the same folder stay."""
    others = [row for _, row in read_json_lines(path) if row.get("command") != task.name] if path.exists() else []
    own = [
        {"command": task.name, **task.identity(index), "reason": reason}
        for index, reason in sorted(state.failed.items())
    ]
    if others or own:
        write_json_lines(path, [*others, *own])
    else:
        path.unlink(missing_ok=True)


def _run_coroutine(function: Callable) -> Any:
    """`asyncio.run`, also from within a running loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(function())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, function()).result()
