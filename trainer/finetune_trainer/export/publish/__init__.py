"""From finished files to an output folder that readers can rely on.

publication  uploads the files of a new version in the background, and makes it the current one
signing      signs them
hub_push     pushes them to the Hugging Face Hub
"""

from finetune_trainer.export.publish.publication import Publication, Published, finish

__all__ = ["Publication", "Published", "finish"]
