"""What `SepMldcTrainer` adds to saving and pushing: a card in every checkpoint, and checkpoints that load by themselves."""

import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging
from transformers.utils.hub import hf_api

from ..checkpoints import MANIFEST_NAME, write_manifest
from .model_card import is_generated_card, save_model_card
from .model_card_text import split_metrics


logger = logging.get_logger(__name__)

# What a checkpoint holds for resuming only; it has no place among the files that people load.
TRAINING_STATE = (
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    "trainer_state.json",
    "global_step*",
    MANIFEST_NAME,
)


class HubMixin:
    """
    For a `Trainer`: each saved folder gets a model card, and each push to the Hub the card and the model's code too.

    Attributes:
        model_card_kwargs (`dict`): what the card cannot know by itself: `datasets`, `language`, `license`, `base_model`,
            `pseudo_document_provenance`, further measured `metrics`, ... See [`~trainer.hub.model_card.build_model_card`].
    """

    @property
    def model_card_kwargs(self) -> dict:
        return self.__dict__.setdefault("_model_card_kwargs", {})

    @model_card_kwargs.setter
    def model_card_kwargs(self, value: dict) -> None:
        self._model_card_kwargs = dict(value)

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
    ) -> None:
        """
        Write the model card into `args.output_dir`. What is given here holds for later cards too; `tasks` and
        `dataset_args` are accepted for `Trainer`'s sake. A README that someone wrote or changed is kept, with a warning.
        """
        tags = [tags] if isinstance(tags, str) else tags
        given = {"language": language, "license": license, "tags": tags, "model_name": model_name}
        given |= {"base_model": finetuned_from, "datasets": dataset_tags or dataset}
        self.model_card_kwargs.update({name: value for name, value in given.items() if value is not None})
        if self.is_world_process_zero():
            self._write_model_card(self.args.output_dir)

    def _write_model_card(self, folder: str) -> None:
        config = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).config
        metrics, note, is_latest = self._card_metrics()
        deciles = None
        if is_latest and self._streaming_metrics is not None and not self._predicting:
            if self._streaming_metrics.num_seen and self._streaming_metrics.label_counts is not None:
                deciles = self._streaming_metrics.deciles()
        kwargs = dict(self.model_card_kwargs)
        kwargs.setdefault("base_model", _base_model(config))
        kwargs.setdefault("repo_id", self.hub_model_id or self.args.hub_model_id)
        kwargs.setdefault("model_name", Path(self.args.output_dir).absolute().name)
        further = kwargs.pop("metrics", {})
        try:
            save_model_card(
                folder,
                config,
                training_args=self.args,
                metrics={**metrics, **further},
                metric_note=None if further else note,
                log_history=self.state.log_history,
                deciles=deciles,
                run_dir=self.args.output_dir,
                **kwargs,
            )
        except FileExistsError as error:
            logger.warning(str(error))

    def _card_metrics(self) -> tuple[dict, str | None, bool]:
        """What was measured of the model as it is now, when, and whether this is the latest evaluation."""
        history = self.state.log_history
        measured = [index for index, entry in enumerate(history) if split_metrics(entry)]
        if not measured:
            return {}, None, False
        ends = [index for index, entry in enumerate(history) if "train_runtime" in entry]
        if not self.is_in_train and ends and measured[-1] > ends[-1]:
            metrics = {}
            for index in measured:
                if index > ends[-1]:
                    metrics.update(history[index])
            return metrics, "after training", True
        index = measured[-1]
        if not self.is_in_train and self.args.load_best_model_at_end and self.state.best_global_step:
            index = next((i for i in measured if history[i]["step"] == self.state.best_global_step), index)
        return history[index], f"at step {history[index]['step']}", index == measured[-1]

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._write_model_card(output_dir if output_dir is not None else self.args.output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Push a checkpoint beside the training: complete, with code, tokenizer and card.

        transformers uploads the output folder, where weights are overwritten and log files grow meanwhile, and checkpoints
        that are rotated away meanwhile: each lets the push fail, unseen. Here the files are set aside first.
        """
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self._warn_of_failed_pushes()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            for left_over in Path(args.output_dir).glob("_push-*"):  # of a run that was killed
                shutil.rmtree(left_over, ignore_errors=True)
        staged = tempfile.mkdtemp(prefix="_push-", dir=args.output_dir)  # "_*" is never pushed
        shutil.copytree(checkpoint_folder, staged, copy_function=_link_or_copy, dirs_exist_ok=True)
        write_manifest(staged)
        own_card = Path(args.output_dir, "README.md")
        if own_card.exists() and not is_generated_card(own_card.read_text(encoding="utf-8", errors="replace")):
            os.remove(os.path.join(staged, "README.md"))
            shutil.copy(own_card, staged)

        at = f"step {self.state.global_step}"
        if args.save_strategy == SaveStrategy.EPOCH:
            at = f"epoch {int(self.state.epoch)}"
        uploads = [{"commit_message": f"Training in progress, {at}", "ignore_patterns": list(TRAINING_STATE)}]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            target = "last-checkpoint" if last else Path(checkpoint_folder).name
            uploads.append({"commit_message": f"Training in progress, {at}, checkpoint", "path_in_repo": target})
        jobs = [
            hf_api().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=staged,
                token=args.hub_token,
                revision=args.hub_revision,
                run_as_future=True,
                **upload,
            )
            for upload in uploads
        ]
        # Uploads run one after the other, in the order they were asked for.
        jobs[-1].add_done_callback(lambda _: shutil.rmtree(staged, ignore_errors=True))
        # Earlier jobs stay until they were looked at: one may have failed since, and would never be told of.
        earlier = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress(earlier + jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """transformers never looks at the result of a push that runs beside the training."""
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


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _base_model(config) -> str | None:
    """The encoder's name: as a Hub name where it is known to be one, else marked as a folder."""
    name = getattr(config.backbone_config, "_name_or_path", None)
    if not name:
        return None
    is_hub_name = "/" in name or isinstance(try_to_load_from_cache(name, "config.json"), str)
    return name if is_hub_name else os.path.join(".", name)
