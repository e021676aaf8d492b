"""From prompts to pairs: noise, transformers' generate, who draws the second completion, draws kept in a store.

No judge and no gradient. Every draw depends on seed, step, prompt and stream only.
"""
