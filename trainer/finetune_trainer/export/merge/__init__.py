"""The merged model's weights, computed as they are read: base shards plus the adapter's deltas.

checkpoint    the base's safetensors, memory-mapped; names of weights; the type to store them in
adapter       the adapter's files, and what they add to each weight
merged        MergedWeights: rows of the merged model, by blocks
writer        the merged model as safetensors shards on disk
model_folder  the merged model's folder but for its weights

Nothing here loads a model: whatever its size, some blocks of rows are all that is in memory.
"""

from finetune_trainer.export.merge.checkpoint import TensorInfo
from finetune_trainer.export.merge.merged import MergedWeights
from finetune_trainer.export.merge.writer import write_merged

__all__ = ["MergedWeights", "TensorInfo", "write_merged"]
