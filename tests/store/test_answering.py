"""The fingerprint that policies and transcripts compare: two stores that answer differently differ in it."""

from dataclasses import replace

import pytest

from offramp.errors import RefusedError
from offramp.policies import parse
from offramp.program.narrow import EXACT, ROTATION, ZERO_POINT
from offramp.session.policy_files import NamedPolicy
from offramp.store import Store
from offramp.store.policy_file import MeasuredOn, PolicyFile, Prediction
from tests.golden.common import unpack
from tests.golden.narrow import STORES

POLICY = PolicyFile({}, "", None, Prediction(), None, {}, MeasuredOn(), ())


def manifest(name, folder):
    with Store(unpack(name, folder, STORES)) as store:
        return store.manifest


def edited(manifest, template, **attributes):
    """Return the manifest with other attributes in the kernels of a template."""
    kernels = {
        name: replace(each, attributes={**each.attributes, **attributes}) if each.template == template else each
        for name, each in manifest.program.kernels.items()
    }
    return replace(manifest, program=replace(manifest.program, kernels=kernels))


def warned(file, store):
    named = NamedPolicy(parse("none"), {"mine.json": replace(POLICY, model_sha256=file)})
    named.require_model(store)
    return named.rounding(store)


@pytest.mark.parametrize(
    ("template", "attribute", "value"),
    [
        ("attention-int8", ROTATION, 2), ("up-int8", ROTATION, 2),
        ("down-int8", ZERO_POINT, 100), ("down-int8", EXACT, 2),
    ],
)  # fmt: skip
def test_every_attribute_that_changes_answers_is_in_the_fingerprint(tmp_path, template, attribute, value):
    own = manifest("bert-int8-rotated", tmp_path)
    other = edited(own, template, **{attribute: value})
    assert own.answering != other.answering and own.precision_of(other.answering) == "int8"
    assert (
        edited(own, "attention-int8", norm_epsilon=own.program.kernels["attention"].attributes["norm_epsilon"]) == own
    )


def test_a_policy_of_an_older_store_of_integers_is_told(tmp_path):
    for name in ("bert-int8", "bert-int8-rotated", "bert-fp16"):
        unpack(name, tmp_path, STORES)
    with Store(tmp_path / "bert-int8") as old, Store(tmp_path / "bert-int8-rotated") as new:
        assert old.manifest.source.fingerprint == new.manifest.source.fingerprint
        assert old.manifest.answering != new.manifest.answering
        for file, store in ((old, new), (new, old)):
            (line,) = warned(file.manifest.answering, store)
            assert (
                "tuned on the answers of int8 weights, those of this store were rounded by another version of offramp"
                in line
            )
            assert warned(store.manifest.answering, store) == []
            (line,) = warned(store.manifest.source.fingerprint, store)
            assert "fp32 weights, those of this store are int8" in line
        with Store(tmp_path / "bert-fp16") as halves:
            assert "int8 weights, those of this store are fp16" in warned(new.manifest.answering, halves)[0]
        for foreign in ("0" * 64, new.manifest.source.fingerprint[:32] + "0" * 32):
            with pytest.raises(RefusedError, match="another model"):
                warned(foreign, new)


def test_fingerprints_that_earlier_versions_wrote_are_valid(tmp_path):
    """Of stores that round nothing, and of stores of integers without attributes."""
    import hashlib

    old = manifest("bert-int8", tmp_path)
    assert old.answering == hashlib.sha256(f"{old.source.fingerprint} int8".encode()).hexdigest()
    with Store(unpack("bert-tuned", tmp_path)) as store:
        assert store.manifest.answering == store.manifest.source.fingerprint
        assert warned(store.manifest.source.fingerprint, store) == []
