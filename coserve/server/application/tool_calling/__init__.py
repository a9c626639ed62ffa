"""Tool calls in generated text: the formats that models write them in, read piece by piece."""
