"""Saving and pushing in `SepMldcTrainer`: adds a model card to every checkpoint, and the code that loads it without this package."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..checkpoints import write_manifest
from ..transformers_internals import TransformersInternals
from .callback import ModelCardCallback
from .model_card import is_generated_card, save_model_card


logger = logging.get_logger(__name__)

# Files of a checkpoint that transformers does not push.
EXTRA_FILES = ("README.md", "*.png", "*.py", "requirements.txt")


class HubMixin(TransformersInternals):
    """
    Mixin for a `Trainer`: writes a model card into each saved folder, and also pushes the card and the model's code to the Hub.

    Attributes:
        model_card_kwargs (`dict`): what the trainer cannot know: `datasets`, `language`, `license`, `base_model`,
            `pseudo_document_provenance`, further measured `metrics`, ... See [`~trainer.hub.model_card.build_model_card`].
        model_card_callback ([`~trainer.hub.callback.ModelCardCallback`]): the measurements so far.
    """

    args: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_card_callback = ModelCardCallback(self)
        self.add_callback(self.model_card_callback)

    @property
    def model_card_kwargs(self) -> dict:
        return self.__dict__.setdefault("_model_card_kwargs", {})

    @model_card_kwargs.setter
    def model_card_kwargs(self, value: dict) -> None:
        self._model_card_kwargs = dict(value)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card to `args.output_dir`. The arguments are also used for later cards; `tasks` and `dataset_args` are accepted only
        because `Trainer` has them. A README that was written or edited by someone is kept, with a warning.
        """
        tags = [tags] if isinstance(tags, str) else tags
        given = {"language": language, "license": license, "tags": tags, "model_name": model_name}
        given |= {"base_model": finetuned_from, "datasets": dataset_tags or dataset}
        self.model_card_kwargs.update({name: value for name, value in given.items() if value is not None})
        if self.is_world_process_zero():
            self._write_model_card(self.args.output_dir)

    def _write_model_card(self, folder: str) -> None:
        config = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).config
        collected = self.model_card_callback.card_of(self.state, self.args)
        kwargs = {
            "base_model": _base_model(config),
            "repo_id": self.hub_model_id or self.args.hub_model_id,
            "model_name": Path(self.args.output_dir).absolute().name,
            "max_length": getattr(self.processing_class, "model_max_length", None),
            "evaluation_sets": list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else (),
            **{name: value for name, value in self.model_card_kwargs.items() if value is not None},
        }
        further = kwargs.pop("metrics", {})
        try:
            save_model_card(
                folder,
                config,
                training_args=self.args,
                metrics={**collected["metrics"], **further},
                metric_note=None if further else collected["metric_note"],
                log_history=self.state.log_history,
                deciles=collected["deciles"],
                kept=collected["kept"],
                run_dir=self.args.output_dir,
                **kwargs,
            )
        except FileExistsError as error:
            logger.warning(str(error))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._write_model_card(output_dir if output_dir is not None else self.args.output_dir)

    def push_checkpoint(self, folder: str) -> None:
        """
        Push a checkpoint during training as transformers does, but from a separate folder that also holds card and code.

        transformers uploads the output folder itself, in which weights are overwritten, log files grow and old checkpoints are deleted
        meanwhile. Each of these makes the push fail silently.
        """
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if (
            not self.is_world_process_zero()
            or self.args.hub_strategy == HubStrategy.END
            or (busy and not self.args.hub_always_push)
        ):
            return
        self._warn_of_failed_pushes()
        earlier = [] if self.push_in_progress is None else list(self.push_in_progress.jobs)
        if not busy:
            for left_over in Path(self.args.output_dir).glob("_push-*"):  # left over from a killed run
                shutil.rmtree(left_over, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix="_push-", dir=self.args.output_dir))  # "_*" is never pushed
        checkpoint = staged / Path(folder).name
        shutil.copytree(folder, checkpoint, copy_function=_link_or_copy)
        own_card = Path(self.args.output_dir, "README.md")
        if own_card.exists() and not is_generated_card(own_card.read_text(encoding="utf-8", errors="replace")):
            (checkpoint / "README.md").unlink(missing_ok=True)
            shutil.copy(own_card, checkpoint)
        write_manifest(checkpoint)
        for pattern in EXTRA_FILES:
            for path in checkpoint.glob(pattern):
                shutil.copy(path, staged)
        with self._output_dir(staged):
            super().push_checkpoint(str(checkpoint))
        jobs = [job for job in self.push_in_progress.jobs if job not in earlier]
        # Uploads run sequentially, in the order in which they were requested.
        jobs[-1].add_done_callback(lambda _: shutil.rmtree(staged, ignore_errors=True))
        # Jobs are kept until they are checked, because they may fail later.
        self.push_in_progress.jobs = earlier + jobs

    @contextmanager
    def _output_dir(self, folder: Path) -> Iterator[None]:
        """Within this context, `args.output_dir` is another folder; saved arguments contain the original one."""
        original: Any = self.args
        self.args = _arguments_with_folder(original, folder)
        try:
            yield
        finally:
            self.args = original

    def finish_pushes(self) -> None:
        super().finish_pushes()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Reports failed pushes, which transformers ignores during training."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        ended = [job for job in push.jobs if job.done()]
        push.jobs = [job for job in push.jobs if job not in ended]
        for job in ended:
            if job.cancelled() or job.exception() is None:
                continue
            logger.warning(
                f"A push to {self.hub_model_id} during training failed ({job.exception()}), so the Hub has an older "
                "checkpoint, or none. Push the final model with `trainer.push_to_hub()`."
            )


def _arguments_with_folder(args: Any, folder: Path) -> Any:
    """A copy of training arguments with another `output_dir` that is pickled as the original. It keeps the token."""
    copy = object.__new__(type(args))
    copy.__dict__.update(vars(args), output_dir=str(folder), __getstate__=args.__getstate__)
    return copy


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _base_model(config: Any) -> str | None:
    """The encoder's name, marked as a folder unless it is known to be a Hub name."""
    name = getattr(config.backbone_config, "_name_or_path", None)
    if not name:
        return None
    is_hub_name = "/" in name or isinstance(try_to_load_from_cache(name, "config.json"), str)
    return name if is_hub_name else os.path.join(".", name)
