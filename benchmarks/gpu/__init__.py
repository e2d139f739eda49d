"""One command on a GPU: first whether it computes what it should, then how fast.

    python -m benchmarks.gpu [--minutes 25] [--wheels FOLDER] [--cases NAME,NAME] [--tiny]

Models are Llamas of 1 and 8 billion parameters with random weights, and a tokenizer of single
bytes, all made here: nothing is downloaded, and no cluster, bucket or llama.cpp is needed.

cases      what is run, in which order, and how long it may take
models     models, tokenizer and rows
trainings  ours, by the trainer's own `fine_tune`, with what is looked at in it
checks     the cases that say right or wrong
speed      tokens/s, MFU and peak memory: ours, TRL's script, Unsloth
flops      the arithmetic of MFU
case_runner  the process that runs cases
"""
