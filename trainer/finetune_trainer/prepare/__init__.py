"""The first room: check everything that can be checked without a GPU, and write the examples.

stage       the order of the checks, and the result
inputs      the files of examples, at one version
reading     CSV, JSON lines and Parquet, row by row
rows        the first pass: every row read, numbered and hashed
split       which rows are held out, which are there twice
examples    the second pass: the chat template and the tokenizer
template    what the chat template must be able to do
statistics  lengths in tokens
report      dataset-report.json, and the summary in status
"""
