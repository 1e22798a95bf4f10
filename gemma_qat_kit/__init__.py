"""Load, measure, train, export and chat with Google's Gemma 4 QAT checkpoints, in a notebook."""

__version__ = "0.1.0"
