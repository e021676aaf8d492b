"""The mathematics: what a label is worth, preference losses, the exploration bonus. Pure functions of tensors.

No models, no texts, no state.
"""
