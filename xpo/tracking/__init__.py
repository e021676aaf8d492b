"""What a run leaves behind: its directory, its metrics, MLflow, the model card, what the terminal shows.

Nothing here changes a number. What the parent process imports needs no torch.
"""
