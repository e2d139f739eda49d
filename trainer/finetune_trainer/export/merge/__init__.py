"""The merged model's weights, computed as they are read: base shards plus the adapter's deltas.

checkpoint    the base's safetensors, memory-mapped; names of weights; the type to store them in
deltas        what the adapter adds to each weight
merged        MergedWeights: rows of the merged model, by blocks
model_folder  the merged model as a folder: shards, configuration, tokenizer

Nothing here loads a model. Whatever its size, only some blocks of rows are in memory.
"""

from finetune_trainer.export.merge.checkpoint import TensorInfo
from finetune_trainer.export.merge.merged import MergedWeights

__all__ = ["MergedWeights", "TensorInfo"]
