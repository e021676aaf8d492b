"""What a prompt is, prompt sets and pairs, what is kept on disk for later runs, the embedded assets.

No models: tokens are made here, and read elsewhere.
"""
