"""Stores with integer weights made from stores with float weights: symmetric, a scale for each output channel.

Their kernels have no rotation and no exact inputs, as in stores of offramp 0.1; magnitudes are at most half a pair's.
"""

import dataclasses

import numpy as np

from offramp.program.dtypes import DTYPES
from offramp.program.encoder import LAYER_KERNELS
from offramp.program.narrow import LARGEST_PAIR, SUFFIX
from offramp.store import Store
from offramp.store.writer import StoreWriter


def narrowed(weight):
    """A weight [N, K] as integers [K, N] and scales [N]; channels of zeros have scale 0."""
    largest_N = np.abs(weight).max(axis=1)
    scale_N = (largest_N / np.float32(LARGEST_PAIR // 2)).astype(np.float32)
    divisor_N1 = np.where(scale_N > 0, scale_N, np.float32(1))[:, None]
    return np.ascontiguousarray(np.rint(weight / divisor_N1).T.astype(np.int8)), scale_N


def widened(weight):
    """The float weight that the integers of `narrowed` stand for."""
    integers_KN, scale_N = narrowed(weight)
    return np.ascontiguousarray((integers_KN.astype(np.float32) * scale_N).T)


def write_rewritten(source: Store, path, *, narrow: bool):
    """Write a store whose layers have integers, or the float weights that these stand for. Returns its path."""
    program, tensors = source.program, source.manifest.tensors()
    matrices = {
        name for step in program.steps() if step.kernel in LAYER_KERNELS for role, name in step.weights.items()
        if role.endswith(".weight") and len(tensors[name][1].shape) == 2
    }  # fmt: skip
    with StoreWriter(path, source.manifest.source.fingerprint) as writer:
        shards = {}
        for shard in source.manifest.shards.values():
            arrays = {each.name: read_tensor(source, each.name) for each in shard.tensors}
            roles = {each.name: each.role for each in shard.tensors}
            for name in matrices & set(arrays):
                if narrow:
                    arrays[name], arrays[name + ".scale"] = narrowed(arrays[name])
                    roles[name + ".scale"] = roles[name].replace(".weight", ".scale")
                else:
                    arrays[name] = widened(arrays[name])
            described = [
                (name, roles[name], "I8" if array.dtype == np.int8 else "F32", array.shape)
                for name, array in sorted(arrays.items(), key=lambda item: item[1].dtype == np.int8)  # floats aligned
            ]
            read = _reader(arrays)
            shards[shard.name] = writer.add_shard(shard.name, described, read, gathered=shard.blocks is not None)
        manifest = source.manifest
        for file in (*manifest.files, *filter(None, [manifest.labels])):
            writer.add_copy(file.file, source.path / file.file)
        exits = manifest.exits and writer.add_exits(
            source.path / manifest.exits.heads.file, source.path / manifest.exits.description.file
        )
        program = narrow_program(program) if narrow else program
        return writer.finish(dataclasses.replace(manifest, program=program, shards=shards, exits=exits))


def narrow_program(program):
    """The program of an encoder with integer weights in its layers."""
    kernels = {
        name: dataclasses.replace(kernel, template=kernel.template + SUFFIX) if name in LAYER_KERNELS else kernel
        for name, kernel in program.kernels.items()
    }
    stages = tuple(dataclasses.replace(stage, steps=tuple(map(_narrow_step, stage.steps))) for stage in program.stages)
    return dataclasses.replace(program, kernels=kernels, stages=stages)


def _narrow_step(step):
    if step.kernel not in LAYER_KERNELS:
        return step
    matrices = {role: name for role, name in step.weights.items() if role.endswith(".weight") and role != "norm.weight"}
    scales = {role[:-7] + ".scale": name + ".scale" for role, name in matrices.items()}
    return dataclasses.replace(step, weights={**step.weights, **scales})


def read_tensor(store, name):
    """A tensor of a store as an array."""
    shard, tensor = store.manifest.tensors()[name]
    data = store.read_tensor(shard.name, tensor)
    return np.frombuffer(data, DTYPES[tensor.dtype].numpy).reshape(tensor.shape)


def _reader(arrays):
    return lambda name: [np.ascontiguousarray(arrays[name]).tobytes()]
