"""The operations that captured kernels may use in PyTorch: `python -m tests.checks.operations` prints the table.

`--record STORE ...` runs stores that were divided with `--method export`, and writes one call of each operation to
`tests/backends/calls.json`: the legal twins of hostile calls. `--missing STORE ...` names operations that stores use
and the table lacks.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.backends import torch_limits
from offramp.backends.torch import TorchBackend
from offramp.backends.torch_graphs import NUMBERS, Node
from offramp.backends.torch_operations import KINDS, OPERATIONS
from offramp.store import Store

CALLS = Path(__file__).parents[2] / "tests/backends/calls.json"
MOST_CALLS = 2
"""Calls of each operation that are recorded, with different numbers of axes."""
KEPT = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", nargs="+", type=Path, metavar="STORE")
    parser.add_argument("--missing", nargs="+", type=Path, metavar="STORE")
    args = parser.parse_args()
    if args.record:
        record(args.record)
    elif args.missing:
        for name, stores in sorted(missing(args.missing).items()):
            print(name, *sorted(stores))
    else:
        print("\n".join(table()))


def table() -> list[str]:
    """Return the section of `docs/results/reliability.md` that lists the operations, as Markdown."""
    names = defaultdict[str, list[str]](list)
    for name, operation in OPERATIONS.items():
        names[operation.kind].append(f"`{name.removeprefix('aten.').removesuffix('.default')}`")
    total = sum(each.name.startswith("aten::") for each in torch._C._jit_get_all_schemas())
    listed = {kind: sorted(names[kind]) for kind in KINDS if names[kind]}
    rows = [f"| {kind} | {KINDS[kind]} | {len(found)} | {' '.join(found)} |" for kind, found in listed.items()]
    about = f"{len(OPERATIONS)} of {total} operations and overloads of `aten` are allowed, {len(NUMBERS)} on numbers."
    return [about, "", "| class | bound of the result | number | operations |", "| --- | --- | --- | --- |", *rows]


def missing(stores: list[Path]) -> dict[str, set[str]]:
    """Return operation that the table lacks -> stores that use it."""
    found = defaultdict[str, set[str]](set)
    for store in stores:
        for path in store.glob("graphs/*.json"):
            for _, target, *_ in json.loads(path.read_bytes())["nodes"]:
                if target not in OPERATIONS and target not in NUMBERS:
                    found[target].add(store.name)
    return found


def record(stores: list[Path]) -> None:
    """Write the first calls of each operation in these stores."""
    calls: dict[str, list[Any]] = defaultdict(list)

    class Recorder(torch_limits._Meter):
        """Keeps the arguments of calls."""

        def call(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
            known = calls[node.target]
            if node.schema is not None and len(known) < MOST_CALLS:
                call = [described(args), described(kwargs)]
                if all(ranks(call) != ranks(each) for each in known):
                    known.append(call)
            return super().call(node, args, kwargs)

    torch_limits._Meter = Recorder  # type: ignore[misc]
    for path in stores:
        with Store(path, "never") as store:
            TorchBackend(store, 1).warm_up(*store.program.example)
    lines = [f"{json.dumps(name)}: {json.dumps(calls[name])}" for name in sorted(calls) if name in OPERATIONS]
    CALLS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines)} operations of {len(OPERATIONS)}:", *sorted(OPERATIONS.keys() - calls.keys()))


def described(part: Any) -> Any:
    """Return an argument as JSON; a tensor by shape, dtype and largest integer."""
    if isinstance(part, Tensor):
        is_index = part.dtype == torch.int64 and part.numel() > 0
        return {
            "tensor": [list(part.shape), str(part.dtype).removeprefix("torch."), int(part.max()) if is_index else 0]
        }
    if isinstance(part, (list, tuple)):
        return [described(each) for each in part]
    if isinstance(part, dict):
        return {key: described(each) for key, each in part.items()}
    kind = KEPT.get(type(part))
    if kind or isinstance(part, torch.device):
        return {kind: str(part).removeprefix("torch.")} if kind else {"device": "cpu"}
    return {"float": str(part)} if isinstance(part, float) and not math.isfinite(part) else part


def ranks(call: Any) -> str:
    """Return what tells calls apart: axes and dtypes of tensors."""
    if isinstance(call, dict) and "tensor" in call:
        return f"{len(call['tensor'][0])}{call['tensor'][1]}"
    parts = call.values() if isinstance(call, dict) else call if isinstance(call, list) else ()
    return ",".join(map(ranks, parts))


if __name__ == "__main__":
    main()
