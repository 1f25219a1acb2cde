"""Find the policy that a goal asks for, on what every exit said of a tune split, and on seconds of this machine.

offramp eval STORE --task sst2 --data glue --split tune,certify,dev --transcript transcripts
offramp tune STORE --transcript transcripts --budget 128MiB --latency 40ms --out policy.json
offramp tune STORE --transcript transcripts --max-drop 0.5 --confidence 0.9
offramp tune --explain policy.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from offramp.cli.options import add_budget, count, duration, emit, say, table
from offramp.errors import StoreError, UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of tune."""
    from offramp.policies.certify import METHODS

    parser.add_argument("store", nargs="?", help="the store that the policy is for")
    parser.add_argument("--transcript", metavar="DIR", help="what offramp eval --transcript wrote of this store")
    parser.add_argument(
        "--out", default="policy.json", metavar="FILE", help="the policy file, for --exit (default: policy.json)"
    )
    parser.add_argument("--explain", metavar="FILE", help="show a policy file: its front, and where it stands")
    goal = parser.add_argument_group("goal")
    goal.add_argument("--latency", type=duration, metavar="TIME", help="the best score at this mean latency: 40ms")
    goal.add_argument("--max-drop", type=float, metavar="POINTS", help="the fastest certified to lose no more")
    goal.add_argument("--confidence", type=float, default=0.9, metavar="P", help="of the certificate (default: 0.9)")
    goal.add_argument("--method", choices=METHODS, default="ucb", help="of the certificate (default: ucb)")
    goal.add_argument("--deadline", type=duration, metavar="TIME", help="of a request: the best answer so far goes out")
    machine = parser.add_argument_group("machine")
    add_budget(machine)
    machine.add_argument(
        "--batch", type=count, default=1, metavar="N",
        help="inputs that will run together: a latency is then an input's share of a pass (default: 1)",
    )  # fmt: skip
    machine.add_argument("--profile", metavar="FILE", help="offramp bench --save-profile wrote it (default: measure)")
    machine.add_argument("--force-profile", action="store_true", help="take a profile of another machine as it is")
    machine.add_argument("--backend", choices=("ort", "torch"), default="ort", help="who multiplies (default: ort)")
    machine.add_argument("--threads", type=count, metavar="N", help="of the backend (default: the processors)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def main(args: argparse.Namespace) -> int:
    """Tune, or explain."""
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
            remedy = "offramp eval --transcript writes it for this store, or the run folder that it was divided from"
            raise UsageError("the transcript is of another model", transcript.path, remedy)
        texts = store.program.texts
        digest, limit = store.digest, None if texts is None else texts.max_length
    longest = None if limit is None else min(int(transcript.lengths_N.max()), limit)
    profile = _profile(args, digest, longest)
    file, rivals = tune(transcript, certify_on, profile, goal, say)
    policy = policy_of(file, args.out)
    write_policy(Path(args.out), file)
    if args.json:
        told = {"out": args.out, "batch": profile.batch, "predicted": file.predicted}
        emit({**told, "certificate": file.certificate})
        return 0
    print(table(_HEAD, [_row(each.row()) for each in sorted(rivals, key=lambda each: -each.score)]))
    _show(args.out, file, policy)
    return 0


_HEAD = ("at most as slow", "score", "loss", "latency", "mean exit")


def _row(tried: dict[str, Any]) -> tuple[str, ...]:
    return (
        tried["policy"], f"{tried['score']:.1f}", f"{tried['loss']:+.2f}", f"{tried['seconds'] * 1e3:.2f} ms",
        f"{tried['mean_exit']:.2f}",
    )  # fmt: skip


def _show(name: str, file: Any, policy: object) -> None:
    predicted = file.predicted
    print(
        f"{name}: {policy}, score {predicted['score']:.1f} ({0.0 - predicted['loss']:+.2f} against the last"
        f" exit), {predicted['seconds'] * 1e3:.2f} ms an input at batch {file.measured_on.get('batch', 1)},"
        f" mean exit {predicted['mean_exit']:.2f}"
    )
    if file.deadline_seconds is not None:
        print(f"deadline: {file.deadline_seconds * 1e3:g} ms a request")
    certificate = file.certificate
    if certificate is not None:
        if certificate["kind"] == "certified":
            chance = "" if certificate["delta"] is None else f" with confidence {1 - certificate['delta']:g}"
            print(f"certified{chance}: loses at most {100 * certificate['epsilon']:g} points of accuracy")
        else:
            print(f"estimated by bootstrap, not certified: loses at most {100 * certificate['epsilon']:g} points")
        told = f"method {certificate['method']}, {certificate['num_samples']} samples"
        print(f"  {told}, of which it lost {100 * certificate['risk']:.2f} points")


def _explain(path: Path, as_json: bool) -> int:
    from dataclasses import asdict

    from offramp.session.policy_files import policy_of
    from offramp.store.policy_file import read_policy

    file = read_policy(path)
    policy = policy_of(file, path)
    if as_json:
        emit(asdict(file))
        return 0
    try:
        _tell(path, file, policy)
    except (KeyError, TypeError, ValueError) as error:
        what = f"policy file that does not say how it was tuned ({type(error).__name__}: {error})"
        raise StoreError(what, path, "make it again: offramp tune") from None
    return 0


def _tell(path: Path, file: Any, policy: object) -> None:
    from offramp.units import format_size, named_size

    front = [each for each in file.front if each["policy"] != str(policy)]
    front.append({**file.predicted, "policy": f"{policy}  <- this one"})
    front.sort(key=lambda each: each["seconds"])
    print(table(("the front", "score", "loss", "latency", "mean exit"), [_row(each) for each in front]))
    _show(str(path), file, policy)
    print(f"tuned on {file.tuned_on['num_samples']} samples of {file.tuned_on['task']}")
    print(f"reads {format_size(round(file.predicted['bytes_read']))} an input")
    keys = ("cpu_model", "num_cores", "backend", "threads")
    machine = ", ".join(str(file.measured_on.get(key)) for key in keys)
    budget = file.measured_on.get("budget_bytes")
    under = "" if budget is None else f" and --budget {named_size(budget)}"
    print(f"measured on {machine}; latencies hold for batch {file.measured_on.get('batch', 1)}{under}")


def _transcripts(folder: Path, needs_certify: bool) -> tuple[Any, Any]:
    from offramp.store.transcript import read_transcript

    return read_transcript(folder, "tune"), read_transcript(folder, "certify") if needs_certify else None


def _profile(args: argparse.Namespace, store_sha256: str, longest: int | None) -> Any:
    """The one that was given, if it was measured here; else a process of the engine's own measures, or remembers."""
    from offramp.experiments.bench import profile_here
    from offramp.measure import num_cores
    from offramp.runtime.profile import engine_of, load_profile, require_here

    if args.profile:
        profile = load_profile(Path(args.profile))
        if not args.force_profile:
            here = engine_of(store_sha256, args.backend, args.threads or num_cores(), args.batch)
            if args.budget is not None:
                here["budget_bytes"] = args.budget
            require_here(profile, here, args.profile)
        return profile
    options = ["--backend", args.backend, "--batch", str(args.batch)]
    options += [] if args.budget is None else ["--budget", str(args.budget)]
    options += [] if args.threads is None else ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        return profile_here(args.store, longest, options, Path(folder) / "profile.json", say)
