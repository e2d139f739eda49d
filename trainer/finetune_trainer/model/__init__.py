"""The base model: finding it, fetching it, loading it, and what llama.cpp makes of it.

source      a Hub repository, a folder in a bucket or a folder on disk; revision and files
hub         the Hugging Face Hub's part of it
shape       widths and parameter counts, from config.json
targets     which layers get an adapter
tokenizer   loading it, and how a question and its answer become tokens
loading     the model in memory, and the machine that it is in
converter   llama.cpp's converter to GGUF
rehearsal   the conversion, tried before any weights are fetched (and its worker)
"""
