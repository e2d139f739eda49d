"""The second room: train the adapter.

stage      inputs from the store, result into the store; starts the worker
worker     the process that trains
sft        the recipe, read from top to bottom
"""
