"""Every verb on fp16 and int8 stores; policies and transcripts of the same model in another precision."""

import json
from dataclasses import replace

import pytest

from offramp.errors import RefusedError
from offramp.policies import parse
from offramp.session.policy_files import NamedPolicy
from offramp.store import Store
from offramp.store.policy_file import MeasuredOn, PolicyFile, Prediction
from offramp.store.transcript import read_transcript
from tests.cli.conftest import LABELS, WORDS, write_tiny

PRECISIONS = ("fp16", "int8")
BACKENDS = ("ort", "numpy", "torch")
QUICK = ("--threads", 1, "--max-length", 8)
POLICY = PolicyFile({}, "", None, Prediction(), None, {}, MeasuredOn(), ())
TUNING = ("--latency", "1s", "--threads", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, its stores of each precision, and a labelled table."""
    from offramp.cli import main

    folder = tmp_path_factory.mktemp("narrow")
    write_tiny(folder / "model")
    texts = [f"the {WORDS[i % 11]} {WORDS[i // 11 % 11]} {WORDS[i // 121]}" for i in range(240)]
    rows = [f"{text}\t{LABELS[str(number % 3)]}\n" for number, text in enumerate(texts)]
    (folder / "mine.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    for name in ("fp32", *PRECISIONS):
        assert main(["divide", str(folder / "model"), str(folder / name), "--dtype", name]) == 0
    return folder


@pytest.fixture
def transcripts(made, run):
    """Return the folder of a store's transcripts, which are written at their first use."""

    def of(name):
        if not (made / f"{name}-transcripts").exists():
            assert run(*evaluated(made, name, made / f"{name}-transcripts")).code == 0
        return made / f"{name}-transcripts"

    return of


def evaluated(folder, name, out):
    data = ("--train", folder / "mine.tsv", "--split", "tune,certify", "--transcript", out)
    return ("eval", folder / name, *data, "--features", "--max-length", 8)


@pytest.mark.parametrize("name", PRECISIONS)
def test_divide_verify_and_ls_say_what_it_is(run, made, name, tmp_path):
    said = run("divide", made / "fp32", tmp_path / "store", "--dtype", name)
    assert said.code == 0 and "rounded: to" in said.err
    with Store(tmp_path / "store") as store, Store(made / name) as other:
        assert store.manifest == other.manifest, "an fp32 store is as good a source as the model that it is of"
        assert store.manifest.precision == name
    assert run("verify", made / name).code == 0
    assert f"stored as {name}" in run("ls", made / name).out and "stored as fp32" in run("ls", made / "fp32").out
    dtypes = {line["shard"]: line["dtypes"] for line in run("ls", made / name, "--json").lines}
    assert dtypes["layer-00-up"] == sorted(["F32", "I8" if name == "int8" else "F16"])
    assert (dtypes["embedding-rows"], dtypes["head"]) == (["F16"], ["F32"])
    assert run("ls", made / name, "--graph", tmp_path / "stages.svg").code == 0


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_run_answers_like_the_model_it_is_of(run, made, name, backend):
    words = ("--text", "the bank fell", "--text", "a film", "--backend", backend, "--all-scores", "--json", *QUICK)
    for more in ((), ("--exit", "stage:2"), ("--exit", "confidence:0.6", "--batch", 2)):
        *full, _ = run("run", made / "fp32", *words, *more).lines
        *rows, last = run("run", made / name, *words, *more, "--budget", "2GiB").lines
        assert last["record"]["dtype"] == name
        for row, wanted in zip(rows, full, strict=True):
            assert row["label"] == wanted["label"] and abs(row["score"] - wanted["score"]) < 0.1


@pytest.mark.parametrize("name", PRECISIONS)
def test_plans_count_memory(run, made, name):
    plan = run("plan", made / name, "--budget", "2GiB", "--json", *QUICK).lines[0]
    assert plan["dtype"] == name
    sizes = {each["shard"]: each["bytes"] for stage in plan["stages"] for each in stage["shards"]}
    with Store(made / name) as store:
        assert sizes == {shard: store.manifest.layouts[shard].num_bytes for shard in sizes}


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("verb", ["memory", "bench", "profile"])
def test_the_other_verbs_run(run, made, verb, name, tmp_path):
    more = {
        "memory": ("--text", "the bank", "--out", tmp_path / "memory.svg"),
        "bench": ("--repeat", 1, "--passes", 2),
        "profile": ("--out", tmp_path / "profile.json"),
    }
    assert run(verb, made / name, *more[verb], "--budget", "2GiB", *QUICK).code == 0


@pytest.mark.parametrize("name", PRECISIONS)
def test_transcripts_are_of_the_weights_that_answered(run, made, transcripts, name):
    own, full = (read_transcript(transcripts(each), "tune") for each in (name, "fp32"))
    assert own.about.model_sha256 != full.about.model_sha256
    features = (each.features(0, len(each.labels_N)) for each in (own, full))
    for one, other in ((own.logits_NKC, full.logits_NKC), features):
        assert one.shape == other.shape and 0 < abs(one - other).mean() < 0.1 * abs(other).mean()
    assert run(*evaluated(made, "model", transcripts("fp32"))).code == 0, "those of the model are of its store"


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_policy_knows_the_weights_that_it_was_tuned_on(made, name):
    with Store(made / name) as store, Store(made / "fp32") as full:
        for opened in (store, full):
            for precision, sha256 in ((name, store.manifest.answering), ("fp32", full.manifest.answering)):
                named = NamedPolicy(parse("none"), {"mine": replace(POLICY, model_sha256=sha256)})
                named.require_model(opened)
                assert len(named.rounding(opened)) == (precision != opened.manifest.precision)
            foreign = NamedPolicy(parse("none"), {"mine": replace(POLICY, model_sha256="0" * 64)})
            with pytest.raises(RefusedError, match="another model"):
                foreign.require_model(opened)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_policy_of_other_weights_is_told(run, made, transcripts, refused, name, tmp_path):
    assert run("profile", made / name, "--out", tmp_path / "profile.json", "--budget", "2GiB", *QUICK).code == 0
    for source in (name, "fp32"):
        words = ("--transcript", transcripts(source), "--profile", tmp_path / "profile.json")
        said = run("tune", made / name, *words, *TUNING, "--out", tmp_path / f"{source}.json")
        assert said.code == 0, said.err
        assert ("before its weights were rounded" in said.err) == (source == "fp32")
    for source in (name, "fp32"):
        said = run("run", made / name, "--exit", tmp_path / f"{source}.json", "--text", "the bank", *QUICK)
        assert said.code == 0
        mention = f"tuned on the answers of fp32 weights, those of this store are {name}"
        assert (mention in said.err) == (source == "fp32")
    said = run("run", made / "fp32", "--exit", tmp_path / f"{name}.json", "--text", "the bank", *QUICK)
    assert said.code == 0 and f"tuned on the answers of {name} weights, those of this store are fp32" in said.err
    foreign = json.loads((tmp_path / "fp32.json").read_text())
    (tmp_path / "foreign.json").write_text(json.dumps({**foreign, "model_sha256": "0" * 64}))
    refused(4, "another model", "run", made / name, "--exit", tmp_path / "foreign.json", "--text", "the bank")


@pytest.mark.parametrize(("name", "method", "advice"), [
    ("int8", "eager", "--method export"), ("fp16", "eager", "--dtype fp32"), ("fp16", "export", "--dtype fp32"),
])  # fmt: skip
def test_methods_that_make_no_narrow_stores(refused, made, tmp_path, name, method, advice):
    words = ("divide", made / "model", tmp_path / "store", "--dtype", name, "--method", method)
    refused(2, [f"stores of {name}", advice], *words)
