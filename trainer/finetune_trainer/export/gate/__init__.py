"""Whether a GGUF file is what it should be: read, counted, tokenized and computed before it counts.

gates        what the export asks: the gate of the 16-bit file, which opens that of the others
file_checks  header, sizes, types and metadata; the same tokens, template and end as in training
thresholds   what a type may lose, by the model's size
"""
