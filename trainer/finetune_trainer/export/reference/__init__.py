"""What the tuned model says, computed in float32 before anything is merged.

rows           the rows that everything is measured on
float32_model  a model that computes from weights that stay in their files
compute        log-probabilities and answers of the base model with its adapter
logprobs       how they are kept, and how far two of them are apart
"""
