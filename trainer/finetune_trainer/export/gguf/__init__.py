"""GGUF files: the merged model in 16 bits, quantizations of it, and the adapter alone.

files            all of them, each when it is complete
choice           names of the files, which the others are made of, and which one to serve
convert          base model + adapter -> GGUF in one go, without a merged model in between
convert_worker   llama.cpp's converter, fed from the merged weights; a program of its own
blocks           tensors that the converter moves about in 16 bits, written block by block
quantize         a 16-bit file as another type
quantize_worker  llama.cpp's quantizer; a program of its own
importance       llama.cpp's importance matrix, which says what a quantization should spare
adapter          LoRA as GGUF, to be applied to a GGUF file of the base model
showing          what these programs say about their progress

A file appears under its name when it is complete.
"""
