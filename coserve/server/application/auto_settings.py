"""Settings that a request leaves to the server ("auto"), chosen by the number of examples.

Epochs follow the rule that OpenAI published for its own choice (its cookbook's data preparation for chat
fine-tuning): three, but at least about 100 and at most 25,000 examples are seen. The batch keeps an epoch of
few examples at eight steps or more, and grows with many. The learning rate goes with the square root of the
batch, as gradient noise does.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from msgspec.structs import replace

from coserve.training.job import TrainingSpec

EXAMPLES_SEEN = (100, 25_000)
MOST_EPOCHS = 25
STEPS_OF_AN_EPOCH = 8
EXAMPLES_A_BATCH = 500  # of a large data set, for each example in its batch
MOST_BATCH = 64
MULTIPLIER = (0.5, 2.0)
BY_METHOD = {"dpo": 0.1}  # preferences move an adapter further a step than answers do

DEFAULTS = TrainingSpec()


def choose(
    training: TrainingSpec, names: Collection[str], examples: int, tokens: int, method: str
) -> TrainingSpec:
    """`training` with the settings in `names` chosen for data of at least one example, of `tokens` in all."""
    if "n_epochs" in names:
        training = replace(training, n_epochs=epochs(examples))
    if "batch_size" in names:
        packs = -(-tokens // training.max_length) if training.packing else examples
        training = replace(training, batch_size=batch_size(packs))
    if "learning_rate_multiplier" in names:
        multiplier = learning_rate_multiplier(training.batch_size, method)
        training = replace(training, learning_rate=DEFAULTS.learning_rate * multiplier)
    return training


def epochs(examples: int) -> int:
    """Passes over the data."""
    least, most = EXAMPLES_SEEN
    if examples * DEFAULTS.n_epochs < least:
        return min(MOST_EPOCHS, least // examples)
    if examples * DEFAULTS.n_epochs > most:
        return max(1, most // examples)
    return DEFAULTS.n_epochs


def batch_size(examples: int) -> int:
    """Examples (or packs, where they are packed) of one optimizer step."""
    few = max(1, examples // STEPS_OF_AN_EPOCH)
    many = min(MOST_BATCH, examples // EXAMPLES_A_BATCH)
    return max(many, min(DEFAULTS.batch_size, few))


def learning_rate_multiplier(batch: int, method: str) -> float:
    """Of the default learning rate, for this batch."""
    low, high = MULTIPLIER
    by_batch = min(high, max(low, math.sqrt(batch / DEFAULTS.batch_size)))
    return round(by_batch * BY_METHOD.get(method, 1.0), 3)
