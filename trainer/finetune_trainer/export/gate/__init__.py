"""Whether a GGUF file is what it should be: read, counted, tokenized and computed before it counts.

gate        what the export asks: one file after the other, the 16-bit one first
structure   header, sizes, types and metadata
tokens      the same tokens, template and end as in training
thresholds  what a type may lose, by the model's size
"""
