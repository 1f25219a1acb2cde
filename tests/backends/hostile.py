"""Hostile calls of the operations that kernels may use: `python -m tests.backends.hostile SEED COUNT` runs them in this
process and prints what happened. A crash, a hang or much memory is a fault of ours.

Tensors that are given lie in memory that may not be written, and end before a page that may not be read: an operation
that does so ends the process.

A call is one of `calls.json`, which models make, or arguments by the types of the schema; some arguments are then
replaced by hostile ones.
"""

import ctypes
import faulthandler
import json
import mmap
import random
import resource
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

from offramp.backends.torch_graphs import CapturedGraph
from offramp.backends.torch_limits import Allowance, BoundedGraph, TooLargeError, spec_of
from offramp.backends.torch_operations import OPERATIONS

CALLS = json.loads((Path(__file__).parent / "calls.json").read_bytes())


def given(*shape, dtype="float32", largest=None):
    """A tensor as an argument of a recorded call."""
    return {"tensor": [list(shape), dtype, largest]}


_GATES = [given(16, 3), given(16, 4), given(16), given(16)]
_HEADS = [given(1, 2, size, 4) for size in (5, 7, 7)]
SEVERAL = {
    "aten.lstm.input": [given(2, 5, 3), [given(1, 2, 4), given(1, 2, 4)], _GATES, True, 1, 0.0, False, False, True],
    "aten.gru.input": [
        given(2, 5, 3), given(1, 2, 4), [given(12, 3), given(12, 4), given(12), given(12)], True, 1, 0.0, False, False,
        True,
    ],
    "aten._weight_norm.default": [given(4, 3, 2), given(4, 1, 1), 0],
    "aten.batch_norm.default": [given(2, 3, 4), *[given(3)] * 4, False, 0.1, 1e-5, False],
    "aten.instance_norm.default": [given(2, 3, 4), *[given(3)] * 4, False, 0.1, 1e-5, False],
    "aten.group_norm.default": [given(2, 4, 3), 2, given(4), given(4), 1e-5, False],
    "aten.layer_norm.default": [given(2, 4), [4], given(4), given(4), 1e-5, False],
    "aten.prelu.default": [given(2, 3, 4), given(3)],
    "aten.scaled_dot_product_attention.default": [*_HEADS, given(5, 7), 0.0, False],
    "aten.grid_sampler.default": [given(1, 2, 4, 4), given(1, 3, 3, 2), 0, 0, False],
    "aten.col2im.default": [given(1, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]],
    "aten.im2col.default": [given(1, 2, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]],
    "aten.conv1d.default": [given(2, 3, 8), given(4, 3, 3), given(4), [1], [1], [1], 1],
    "aten.conv2d.default": [given(1, 3, 6, 6), given(4, 3, 3, 3), given(4), [1, 1], [1, 1], [1, 1], 1],
    "aten.conv_transpose2d.input": [
        given(1, 3, 6, 6), given(3, 4, 3, 3), given(4), [1, 1], [1, 1], [0, 0], 1, [1, 1],
    ],
    "aten.max_pool2d.default": [given(1, 3, 6, 6), [2, 2], [2, 2], [0, 0], [1, 1], False],
    "aten.avg_pool2d.default": [given(1, 3, 6, 6), [2, 2], [2, 2], [0, 0], False, True, None],
    "aten.embedding.default": [given(5, 4), given(3, dtype="int64", largest=4)],
    "aten.index_add.default": [given(5, 4), 0, given(3, dtype="int64", largest=4), given(3, 4)],
    "aten.scatter_add.default": [given(5, 4), 0, given(5, 4, dtype="int64", largest=4), given(5, 4)],
    "aten.gather.default": [given(5, 4), 0, given(5, 4, dtype="int64", largest=4)],
    "aten.diff.default": [given(5, 4), 1, -1, None, None],
    "aten.linear.default": [given(2, 3, 4), given(5, 4), given(5)],
    "aten.bucketize.Tensor": [given(2, 3), given(4)],
}  # fmt: skip
"""Calls whose arguments belong together: the size of one says how another is read."""
for _target, _call in SEVERAL.items():
    CALLS.setdefault(_target, []).append([_call, {}])
