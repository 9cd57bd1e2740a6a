"""Convert and quantize ERNIE 4.5 checkpoints, one tensor at a time."""

__version__ = "0.1.0"
