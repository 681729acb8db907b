"""Label expansion: one sentence that says what a label means (Eq. 1-2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .client import ItemError, RequestSettings, answer_text
from .files import read_labels
from .journal import Request
from .language import is_language
from .prompts import LANGUAGES, MAX_EXPANSION_TOKENS, PromptBuilder, approximate_tokens
from .tasks import Plan, RunSummary, follow_up, is_refusal, provenance, run_task


TEMPERATURE = 0.0
MAX_TOKENS = 160  # 30 for the sentence, the rest for JSON and for answers that run on and are then asked to be shorter
FILE_NAME = "label_descriptions.jsonl"


class ExpandLabels:
    """The task of `expand_labels`; items are labels."""

    name = "expand-labels"

    def __init__(self, labels: Mapping[str, str], prompts: PromptBuilder, settings: RequestSettings) -> None:
        self.labels = list(labels.items())
        self.prompts, self.settings = prompts, settings

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self, index: int) -> dict[str, Any]:
        return {"label": self.labels[index][0]}

    def request(self, index: int) -> Request:
        label, note = self.labels[index]
        return Request(
            messages=self.prompts.expand(label, note),
            model=self.settings.model,
            parameters=self.settings.request_parameters(TEMPERATURE, MAX_TOKENS),
            field="expansion",
            expected_tokens=MAX_EXPANSION_TOKENS + 12,
            origin={"template": self.prompts.name, "template_hash": self.prompts.template_hash},
        )

    def problems(self, text: str, cut: bool) -> list[str]:
        """What is wrong with an expansion: any of empty, refusal, too_long, cut_off, wrong_language."""
        if not text:
            return ["empty"]
        found = ["refusal"] if is_refusal(text) else []
        if approximate_tokens(text) > MAX_EXPANSION_TOKENS:
            found.append("too_long")
        if cut:
            found.append("cut_off")
        if not is_language(text, self.prompts.language):
            found.append("wrong_language")
        return found

    def follow_up(self, index: int, request: Request, entry: dict[str, Any]) -> Request | None:
        text, cut = answer_text(entry, request.field)
        problems = self.problems(_one_line(text), cut)
        if not problems:
            return None
        complaints = {
            "empty": "The answer was empty.",
            "refusal": "Only the meaning of a label is asked for, which is harmless.",
            "too_long": f"That has about {approximate_tokens(text)} tokens, but at most {MAX_EXPANSION_TOKENS} are allowed.",
            "cut_off": "That was cut off before its end.",
            "wrong_language": f"That is not in {LANGUAGES[self.prompts.language]}.",
        }
        wanted = (
            f"Write one sentence in {LANGUAGES[self.prompts.language]} with at most {MAX_EXPANSION_TOKENS} tokens (about "
            f"{int(MAX_EXPANSION_TOKENS * 0.6)} words), and nothing else."
        )
        return follow_up(request, entry, " ".join([*(complaints[problem] for problem in problems), wanted]))

    def row(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        answers = [answer_text(entry, "expansion") for entry in entries]
        judged = [(_one_line(text), self.problems(_one_line(text), cut)) for text, cut in answers]
        # the second answer counts, unless it is of no use and the first one is not
        text, marks = next((pair for pair in reversed(judged) if not {"empty", "refusal"} & set(pair[1])), judged[-1])
        if "empty" in marks or "refusal" in marks:
            raise ItemError(f"no usable answer, also when asked again ({', '.join(marks)}): {text[:80]!r}")
        return {
            "label": self.labels[index][0],
            "expansion": text,
            "marks": " ".join(marks),
            "provenance": provenance(entries),
        }


def _one_line(text: str) -> str:
    return " ".join(text.split()).strip("\"' ")


def expand_labels(
    labels: str | Path | Sequence[str] | Mapping[str, str],
    output_dir: str | Path,
    settings: RequestSettings,
    prompts: PromptBuilder | None = None,
    dry_run: bool = False,
    partial: bool = False,
) -> RunSummary | Plan:
    """
    Writes `label_descriptions.jsonl`: `{"label", "expansion", "marks", "provenance"}` for each label (Eq. 1).

    An expansion that is empty, longer than 30 tokens, cut off or in another language is asked for once more; what is still
    too long or in another language is kept, and marked in `marks`.

    Args:
        labels: File of labels (see `read_labels`), label names, or label names with the data set's notes on them.
        output_dir: Folder of the output and the journal.
        settings (`RequestSettings`): Model, endpoint and limits.
        prompts (`PromptBuilder`, *optional*): Template and what it is filled with.
        dry_run (`bool`): Send nothing; return what would be sent.
        partial (`bool`): Write the output even if the run ended before its end.

    Returns:
        `RunSummary`, or `Plan` for a dry run.

    Raises:
        AugmentationError: bad input, an endpoint that refuses or cannot be reached.
    """
    if isinstance(labels, (str, Path)):
        labels = read_labels(labels)
    elif not isinstance(labels, Mapping):
        labels = dict.fromkeys(labels, "")
    task = ExpandLabels(labels, prompts or PromptBuilder(), settings)
    return run_task(task, settings, output_dir, FILE_NAME, dry_run, partial)
