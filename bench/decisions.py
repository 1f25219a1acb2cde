"""Measure the constants of `experiments/trials.py`: time of a decision by class of policy, without what the policy of a
profile takes, in multiples of that. `python bench/decisions.py`. Prints a line for each shape, and the medians last.
"""

import time
from collections.abc import Sequence

import numpy as np

from offramp.measure import median
from offramp.policies import Evidence, Policy, StopAt
from offramp.policies.costs import Costs
from offramp.policies.fitting import TrainingSet, fit_index_risks, fit_risks, fit_stopping, fit_thresholds
from offramp.policies.learned import Halting, Index

PROBLEM = "single_label_classification"
BATCHES, EXITS, CLASSES = (1, 8, 32), (4, 12), 3
DECISIONS = 40
"""Batches of which each exit is timed."""
BETWEEN = 4 << 20
"""Number of float32 read between two decisions, as a layer reads its weights, so that caches are cold."""


def policies(logits_KNC: np.ndarray, truth_N: np.ndarray, lengths_N: np.ndarray) -> Sequence[Policy]:
    """Return a policy of each class, fitted to logits."""
    samples, num_exits = TrainingSet.from_logits(logits_KNC, truth_N, lengths_N, PROBLEM), len(logits_KNC)
    costs = Costs((8, 128), tuple(tuple(scale * 0.01 * k for k in range(1, num_exits + 1)) for scale in (1, 5)))
    risks = fit_risks(samples)
    scored = (fit_stopping(samples, risks, costs, 1.0), Index(fit_index_risks(samples), costs, 1.0))
    return (StopAt(1), fit_thresholds(samples, 1.0), Halting(risks, 0.1), *scored)


def seconds(policy: Policy, logits_KNC: np.ndarray, lengths_N: np.ndarray, batch: int) -> float:
    """Return the median time of a decision for a batch, over all exits, with cold caches."""
    found, weights = [], np.ones(BETWEEN, np.float32)
    for start in range(0, DECISIONS * batch, batch):
        here = slice(start, start + batch)
        decider = policy.start(batch, len(logits_KNC))
        for exit_index in range(policy.first_evidence(len(logits_KNC)), len(logits_KNC)):
            weights.sum()
            began = time.perf_counter()
            decider.update(exit_index, Evidence.from_logits(logits_KNC[exit_index - 1, here], PROBLEM, lengths_N[here]))
            found.append(time.perf_counter() - began)
    return median(found)


def main() -> None:
    """Time each class of policies in each shape."""
    generator, factors = np.random.default_rng(0), {}
    for num_exits in EXITS:
        num = DECISIONS * max(BATCHES)
        truth_N, lengths_N = generator.integers(0, CLASSES, num), generator.integers(4, 128, num)
        logits_KNC = generator.standard_normal((num_exits, num, CLASSES)).astype(np.float32)
        logits_KNC[:, np.arange(num), truth_N] += np.linspace(0, 3, num_exits)[:, None]
        base, *others = policies(logits_KNC, truth_N, lengths_N)
        for batch in BATCHES:
            own = seconds(base, logits_KNC, lengths_N, batch)
            for policy in others:
                factor = max(seconds(policy, logits_KNC, lengths_N, batch) - own, 0.0) / own
                factors.setdefault(type(policy).__name__, []).append(factor)
                shape = f"{num_exits} exits, batch {batch}"
                print(f"{shape}: {type(policy).__name__} {factor:.2f} x {1e6 * own:.0f} us", flush=True)
    print({name: round(median(values), 2) for name, values in factors.items()})


if __name__ == "__main__":
    main()