INTEGERS = (-(1 << 63), -(1 << 31), -1000, -3, -2, -1, 0, 1, 2, 3, 4, 7, 100, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1)
FLOATS = ({"float": "nan"}, {"float": "inf"}, {"float": "-inf"}, -1.0, 0.0, 0.5, 1.0, 1e-300, 1e30, 2.0)
SHAPES = ([], [0], [1], [4], [3, 0], [2, 3], [3, 3], [2, 3, 4], [1, 2, 8], [1, 2, 8, 8], [2, 4, 4, 4], [1, 1, 4, 4, 4])
DTYPES = (
    "float32",
    "float32",
    "float32",
    "int64",
    "int64",
    "bool",
    "float64",
    "uint8",
    "int32",
    "complex64",
    "bfloat16",
)
TEXTS = (
    "", "tanh", "none", "reflect", "replicate", "circular", "constant", "floor", "trunc", "same", "valid", "ij", "xy",
    "sum", "amin", "amax", "mean", "prod", "i,j->", "ij,jk->ik", "...i,ij->...j", "ii->i", "i...,->", "->", "a" * 60,
)  # fmt: skip
OTHER = {
    "ScalarType": [{"dtype": name} for name in DTYPES],
    "MemoryFormat": [{"memory_format": "channels_last"}, {"memory_format": "contiguous_format"}],
    "Layout": [{"layout": "strided"}],
    "Device": [{"device": "cpu"}],
}
LONGEST_SECONDS = 10
MOST_GROWTH_BYTES = 160 << 20


def tensor(rng, shape, dtype, largest=None):
    """Data that is hostile: indices of all sizes, NaN, infinity; sometimes a view."""
    count = 1
    for size in shape:
        count *= size
    if dtype == "int64" and largest is not None:
        made = torch.tensor([rng.randint(0, max(largest, 0)) for _ in range(count)], dtype=torch.int64)
    elif dtype in ("int64", "int32"):
        kind = getattr(torch, dtype)
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
        made = torch.tensor([min(max(rng.choice(INTEGERS), low), high) for _ in range(count)], dtype=kind)
    else:
        numbers = [float("nan"), float("inf"), -1.0, 0.0, 1.0, 1e30] if rng.random() < 0.3 else [0.0, 1.0, 0.5, -0.5]
        made = torch.tensor([rng.choice(numbers) for _ in range(count)]).to(getattr(torch, dtype))
    made = made.reshape(shape)
    if made.dim() > 1 and rng.random() < 0.2:
        made = made.transpose(0, -1).contiguous().transpose(0, -1)
    return made


