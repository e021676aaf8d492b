"""From a configuration to processes: run directories, jobs, sweeps, the worker and what it builds.

Above all rooms; commands alone import it.
"""
