"""The parts of a divided module: which shards each needs under a plan, where it starts, and the order of reading."""

from __future__ import annotations

from offramp.errors import StoreError
from offramp.program.program import Module
from offramp.runtime.ring import Turn
from offramp.runtime.weight_plan import WeightPlan, reading_order
from offramp.store import Store


def module_of(store: Store) -> Module:
    """Return the module that a store was divided from. Raises StoreError for an encoder divided by tensor names."""
    if store.program.module is None:
        what = f"this is the store of a {store.manifest.source.architecture} that was divided by its names"
        raise StoreError(what, store.path, "run it with offramp.load, or divide with --method eager")
    return store.program.module


def streamed_shards(store: Store) -> list[list[str]]:
    """Return the shards that each part has in memory as a whole, if they fit. Rows of the others are gathered."""
    module, shards = module_of(store), store.manifest.shards
    whole = {n for n, shard in shards.items() if shard.blocks is None or shard.tensors[0].name in module.sliced}
    return [[name for name in part.shards if name in whole] for part in module.parts]


class Parts:
    """The parts of a store's module under a plan for its weights."""

    def __init__(self, store: Store, plan: WeightPlan) -> None:
        module = module_of(store)
        self._parts = module.parts
        self.needs = [[name for name in shards if name not in plan.sliced] for shards in streamed_shards(store)]
        """Shards that each part has in memory as a whole."""
        self.needs[0] = list(dict.fromkeys((*module.pinned, *self.needs[0])))  # from the first use on
        self.starts = {
            (part.start.module, part.start.number): index
            for index, part in enumerate(module.parts) if part.start is not None
        }  # fmt: skip
        """Module call that a part begins with -> index of the part."""
        self.stage_of = {name: index for index, names in reversed([*enumerate(self.needs)]) for name in names}
        """Shard -> index of the first part that needs it."""

    def turns(self, first: int) -> list[Turn]:
        """Return the reads of a pass that begins with part `first`, in order."""
        return [Turn(name) for shards in reading_order(self.needs[first:]) for name in shards]

    def name(self, index: int) -> str:
        """Return the name of a part in messages."""
        return f"{index:03d}"

    def homes(self, shard: str) -> list[str]:
        """Return the names of the parts that a shard is planned for."""
        return [self.name(index) for index, part in enumerate(self._parts) if shard in part.shards]
