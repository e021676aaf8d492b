"""What has been learned: win rate and more on held-out prompts, how good judges are, the runs of a sweep compared.

Nothing here trains.
"""
