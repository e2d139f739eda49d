"""The trainer: a CSV becomes a LoRA adapter, a merged model and GGUF files, in three stages."""
