"""farspan: fine-tune large language models on GPUs that stand far apart."""

__version__ = "0.1.0"
