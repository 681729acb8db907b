"""Label descriptions: one sentence that says what a label means (Eq. 1-2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .answers import answer_text, is_refusal
from .errors import AugmentationError, ItemError
from .files import label_name, read_labels
from .language import is_language
from .prompts import LANGUAGES, MAX_DESCRIPTION_TOKENS, PromptBuilder
from .request import Request
from .settings import RequestSettings
from .summary import Plan, RunSummary
from .tasks import provenance, run_task
from .tokens import approximate_tokens


TEMPERATURE = 0.0
MAX_TOKENS = 160  # 30 for the sentence; the rest for JSON and for answers that are too long and then requested again
FILE_NAME = "label_descriptions.jsonl"
FIELD, OLD_FIELD = "description", "expansion"  # where the answer is JSON; the second one in journals of version 0.1


class LabelDescriptions:
    """The task of `describe_labels`; items are labels."""

    name, old_name, file_name = "describe-labels", "expand-labels", FILE_NAME

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
            messages=self.prompts.label_description(label, note),
            model=self.settings.model,
            parameters=self.settings.request_parameters(TEMPERATURE, MAX_TOKENS),
            field=FIELD,
            expected_tokens=MAX_DESCRIPTION_TOKENS + 12,
            origin={"template": self.prompts.name, "template_hash": self.prompts.template_hash},
            old_field=OLD_FIELD,
        )

    def problems(self, text: str, cut: bool) -> list[str]:
        """What is wrong with a description: any of empty, refusal, too_long, cut_off, wrong_language."""
        if not text:
            return ["empty"]
        found = ["refusal"] if is_refusal(text) else []
        if approximate_tokens(text) > MAX_DESCRIPTION_TOKENS:
            found.append("too_long")
        if cut:
            found.append("cut_off")
        if not is_language(text, self.prompts.language):
            found.append("wrong_language")
        return found

    def follow_up(self, index: int, request: Request, entry: dict[str, Any]) -> Request | None:
        """A follow-up request if the answer is empty, a refusal, too long, cut off or in another language."""
        answer, cut = answer_text(entry, FIELD, OLD_FIELD)
        text = _one_line(answer)
        problems = self.problems(text, cut)
        if not problems:
            return None
        language = LANGUAGES[self.prompts.language]
        complaints = {
            "empty": "The answer was empty.",
            "refusal": "Only the meaning of a label is asked for, which is harmless.",
            "too_long": f"That has about {approximate_tokens(answer)} tokens, but at most {MAX_DESCRIPTION_TOKENS} are allowed.",
            "cut_off": "That was cut off before its end.",
            "wrong_language": f"That is not in {language}.",
        }
        wanted = (
            f"Write one sentence in {language} with at most {MAX_DESCRIPTION_TOKENS} tokens (about "
            f"{int(MAX_DESCRIPTION_TOKENS * 0.6)} words), and nothing else."
        )
        return request.again(answer, " ".join([*(complaints[problem] for problem in problems), wanted]))

    def row(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        answers = [answer_text(entry, FIELD, OLD_FIELD) for entry in entries]
        judged = [(_one_line(text), self.problems(_one_line(text), cut)) for text, cut in answers]
        # use the second answer, unless only the first one is usable
        text, marks = next((pair for pair in reversed(judged) if not {"empty", "refusal"} & set(pair[1])), judged[-1])
        if "empty" in marks or "refusal" in marks:
            raise ItemError(f"no usable answer, also when asked again ({', '.join(marks)}): {text[:80]!r}")
        return {
            "label": self.labels[index][0],
            "description": text,
            "marks": " ".join(marks),
            "provenance": provenance(entries),
        }


def _one_line(text: str) -> str:
    return " ".join(text.split()).strip("\"' ")


def describe_labels(
    labels: str | Path | Sequence[str] | Mapping[str, str],
    output_dir: str | Path,
    settings: RequestSettings,
    prompts: PromptBuilder | None = None,
    dry_run: bool = False,
    partial: bool = False,
    label_delimiter: str | None = None,
) -> RunSummary | Plan:
    """
    Writes `label_descriptions.jsonl`: `{"label", "description", "marks", "provenance"}` for each label (Eq. 1).

    A description that is empty, longer than 30 tokens, cut off or in another language is requested once more. If the second answer is too
    long or in another language, it is kept and marked in `marks`.

    Args:
        labels: File of labels (see `read_labels`), label names, or label names with the dataset's notes on them.
        output_dir: Folder of the output and the journal.
        settings (`RequestSettings`): Model, endpoint and limits.
        prompts (`PromptBuilder`, *optional*): Template and what it is filled with.
        dry_run (`bool`): Send nothing; return what would be sent.
        partial (`bool`): Write the output even if the run stopped early.
        label_delimiter (`str`, *optional*): Separator of joined labels in a training table.

    Returns:
        `RunSummary`, or `Plan` for a dry run.

    Raises:
        AugmentationError: invalid input, or an endpoint that refuses requests or cannot be reached.
    """
    inputs: tuple[str | Path, ...] = ()
    if isinstance(labels, (str, Path)):
        inputs = (labels,)
        notes = read_labels(labels, label_delimiter)
    else:
        given = labels if isinstance(labels, Mapping) else dict.fromkeys(labels, "")
        notes = {label_name(label, "`labels`"): note for label, note in given.items()}
        if not notes:
            raise AugmentationError("`labels` is empty, but at least one label is needed; give label names.")
    task = LabelDescriptions(notes, prompts or PromptBuilder(), settings)
    return run_task(task, settings, output_dir, dry_run, partial, inputs)
