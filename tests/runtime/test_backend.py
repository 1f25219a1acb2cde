from __future__ import annotations

import pytest

from offramp.runtime.backend import require_kinds


def test_kinds_that_a_backend_does_not_know_are_named():
    require_kinds(["up"], {"up": 1, "down": 2}, "toy")
    with pytest.raises(ValueError, match=r"backend toy does not know the kinds \['left', 'right'\]; it knows \['up'\]"):
        require_kinds(["right", "up", "left"], {"up": 1}, "toy")
