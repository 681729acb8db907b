"""
The private parts of transformers' `Trainer` that this project overrides or reads, each with the reason. All other code in `trainer/` uses
public interfaces: callbacks, `save_model`, `log`, `training_step`, `evaluation_loop`.
`tests/test_transformers_internals.py` fails if the installed version of transformers lacks one of these, or if its arguments have changed.
"""

import inspect
from typing import Any

from torch.utils.data import Sampler
from transformers import Trainer


# Name -> parameters that this project relies on.
OVERRIDDEN = {
    "_get_train_sampler": ("self", "train_dataset"),
    "_set_signature_columns_if_needed": ("self",),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_finish_current_push": ("self",),
}
# Attributes of a trainer that an override reads.
ATTRIBUTES = ("_signature_columns", "push_in_progress")


class TransformersInternals(Trainer):
    """A `Trainer` with public names for private parts of transformers."""

    # Columns that the data collator needs although the model's forward has no such argument.
    further_columns: tuple[str, ...] = ()

    def train_sampler(self, dataset: Any) -> Sampler | None:
        """Returns the sampler of the training documents; subclasses may override it."""
        return super()._get_train_sampler(dataset)

    # Reason: `get_train_dataloader` is public, but builds loader and sampler in one; overriding it would copy how transformers
    # sets up workers, seeds and processes.
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return self.train_sampler(self.train_dataset if train_dataset is None else train_dataset)

    # Reason: columns are dropped by the names of the model's arguments. `remove_unused_columns=False` would keep all others too,
    # so that each batch reads the texts from the disk; `label_names` adds a column but then demands it as a target.
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self.__dict__["_signature_columns"]
        self._signature_columns = [*columns, *(name for name in self.further_columns if name not in columns)]

    def push_checkpoint(self, folder: str) -> None:
        """Starts to push a checkpoint during training; subclasses may override it."""
        super()._push_from_checkpoint(folder)

    # Reason: `on_push_begin` cannot change what is pushed, and is also called at the end of training.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.push_checkpoint(checkpoint_folder)

    def finish_pushes(self) -> None:
        """Waits until pushes are finished; subclasses may override it."""
        super()._finish_current_push()

    # Reason: transformers waits for uploads, but does not check whether they failed.
    def _finish_current_push(self) -> None:
        self.finish_pushes()


def changed_internals() -> list[str]:
    """One sentence for each private part that is missing or different in the installed version of transformers."""
    changes = []
    for name, expected in OVERRIDDEN.items():
        method = getattr(Trainer, name, None)
        if method is None:
            changes.append(f"`Trainer.{name}` is gone.")
        elif tuple(inspect.signature(method).parameters) != expected:
            found = ", ".join(inspect.signature(method).parameters)
            changes.append(f"`Trainer.{name}` takes ({found}), not ({', '.join(expected)}).")
    source = inspect.getsource(Trainer)
    changes += [f"`Trainer.{name}` is gone." for name in ATTRIBUTES if f"self.{name}" not in source]
    return changes
