"""What the tuned model predicts, computed in float32 before anything is merged.

float32   log-probabilities of the base model with its adapter; weights stay in their files
logprobs  how log-probabilities are kept, and how far two of them are apart
"""
