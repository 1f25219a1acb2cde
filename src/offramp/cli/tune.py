"""Find the exit policy that meets a goal, from a transcript of a tune split and the latencies of this machine.

offramp eval STORE --task sst2 --data glue --split tune,certify,dev --transcript transcripts
offramp tune STORE --transcript transcripts --budget 128MiB --latency 40ms --out policy.json
offramp tune STORE --transcript transcripts --max-drop 0.5 --confidence 0.9
offramp tune --explain policy.json
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from offramp.cli.options import (
    add_engine,
    add_training_rows,
    duration,
    emit,
    engine_config,
    log,
    require_writable,
    table_of,
    warn,
)
from offramp.errors import RefusedError, StoreError, UsageError, shown
from offramp.units import format_duration, format_size, named_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of tune."""
    from offramp.policies.certify import METHODS

    add = parser.add_argument
    add("store", nargs="?", help="the store that the policy is for")
    add("--transcript", metavar="DIR", help="folder that offramp eval --transcript wrote for this store")
    out = "policy file to write, for --exit (default: policy.json)"
    add("--out", default="policy.json", metavar="FILE", help=out)
    add("--explain", metavar="FILE", help="show a policy file and the front that it was chosen from")
    goal = parser.add_argument_group("goal").add_argument
    latency = "choose the best score within this mean latency, such as 40ms"
    drop = "choose the fastest policy that is certified to lose at most this"
    deadline = "time limit of each request: the best answer so far is returned"
    confidence = "confidence of the certificate (default: 0.9)"
    goal("--latency", type=duration, metavar="TIME", help=latency)
    goal("--max-drop", type=float, metavar="POINTS", help=drop)
    goal("--confidence", type=float, default=0.9, metavar="P", help=confidence)
    goal("--method", choices=METHODS, default="ucb", help="method of the certificate (default: ucb)")
    goal("--deadline", type=duration, metavar="TIME", help=deadline)
    machine = parser.add_argument_group("machine")
    add_engine(machine, "budget", "batch", "profile", "backend", "threads", "trust_kernels")
    machine.add_argument("--force-profile", action="store_true", help="accept a profile of another machine")
    add_training_rows(parser)
    add("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> None:
    """Tune a policy, or explain a policy file."""
    if args.explain:
        _explain(Path(args.explain), args.json)
        return
    if not args.store or not args.transcript:
        missing = "transcript" if args.store else "store"
        raise UsageError(f"no {missing}", None, "offramp tune STORE --transcript DIR --latency 40ms")
    from offramp.experiments.tuning import Goal, require_held_out, shortfall, tune
    from offramp.session.policy_files import policy_of
    from offramp.store import Store
    from offramp.store.manifest import require_head
    from offramp.store.policy_file import write_policy
    from offramp.store.transcript import read_transcript

    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    require_writable(args.out, atomic=True)
    wanted = (args.latency, args.max_drop, args.confidence, args.method, args.deadline)
    goal = Goal(*wanted, include_training_rows=args.include_training_rows)
    folder = Path(args.transcript)
    transcript = read_transcript(folder, "tune")
    certify_on = None if goal.max_drop is None else read_transcript(folder, "certify")
    require_held_out([transcript, *([] if certify_on is None else [certify_on])], goal)  # before latencies are measured
    with Store(args.store) as store:
        require_head(store.manifest, store.path)
        _require_same_model(store, transcript)
        texts = store.program.texts
    longest = None if texts is None else min(int(transcript.lengths_N.max()), texts.max_length)
    profile = _profile(args, store.digest, longest)
    file, rivals = tune(transcript, certify_on, profile, goal, log)
    policy = policy_of(file, args.out)
    _report_shortfall(shortfall(file, transcript, profile), args.out)
    write_policy(Path(args.out), file)
    if args.json:
        predicted = asdict(file.predicted)
        known = {"certificate": file.certificate, "training_rows": file.tuned_on["training_rows"]}
        emit({"out": args.out, "batch": profile.batch, "predicted": predicted, **known})
        return
    _print_rows("policies at most as slow", [each.row() for each in sorted(rivals, key=lambda each: -each.score)])
    _print_policy(args.out, file, policy)


def _require_same_model(store: Any, transcript: Any) -> None:
    """Raise UsageError for the transcript of another model; say if it is of the weights before they were rounded."""
    here, known = store.manifest.answering, transcript.about.model_sha256
    if known not in (here, store.manifest.source.fingerprint):
        what = "offramp eval --transcript writes one for this store, or for the run folder that it was divided from"
        raise UsageError("the transcript is of another model", transcript.path, what)
    if known != here:
        log(f"the transcript is of the model before its weights were rounded to {store.manifest.precision}")


def _report_shortfall(missed: str | None, out: str) -> None:
    """Warn of a policy that misses its goal. Raises RefusedError where it would replace a file."""
    if missed is None:
        return
    if Path(out).exists():
        remedy = "allow a larger --max-drop or --deadline, or name another file with --out"
        raise RefusedError(f"{missed}, so the policy file is not replaced", out, remedy)
    warn(missed)


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    columns = {
        title: lambda row: row["policy"],
        "score (%)": lambda row: f"{row['score']:.1f}",
        "loss (points)": lambda row: f"{row['loss']:+.2f}",
        "latency": lambda row: format_duration(row["seconds"]),
        "mean exit": lambda row: f"{row['mean_exit']:.2f}",
    }
    print(table_of(rows, columns))


def _print_policy(name: str, file: Any, policy: object) -> None:
    predicted, certificate = file.predicted, file.certificate
    score = f"score {predicted.score:.1f} ({0.0 - predicted.loss:+.2f} relative to the last exit)"
    latency = f"{format_duration(predicted.seconds)} per input at batch {file.measured_on.batch or 1}"
    print(f"{name}: {shown(policy)}, {score}, {latency}, mean exit {predicted.mean_exit:.2f}")
    if file.deadline_seconds is not None:
        print(f"deadline: {format_duration(file.deadline_seconds)} per request")
    if certificate is None:
        return
    loss = f"loses at most {100 * certificate['epsilon']:g} points"
    if certificate["kind"] == "certified":
        chance = "" if certificate["delta"] is None else f" with confidence {1 - certificate['delta']:g}"
        print(f"certified{chance}: {loss} of accuracy")
    else:
        print(f"estimated by bootstrap, not certified: {loss}")
    facts = f"method {shown(certificate['method'])}, {shown(certificate['num_samples'])} samples"
    print(f"  {facts}, measured loss {100 * certificate['risk']:.2f} points")


def _explain(path: Path, as_json: bool) -> None:
    from offramp.session.policy_files import policy_of
    from offramp.store.policy_file import read_policy

    file = read_policy(path)
    policy = policy_of(file, path)
    if as_json:
        emit(asdict(file))
        return
    try:
        _print_front(path, file, policy)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        what = f"policy file that does not record how it was tuned ({type(error).__name__}: {error})"
        raise StoreError(what, path, "make it again: offramp tune") from None


def _print_front(path: Path, file: Any, policy: object) -> None:
    front = [each for each in file.front if each["policy"] != str(policy)]
    front.append({**asdict(file.predicted), "policy": f"{policy}  <- this one"})
    _print_rows("the front", sorted(front, key=lambda each: each["seconds"]))
    _print_policy(str(path), file, policy)
    trained = file.tuned_on.get("training_rows")
    trained = f"; the model was trained on {trained} of the samples" if trained else ""
    print(shown(f"tuned on {file.tuned_on['num_samples']} samples of {file.tuned_on['task']}{trained}"))
    print(f"reads {format_size(round(file.predicted.bytes_read))} per input")
    measured = file.measured_on
    machine = f"{measured.cpu_model}, {measured.num_cores}, {measured.backend}, {measured.threads}"
    under = f" and --budget {named_size(measured.budget_bytes)}" if measured.budget_bytes else ""
    print(shown(f"measured on {machine}; latencies hold for batch {measured.batch or 1}{under}"))


def _profile(args: argparse.Namespace, store_sha256: str, longest: int | None) -> Any:
    """Return the profile that `args` name, if it was measured under these conditions; without one, measure it in a
    process of its own, or recall it from the cache.
    """
    from offramp.experiments.children import run_worker
    from offramp.experiments.jobs import WorkerJob
    from offramp.runtime.profile import conditions_of, load_profile, profile_from_json, require_here
    from offramp.store.policy_file import UNRECORDED

    config = engine_config(args, profile=None)
    if args.profile:
        profile = load_profile(Path(args.profile))
        if not args.force_profile:
            here = conditions_of(store_sha256, config)
            here = replace(here, budget_bytes=UNRECORDED) if args.budget is None else here
            require_here(profile, here, args.profile)
        return profile
    log("measuring the latency of each exit on this machine, unless it is known: at most 2 minutes")
    config = replace(config, max_length=longest)
    return profile_from_json(run_worker(WorkerJob("profile", args.store, config, recall=True), log), args.store)
