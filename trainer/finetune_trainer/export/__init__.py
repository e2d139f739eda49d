"""The third room: turn the adapter into files that people can serve.

stage     inputs from the store, artifacts and manifest into the store
weights   base model + adapter, merged as they are read; 16-bit safetensors of them
model_folder  the merged model's folder but for its weights
gguf      merged weights -> GGUF, quantizations of it, the adapter alone
modelfile what Ollama needs to serve it, its template made of the chat template's shape
verify    each GGUF file is loaded in llama.cpp and asked a question
manifest  what is where, made from what
"""
