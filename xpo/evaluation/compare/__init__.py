"""What a sweep says: statistics, plots and a report of its runs. `python -m xpo.compare SWEEP`."""
