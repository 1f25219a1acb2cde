"""The zoo: architectures of transformers, torchvision and timm that are divided and streamed bit for bit. A sample
here; `python -m tests.zoo.measure` tries all."""

import pytest

from tests.zoo import measure, survey

SAMPLE = ("bert", "mixtral", "resnet")


@pytest.fixture(scope="module")
def zoo():
    return survey.survey()


def test_the_zoo_is_large_and_names_are_unique(zoo):
    found, missing = zoo
    names = [specimen.name for specimen in found]
    assert len(names) > 300 and len(set(names)) == len(names)
    assert not set(names) & set(missing) and all(missing.values())


@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_of_the_zoo_is_divided_and_streamed_bit_for_bit(name, zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    specimen = next(each for each in zoo[0] if each.name == name)
    found = measure.streamed(specimen, tmp_path)
    for run in ("smallest", "twice"):
        assert found[run]["equal"] == [True, True]
        assert found[run]["peak_weight_bytes"] <= found[run]["budget_bytes"]
