"""From a table to a tuned policy that runs: eval, tune, explain, run; and what is refused on the way."""

import dataclasses
import json
import re

import pytest

import offramp
from offramp.cli import main
from offramp.errors import RefusedError
from offramp.experiments import children, worker
from offramp.policies import parse
from offramp.policies.codec import to_json
from offramp.policies.learned import Index
from offramp.profiling import profiler
from offramp.runtime.profile import load_profile, save_profile
from offramp.store.policy_file import MeasuredOn, PolicyFile, Prediction, write_policy
from offramp.store.transcript import read_transcript
from offramp.units import format_duration
from tests.training.tiny import LABELS, VOCABULARY, examples, make_model

TIGHT = ("--max-length", 16)


def shorten_profiles(monkeypatch):
    """Measure profiles here and in fewer rounds: a process of its own takes ten seconds.

    What a profile says is looked at in tests/runtime/test_profile.py.
    """
    monkeypatch.setattr(profiler, "NUM_ROUNDS", 3)
    monkeypatch.setattr(worker, "_log", str)
    monkeypatch.setattr(children, "run_worker", lambda job, log: json.loads(json.dumps(worker._RUN[job.job](job))))


@pytest.fixture
def short_profiles(monkeypatch):
    shorten_profiles(monkeypatch)


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
    with pytest.MonkeyPatch.context() as monkeypatch:
        shorten_profiles(monkeypatch)
        call(folder, "profile", "store", "--out", "profile.json", *TIGHT)
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
    assert said.out.splitlines()[0].startswith("policies at most as slow")
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


def test_a_budget_that_is_too_small_has_no_known_latencies(short_profiles, run, refused, made, tmp_path):
    """The latencies of a plan of all weights were recalled for it, and a policy was written that no run accepts."""
    words = ("tune", made / "store", "--transcript", made / "transcripts", "--latency", "1s", "--out", tmp_path / "p")
    assert run(*words).code == 0
    refused(3, "budget of 1.00 MiB is too small", *words, "--budget", "1MiB")


def test_a_policy_file_is_joined_with_rules(run, refused, tune, made, tmp_path):
    out = tmp_path / "policy.json"
    assert tune("--latency", middle(made), "--out", out).code == 0
    words = ("run", made / "store", "--text", "a red rose", "--json")
    done = run(*words, "--exit", f"{out}|stage:1")
    assert done.code == 0, done.err
    assert done.lines[0]["exit_stage"] == 1
    refused(2, "no such policy file", *words, "--exit", "none.json|stage:1")
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
    assert "deadline: 5.00 s per request" in said.out
    done = run("run", made / "store", "--exit", tmp_path / "policy.json", "--text", "a red rose", "--json")
    assert done.lines[-1]["record"]["deadline_seconds"] == 5.0
    other = run("run", made / "store", "--exit", tmp_path / "policy.json", "--deadline", "9s", "--text", "a", "--json")
    assert other.lines[-1]["record"]["deadline_seconds"] == 9.0


@pytest.mark.parametrize("goal", [("--max-drop", 20, "--confidence", 0.8), ("--deadline", "5s")])
def test_a_policy_that_misses_its_goal_replaces_no_file(run, refused, tune, made, tmp_path, monkeypatch, goal):
    out = tmp_path / "policy.json"
    assert tune(*goal, "--out", out).code == 0
    good = out.read_bytes()
    monkeypatch.setattr("offramp.experiments.tuning.certify", lambda *_: 0)  # the whole model alone passes
    profile = load_profile(made / "profile.json")
    slow = tuple((9.0,) * profile.num_exits for _ in profile.lengths)
    save_profile(dataclasses.replace(profile, seconds_p99=slow), tmp_path / "slow.json")
    words = ("tune", made / "store", "--transcript", made / "transcripts", "--profile", tmp_path / "slow.json", *goal)
    missed = "no policy faster than" if goal[0] == "--max-drop" else "100.0 % of the texts miss the deadline of 5.00 s"
    said = run(*words, "--out", out)
    assert (said.code, said.out) == (4, "")
    assert missed in said.err and "policy.json - allow a larger --max-drop or --deadline" in said.err
    assert out.read_bytes() == good
    said = run(*words, "--out", tmp_path / "other.json")
    assert said.code == 0 and f"offramp: warning: {missed}" in said.err
    assert run("run", made / "store", "--exit", tmp_path / "other.json", "--text", "a red rose").code == 0
    refused(3, "below the first exit", *words[: -len(goal)], "--latency", "1us", "--out", out)
    assert out.read_bytes() == good and not list(tmp_path.glob("*.tmp"))


