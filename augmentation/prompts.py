"""
Prompts from Jinja2 templates, to which documents and labels are passed only as quoted data.

A template is a single file that extends `generic.jinja` and overrides blocks. `part` selects the text to render: `"system"`, `"label_description"` (Eq. 1) or `"pseudo_document"` (Eq. 3).
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import SandboxedEnvironment

from .errors import AugmentationError
from .texts import clean


FOLDER = Path(__file__).with_name("templates")
MAX_DESCRIPTION_TOKENS = 30  # Eq. 1: one sentence of at most 30 tokens
LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fi": "Finnish", "fr": "French", "hi": "Hindi", "hu": "Hungarian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sv": "Swedish", "tr": "Turkish", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip

OLD_BLOCKS = {"expand": "label_description", "sample": "pseudo_document"}  # names in templates of version 0.1

# Control tokens with which chat templates of open models end a turn. In a document, they must be treated as plain text.
_CONTROL = re.compile(
    r"<\|[^<>|]{0,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|<｜[^<>｜]{0,40}｜>", re.I
)


def _defuse(text: str) -> str:
    """Breaks up a model's control tokens (`<|im_end|>` becomes `< |im_end| >`)."""
    return _CONTROL.sub(lambda match: f"{match[0][0]} {match[0][1:-1]} {match[0][-1]}", clean(text))


def quoted(text: str) -> str:
    """A label or description as a JSON string, in which quotes, newlines and braces have no special meaning."""
    return json.dumps(" ".join(_defuse(text).split()), ensure_ascii=False)


def fenced(text: str, name: str = "document") -> str:
    """A document between tags that contain a hash of it, so that no document can contain its own closing tag."""
    text = _defuse(text)
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"<{name}-{mark}>\n{text}\n</{name}-{mark}>"


