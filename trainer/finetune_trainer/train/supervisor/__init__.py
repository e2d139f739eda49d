"""The process that supervises a training: store, status, memory ladder, uploads.

setup        devices, engine, and how a step is split for them
session      a training as the stage sees it: workers that come and go, checkpoints between them
launch       starts a worker and finds out how it ended
ladder       what to try when memory runs out
checkpoints  checkpoints in the object store, whole or not at all
uploads      brings them there beside the training

Nothing here imports torch, transformers or the recipe (import-linter holds it): a worker that runs
out of memory or crashes leaves this process its word.
"""
