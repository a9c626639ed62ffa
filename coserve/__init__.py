"""coserve: one server that answers chat requests and fine-tunes LoRA adapters in the same step."""

__version__ = "0.1.0"
