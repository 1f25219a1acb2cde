"""Find the exit policy that meets a goal, from a transcript of a tune split and the latencies of this machine.

offramp eval STORE --task sst2 --data glue --split tune,certify,dev --transcript transcripts
offramp tune STORE --transcript transcripts --budget 128MiB --latency 40ms --out policy.json
offramp tune STORE --transcript transcripts --max-drop 0.5 --confidence 0.9
offramp tune --explain policy.json
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from offramp.cli.options import add_engine, duration, emit, engine_config, log, table
from offramp.errors import StoreError, UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of tune."""
    from offramp.policies.certify import METHODS

    parser.add_argument("store", nargs="?", help="the store that the policy is for")
    parser.add_argument(
        "--transcript", metavar="DIR", help="folder that offramp eval --transcript wrote for this store"
    )
    parser.add_argument(
        "--out", default="policy.json", metavar="FILE", help="policy file to write, for --exit (default: policy.json)"
    )
    parser.add_argument("--explain", metavar="FILE", help="show a policy file and the front that it was chosen from")
    goal = parser.add_argument_group("goal")
    goal.add_argument(
        "--latency", type=duration, metavar="TIME", help="choose the best score within this mean latency, such as 40ms"
    )
    goal.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="choose the fastest policy that is certified to lose at most this",
    )
    goal.add_argument(
        "--confidence", type=float, default=0.9, metavar="P", help="confidence of the certificate (default: 0.9)"
    )
    goal.add_argument("--method", choices=METHODS, default="ucb", help="method of the certificate (default: ucb)")
    goal.add_argument(
        "--deadline",
        type=duration,
        metavar="TIME",
        help="time limit of each request: the best answer so far is returned",
    )
    machine = parser.add_argument_group("machine")
    add_engine(machine, "budget", "batch", "profile", "backend", "threads")
    machine.add_argument("--force-profile", action="store_true", help="accept a profile of another machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Tune a policy, or explain a policy file."""
    if args.explain:
        return _explain(Path(args.explain), args.json)
    if not args.store or not args.transcript:
        missing = "transcript" if args.store else "store"
        raise UsageError(f"no {missing}", None, "offramp tune STORE --transcript DIR --latency 40ms")
    from offramp.experiments.tuning import Goal, tune
    from offramp.session.policy_files import policy_of
    from offramp.store import Store
    from offramp.store.manifest import require_head
    from offramp.store.policy_file import write_policy

    goal = Goal(args.latency, args.max_drop, args.confidence, args.method, args.deadline)
    transcript, certify_on = _transcripts(Path(args.transcript), needs_certify=goal.max_drop is not None)
    with Store(args.store) as store:
        require_head(store.manifest, store.path)
        if transcript.about.model_sha256 != store.manifest.source.fingerprint:
            remedy = (
                "offramp eval --transcript writes one for this store, or for the run folder that it was divided from"
            )
            raise UsageError("the transcript is of another model", transcript.path, remedy)
        texts = store.program.texts
        digest, limit = store.digest, None if texts is None else texts.max_length
    longest = None if limit is None else min(int(transcript.lengths_N.max()), limit)
    profile = _profile(args, digest, longest)
    file, rivals = tune(transcript, certify_on, profile, goal, log)
    policy = policy_of(file, args.out)
    write_policy(Path(args.out), file)
    if args.json:
        predicted = asdict(file.predicted)
        emit({"out": args.out, "batch": profile.batch, "predicted": predicted, "certificate": file.certificate})
        return 0
    print(table(_HEAD, [_row(each.row()) for each in sorted(rivals, key=lambda each: -each.score)]))
    _show(args.out, file, policy)
    return 0


_COLUMNS = ("score (%)", "loss (points)", "latency", "mean exit")
_HEAD = ("policies at most as slow", *_COLUMNS)


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    return (
        facts["policy"], f"{facts['score']:.1f}", f"{facts['loss']:+.2f}", f"{facts['seconds'] * 1e3:.2f} ms",
        f"{facts['mean_exit']:.2f}",
    )  # fmt: skip


def _show(name: str, file: Any, policy: object) -> None:
    predicted = file.predicted
    print(
        f"{name}: {policy}, score {predicted.score:.1f} ({0.0 - predicted.loss:+.2f} relative to the last"
        f" exit), {predicted.seconds * 1e3:.2f} ms per input at batch {file.measured_on.batch or 1},"
        f" mean exit {predicted.mean_exit:.2f}"
    )
    if file.deadline_seconds is not None:
        print(f"deadline: {file.deadline_seconds * 1e3:g} ms per request")
    certificate = file.certificate
    if certificate is not None:
        if certificate["kind"] == "certified":
            chance = "" if certificate["delta"] is None else f" with confidence {1 - certificate['delta']:g}"
            print(f"certified{chance}: loses at most {100 * certificate['epsilon']:g} points of accuracy")
        else:
            print(f"estimated by bootstrap, not certified: loses at most {100 * certificate['epsilon']:g} points")
        facts = f"method {certificate['method']}, {certificate['num_samples']} samples"
        print(f"  {facts}, measured loss {100 * certificate['risk']:.2f} points")


def _explain(path: Path, as_json: bool) -> int:
    from offramp.session.policy_files import policy_of
    from offramp.store.policy_file import read_policy

    file = read_policy(path)
    policy = policy_of(file, path)
    if as_json:
        emit(asdict(file))
        return 0
    try:
        _print_front(path, file, policy)
    except (KeyError, TypeError, ValueError) as error:
        what = f"policy file that does not record how it was tuned ({type(error).__name__}: {error})"
        raise StoreError(what, path, "make it again: offramp tune") from None
    return 0


def _print_front(path: Path, file: Any, policy: object) -> None:
    from offramp.units import format_size, named_size

    front = [each for each in file.front if each["policy"] != str(policy)]
    front.append({**asdict(file.predicted), "policy": f"{policy}  <- this one"})
    front.sort(key=lambda each: each["seconds"])
    print(table(("the front", *_COLUMNS), [_row(each) for each in front]))
    _show(str(path), file, policy)
    print(f"tuned on {file.tuned_on['num_samples']} samples of {file.tuned_on['task']}")
    print(f"reads {format_size(round(file.predicted.bytes_read))} per input")
    measured = file.measured_on
    facts = (measured.cpu_model, measured.num_cores, measured.backend, measured.threads)
    machine = ", ".join(map(str, facts))
    under = f" and --budget {named_size(measured.budget_bytes)}" if measured.budget_bytes else ""
    print(f"measured on {machine}; latencies hold for batch {measured.batch or 1}{under}")


def _transcripts(folder: Path, needs_certify: bool) -> tuple[Any, Any]:
    from offramp.store.transcript import read_transcript

    return read_transcript(folder, "tune"), read_transcript(folder, "certify") if needs_certify else None


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
