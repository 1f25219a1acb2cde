"""The description of a computation as plain data. Standard library only."""
