"""What tests of whole engines share."""

from __future__ import annotations

from tests.invariants.fixtures import adapters as adapters
from tests.invariants.fixtures import data as data
from tests.invariants.fixtures import model as model
