"""The engine configuration: values, texts, refusals, JSON; and that everything names its options by it."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from offramp.runtime import config as engine_config
from offramp.runtime.config import EngineConfig
from offramp.store import reader


def test_sizes_and_durations_may_be_given_as_texts():
    config = EngineConfig(budget="128MiB", deadline="60ms", profile=Path("p.json"), batch="bulk", threads="2")
    assert (config.budget, config.deadline, config.profile) == (128 << 20, pytest.approx(0.06), "p.json")
    assert (config.batch, config.threads) == ("bulk", 2)
    assert EngineConfig(budget=1 << 20, deadline=0.5, batch=8) == EngineConfig(
        budget="1MiB", deadline="0.5s", batch="8"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "12XB"}, "budget: a size must be a number and one of"),
        ({"budget": 0}, "budget: a size must be positive, got 0"),
        ({"deadline": "soon"}, "deadline: a duration must be a number above 0"),
        ({"exit": ""}, "exit: must be a text"),
        ({"exit": None}, "exit: must be a text, not None"),
        ({"profile": 3}, "profile: must be a text"),
        ({"threads": 0}, "threads: a whole number of at least 1, not 0"),
        ({"threads": 10_000}, "threads: at most 1024, not 10000"),
        ({"threads": True}, "threads: a whole number of at least 1, not True"),
        ({"batch": "many"}, "batch: a whole number of at least 1, not 'many'"),
        ({"batch": 1.5}, "batch: a whole number"),
        ({"max_length": -1}, "max_length: a whole number"),
        ({"longest": 0}, "longest: a whole number"),
        ({"reads": "mapped?"}, "reads: must be one of auto, direct, buffered, mapped, not 'mapped"),
        ({"verify": "maybe"}, "verify: must be one of"),
        ({"own_process": 1}, "own_process: must be true or false"),
        ({"trust_kernels": "yes"}, "trust_kernels: must be true or false"),
    ],
)
def test_what_is_no_value_is_refused_with_the_name_of_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_unknown_names_are_refused_and_the_known_ones_listed():
    with pytest.raises(ValueError, match="unknown engine option bugdet, colour; known: budget, exit, deadline"):
        EngineConfig.from_json({"bugdet": 1, "colour": 2, "threads": 1})


def test_a_configuration_survives_json():
    config = EngineConfig("1MiB", "patience:2", "1s", "p.json", "torch", 3, 4, 5, "direct", "never", 6, True, True)
    tree = json.loads(json.dumps(config.to_json()))
    assert set(tree) == {each.name for each in fields(EngineConfig)}
    assert EngineConfig.from_json(tree) == config != EngineConfig()
    assert EngineConfig.from_json({}) == EngineConfig()


def test_the_options_of_verify_are_those_of_the_store():
    assert set(engine_config.VERIFY) == set(reader.VERIFY)
