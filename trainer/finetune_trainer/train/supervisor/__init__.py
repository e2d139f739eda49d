"""The process that supervises a training: store, status, memory ladder, uploads.

setup             adapts a training to the machine: devices, split of a step, engine, trackers
training_session  workers that come and go, and the checkpoints between them
ladder            what to try when memory runs out
checkpoints       checkpoints in the object store, and the thread that brings them there

Nothing here imports torch, transformers or the recipe (import-linter holds it). So this process can
still report when a worker runs out of memory or crashes.
"""
