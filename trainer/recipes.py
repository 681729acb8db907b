"""
Recommended settings, chosen from the data.

One place decides what a user gets without naming a setting. The rules come from `benchmarks/recipe_sweep.py`: many short runs over
three data sets at 300 to 6,000 documents, chosen on validation data. See docs/settings.md for the measurements.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


RECIPES = ("best", "fast", "paper")
# Which settings belong to the model (`SepMldcConfig`, `from_backbone`); all others are training arguments or steps of `run_mldc.py`.
MODEL_SETTINGS = (
    "pooling",
    "classification_loss",
    "classifier",
    "classifier_dropout",
    "classifier_bias_init",
    "label_attention",
)
PIPELINE_SETTINGS = ("max_length", "freeze_layers", "backbone_dropout", "lexical_scores", "early_stopping_patience")


@dataclass(frozen=True)
class Setting:
    """A recommended value and the reason for it."""

    value: Any
    why: str


@dataclass(frozen=True)
class RecommendedSettings(Mapping[str, Any]):
    """
    What [`recommend_settings`] returns: a mapping of setting to value, with the reasons.

    Attributes:
        recipe (`str`): the name of the recipe.
        settings (`dict[str, Setting]`): values and reasons, in the order in which they are shown.
    """

    recipe: str
    settings: Mapping[str, Setting]

    def __getitem__(self, name: str) -> Any:
        return self.settings[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    @property
    def model(self) -> dict[str, Any]:
        """Keyword arguments of `SepMldcForMultiLabelClassification.from_backbone`."""
        return {name: self[name] for name in MODEL_SETTINGS if name in self.settings}

    @property
    def training(self) -> dict[str, Any]:
        """Keyword arguments of `SepMldcTrainingArguments`."""
        return {name: self[name] for name in self if name not in (*MODEL_SETTINGS, *PIPELINE_SETTINGS)}

    def rows(self, named: Mapping[str, Any] | None = None) -> list[tuple[str, str, str]]:
        """
        The table "setting, value, why".

        Args:
            named (`dict[str, Any]`, *optional*): settings that the user named. Their values are shown instead of the
                recommended ones.
        """
        named = named or {}
        return [
            (name, str(named[name]), "named by the user") if name in named else (name, str(setting.value), setting.why)
            for name, setting in self.settings.items()
        ]
