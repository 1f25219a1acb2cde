"""In one process and in turns of a second: a device profile of the moment, and what policies take on texts.

`python bench/promise.py STORE --input FILE --exits none policy.json ... --longest 128`. A machine that other tenants
share is faster in one second than in the next by a quarter; what is compared must therefore take turns within seconds.
One JSON object a round: mean seconds a text of each exit, and the profile, if one is asked for.
"""

import argparse
import json
from pathlib import Path

import offramp
from offramp.policies import Decider, Policy
from offramp.profiling.profiler import Profiler, Scheduled
from offramp.runtime.profile import save_profile
from offramp.session.policy_files import read_exit

BLOCK, WARM_UP = 48, 12
"""Passes of each policy before it is another's turn; and those that come first, uncounted, until the caches are as the
policy leaves them.
"""


class Turns(Scheduled):
    """What is scheduled, or another policy in its turn: all on the same weights, since where these lie in memory makes
    a difference of some percent as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turn: Policy | None = None

    def first_evidence(self, num_exits: int) -> int:
        """Of the policy whose turn it is."""
        return super().first_evidence(num_exits) if self.turn is None else self.turn.first_evidence(num_exits)

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Of the policy whose turn it is."""
        return super().start(num_rows, num_exits) if self.turn is None else self.turn.start(num_rows, num_exits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--exits", nargs="+", required=True)
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest text of a profile")
    parser.add_argument("--profiles", type=Path, help="a folder for profiles; without it there are none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=128)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.input.read_text().splitlines()]
    texts = [(line["text"], line["pair"]) if "pair" in line else line["text"] for line in lines]
    policies = {exit: read_exit(exit).policy for exit in args.exits}
    options = {"threads": args.threads, "batch": args.batch, "max_length": args.max_length, "own_process": False}
    turns = Turns()
    with offramp.prepare(args.store, exit=turns, **options) as classifier:
        turns.exit_index = classifier.num_exits
        classifier.predict(texts[: 2 * args.batch])  # now all of it is loaded
        for number in range(args.rounds):
            profiler = Profiler(classifier, args.longest) if args.profiles else None
            found: dict[str, object] = {"seconds": one_round(classifier, turns, policies, profiler, texts, number)}
            if profiler is not None:
                found["profile"] = str(args.profiles / f"profile-round-{number}.json")
                save_profile(profiler.profile(), Path(str(found["profile"])))
            print(json.dumps(found), flush=True)


def one_round(
    classifier: offramp.Classifier, turns: Turns, policies: dict[str, Policy], profiler: Profiler | None, texts: list,
    first: int,
) -> dict[str, float]:  # fmt: skip
    """Mean seconds a text of each policy, all texts run once; another policy is first in each block."""
    names, seconds, batch = list(policies), dict.fromkeys(policies, 0.0), classifier.settings.num_rows
    for number, start in enumerate(range(0, len(texts), BLOCK * batch), start=first):
        block = texts[start : start + BLOCK * batch]
        if profiler is not None:
            turns.turn = None
            profiler.run_round()
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            turns.turn = policies[name]
            classifier.predict(block[: WARM_UP * batch])
            classifier.predict(block)
            num_passes = -(-len(block) // batch)
            seconds[name] += sum(classifier.latencies[-num_passes:])
    return {name: total / len(texts) for name, total in seconds.items()}


if __name__ == "__main__":
    main()
