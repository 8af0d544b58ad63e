"""Imported once by the server that the ranks are forked from: all that a rank would spend its first seconds on."""

import farspan.runtime.cli
import farspan.runtime.train
import torch._dynamo
import transformers.integrations.hub_kernels
from transformers import AutoTokenizer, PreTrainedTokenizerFast

__all__ = ["AutoTokenizer", "PreTrainedTokenizerFast", "farspan", "torch", "transformers"]
