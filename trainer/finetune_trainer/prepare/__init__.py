"""The first room: check everything that can be checked without a GPU, and write the examples.

stage       the order of the checks, and the result
dataset     the CSV file
template    examples, their tokens, and the report about them
"""
