"""llama.cpp's library in a process of its own, which it may abort.

calls     a request to it and its answer, here
worker    what it does for a request, there
session   a model in memory, there: tokens, log-probabilities, answers
"""

from finetune_trainer.export.llama.calls import LlamaError, call

__all__ = ["LlamaError", "call"]
