"""The third room: turn the adapter into files that people can serve.

stage     inputs from the store, artifacts and manifest into the store
inputs    what the stages before left: adapter, measurements, examples
models    the merged model and GGUF files, each checked and handed on when it is finished
weights   base model + adapter, merged as they are read; 16-bit safetensors of them
model_folder  the merged model's folder but for its weights
gguf      merged weights -> GGUF, quantizations of it, the adapter alone
importance    which weights a quantization should spare, measured on training rows (and its worker)
gate      whether a GGUF file is what it should be, against base model and adapter unmerged
refusal   what is said of files that the gate refused
streamed  base model and adapter in float32, with weights that stay in their files
llama     llama.cpp's library in a process of its own
modelfile what Ollama needs to serve it, its template made of the chat template's shape
report    report.html and the model card
publish   uploads in the background, the change of versions, signature, the Hub
manifest  what is where, made from what
"""
