"""Policy and reference: loading, checks, log-probabilities and the attention they need, DeepSpeed.

No sampling, and nothing that knows what a completion is worth.
"""
