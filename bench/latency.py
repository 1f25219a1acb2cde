"""Do policies that `offramp tune` makes keep what it says? `python bench/latency.py --data GLUE --out glue-out`.

For each task that glue.py trained: transcripts, a device profile, policies for three mean latencies, and each patience
against the cost function at the same latency. What they take on texts that they never saw is then measured in turns of
a second, beside a profile of the same seconds (promise.py); `offramp bench --task` says what users see. Then deadlines
with reads that become slow, certificates on sets drawn with replacement, BERT-base's shape streamed and in bulk, and
the time that tuning takes. Each measurement is one line of docs/results/latency.jsonl; what is there is not done again.
It wants a quiet machine.
"""

import argparse
import dataclasses
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import glue
import numpy as np
from processes import offramp, rival, run, worker
from records import add_record, read_records

from offramp.measure import median

RESULTS = glue.RESULTS.with_name("latency.jsonl")
PROMISE = Path(__file__).with_name("promise.py")
ROUNDS, NUM_TEXTS, PAIR_ROUNDS, PAIR_TEXTS = 5, 480, 3, 200
SHARES = (0.2, 0.4, 0.6)
"""Of the way from the first exit's mean latency to the whole model's: the three latencies that are asked for."""
MAX_LENGTH, THREADS = 128, 2
NUM_REQUESTS, SLOWER = 2000, 5
CERTIFY_SETS, CERTIFY_ROWS = 1000, 1000
EPSILON, DELTA = 0.01, 0.1
SHAPE_BUDGET, SHAPE_ROUNDS, STAGES, BULK_TEXTS = "128MiB", 3, (3, 6, 9), 256
STREAMED_BUDGETS, STREAMED_ROUNDS = ("96MiB", SHAPE_BUDGET), 5
"""In the first no layer is resident, in the second one shard of each of the first three."""
BENCH_TEXTS, BENCH_ROUNDS, TASK_BUDGET = 200, 3, "96MiB"


