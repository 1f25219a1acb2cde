"""The reliability run: what offramp does with hostile, damaged and changing files, and where the system fails it.

`python -m tests.reliability --out reliability-out` tries all parts, adds one JSON line for each trial, and goes on
where it was stopped. `--list` names the parts with the time that each took, `--page` writes the figures of
docs/results/reliability.md.
"""
