"""Export: turn the adapter into files that people can serve.

export_stage   artifacts and manifest into the store
pipeline       the merged model and GGUF files, each checked and published when it is finished
inputs         what the stages before left, what an export works with, and publishing it

Its folders, in the order of the data:

merge      base model + adapter, merged as they are read; 16-bit safetensors of them
reference  what base model and adapter predict in float32, unmerged
gguf       merged weights -> GGUF, quantizations of it, the adapter alone, importance matrix
llama      llama.cpp's library in a process of its own
gate       whether a GGUF file is what it should be
ollama     Modelfile, its template made of the chat template's shape
report     report.html and the model card
publish    uploads in the background, the change of versions, signature, the Hub
"""
