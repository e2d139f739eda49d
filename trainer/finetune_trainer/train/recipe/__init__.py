"""The process that trains. `sft` is the recipe; read it from top to bottom."""
