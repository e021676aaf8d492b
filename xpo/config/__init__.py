"""Every key of the configuration: declared in options, composed, checked, explained in one line when it is wrong.

What a key does is not here. Imports nothing of the other rooms, and no torch: a command line answers at once.
"""
