"""GGUF files: the merged model in 16 bits, quantizations of it, and the adapter alone.

files            all of them, each when it is complete; their names, and which to serve
requests         what the programs that write them are asked for
convert_worker   llama.cpp's converter, fed from the merged weights; a program of its own
blocks           its tensors, written block by block
quantize_worker  llama.cpp's quantizer; a program of its own
importance       which weights a quantization should spare, measured on training rows
header           the header of a GGUF file

A file gets its name when it is complete.
"""
