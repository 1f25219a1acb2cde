"""Rounds: each command once in each, another one first."""

import json

from offramp.experiments import bench
from offramp.experiments.bench import run_rounds


def test_every_rival_is_first_in_turn(monkeypatch):
    def output_of(command, say):
        say(f"warning of {command[0]}")
        return "said\n" + json.dumps({"ran": command}) + "\n"

    monkeypatch.setattr(bench, "output_of", output_of)
    commands, said = {"a": ["1"], "b": ["2"]}, []
    found = list(run_rounds(commands, 3, said.append))
    assert [name for name, _ in found] == ["a", "b", "b", "a", "a", "b"]
    assert all(record == {"ran": commands[name]} for name, record in found)
    assert said[:4] == ["warning of 1", "round 1/3: a", "warning of 2", "round 1/3: b"]
    assert said[4] == "round 2/3: b" and said[-1] == "round 3/3: b", "once is enough"
