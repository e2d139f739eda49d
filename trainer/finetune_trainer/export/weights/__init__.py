"""The merged model's weights, computed as they are read: base shards plus the adapter's deltas.

checkpoint        the base's safetensors, memory-mapped
adapter           the adapter's files, and what of PEFT's variety can be merged
delta             what the adapter adds to one weight
names             modules to names of weights, where transformers renames them
storage_type      the 16-bit type that the result is stored in
merged            MergedWeights: rows of the merged model, by blocks
safetensors_file  the merged model as shards on disk

Nothing here loads a model: whatever its size, some blocks of rows are all that is in memory.
"""

from finetune_trainer.export.weights.checkpoint import TensorInfo
from finetune_trainer.export.weights.merged import MergedWeights
from finetune_trainer.export.weights.safetensors_file import write_merged

__all__ = ["MergedWeights", "TensorInfo", "write_merged"]
