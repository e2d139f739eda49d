"""The main job on this machine, from a CSV in a bucket to a GGUF file that answers."""
