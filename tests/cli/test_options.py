"""The options of the command line are those of the engine configuration."""

import argparse
from dataclasses import fields

import pytest

import offramp
from offramp.backends import BACKENDS
from offramp.cli.options import add_engine, engine_config
from offramp.runtime.config import EngineConfig

PYTHON_ONLY = {"longest", "own_process", "prefetch", "residency", "resident_layers", "slots"}


def parser(*names, **more):
    made = argparse.ArgumentParser()
    add_engine(made, *names, **more)
    return made


def test_every_option_of_the_engine_is_on_the_command_line():
    args = vars(parser().parse_args([]))
    assert set(args) == {each.name for each in fields(EngineConfig)} - PYTHON_ONLY
    assert engine_config(argparse.Namespace(**args)) == EngineConfig(own_process=True)


def test_words_become_values():
    words = "--budget 1MiB --exit patience:1 --deadline 60ms --backend torch --batch bulk --max-length 8 --reads direct"
    config = engine_config(parser().parse_args([*words.split(), "--trust-kernels"]), longest=8)
    assert config == EngineConfig(
        1 << 20, "patience:1", 0.06, None, "torch", None, "bulk", 8, "direct", "first", 8, True, True
    )  # fmt: skip
    assert set(vars(parser("budget", "batch").parse_args([]))) == {"budget", "batch"}
    assert "exit" not in vars(parser(omit=("exit",)).parse_args([]))


def test_resident_is_a_budget_without_bytes():
    for config in (engine_config(parser().parse_args(["--budget", "resident"])), EngineConfig("resident")):
        assert (config.budget, config.budget_bytes) == ("resident", None)
        assert EngineConfig.from_json(config.to_json()) == config
    assert (EngineConfig().budget_bytes, EngineConfig("1KiB").budget_bytes, EngineConfig(7).budget_bytes) == (
        None,
        1024,
        7,
    )
    with pytest.raises(ValueError, match="budget: a size must be a number"):
        EngineConfig("residents")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_a_name_on_the_command_line(name):
    assert parser().parse_args(["--backend", name]).backend == name


def test_an_unknown_option_of_load_is_named(store):
    with pytest.raises(ValueError, match="unknown engine option bugdet; known: budget"):
        offramp.load(store, bugdet="1MiB")
    with pytest.raises(ValueError, match=r"backend must be one of \('ort', 'torch', 'numpy'\), not 'tpu'"):
        offramp.load(store, backend="tpu")


def test_a_record_holds_the_configuration(run, store):
    words = ("run", store, "--budget", "2GiB", "--threads", 1, "--exit", "stage:2", "--text", "a", "--json")
    tree = run(*words).lines[-1]["record"]["config"]
    assert EngineConfig.from_json(tree) == EngineConfig(budget=2 << 30, threads=1, exit="stage:2", own_process=True)
