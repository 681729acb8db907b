"""Decision thresholds and calibration of probabilities, from histograms of scores."""

from typing import TYPE_CHECKING

from .._lazy import attach


_MODULES = {
    "choose_shrinkage": ".tuning",
    "expected_calibration_error": ".tuning",
    "global_threshold": ".tuning",
    "platt_scaling": ".tuning",
    "temperature_scaling": ".tuning",
    "tune_thresholds": ".tuning",
}
__getattr__, __dir__ = attach(__name__, _MODULES)
__all__ = [
    "choose_shrinkage",
    "expected_calibration_error",
    "global_threshold",
    "platt_scaling",
    "temperature_scaling",
    "tune_thresholds",
]

if TYPE_CHECKING:
    from .tuning import (
        choose_shrinkage,
        expected_calibration_error,
        global_threshold,
        platt_scaling,
        temperature_scaling,
        tune_thresholds,
    )