def fenced(made):
    """The same tensor in memory of its own that may not be written, before a page that may not be read."""
    size = made.untyped_storage().nbytes()
    if not size or sys.platform != "linux":
        return made
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, end + mmap.PAGESIZE)
    region[end - size : end] = made.as_strided((size // made.itemsize,), (1,), 0).view(torch.uint8).numpy().tobytes()
    found = torch.frombuffer(region, dtype=made.dtype, offset=end - size, count=size // made.itemsize)
    address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(region)))
    protect = ctypes.CDLL(None).mprotect
    assert not protect(address, end, mmap.PROT_READ)
    assert not protect(ctypes.c_void_p(address.value + end), mmap.PAGESIZE, 0)
    return found.as_strided(made.shape, made.stride(), made.storage_offset())


class Caller:
    """Makes one graph with its inputs."""

    def __init__(self, seed):
        self.rng, self.inputs = random.Random(seed), []

    def graph(self):
        """Operation, graph as JSON, inputs."""
        rng = self.rng
        target = rng.choice(list(SEVERAL if rng.random() < 0.3 else OPERATIONS))
        schema = CapturedGraph._operation(target)._schema
        if target in CALLS and rng.random() < 0.6:
            args, kwargs = (self.recorded(part) for part in rng.choice(CALLS[target]))
            self.spoil(args)
            self.spoil(kwargs)
        else:
            args, kwargs = [], {}
            for each in schema.arguments:
                if each.has_default_value() and rng.random() < 0.5:
                    if not each.kwarg_only:
                        break
                elif each.kwarg_only:
                    kwargs[each.name] = self.of_type(str(each.real_type))
                else:
                    args.append(self.of_type(str(each.real_type)))
        first = ["n0", "aten.clone.default", args[:1], {}]
        writes = (
            schema.arguments and schema.arguments[0].alias_info is not None and schema.arguments[0].alias_info.is_write
        )
        nodes = [first] if writes else []
        if writes:
            args = [{"v": "n0"}, *args[1:]]
        nodes.append(["n1", target, args, kwargs])
        tree = {"inputs": {"r": len(self.inputs), "w": 0, "c": 0}, "nodes": nodes, "outputs": ["n1"]}
        return target, json.dumps(tree).encode(), self.inputs

    def add(self, made):
        self.inputs.append(fenced(made))
        return {"v": f"r{len(self.inputs) - 1}"}

    def recorded(self, part):
        """An argument of `calls.json`, with its tensors made anew."""
        if isinstance(part, dict) and "tensor" in part:
            shape, dtype, largest = part["tensor"]
            return self.add(tensor(self.rng, shape, dtype, largest))
        if isinstance(part, list):
            return [self.recorded(each) for each in part]
        return {key: self.recorded(each) for key, each in part.items()} if isinstance(part, dict) else part

    def spoil(self, part):
        """Replace some arguments by hostile ones of the same type."""
        places = part.keys() if isinstance(part, dict) else range(len(part))
        for place in list(places):
            old = part[place]
            if isinstance(old, list):
                self.spoil(old)
            if self.rng.random() > 0.15:
                continue
            if isinstance(old, bool):
                part[place] = not old
            elif isinstance(old, int):
                part[place] = self.rng.choice(INTEGERS)
            elif isinstance(old, float):
                part[place] = self.rng.choice(FLOATS)
            elif isinstance(old, dict) and "v" in old:
                part[place] = self.add(tensor(self.rng, self.rng.choice(SHAPES), self.rng.choice(DTYPES)))
            elif isinstance(old, list):
                part[place] = self.of_type("List[int]")

    def of_type(self, kind):
        """An argument of a type of a schema."""
        rng = self.rng
        if kind.startswith("Optional["):
            return None if rng.random() < 0.4 else self.of_type(kind[9:-1])
        if kind.startswith("List["):
            return [self.of_type(kind[5:-1]) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
        if kind == "Tensor":
            known = {"v": rng.choice(range(len(self.inputs)))} if self.inputs and rng.random() < 0.3 else None
            if known:
                return {"v": f"r{known['v']}"}
            return self.add(tensor(rng, rng.choice(SHAPES), rng.choice(DTYPES), 2 if rng.random() < 0.5 else None))
        if kind in OTHER:
            return rng.choice(OTHER[kind])
        if kind == "bool":
            return rng.random() < 0.5
        if kind == "str":
            return rng.choice(TEXTS)
        if kind in ("float", "number") and rng.random() < 0.5:
            return rng.choice(FLOATS)
        return rng.choice(INTEGERS) if rng.random() < 0.3 else rng.choice((-1, 0, 1, 1, 2, 2, 3, 4))


def run(seed):
    """What happened: `ran`, `too large`, or the class of the error."""
    target, data, inputs = Caller(seed).graph()
    try:
        graph = BoundedGraph(CapturedGraph(data, "here"), [])
        allowance = Allowance(64, 1 << 16, (1 << 10, 1 << 12), 0, is_warm_up=False)
        results = graph(inputs, allowance)
    except TooLargeError:
        return target, "too large"
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, ArithmeticError) as error:
        return target, type(error).__name__
    assert all(spec_of(each) for each in results)
    return target, "ran"


def main(seed, count):
    faulthandler.enable()
    torch.set_num_threads(1)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    found, ran = Counter(), set()
    with torch.inference_mode():
        for number in range(seed, seed + count):
            sys.stderr.write(f"{number}\n")
            sys.stderr.flush()
            signal.alarm(LONGEST_SECONDS)  # its signal ends the process, also while PyTorch computes
            target, end = run(number)
            found[end] += 1
            if end == "ran":
                ran.add(target)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - start
    sys.stdout.write(json.dumps({"ends": found, "ran": sorted(ran), "growth_bytes": growth}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
