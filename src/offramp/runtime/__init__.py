"""The engine: when a weight is in memory, the plan for a budget, exits and deadlines.

It computes nothing (that is `offramp.backends`) and reads no inputs (that is `offramp.tasks`). Importing the room
imports no NumPy, so that the command line can choose the number of BLAS threads before it does.
"""
