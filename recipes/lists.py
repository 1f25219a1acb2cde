"""The ring against lists of layers at the same number of layers in memory, as the project of 2021 had them.

STORE is a store that transformers loads, as `offramp divide MODEL store` makes it: the list of 2021 reads it, too.

STORE=my-store offramp sweep recipes/lists.py --out results/lists
"""

import os

from offramp.experiments import Grid

LAYERS = [1, 2, 4, 6, 8, 10, 12]


def recipe():
    """The ring, with and without reading ahead; three rules with the same kernels; and the program of 2021.

    With one layer in memory the ring and a list also read the disk itself, without the page cache.
    """
    of = {"model": os.environ.get("STORE", "store"), "resident_layers": LAYERS, "passes": 5, "rounds": 5, "threads": 2}
    rings, lists = Grid(prefetch=[True, False], **of), Grid(residency=["fifo", "lru", "mru"], **of)
    from_disk = of | {"resident_layers": 1, "reads": "direct"}
    direct = [Grid(prefetch=[True, False], **from_disk), Grid(residency="fifo", **from_disk)]
    return [rings, lists, Grid(rival="lazy-layers", residency=["fifo", "mru"], **of), *direct]
