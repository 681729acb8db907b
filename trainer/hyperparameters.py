"""Search space for hyperparameter search with Optuna."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from optuna import Trial


def search_space(trial: "Trial") -> dict[str, Any]:
    """
    A search space for `SepMldcTrainer.hyperparameter_search(hp_space=search_space)` with Optuna: the training arguments that matter
    most, around the recommended ones.

    | argument | values |
    |---|---|
    | `learning_rate` | 2e-5 to 5e-4, on a logarithmic scale |
    | `head_learning_rate` | 3e-4 to 1e-2, on a logarithmic scale |
    | `num_train_epochs` | 2 to 20, on a logarithmic scale |
    | `per_device_train_batch_size` | 16, 32 |

    Hyperparameters of the model, such as its dropout, can be suggested in `model_init(trial)`.

    Args:
        trial (`optuna.Trial`): suggests the values.

    Returns:
        `dict`: values by the names of `SepMldcTrainingArguments`.
    """
    return {
        "learning_rate": trial.suggest_float("learning_rate", 2e-5, 5e-4, log=True),
        "head_learning_rate": trial.suggest_float("head_learning_rate", 3e-4, 1e-2, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 2, 20, log=True),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [16, 32]),
    }
