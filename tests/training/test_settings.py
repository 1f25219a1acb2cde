import pytest

from offramp.training import TrainSettings


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("head_learning_rate", float("nan")),
        ("batch_size", -1),
        ("accumulate", 0),
        ("max_length", 0),
        ("save_steps", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("loss", "hinge"),
        ("heads", "pooled"),
        ("precision", "int8"),
        ("exit_weights", "square"),
        ("warmup", 1.0),
        ("weight_decay", -0.1),
        ("heads_epochs", -1),
    ],
)
def test_impossible_settings_are_named(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be .*, got .?{bad}"):
        TrainSettings(**{name: bad})


def test_heads_only_without_epochs_is_refused():
    with pytest.raises(ValueError, match="heads_epochs must be at least 1, got 0"):
        TrainSettings(loss="heads-only", heads_epochs=0)


def test_weights_of_exits_sum_to_one():
    assert TrainSettings().weights(3) == [1 / 6, 2 / 6, 3 / 6]
    assert TrainSettings(exit_weights="equal").weights(4) == [0.25] * 4
    assert TrainSettings(exit_weights=lambda num_exits: [0] * (num_exits - 1) + [3]).weights(3) == [0, 0, 1]


@pytest.mark.parametrize("bad", [[1, 2], [0, 0, 0], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]])
def test_a_function_that_gives_no_weights_is_refused(bad):
    with pytest.raises(ValueError, match="exit_weights must return 3 numbers >= 0"):
        TrainSettings(exit_weights=lambda num_exits: bad).weights(3)
