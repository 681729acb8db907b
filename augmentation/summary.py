"""Summaries of what a command did or would do."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class RunSummary:
    """
    The result of a command.

    Args:
        output (`Path`, *optional*): The file written; None where items are missing.
        total, done, failed (`int`): Items.
        sent, answered (`int`): HTTP requests of this run, and answers that came.
        prompt_tokens, completion_tokens (`int`): As the provider counts them, this run.
        cost (`float`, *optional*): Of this run; None where the price is unknown.
        currency (`str`): Of `cost`.
        stopped (`str`, *optional*): Why the run stopped early.
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
            lines.append(f"Stopped: {self.stopped}. The answers are kept; run the same command again to continue.")
        return "\n".join(lines + self.notes)


@dataclass
class Plan:
    """
    What a run would send; prints with five full prompts.

    Args:
        total (`int`): Items.
        missing (`int`): Requests to send.
        answered, under_way (`int`): Items with an answer in the journal, and items in a batch that has not been collected yet.
        prompt_tokens, completion_tokens (`int`): Estimates for the missing requests.
        counted_with (`str`): What counted them.
        cost (`float`, *optional*): Estimate; None where the price is unknown.
        currency, model (`str`): Of the price.
        prompts (`list[list[dict[str, str]]]`): Messages of some of the requests.
        notes (`list[str]`): What a user should know.
    """

    total: int
    missing: int
    answered: int
    under_way: int
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
        known = f"{self.total} items, {self.answered} answers in the journal"
        known += f", {self.under_way} in progress in a batch" if self.under_way else ""
        lines.append(
            f"{self.missing} requests to send ({known}), about {self.prompt_tokens} prompt tokens and "
            f"{self.completion_tokens} answer tokens ({self.counted_with})."
        )
        if self.cost is None:
            lines.append(
                f"The price of {self.model} is unknown: add it to a file and pass that with --prices to see the cost."
            )
        else:
            lines.append(f"Estimated cost: {self.cost:.4f} {self.currency}, repeated requests not counted.")
        return "\n".join([*lines, "Nothing was sent."])
