"""The second room: train the adapter.

stage    inputs from the store, result into the store
sft      the recipe, read from top to bottom
"""
