"""Data, training and evaluation of the bundled ``coserve-demo`` model."""
