"""From a table to a tuned policy that runs: eval, tune, explain, run; and what is refused on the way."""

import json

import pytest

import offramp
from offramp.cli import main
from offramp.runtime.profile import load_profile
from tests.training.tiny import LABELS, VOCABULARY, examples, make_model

TIGHT = ("--max-length", 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, its table and its transcripts."""
    folder = tmp_path_factory.mktemp("tune")
    make_model("bert").base_model.save_pretrained(folder / "encoder")
    (folder / "encoder" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    rows = [f"{text} {number}\t{LABELS[label]}\n" for number, (text, label) in enumerate(examples(900))]
    (folder / "mine.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    call(folder, "train", "encoder", "--train", "mine.tsv", "--out", "run", "--epochs", 2, "--heads-epochs", 2, *TIGHT)
    call(folder, "divide", "run", "store")
    eval_words = ("--train", "mine.tsv", "--split", "tune,certify,dev", "--transcript", "transcripts")
    call(folder, "eval", "store", *eval_words)
    call(folder, "bench", "store", "--save-profile", "profile.json", *TIGHT)
    return folder


def call(folder, *words):
    names = {path.name for path in folder.iterdir()} | {"run", "store", "transcripts", "profile.json"}
    verb, *rest = [str(word) for word in words]
    assert main([verb, *(str(folder / word) if word in names else word for word in rest)]) == 0


@pytest.fixture
def tune(run, made):
    """The command on what was made; named files lie there."""

    def call_tune(*words):
        return run(
            "tune", made / "store", "--transcript", made / "transcripts", "--profile", made / "profile.json", *words
        )

    return call_tune


def middle(made):
    """A latency between the first exit and the whole model."""
    seconds = load_profile(made / "profile.json").seconds[0]
    return f"{1e6 * (seconds[0] + seconds[-1]) / 2:.0f}us"


def test_a_policy_for_a_latency_is_found_told_and_run(run, tune, made, tmp_path):
    said = tune("--latency", middle(made), "--out", tmp_path / "policy.json")
    assert said.code == 0, said.err
    assert said.out.splitlines()[0].startswith("at most as slow")
    assert f"{tmp_path / 'policy.json'}: " in said.out
    told = run("tune", "--explain", tmp_path / "policy.json")
    assert told.out.splitlines()[0].startswith("the front")
    assert "samples of mine" in told.out
    assert sum("<- this one" in line for line in told.out.splitlines()) == 1
    predicted = json.loads((tmp_path / "policy.json").read_text())["predicted"]
    assert {"score", "seconds", "bytes_read", "mean_exit", "loss"} <= set(predicted)
    done = run("run", made / "store", "--exit", tmp_path / "policy.json", "--text", "a red rose", "--json")
    assert done.code == 0, done.err
    assert done.lines[0]["label"] in LABELS
    with offramp.load(made / "store", exit=str(tmp_path / "policy.json")) as classifier:
        assert classifier.record()["exit"] == done.lines[-1]["record"]["exit"]


def test_a_policy_file_is_joined_with_rules(run, refused, tune, made, tmp_path):
    out = tmp_path / "policy.json"
    assert tune("--latency", middle(made), "--out", out).code == 0
    words = ("run", made / "store", "--text", "a red rose", "--json")
    done = run(*words, "--exit", f"{out}|stage:1")
    assert done.code == 0, done.err
    assert done.lines[0]["exit_stage"] == 1
    refused(2, "policy file cannot be read", *words, "--exit", "none.json|stage:1")
    tree = json.loads(out.read_text())
    (tmp_path / "other.json").write_text(json.dumps({**tree, "model_sha256": "0" * 64}))
    refused(2, "the policy files are of two models", *words, "--exit", f"{out}|{tmp_path / 'other.json'}")


def test_without_a_name_the_policy_is_policy_json(run, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("tune", made / "store", "--transcript", made / "transcripts", "--profile", made / "profile.json")
    assert run(*words, "--max-drop", 20, "--confidence", 0.8).code == 0
    tree = json.loads((tmp_path / "policy.json").read_text())
    certificate = tree["certificate"]
    assert (certificate["epsilon"], certificate["method"]) == (0.2, "ucb")
    assert certificate["delta"] == pytest.approx(0.2)
    assert certificate["num_samples"] > 0 and len(certificate["split_sha256"]) == 64


def test_a_drop_is_certified(tune, tmp_path):
    said = tune("--max-drop", 20, "--confidence", 0.8, "--out", tmp_path / "policy.json")
    assert said.code == 0, said.err
    assert "certified with confidence 0.8: loses at most 20 points of accuracy" in said.out
    said = tune("--max-drop", 20, "--method", "crc", "--out", tmp_path / "policy.json", "--json")
    assert said.lines[0]["certificate"]["method"] == "crc"
    assert said.lines[0]["certificate"]["delta"] is None


def test_a_deadline_goes_with_the_policy(run, tune, made, tmp_path):
    said = tune("--deadline", "5s", "--out", tmp_path / "policy.json")
    assert "deadline: 5000 ms a request" in said.out
    done = run("run", made / "store", "--exit", tmp_path / "policy.json", "--text", "a red rose", "--json")
    assert done.lines[-1]["record"]["deadline_seconds"] == 5.0
    other = run("run", made / "store", "--exit", tmp_path / "policy.json", "--deadline", "9s", "--text", "a", "--json")
    assert other.lines[-1]["record"]["deadline_seconds"] == 9.0


def test_without_a_profile_one_is_measured_and_remembered(run, made, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    words = ("tune", made / "store", "--transcript", made / "transcripts", "--latency", "1s")
    assert run(*words, "--out", tmp_path / "one.json").code == 0
    (file,) = (tmp_path / "cache" / "profiles").iterdir()
    before = file.stat().st_mtime_ns
    assert run(*words, "--out", tmp_path / "two.json").code == 0
    assert file.stat().st_mtime_ns == before


def test_a_batch_of_several_has_its_own_profile_and_policy(run, refused, tune, made, tmp_path):
    said = run("bench", made / "store", "--save-profile", tmp_path / "four.json", "--batch", 4, *TIGHT)
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == "an input's share of passes of 4 rows"
    profile = load_profile(tmp_path / "four.json")
    assert profile.batch == 4
    share = f"{1e3 * profile.seconds[0][0] / 4:.2f} ms"
    assert said.out.splitlines()[1].split("  ")[-profile.num_exits].strip() == share
    out, words = tmp_path / "policy.json", ("tune", made / "store", "--transcript", made / "transcripts")
    given = (*words, "--profile", tmp_path / "four.json", "--latency", "1s", "--out", out)
    said = run(*given, "--batch", 4)
    assert said.code == 0, said.err
    assert "ms an input at batch 4, mean exit" in said.out
    assert run("tune", "--explain", out).out.splitlines()[-1].endswith("; latencies hold for batch 4")
    assert json.loads(out.read_text())["measured_on"]["batch"] == 4
    done = run("run", made / "store", "--exit", out, "--batch", 4, "--text", "a red rose", "--text", "a", "--json")
    assert len(done.lines) == 3
    refused(4, "measured elsewhere (batch 4 there, 1 here)", *given)
    tuned = tune("--latency", "1s", "--out", out, "--json")
    assert tuned.lines[0]["batch"] == 1
    refused(4, "(batch 1 there, 4 here)", *words, "--profile", made / "profile.json", "--latency", "1s", "--out", out,
            "--batch", 4)  # fmt: skip
    bulk = ("bench", made / "store", "--save-profile", tmp_path / "bulk.json", "--batch", "bulk")
    refused(2, "a profile is of a fixed number of rows", *bulk)


def test_a_profile_of_several_rows_is_measured_where_there_is_none(run, made, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    words = ("tune", made / "store", "--transcript", made / "transcripts", "--latency", "1s", "--batch", 2)
    assert run(*words, "--out", tmp_path / "policy.json").code == 0
    (file,) = (tmp_path / "cache" / "profiles").iterdir()
    assert load_profile(file).batch == 2


def test_what_cannot_be_tuned_is_refused(refused, run, made, tmp_path):
    out = ("--out", tmp_path / "policy.json")
    given = ("--transcript", made / "transcripts", "--profile", made / "profile.json", *out)
    refused(2, "no store", "tune", "--latency", "1s")
    refused(2, "no goal", "tune", made / "store", *given)
    refused(2, "a duration is a number above 0", "tune", made / "store", *given, "--latency", "soon")
    refused(3, "below the first exit", "tune", made / "store", *given, "--latency", "1us")
    refused(3, "a deadline of 0.001 ms is below the first exit", "tune", made / "store", *given, "--deadline", "1us")
    refused(2, "need at least", "tune", made / "store", *given, "--max-drop", 0.5)
    refused(4, "(backend 'ort' there, 'torch' here)", "tune", made / "store", *given, "--latency", "1s", "--backend",
            "torch")  # fmt: skip
    refused(4, "measured under no budget, not under 512.0 MiB", "tune", made / "store", *given, "--latency", "1s",
            "--budget", "512MiB")  # fmt: skip
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (made / "transcripts").glob("tune.*"):
        (alone / path.name).write_bytes(path.read_bytes())
    words = ("tune", made / "store", "--transcript", alone, *given[2:])
    refused(2, "no transcript of certify there", *words, "--max-drop", 20)
    other = tmp_path / "other.json"
    tree = json.loads((made / "profile.json").read_text())
    other.write_text(json.dumps({**tree, "fingerprint": {**tree["fingerprint"], "cpu_model": "Another"}}))
    words = ("tune", made / "store", "--transcript", made / "transcripts", "--profile", other, *out, "--latency", "1s")
    refused(4, "measured elsewhere (cpu_model 'Another' there", *words)
    assert run(*words, "--force-profile").code == 0
    assert not list(tmp_path.glob("*.tmp"))


def test_policies_of_another_model_are_refused(refused, tune, store, made, tmp_path):
    assert tune("--latency", "1s", "--out", tmp_path / "policy.json").code == 0
    refused(4, "tuned for another model", "run", store, "--exit", tmp_path / "policy.json", "--text", "a")
    words = ("--transcript", made / "transcripts", "--out", tmp_path / "p.json", "--latency", "1s")
    refused(2, "the transcript is of another model", "tune", store, *words)


@pytest.mark.parametrize(
    ("content", "code", "what"),
    [
        (None, 2, "policy file cannot be read"),
        ("{", 4, "no policy file"),
        ("[]", 4, "no policy file"),
        ('{"format": 2}', 4, "policy file of format 2"),
        ('{"format": 1}', 4, "policy file without 'policy'"),
    ],
)
def test_files_that_are_no_policies_are_refused(refused, made, tmp_path, content, code, what):
    path = tmp_path / "policy.json"
    if content is not None:
        path.write_text(content)
    refused(code, what, "run", made / "store", "--exit", path, "--text", "a")
    refused(code, what, "tune", "--explain", path)


def test_a_policy_file_with_another_policy_inside_is_refused(refused, tune, made, tmp_path):
    assert tune("--latency", "1s", "--out", tmp_path / "policy.json").code == 0
    tree = json.loads((tmp_path / "policy.json").read_text())
    for policy in (3, {"kind": "oracle"}, {"kind": "rule", "text": "hope"}, {"kind": ["rule"]}):
        (tmp_path / "bad.json").write_text(json.dumps({**tree, "policy": policy}))
        code = 2 if isinstance(policy, dict) and policy.get("text") == "hope" else 4
        refused(code, "policy", "run", made / "store", "--exit", tmp_path / "bad.json", "--text", "a")
        refused(code, "policy", "tune", "--explain", tmp_path / "bad.json")


def test_a_profile_tells_the_guard_what_to_expect(refused, run, made, tmp_path):
    """Through the whole machine's plan, as the profile was measured."""
    words = ("run", made / "store", "--text", "a red rose", "--max-length", 16)
    done = run(*words, "--deadline", "10s", "--profile", made / "profile.json", "--json")
    assert done.code == 0, done.err
    told = (*words, "--profile", made / "profile.json", "--deadline", "1us")
    refused(3, "a deadline of 0.001 ms is below the first exit", *told)
    other = tmp_path / "other.json"
    tree = json.loads((made / "profile.json").read_text())
    other.write_text(json.dumps({**tree, "fingerprint": {**tree["fingerprint"], "store_sha256": "another"}}))
    refused(4, "measured elsewhere (store_sha256 'another' there", *words, "--deadline", "10s", "--profile", other)
    refused(2, "device profile cannot be read", *words, "--deadline", "10s", "--profile", tmp_path / "none.json")


def test_a_deadline_needs_exits_and_time_for_one(refused, made, run, tmp_path):
    done = run("run", made / "store", "--deadline", "10s", "--text", "a red rose", "--json")
    assert done.lines[-1]["record"]["num_cut_by_deadline"] == 0
    refused(2, "a duration is a number above 0", "run", made / "store", "--deadline", "0ms", "--text", "a")