def finish(command: list[str]) -> list[dict[str, Any]]:
    done = run(command, {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(done.errors)
    return [json.loads(line) for _, line in done.lines if line.startswith("{")]


class Place:
    """The files of one task."""

    def __init__(self, task: str, model: str, data: Path, out: Path) -> None:
        self.task, self.model, self.data = task, model, data
        self.run = out / glue.Run(task, "pabee", model=model).name
        self.store = out / "stores" / self.run.name
        self.transcripts = out / "transcripts" / self.run.name
        self.folder = out / "latency" / self.run.name
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Store and transcripts."""
        if not self.store.exists():
            finish(offramp("divide", self.run, self.store))
        if not (self.transcripts / "certify.json").exists():
            splits = ("--split", "tune,certify,dev", "--transcript", self.transcripts)
            words = ("--task", self.task, "--data", self.data, "--max-length", MAX_LENGTH)
            finish(offramp("eval", self.store, *words, *splits))

    def chosen(self, split: str, num_texts: int) -> np.ndarray:
        """Rows of a split whose lengths are those of the whole, in its order."""
        from offramp.store.transcript import read_transcript
        from offramp.tasks.examples import spread

        by_length = np.argsort(read_transcript(self.transcripts, split).lengths_N, kind="stable")
        return np.sort(spread(by_length.tolist(), num_texts))

    def inputs(self, split: str, num_texts: int) -> Path:
        """These rows, as `offramp run` reads them."""
        path = self.folder / f"{split}.jsonl"
        splits, _, _ = glue.load(self.task, self.data)
        texts = [splits.examples[split][row].text for row in self.chosen(split, num_texts)]
        pairs = [{"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]} for text in texts]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return path

    def profile(self, name: str, batch: int = 1) -> Path:
        """A device profile, measured now."""
        path = self.folder / f"profile-{name}.json"
        words = ("--threads", THREADS, "--max-length", self.longest(), "--batch", batch)
        finish(offramp("profile", self.store, "--out", path, *words))
        return path

    def tune(self, profile: Path, latency_seconds: float, name: str, batch: int = 1) -> dict[str, Any]:
        """A policy for a latency: `tune --json`, and the path."""
        path = self.folder / f"policy-{name}.json"
        words = ("--transcript", self.transcripts, "--profile", profile, "--batch", batch, "--threads", THREADS)
        goal = ("--latency", f"{latency_seconds * 1e6:.0f}us", "--out", path, "--json")
        (said,) = finish(offramp("tune", self.store, *words, *goal))
        return {**said, "path": path}

    def take_turns(self, inputs: Path, exits: list[object], rounds: int, *words: object) -> list[dict[str, Any]]:
        """A round each: mean seconds a text of each exit, and the profile of the moment, if words ask for one."""
        words = ("--rounds", rounds, "--threads", THREADS, "--max-length", MAX_LENGTH, *words)
        command = (sys.executable, str(PROMISE), self.store, "--input", inputs, *words, "--exits", *exits)
        return finish([str(word) for word in command])

    @property
    def dev(self) -> str:
        """The transcript of dev; of MNLI's two the matched one."""
        return next(name for name in ("dev", "dev_matched") if (self.transcripts / f"{name}.json").exists())

    def longest(self) -> int:
        """Tokens of the longest text."""
        from offramp.store.transcript import read_transcript

        return max(int(read_transcript(self.transcripts, split).lengths_N.max()) for split in ("tune", "certify"))


def latencies(place: Place) -> dict[str, Any]:
    """Three latencies asked for, and what texts that the policies never saw take."""
    return _promises(place, SHARES, 1)


def latencies_of_batches(place: Place) -> dict[str, Any]:
    """The same for one latency, of texts that run eight at a time."""
    return _promises(place, SHARES[1:2], 8)


def _promises(place: Place, shares: tuple[float, ...], batch: int) -> dict[str, Any]:
    """Policies for latencies; then what they take, and what a profile of the same seconds says of them: of the samples
    that they were tuned on (`said`), of the texts that run (`predicted`), and of the split that these are of (`whole`).
    """
    from offramp.experiments.trials import Trials
    from offramp.policies import parse
    from offramp.runtime.profile import load_profile
    from offramp.session.policy_files import read_exit
    from offramp.store.transcript import read_transcript

    tune, certify = (read_transcript(place.transcripts, split) for split in ("tune", "certify"))
    first = place.profile("first" if batch == 1 else f"batch-{batch}", batch)
    trials = Trials(tune, load_profile(first))
    shallow, deep = (trials.rule(parse(text)).seconds for text in ("stage:1", "none"))
    asked = {f"{share:g}": shallow + share * (deep - shallow) for share in shares}
    told = {name: place.tune(first, seconds, f"{name}-{batch}", batch) for name, seconds in asked.items()}
    name_of = {str(each["path"]): name for name, each in told.items()}
    policies = {name: read_exit(path).policy for path, name in name_of.items()}
    said = {name: each["predicted"]["seconds"] for name, each in told.items()}
    name_of["none"], policies["none"] = "none", parse("none")
    chosen, rounds = place.chosen("certify", NUM_TEXTS), []
    words = ("--profiles", place.folder, "--longest", place.longest(), "--batch", batch)
    for each in place.take_turns(place.inputs("certify", NUM_TEXTS), [*name_of], ROUNDS, *words):
        profile = load_profile(Path(each["profile"]))
        rows_of = {"said": tune, "predicted": _rows(certify, chosen), "whole": certify}
        trials_of = {rows: Trials(transcript, profile) for rows, transcript in rows_of.items()}
        found = {}
        for exit, seconds in each["seconds"].items():
            name = name_of[exit]
            foretold = {rows: of.rule(policies[name]).seconds for rows, of in trials_of.items()}
            found[name] = {"seconds": seconds, **foretold}
        rounds.append(found)
    names = {name: str(policies[name]) for name in asked}
    tokens = {"said": _tokens(tune, batch), "whole": _tokens(certify, batch)}
    return {"asked": asked, "said": said, "policies": names, "tokens": tokens, "texts": len(chosen), "rounds": rounds}


def _tokens(transcript: Any, batch: int) -> float:
    """That a text of the split is computed with, in the mean."""
    from offramp.experiments.batching import padded

    return float(padded(transcript.lengths_N, batch).mean())


def _rows(transcript: Any, chosen: Any) -> Any:
    fields = ("logits_NKC", "lengths_N", "labels_N")
    return dataclasses.replace(transcript, **{field: getattr(transcript, field)[chosen] for field in fields})


def against_patience(place: Place) -> dict[str, Any]:
    """For each patience a cost-aware policy of the same latency; scores on dev, seconds measured side by side.

    Scores choose on tune. The latency is what the profile says of the texts of dev, whose labels choose nothing: these
    may be deeper or longer than tune's, and more so under one rule than under the other.
    """
    from offramp.experiments.evaluation import answer_at
    from offramp.experiments.trials import Trials
    from offramp.policies import parse, replay
    from offramp.policies.codec import to_json
    from offramp.runtime.profile import load_profile
    from offramp.store.policy_file import MeasuredOn, PolicyFile, Prediction, write_policy
    from offramp.store.transcript import read_transcript
    from offramp.tasks.metrics import paired_interval, score

    tune = read_transcript(place.transcripts, "tune")
    dev = read_transcript(place.transcripts, place.dev)
    logits_KNC, lengths_N = dev.logits_NKC.swapaxes(0, 1), dev.lengths_N.astype(np.int64)
    problem, metrics, inputs = dev.about.problem, dev.about.metrics, place.inputs(place.dev, PAIR_TEXTS)
    suffix = "" if dev.about.labels else "@0.2"
    patiences = [f"patience:{patience}{suffix}" for patience in range(1, len(logits_KNC) - 1)]
    first = place.folder / "profile-first.json"
    profile = load_profile(first if first.exists() else place.profile("first"))
    trials, on_dev = Trials(tune, profile), Trials(dev, profile)
    on_texts = Trials(_rows(dev, place.chosen(place.dev, PAIR_TEXTS)), profile)
    found, paths = [], {}
    for text in patiences:
        near, seconds = (each.rule(parse(text)).seconds for each in (trials, on_dev))
        cost_aware = [each for each in trials.all(lambda line: None, near) if each.family in ("stopping", "index")]
        tried = [dataclasses.replace(each, seconds=on_dev.rule(each.policy).seconds) for each in cost_aware]
        if not any(each.seconds <= seconds for each in tried):
            continue
        chosen = trials.best_use_of(tried, seconds, lambda line: None).policy
        path = place.folder / f"against-{text}.json"
        about = {"task": place.task}
        write_policy(
            path, PolicyFile(to_json(chosen), dev.about.model_sha256, None, Prediction(), None, about, MeasuredOn(), [])
        )
        exits = [replay(policy, logits_KNC, problem, lengths_N) for policy in (chosen, parse(text))]
        ours_N, theirs_N = (answer_at(logits_KNC, exit_N) for exit_N in exits)
        gain, low, high = paired_interval(metrics, dev.labels_N, ours_N, theirs_N)
        paths[text] = str(path)
        found.append({
            "patience": text, "policy": str(chosen), "gain": gain, "gain_low": low, "gain_high": high,
            "score": score(metrics, dev.labels_N, theirs_N)["score"],
            "whole_by_texts": {
                name: on_dev.rule(policy).seconds / on_texts.rule(policy).seconds
                for name, policy in (("ours", chosen), ("patience", parse(text)))
            },
        })  # fmt: skip
    exits = [*paths, *dict.fromkeys(paths.values())]
    rounds = place.take_turns(inputs, exits, PAIR_ROUNDS) if found else []
    for pair in found:
        names = {"patience": pair["patience"], "ours": paths[pair["patience"]]}
        pair["rounds"] = [{key: each["seconds"][name] for key, name in names.items()} for each in rounds]
    return {"pairs": found, "texts": PAIR_TEXTS}


def certificates(place: Place) -> dict[str, Any]:
    """How often the certified candidate of a set, drawn from a whole transcript, risks more on the whole."""
    from offramp.experiments.evaluation import answer_at
    from offramp.policies import parse, replay
    from offramp.policies.certify import certify, losses
    from offramp.store.transcript import read_transcript

    whole = read_transcript(place.transcripts, "certify")
    logits_KNC, truth_N = whole.logits_NKC.swapaxes(0, 1), whole.labels_N
    full_N = logits_KNC[-1].argmax(1)
    levels = np.linspace(0.995, 0.55, 30)
    exits = [replay(parse(f"confidence:{level:.4f}"), logits_KNC, whole.about.problem) for level in levels]
    loss_MN = np.stack([losses(truth_N, answer_at(logits_KNC, exit_N), full_N) for exit_N in exits])
    risk_M, generator = loss_MN.mean(1), np.random.default_rng(0)
    found: dict[str, Any] = {"rows": len(truth_N), "sets": CERTIFY_SETS, "drawn": CERTIFY_ROWS}
    for method in ("ucb", "ltt"):
        violations, certified = 0, []
        for _ in range(CERTIFY_SETS):
            index = certify(loss_MN[:, generator.integers(0, len(truth_N), CERTIFY_ROWS)], EPSILON, DELTA, method)
            violations += index >= 0 and bool(risk_M[index] > EPSILON)
            certified.append(index)
        found[method] = {"violations": violations, "certified": sum(index >= 0 for index in certified)}
    return found


def deadlines(place: Place) -> dict[str, Any]:
    """2,000 requests through a streamed store; from the middle on, every read takes five times as long."""
    import offramp as library

    texts = [json.loads(line) for line in place.inputs(place.dev, PAIR_TEXTS).read_text().splitlines()]
    requests = [each["text"] if "pair" not in each else (each["text"], each["pair"]) for each in texts]
    found = {}
    deadline = None
    for name in ("calibrate", "guard", "no guard"):
        options = {"threads": THREADS, "max_length": MAX_LENGTH, "own_process": False, "reads": "direct"}
        classifier = library.prepare(
            place.store, _streaming_budget(place), deadline=deadline if name == "guard" else None, **options
        )
        with classifier:
            slow = _slowed(classifier.store)
            number = 100 if name == "calibrate" else NUM_REQUESTS
            seconds, exits = [], []
            for index in range(number):
                slow["factor"] = SLOWER if name != "calibrate" and index >= number // 2 else 1
                (result,) = classifier.predict([requests[index % len(requests)]])
                seconds.append(classifier.latencies[-1])
                exits.append(result.exit_stage)
        if name == "calibrate":
            deadline = 2.0 * float(np.median(seconds))
        else:
            found[name] = {
                "beyond": sum(each > 1.05 * deadline for each in seconds), "p50": float(np.median(seconds)),
                "p99": float(np.quantile(seconds, 0.99)), "worst": max(seconds),
                "mean_exit_before": float(np.mean(exits[: number // 2])),
                "mean_exit_after": float(np.mean(exits[number // 2 :])),
            }  # fmt: skip
    return {"deadline": deadline, "requests": NUM_REQUESTS, **found}


def _streaming_budget(place: Place) -> int:
    """So much above this process's own size, all libraries loaded, that a part is streamed."""
    import offramp as library
    from offramp.measure import read_memory

    library.prepare(place.store, threads=THREADS, max_length=MAX_LENGTH).close()
    return read_memory().rss_bytes + (28 << 20)


def _slowed(store: Any) -> dict[str, float]:
    """Reads of the store take `factor` times as long; they stop when they are cancelled, as reads of a disk do."""
    read, state = store.read_shard, {"factor": 1.0}

    def read_shard(name: str, view: Any, *, cancelled: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = read(name, view, cancelled=cancelled, **options)
        until = began + state["factor"] * (time.perf_counter() - began)
        while time.perf_counter() < until:
            if cancelled():
                return result[0], False
            time.sleep(min(0.0005, max(until - time.perf_counter(), 0)))
        return result

    store.read_shard = read_shard
    return state


def tuning_time(out: Path) -> dict[str, Any]:
    """Of a transcript of 10,000 x 12 exits."""
    from offramp.experiments.tuning import Goal, tune
    from offramp.runtime.profile import DeviceProfile
    from offramp.store.policy_file import MeasuredOn
    from offramp.store.transcript import About, Transcript

    generator, num, exits = np.random.default_rng(0), 10_000, 12
    truth_N = generator.integers(0, 3, num)
    logits_NKC = generator.normal(0, 1, (num, exits, 3)).cumsum(1).astype(np.float32)
    logits_NKC[np.arange(num), :, truth_N] += np.arange(1, exits + 1) * generator.uniform(0, 2, (num, 1))
    about = About("synthetic", "tune", "single_label_classification", ("a", "b", "c"), ("accuracy",), "m", "d", 128)
    lengths_N = generator.integers(8, 129, num).astype(np.int32)
    transcript = Transcript(about, logits_NKC, lengths_N, truth_N, out, None, 0)
    row = tuple(0.01 * k for k in range(1, exits + 1))
    rows = (row, tuple(5 * each for each in row))
    heads = ((0.0001,) * (exits - 1),) * 2
    profile = DeviceProfile(
        MeasuredOn(), (8, 128), rows, rows, rows, heads, 0.0, rows, row, row, row, rows, heads, (0.0, 0.0), 0.0, 0.1, 3
    )
    began = time.perf_counter()
    tune(transcript, None, profile, Goal(latency_seconds=0.15), lambda line: None)
    return {"seconds": time.perf_counter() - began}


def pictures(place: Place) -> dict[str, Any]:
    """What docs/cost-function.md draws: the front, who leaves where, and the risk of thresholds with its bound."""
    from offramp.experiments.evaluation import answer_at
    from offramp.experiments.trials import Trials
    from offramp.experiments.tuning import Goal, tune
    from offramp.policies import parse, replay
    from offramp.policies.certify import losses, upper_bound
    from offramp.policies.codec import from_json
    from offramp.runtime.profile import load_profile
    from offramp.store.transcript import read_transcript

    on_tune, on_certify = (read_transcript(place.transcripts, split) for split in ("tune", "certify"))
    profile = load_profile(place.profile("first"))
    trials = Trials(on_tune, profile)
    tried = [(each.family, each.seconds, each.score) for each in trials.all(lambda line: None, None)]
    shallow, deep = (trials.rule(parse(text)).seconds for text in ("stage:1", "none"))
    file, _ = tune(on_tune, None, profile, Goal(latency_seconds=shallow + 0.3 * (deep - shallow)), lambda line: None)
    logits_KNC, truth_N = on_certify.logits_NKC.swapaxes(0, 1), on_certify.labels_N
    lengths_N, problem = on_certify.lengths_N.astype(np.int64), on_certify.about.problem
    exit_N = replay(from_json(file.policy), logits_KNC, problem, lengths_N)
    full_N, curve = logits_KNC[-1].argmax(1), []
    for level in np.linspace(0.55, 0.995, 20):
        early_N = answer_at(logits_KNC, replay(parse(f"confidence:{level:.4f}"), logits_KNC, problem))
        loss_N = losses(truth_N, early_N, full_N)
        curve.append((float(level), float(loss_N.mean()), upper_bound(loss_N, DELTA)))
    return {
        "tried": tried, "chosen": {**file.predicted, "kind": file.policy["kind"]},
        "exits": np.bincount(exit_N, minlength=len(logits_KNC) + 1)[1:].tolist(), "curve": curve,
    }  # fmt: skip


def base_shape(out: Path) -> Path:
    """A store of BERT-base's exact shape with random weights and exits: for memory and speed alone."""
    models, store = out / "shapes", out / "stores" / "bert-base"
    models.mkdir(exist_ok=True)
    if not store.exists():
        done = run(rival("build", models), {})
        assert done.returncode == 0, done.errors
        finish(offramp("divide", models / "bert-base-exits", store))
    return store


def long_texts(out: Path, num_texts: int) -> Path:
    """Of random letters, more than MAX_LENGTH tokens each: hardly two of them are alike."""
    path, generator = out / "shapes" / f"long-{num_texts}.txt", np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(num_texts * 150)]
    path.write_text("".join(" ".join(words[row::num_texts]) + "\n" for row in range(num_texts)))
    return path


def bulk(out: Path) -> dict[str, Any]:
    """Texts a second of 128 tokens under a budget, and of transformers with all weights in memory."""
    store, rounds = base_shape(out), []
    texts = long_texts(out, BULK_TEXTS)
    for _ in range(SHAPE_ROUNDS):
        config = {"budget": SHAPE_BUDGET, "batch": "bulk", "max_length": MAX_LENGTH, "threads": THREADS}
        (ours,) = finish(worker("inputs", store, config, inputs={"file": str(texts)}))
        (theirs,) = finish(rival("throughput", out / "shapes" / "bert-base", "--threads", THREADS))
        rounds.append({
            "rows": ours["batch"], "ours": BULK_TEXTS / ours["texts"]["seconds"], "bytes": ours["bytes_read_per_input"],
            "theirs": theirs["texts_a_second"], "peak": ours["peak_rss_bytes"], "their_peak": theirs["peak_rss_bytes"],
        })  # fmt: skip
    return {"rounds": rounds}


def streamed(out: Path) -> dict[str, Any]:
    """Fixed exits of a streamed store: seconds and bytes a text, and what a profile of the same round says; beside it
    transformers, all in memory.
    """
    store, texts, rounds = base_shape(out), long_texts(out, 16), []
    for _ in range(STREAMED_ROUNDS):
        resident = rival("resident", out / "shapes" / "bert-base", "--threads", THREADS, "--passes", 16)
        (theirs,) = finish(resident)
        rounds.append({
            "transformers": {"seconds": median(theirs["latencies_seconds"]), "peak": theirs["peak_rss_bytes"]},
            **{budget: _there_and_back(store, texts, budget) for budget in STREAMED_BUDGETS},
        })  # fmt: skip
    return {"rounds": rounds}


def _there_and_back(store: Path, texts: Path, budget: str) -> dict[str, Any]:
    """A profile, and then each exit twice, in one order and in its reverse: a machine that becomes slower from process
    to process makes all of them slower alike.
    """
    from offramp.policies import parse
    from offramp.runtime.profile import load_profile

    path = texts.with_name("profile.json")
    config = {"budget": budget, "threads": THREADS, "max_length": MAX_LENGTH}
    common = ("--budget", budget, "--threads", THREADS, "--max-length", MAX_LENGTH)
    finish(offramp("profile", store, "--out", path, *common))
    profile, exits = load_profile(path), ("none", *(f"stage:{stage}" for stage in STAGES))
    passes: dict[str, list[dict[str, Any]]] = {exit: [] for exit in exits}
    for exit in exits + exits[::-1]:
        passes[exit] += finish(worker("inputs", store, {**config, "exit": exit}, inputs={"file": str(texts)}))
    found = {}
    for exit, records in passes.items():
        policy = parse(exit)
        costs = profile.costs(policy.first_evidence(profile.num_exits))
        found[exit] = {
            "seconds": median([seconds for record in records for seconds in record["latencies_seconds"]]),
            "predicted": float(costs.at(np.array([MAX_LENGTH]))[0, policy.last_exit(profile.num_exits) - 1]),
            "bytes": records[0]["bytes_read_per_input"],
            "peak": max(record["peak_rss_bytes"] for record in records),
        }
    return found


def task_bench(place: Place) -> dict[str, Any]:
    """What `offramp bench --task` says of a policy for the middle latency, on texts of dev."""
    return _task_bench(place, ())


def streamed_task_bench(place: Place) -> dict[str, Any]:
    """The same, streamed."""
    return _task_bench(place, ("--budget", TASK_BUDGET))


def _task_bench(place: Place, options: tuple[object, ...]) -> dict[str, Any]:
    from offramp.store.transcript import read_transcript

    policy = place.folder / f"policy-{SHARES[1]:g}-1.json"
    split = read_transcript(place.transcripts, place.dev).about.split
    words = ("--task", place.task, "--data", place.data, "--split", split, "--rows", BENCH_TEXTS, "--exit", policy)
    run_with = ("--threads", THREADS, "--max-length", MAX_LENGTH, "--repeat", BENCH_ROUNDS, "--json")
    *found, last = finish(offramp("bench", place.store, *words, *run_with, *options))
    return {"measured": found, **last}


KINDS = {
    "latencies": latencies, "certificates": certificates, "deadlines": deadlines, "pictures": pictures,
    "against_patience": against_patience, "streamed_task_bench": streamed_task_bench, "task_bench": task_bench,
    "latencies_of_batches": latencies_of_batches,
}  # fmt: skip
OF_SHAPES = (tuning_time, bulk, streamed)
ONCE = ("certificates", "deadlines", "pictures", "streamed_task_bench")
"""Of SST-2 and MiniLM alone."""
CLASSIFICATION = ("sst2", *(task for task in glue.TASKS if task not in ("sst2", "stsb")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("glue-out"))
    parser.add_argument("--models", default="minilm,distil-minilm")
    parser.add_argument("--kinds", help="of measurements, by their names in KINDS; all if not given")
    args = parser.parse_args()
    kinds = args.kinds.split(",") if args.kinds else [*(each.__name__ for each in OF_SHAPES), *KINDS]
    known = {(record["kind"], record["task"], record["model"]) for record in read_records(RESULTS)}
    for measure in OF_SHAPES:
        if measure.__name__ in kinds and (measure.__name__, "", "") not in known:
            keep({"kind": measure.__name__, "task": "", "model": "", **measure(args.out.resolve())})
    for kind in [kind for kind in kinds if kind in KINDS]:
        for model, task in product(args.models.split(","), CLASSIFICATION):
            place = Place(task, model, args.data.resolve(), args.out.resolve())
            wanted = kind not in ONCE or (task, model) == ("sst2", "minilm")
            if wanted and place.run.exists() and (kind, task, model) not in known:
                place.prepare()
                keep({"kind": kind, "task": task, "model": model, **KINDS[kind](place)})


def keep(record: dict[str, Any]) -> None:
    print(json.dumps(record), file=sys.stderr, flush=True)
    add_record(RESULTS, record)


if __name__ == "__main__":
    main()
