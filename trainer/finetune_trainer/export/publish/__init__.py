"""From finished files to an output folder that readers can rely on.

`Publication` uploads files in the background, `swap` puts them in the place of the former version,
`signing` signs them, and `hub` pushes them to the Hugging Face Hub.
"""

from finetune_trainer.export.publish.publication import Publication
from finetune_trainer.export.publish.swap import finish_interrupted

__all__ = ["Publication", "finish_interrupted"]
