"""Modelfile: what Ollama needs to make the same tokens as the training did."""
