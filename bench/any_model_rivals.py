"""Models of the shapes of BERT-base and ViT-base, resident, streamed and offloaded, a process for each: a subcommand
runs, and its last line is one JSON object.

Each measures itself, as in rivals.py: its peak is the high-water mark of the whole process. All see the same inputs.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from rivals import WARM_UP_PASSES, random_ids

from offramp.experiments.rival_process import bytes_read, memory_bytes

SHAPES = {"bert-base": "Bert", "vit-base": "ViT"}


def build(args: argparse.Namespace) -> dict[str, Any]:
    """The model folders, weights random; what is there is whole."""
    import torch
    import transformers

    for name, family in SHAPES.items():
        folder, partial = args.out / name, args.out / f"{name}.partial"
        if folder.exists():
            continue
        shutil.rmtree(partial, ignore_errors=True)
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")()
        getattr(transformers, f"{family}Model")(config).save_pretrained(partial)
        partial.rename(folder)
    return {"built": sorted(SHAPES)}


def inputs(config: Any, index: int, num_rows: int = 1) -> dict[str, Any]:
    """What pass `index` is called with: texts of 128 tokens, or images."""
    import torch

    if hasattr(config, "vocab_size"):
        ids_BS = torch.cat([random_ids(index + row, config.vocab_size) for row in range(num_rows)])
        return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    shape = (num_rows, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(index))}


def timed(model: Any, num_passes: int, num_rows: int) -> dict[str, Any]:
    """Warm up, run, and describe `num_passes` passes."""
    import torch

    seconds, first_byte = [], 0
    for index in range(WARM_UP_PASSES + num_passes):
        if index == WARM_UP_PASSES:
            first_byte = bytes_read()
        given = inputs(model.config, index, num_rows)
        began = time.perf_counter()
        with torch.inference_mode():
            model(**given).last_hidden_state[0, 0, 0].item()
        seconds.append(time.perf_counter() - began)
    return {
        "latencies_seconds": seconds[WARM_UP_PASSES:],
        "peak_rss_bytes": memory_bytes("VmHWM"),
        "rss_bytes": memory_bytes("VmRSS"),
        "bytes_read_per_input": (bytes_read() - first_byte) / num_passes,
    }


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, **options).eval()


def resident(args: argparse.Namespace) -> dict[str, Any]:
    """transformers with every weight in memory."""
    return timed(load(args.model), args.passes, args.rows)


def disk(args: argparse.Namespace) -> dict[str, Any]:
    """transformers and accelerate with every weight left on disk, module by module."""
    args.offload.mkdir(parents=True, exist_ok=True)
    return timed(load(args.model, device_map={"": "disk"}, offload_folder=args.offload), args.passes, args.rows)


def streamed(args: argparse.Namespace) -> dict[str, Any]:
    """The module of the store under a budget of weights that two stages fit in."""
    import offramp

    with offramp.stream(class_of(args.model), args.store, weight_budget=two_stages(args.store)) as model:
        found = timed(model, args.passes, args.rows)
        return {**found, "weight_budget_bytes": two_stages(args.store), "record": model.record()}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Whether the stream answers bit for bit as the model with all weights in memory, each on 64-byte boundaries."""
    import torch

    import offramp

    whole = load(args.model)
    for parameter in whole.parameters():  # mapped from a file they lie anywhere, and that changes the last bits
        parameter.data = parameter.data.clone()
    equal = []
    with (
        torch.no_grad(),
        offramp.stream(class_of(args.model), args.store, weight_budget=two_stages(args.store)) as ours,
    ):
        for index in range(3):
            given = inputs(whole.config, index)
            pairs = zip(whole(**given).values(), ours(**given).values(), strict=True)
            equal.append(all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs))
    return {"equal": equal}


def class_of(folder: Path) -> Any:
    import transformers

    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def two_stages(path: Path) -> int:
    """Twice the largest stage."""
    from offramp.runtime.weight_plan import smallest_bytes
    from offramp.store import Store
    from offramp.streaming.placement import data_bytes, streamed_shards

    with Store(path) as store:
        return 2 * smallest_bytes(streamed_shards(store), data_bytes(store))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    known = {build: ("out",), resident: ("model",), disk: ("model", "offload"), streamed: ("model", "store")}
    for act, paths in {**known, compare: ("model", "store")}.items():
        command = commands.add_parser(act.__name__, help=act.__doc__)
        command.set_defaults(act=act)
        for path in paths:
            command.add_argument(path, type=Path)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--passes", type=int, default=20)
        command.add_argument("--rows", type=int, default=1)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    print(json.dumps(args.act(args)), flush=True)


if __name__ == "__main__":
    main()
