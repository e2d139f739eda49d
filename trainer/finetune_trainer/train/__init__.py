"""Two processes. The stage supervises and has no torch; a worker runs the recipe.

train_stage inputs from the store, result into the store
supervisor  the stage's process: workers, memory ladder, checkpoints, uploads
link        what passes between the two
recipe      the worker's process: torch and the model
"""