def test_without_a_profile_one_is_measured_and_remembered(run, made, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    words = ("tune", made / "store", "--transcript", made / "transcripts", "--latency", "1s")
    assert run(*words, "--out", tmp_path / "one.json").code == 0
    (file,) = (tmp_path / "cache" / "profiles").iterdir()
    before = file.stat().st_mtime_ns
    assert run(*words, "--out", tmp_path / "two.json").code == 0
    assert file.stat().st_mtime_ns == before


def test_a_batch_of_several_has_its_own_profile_and_policy(short_profiles, run, refused, tune, made, tmp_path):
    said = run("profile", made / "store", "--out", tmp_path / "four.json", "--batch", 4, *TIGHT)
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == "per input, for passes of 4 rows"
    profile = load_profile(tmp_path / "four.json")
    assert profile.batch == 4
    share = format_duration(profile.seconds[0][0] / 4)
    cells = re.findall(r"[\d.]+ (?:us|ms|s)\b", said.out.splitlines()[1])
    assert cells[-profile.num_exits] == share
    out, words = tmp_path / "policy.json", ("tune", made / "store", "--transcript", made / "transcripts")
    given = (*words, "--profile", tmp_path / "four.json", "--latency", "1s", "--out", out)
    said = run(*given, "--batch", 4)
    assert said.code == 0, said.err
    assert "s per input at batch 4, mean exit" in said.out
    assert run("tune", "--explain", out).out.splitlines()[-1].endswith("; latencies hold for batch 4")
    assert json.loads(out.read_text())["measured_on"]["batch"] == 4
    words_of_run = ("run", made / "store", "--exit", out, "--text", "a red rose", "--text", "a", "--json")
    done = run(*words_of_run, "--batch", 4)
    assert len(done.lines) == 3 and "tuned under other conditions" not in done.err
    assert (
        "tuned under other conditions (batch 4 there, 1 here): its latency does not hold here - tune it again"
        in run(*words_of_run).err
    )
    assert "tuned under other conditions" not in run(*words_of_run, "--batch", "bulk").err, "which is for throughput"
    refused(4, "measured under other conditions (batch 4 there, 1 here)", *given)
    tuned = tune("--latency", "1s", "--out", out, "--json")
    assert tuned.lines[0]["batch"] == 1
    refused(4, "(batch 1 there, 4 here)", *words, "--profile", made / "profile.json", "--latency", "1s", "--out", out,
            "--batch", 4)  # fmt: skip
    bulk = ("profile", made / "store", "--out", tmp_path / "bulk.json", "--batch", "bulk")
    refused(2, "a profile is of a fixed number of rows", *bulk)


def test_a_profile_of_several_rows_is_measured_where_there_is_none(short_profiles, run, made, tmp_path, monkeypatch):
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
    refused(2, "a duration must be a number above 0", "tune", made / "store", *given, "--latency", "soon")
    refused(3, "below the first exit", "tune", made / "store", *given, "--latency", "1us")
    refused(3, "a deadline of 1 us is below the first exit", "tune", made / "store", *given, "--deadline", "1us")
    refused(2, "rows the least drop that 90 % allows is", "tune", made / "store", *given, "--max-drop", 0.5)
    refused(4, "(backend 'ort' there, 'torch' here)", "tune", made / "store", *given, "--latency", "1s", "--backend",
            "torch")  # fmt: skip
    refused(4, "measured under other conditions (budget_bytes None there, 512MiB here)", "tune", made / "store", *given,
            "--latency", "1s", "--budget", "512MiB")  # fmt: skip
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (made / "transcripts").glob("tune.*"):
        (alone / path.name).write_bytes(path.read_bytes())
    words = ("tune", made / "store", "--transcript", alone, *given[2:])
    refused(2, "no transcript of split certify", *words, "--max-drop", 20)
    other = tmp_path / "other.json"
    tree = json.loads((made / "profile.json").read_text())
    other.write_text(json.dumps({**tree, "fingerprint": {**tree["fingerprint"], "cpu_model": "Another"}}))
    words = ("tune", made / "store", "--transcript", made / "transcripts", "--profile", other, *out, "--latency", "1s")
    refused(4, "measured under other conditions (cpu_model 'Another' there", *words)
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
        (None, 2, "no such policy file"),
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
    for change in (
        {"predicted": []}, {"front": None}, {"certificate": 3}, {"model_sha256": []}, {"deadline_seconds": "soon"},
        {"deadline_seconds": 0}, {"predicted": {"score": "high"}}, {"predicted": {"luck": 1}}, {"measured_on": []},
        {"measured_on": {"weather": "fine"}}, {"measured_on": {"budget_bytes": "1MiB"}}, {"tuned_on": 1},
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps({**tree, **change}))
        (name,) = change
        what = f"policy file with an invalid {name!r}"
        refused(4, what, "run", made / "store", "--exit", tmp_path / "bad.json", "--text", "a")
        refused(4, what, "tune", "--explain", tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps({**tree, "predicted": {}}))
    refused(4, "does not record how it was tuned (TypeError", "tune", "--explain", tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps({**tree, "predicted": {"reached": [2.0]}}))
    shares = "'predicted' (reached must be the share of rows that reach each layer"
    refused(4, shares, "run", made / "store", "--exit", tmp_path / "bad.json", "--text", "a")
    refused(4, shares, "tune", "--explain", tmp_path / "bad.json")
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
    refused(3, "a deadline of 1 us is below the first exit", *told)
    other = tmp_path / "other.json"
    tree = json.loads((made / "profile.json").read_text())
    other.write_text(json.dumps({**tree, "fingerprint": {**tree["fingerprint"], "store_sha256": "another"}}))
    refused(
        4,
        "measured under other conditions (store_sha256 'another' there",
        *words,
        "--deadline",
        "10s",
        "--profile",
        other,
    )
    refused(2, "no such device profile", *words, "--deadline", "10s", "--profile", tmp_path / "none.json")


def test_a_profile_holds_for_its_budget_whatever_the_lengths(short_profiles, run, refused, made, tmp_path):
    """A plan for shorter texts keeps more than the one that was profiled under the same budget."""
    budget, profile = ("--budget", "4GiB"), tmp_path / "profile.json"
    assert run("profile", made / "store", "--out", profile, *budget, *TIGHT).code == 0
    words = ("run", made / "store", "--text", "a", "--deadline", "10s", "--json", "--profile", profile)
    assert run(*words, *budget).code == 0
    tree = json.loads(profile.read_text())
    fewer = {**tree["fingerprint"], "residents": tree["fingerprint"]["residents"] - 1, "num_slots": 2}
    profile.write_text(json.dumps({**tree, "fingerprint": fewer}))
    assert run(*words, *budget).code == 0
    refused(4, "measured under other conditions (budget_bytes 4096MiB there, None here)", *words)
    refused(4, "measured under other conditions (budget_bytes 4096MiB there, 3072MiB here)", *words, "--budget", "3GiB")
    refused(2, "a profile is of a fixed number of rows", *words, *budget, "--batch", "bulk")


def doubtful(place, num_exits):
    """An index policy that thinks ever better of later exits, and takes a second for next to nothing."""
    one = lambda bias: (bias, 0.0, 0.0, 0.0, 0.0, 0.0)  # noqa: E731
    risks = tuple(tuple(one(-float(later)) for later in range(k, num_exits + 1)) for k in range(1, num_exits))
    return Index(risks, load_profile(place / "profile.json").costs_from(1), 1e-3)


def write_file(path, made, policy, **changes):
    about = read_transcript(made / "transcripts", "tune").about
    file = PolicyFile(to_json(policy), about.model_sha256, None, Prediction(), None, {}, MeasuredOn(), [])
    write_policy(path, dataclasses.replace(file, **changes))
    return path


def test_an_index_weighs_the_seconds_of_the_profile_that_run_is_given(run, made, tmp_path):
    """Where exits beyond the first take ages, nobody goes on; other files are not touched, and say so."""
    profile = load_profile(made / "profile.json")
    policy = doubtful(made, profile.num_exits)
    elsewhere = dataclasses.replace(profile.measured_on, cpu_model="Another")
    index = write_file(tmp_path / "index.json", made, policy, certificate={"epsilon": 0.01}, measured_on=elsewhere)
    rule = write_file(tmp_path / "rule.json", made, parse("confidence:1"), measured_on=elsewhere)
    slow = tuple((row[0], *(1e12 * each for each in row[1:])) for row in profile.seconds)
    save_profile(dataclasses.replace(profile, seconds=slow), tmp_path / "slow.json")
    words = ("run", made / "store", "--text", "a red rose", "--json", "--exit")
    alone, here = run(*words, index), run(*words, index, "--profile", made / "profile.json")
    assert (alone.code, here.code) == (0, 0), alone.err + here.err
    assert alone.lines[-1]["record"]["exit"] == here.lines[-1]["record"]["exit"] == str(policy)
    assert alone.lines[0]["exit_stage"] == here.lines[0]["exit_stage"] == profile.num_exits
    assert "index.json was tuned under other conditions (cpu_model 'Another' there" in alone.err
    there = run(*words, f"{index}|{rule}", "--profile", tmp_path / "slow.json")
    assert "the certificate of" in run(*words, index, "--deadline", "9s").err
    assert there.code == 0, there.err
    assert there.lines[0]["exit_stage"] == 1
    assert "the certificate of" in there.err and "index.json does not hold under --profile" in there.err
    assert "rule.json was tuned under other conditions" in there.err and "index.json was tuned" not in there.err


def test_a_profile_that_is_no_file_must_fit_the_batch_and_the_model(made):
    profile = load_profile(made / "profile.json")
    other = dataclasses.replace(profile, fingerprint=MeasuredOn(cpu_model="Another", batch=1))
    assert offramp.prepare(made / "store", profile=other).num_exits == profile.num_exits, "the caller's own word"
    with pytest.raises(RefusedError, match="batch 8 there, 1 here"):
        offramp.prepare(made / "store", profile=dataclasses.replace(profile, fingerprint=MeasuredOn(batch=8)))
    with pytest.raises(RefusedError, match="the profile has 1 exits, the model 3"):
        fewer = tuple(row[:1] for row in profile.seconds)
        offramp.prepare(made / "store", profile=dataclasses.replace(profile, seconds=fewer))


def test_the_plan_knows_how_many_come_to_each_layer(made, tmp_path):
    shares = (1.0, 0.5, 0.25)
    out = str(write_file(tmp_path / "policy.json", made, parse("confidence:0.9"), predicted=Prediction(reached=shares)))

    def survival(exit, **options):
        items = offramp.prepare(made / "store", exit=exit, **options).items
        return {item.stage: item.survival for item in items if 1 <= item.stage <= 3}

    assert survival(out) == {1: 1.0, 2: 0.5, 3: 0.25}
    assert survival(out, batch=2) == {1: 1.0, 2: 0.75, 3: 0.4375}
    for exit, options in (
        ("confidence:0.9", {}),
        (f"{out}&patience:1", {}),
        (f"from:2>{out}", {}),
        (out, {"deadline": 9}),
    ):
        assert set(survival(exit, **options).values()) == {1.0}, exit


def test_a_front_is_told_from_the_fastest_on(run, made, tmp_path):
    """By what policies take, and not by what of it is printed."""
    row = {"family": "stage", "score": 50.0, "loss": 1.0, "mean_exit": 1.0, "bytes_read": 0.0}
    seconds = {"a": 0.1000003, "b": 0.1000001, "c": 0.02}
    front = [{**row, "policy": name, "seconds": each} for name, each in seconds.items()]
    predicted = Prediction(50.0, 1.0, 0.1000002, 1.0, 0.0)
    tuned_on = {"num_samples": 1, "task": "mine"}
    out = write_file(tmp_path / "p.json", made, parse("none"), front=front, predicted=predicted, tuned_on=tuned_on)
    said = run("tune", "--explain", out)
    assert [line.split()[0] for line in said.out.splitlines()[1:5]] == ["c", "b", "none", "a"]


def test_a_deadline_needs_exits_and_time_for_one(refused, made, run, tmp_path):
    done = run("run", made / "store", "--deadline", "10s", "--text", "a red rose", "--json")
    assert done.lines[-1]["record"]["num_cut_by_deadline"] == 0
    refused(2, "a duration must be a number above 0", "run", made / "store", "--deadline", "0ms", "--text", "a")
