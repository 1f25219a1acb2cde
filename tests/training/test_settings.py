import pytest

from offramp.training import TrainSettings


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("head_learning_rate", float("nan")),
        ("batch_size", -1),
        ("max_length", 0),
        ("warmup", 1.0),
        ("weight_decay", -0.1),
    ],
)
def test_impossible_settings_are_named(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be .*, not {bad}"):
        TrainSettings(**{name: bad})
