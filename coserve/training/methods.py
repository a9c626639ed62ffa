"""Which methods a job may train by, and which settings belong to which. Torch-free.

objectives.py holds what they minimise.
"""

from __future__ import annotations

from coserve.errors import InvalidRequest
from coserve.training.job import TrainingSpec

METHODS = ("supervised", "dft", "dpo")


def check_method(method: str, training: TrainingSpec) -> None:
    """InvalidRequest for an unknown method and for a setting that the method has no use for."""
    if method not in METHODS:
        raise InvalidRequest(f"unknown method {method!r}; there are {', '.join(METHODS)}", param="method")
    if not 0.0 <= training.label_smoothing < 1.0:
        raise InvalidRequest(
            f"label_smoothing must be from 0 to below 1, not {training.label_smoothing}",
            param="training.label_smoothing",
        )
    if training.label_smoothing and method != "supervised":
        raise InvalidRequest(
            f"label_smoothing belongs to the method supervised, not to {method}; leave it out",
            param="training.label_smoothing",
        )
    if training.kl_coef < 0.0:
        raise InvalidRequest(f"kl_coef must be at least 0, not {training.kl_coef}", param="training.kl_coef")
    if training.kl_coef and method == "dpo":
        raise InvalidRequest(
            "dpo is held to its reference by beta; leave kl_coef out", param="training.kl_coef"
        )
    if training.packing and method == "dpo":
        raise InvalidRequest("preferences aren't packed; leave packing out", param="training.packing")
    if method == "dpo" and training.beta <= 0.0:
        raise InvalidRequest(f"beta must be above 0, not {training.beta}", param="training.beta")


def needs_reference(method: str, training: TrainingSpec) -> bool:
    """The objective compares the adapter to what it started from."""
    return method == "dpo" or training.kl_coef > 0.0


def check_data(method: str, pairs: bool, param: str = "training_file") -> None:
    """InvalidRequest for `param` when the data set isn't of the method's kind."""
    if pairs and method != "dpo":
        raise InvalidRequest(
            f"the data are preferences; train them by the method dpo, not {method}", param=param
        )
    if method == "dpo" and not pairs:
        raise InvalidRequest(
            "dpo needs preferences: a chosen and a rejected answer in every line", param=param
        )
