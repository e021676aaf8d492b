"""XPOTrainer, the algorithm on one page, and what it is composed with: arguments, checkpoints, callbacks.

Mathematics, models and verdicts come from the rooms before; no command line here.
"""
