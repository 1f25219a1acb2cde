"""The parts of a divided module: which shards each needs, of what size, where it starts, and the order of reading."""

from offramp.errors import StoreError
from offramp.program.program import Module
from offramp.runtime.planner import page_rounded
from offramp.runtime.ring import Turn
from offramp.runtime.weight_plan import WeightPlan, reading_order
from offramp.store import Shard, Store
from offramp.streaming.placement import is_copied


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


def sliceable_shards(store: Store) -> list[str]:
    """Return the shards that may be read some rows at a time."""
    sliced = set(module_of(store).sliced)
    return [name for name, shard in store.manifest.shards.items() if shard.tensors and shard.tensors[0].name in sliced]


def data_bytes(store: Store) -> dict[str, int]:
    """Return the bytes of weights of each shard."""
    return {name: shard.data_bytes + _copied_bytes(shard) for name, shard in store.manifest.shards.items()}


def slot_bytes(store: Store) -> dict[str, int]:
    """Return the memory that each shard takes: its file in whole pages, and tensors that are copied out of it."""
    return {name: page_rounded(shard.bytes) + _copied_bytes(shard) for name, shard in store.manifest.shards.items()}


def _copied_bytes(shard: Shard) -> int:
    return sum(entry.num_bytes for entry in shard.tensors if is_copied(entry))


class Parts:
    """The parts of a store's module under a plan for its weights."""

    def __init__(self, store: Store, plan: WeightPlan) -> None:
        module = module_of(store)
        self._parts = module.parts
        self.needs = [[name for name in shards if name not in plan.sliced] for shards in streamed_shards(store)]
        """Shards that each part has in memory as a whole."""
        self.needs[0] = list(dict.fromkeys((*module.pinned, *self.needs[0])))  # from the first use on
        self.starts = {part.start: index for index, part in enumerate(module.parts) if part.start is not None}
        """Module call that a part begins with -> index of the part."""
        self.stage_of = {name: index for index, names in reversed([*enumerate(self.needs)]) for name in names}
        """Shard -> index of the first part that needs it."""

    def turns(self, first: int) -> list[Turn]:
        """Return the reads of a pass that begins with part `first`, in order."""
        return [Turn(name) for shards in reading_order(self.needs[first:]) for name in shards]

    def homes(self, shard: str) -> str:
        """Return the names of the parts that a shard is planned for, for messages."""
        return ", ".join(f"{index:03d}" for index, part in enumerate(self._parts) if shard in part.shards) or "none"