def template_names() -> list[str]:
    """Names of the templates that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


@dataclass(frozen=True)
class _QuotedLabel:
    """A label as it is passed to a template."""

    name: str
    description: str

    @property
    def expansion(self) -> str:
        """The name of `description` in templates of version 0.1."""
        return self.description


def _quoted_label(label: tuple[str, str]) -> _QuotedLabel:
    name, description = label
    return _QuotedLabel(quoted(name), quoted(description) if description else "")


@dataclass(frozen=True)
class PromptBuilder:
    """
    Builds chat messages from a template.

    Args:
        template (`str`, defaults to `"generic"`): A name of `template_names()`, or the path of your own.
        dataset_description (`str`): What the documents are, put into every prompt; "" keeps the template's own words.
        genre (`str`): What one document is called ("abstract"); "" keeps the template's own word.
        language (`str`, defaults to `"en"`): ISO 639-1 code of the language to write in.

    Raises:
        AugmentationError: if there is no such template, or it has an error.
    """

    template: str = "generic"
    dataset_description: str = ""
    genre: str = ""
    language: str = "en"

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise AugmentationError(
                f"the language {self.language!r} is not known; use one of the codes {', '.join(LANGUAGES)}."
            )
        self._compiled  # noqa: B018 -- a broken template fails here, not in the middle of a run

    @cached_property
    def name(self) -> str:
        """The template's name in the provenance."""
        return self.template if self.template in template_names() else Path(self.template).stem

    @cached_property
    def _environment(self) -> SandboxedEnvironment:
        folders = [FOLDER]
        if self.template not in template_names():
            folders.insert(0, Path(self.template).resolve().parent)
        return SandboxedEnvironment(
            loader=jinja2.FileSystemLoader(folders),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    @cached_property
    def _file_name(self) -> str:
        return f"{self.template}.jinja" if self.template in template_names() else Path(self.template).name

    @cached_property
    def _compiled(self) -> jinja2.Template:
        with self._template_errors("cannot be read"):
            template = self._environment.get_template(self._file_name)
        old = sorted(OLD_BLOCKS.keys() & template.blocks.keys()) if self.template not in template_names() else []
        if old:
            names = ", ".join(f"`{name}` (now `{OLD_BLOCKS[name]}`)" for name in old)
            warnings.warn(
                f"The prompt template {self.template} fills blocks of version 0.1: {names}. Rename them.",
                FutureWarning,
                stacklevel=2,
            )
        return template

    @cached_property
    def template_hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the template and of all templates that it extends."""
        digest, names, seen = hashlib.sha256(), [self._file_name], set()
        loader = self._environment.loader
        while names and loader is not None:
            name = names.pop()
            if name in seen:
                continue
            seen.add(name)
            with self._template_errors("cannot be read"):
                source = loader.get_source(self._environment, name)[0]
                digest.update(source.encode())
                names += [found for found in meta.find_referenced_templates(self._environment.parse(source)) if found]
        return digest.hexdigest()[:16]

    def render(self, part: str, **values: Any) -> str:
        """Renders a part. Documents and labels in `values` are already quoted."""
        context = {
            "part": part,
            "dataset_description": self.dataset_description,
            "genre": self.genre,
            "language": LANGUAGES[self.language],
            "max_tokens": MAX_DESCRIPTION_TOKENS,
        }
        with self._template_errors(f"fails in the part {part!r}"):
            text = self._compiled.render({**context, **values})
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        if not text:
            raise AugmentationError(
                f"the prompt template {self.template} gives an empty part {part!r}; begin it with "
                "`{% extends 'generic.jinja' %}` and change single blocks."
            )
        return text

    @contextmanager
    def _template_errors(self, what: str) -> Iterator[None]:
        """Turns any error of a user's template into one sentence."""
        try:
            yield
        except AugmentationError:
            raise
        except jinja2.TemplateNotFound as error:
            raise AugmentationError(
                f"there is no prompt template {str(error.name)!r}; use one of {', '.join(template_names())}, or the path of "
                "a file."
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise AugmentationError(
                f"the prompt template {error.name or self.template}, line {error.lineno}: {error.message}; correct the "
                "template."
            ) from None
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            raise AugmentationError(
                f"the prompt template {self.template} {what} ({type(error).__name__}: {message}); correct the template."
            ) from None

    def label_description(self, label: str, note: str = "") -> list[dict[str, str]]:
        """Messages that ask for a description of a label (Eq. 1); `note` is the dataset's note on it."""
        note = quoted(note) if note else ""
        return self._messages(self.render("label_description", label=quoted(label), note=note))

    def pseudo_document(
        self,
        labels: Sequence[tuple[str, str]],
        document: str | None,
        length: int,
        variation: int = 0,
        near: tuple[str, str] | None = None,
        candidates: Sequence[tuple[str, str]] = (),
        most_further: int = 2,
    ) -> list[dict[str, str]]:
        """
        Messages that ask for a pseudo-document (Eq. 3).

        Args:
            labels: (label, description) of every label that the new document should have.
            document: The demonstration, already truncated, or None.
            length: Requested length in tokens.
            variation: Number of the pseudo-document for this demonstration; asks for a different topic each time.
            near (*optional*): (label, description) that the new document must only seem to have.
            candidates: (label, description) of further labels, from which the model chooses.
            most_further: Maximum number of `candidates` that it may choose.

        Raises:
            AugmentationError: if the template has an error, or leaves out `near` or `candidates`.
        """
        text = self.render(
            "pseudo_document",
            labels=[_quoted_label(label) for label in labels],
            document=fenced(document) if document else "",
            length=length,
            variation=variation + 1,
            near=_quoted_label(near) if near else None,
            candidates=[_quoted_label(label) for label in candidates],
            most_further=most_further,
        )
        for name, _ in (*([near] if near else []), *candidates):
            if quoted(name) not in text:
                raise AugmentationError(
                    f"the prompt template {self.template} does not show the label {quoted(name)} of `{'near' if near else 'candidates'}`; "
                    "begin it with `{% extends 'generic.jinja' %}`, or write plain pseudo-documents only (`hard_share` and "
                    "`several_share` 0)."
                )
        return self._messages(text)

    def _messages(self, text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}, {"role": "user", "content": text}]

    @cached_property
    def _system(self) -> str:
        return self.render("system")
