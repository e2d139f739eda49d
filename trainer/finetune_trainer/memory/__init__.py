"""Memory and disk: what a training needs, and how it is split so that it fits.

predict   bytes on a GPU, or of the process on a CPU, term by term
forecast  an export's time and memory; bytes on disk, also of a training
plan      micro-batch, accumulation, recomputation and parallelism for the hardware that there is
remedies  what would fit instead, when nothing does
gpus      what is known about GPUs, and why torch can't use them
machine   the hardware at hand; also a program, which asks torch about GPUs

Pure functions of numbers, except `machine`, and without torch. docs/memory.md has the
formula, its sources, and how predictions compare with published and own measurements.
"""
