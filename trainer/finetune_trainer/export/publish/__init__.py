"""From finished files to an output folder that readers can rely on.

publication  uploads files in the background, and puts them in the place of the former version
signing      signs them
hub_push     pushes them to the Hugging Face Hub
"""

from finetune_trainer.export.publish.publication import Publication, finish_interrupted

__all__ = ["Publication", "finish_interrupted"]
