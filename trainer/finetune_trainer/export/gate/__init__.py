"""Whether a GGUF file is what it should be.

gates        the gate of the 16-bit file, which opens the gate of the others
rows         the rows that files are measured on, and samples of them
file_checks  header, sizes, types and metadata; the same tokens, template and end as in training
thresholds   how much a type may lose, by the model's size
"""
