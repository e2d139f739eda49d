"""The third room: turn the adapter into files that people can serve.

stage     inputs from the store, artifacts and manifest into the store
weights   base model + adapter, merged as they are read; 16-bit safetensors of them
model_folder  the merged model's folder but for its weights
gguf      merged weights -> GGUF, quantizations of it, the adapter alone
modelfile what Ollama needs to serve it, its template made of the chat template's shape
gate      whether a GGUF file is what it should be, against base model and adapter unmerged
streamed  base model and adapter in float32, with weights that stay in their files
llama     llama.cpp's library in a process of its own (worker, session)
verify    each GGUF file is loaded in llama.cpp and asked a question
manifest  what is where, made from what
"""
