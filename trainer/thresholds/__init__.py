"""Decision thresholds and calibration of probabilities, from histograms of scores."""

from typing import TYPE_CHECKING

from .._lazy import attach


__getattr__, __dir__ = attach(__name__)
__all__ = [
    "RiskCurve",
    "TunedThresholds",
    "check_guarantee",
    "check_no_guarantee",
    "choose_shrinkage",
    "documents_needed",
    "expected_calibration_error",
    "frequency_thresholds",
    "global_threshold",
    "platt_scaling",
    "temperature_scaling",
    "check_threshold_settings",
    "tune_thresholds_from_batches",
    "tune_thresholds",
]

if TYPE_CHECKING:
    from .conformal import RiskCurve, check_guarantee, check_no_guarantee, documents_needed
    from .from_batches import TunedThresholds, check_threshold_settings, tune_thresholds_from_batches
    from .tuning import (
        choose_shrinkage,
        expected_calibration_error,
        frequency_thresholds,
        global_threshold,
        platt_scaling,
        temperature_scaling,
        tune_thresholds,
    )
