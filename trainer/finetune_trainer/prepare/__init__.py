"""Prepare: check everything that can be checked without a GPU, and write the examples.

prepare_stage  the order of the checks, and the result
shards         which files a dataset consists of, also on the Hub
dataset_files  those files at one version; the first pass: every row read and hashed; by the hashes,
               which rows are held out and which are there twice
stored         what the store already holds for a run; going back to an earlier version
reading        CSV, JSON lines and Parquet, row by row
examples       the second pass: the chat template and the tokenizer
checks         the chat template, the model, and the plan for the hardware
findings       dataset-report.json, and the summary in status
"""
