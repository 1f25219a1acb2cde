"""Writes models of the zoo as checkpoint folders: `python -m tests.zoo.folders OUT [NAME ...] [--sample N]`.

OUT/KIND/NAME is what `save_pretrained` of transformers writes, with inputs. What is there is whole, and not made again.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from offramp.experiments.specification import INPUTS
from tests.zoo import survey as zoo
from tests.zoo.measure import built, examples_of, sampled
from tests.zoo.specimen import Specimen


def write(specimen: Specimen, out: Path) -> Path:
    """Return the folder of a model, and write it if it is not there."""
    folder = out / specimen.kind / specimen.name
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        built(specimen).save_pretrained(partial)  # type: ignore[operator]
        given = dict(examples_of(specimen)[0])
        save_file({name: each for name, each in given.items() if isinstance(each, torch.Tensor)}, partial / INPUTS)
        partial.rename(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Write models of the zoo as checkpoint folders.")
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="these alone")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N models, spread evenly over the zoo")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [each for each in zoo.specimens() if not arguments.names or each.name in arguments.names]
    for specimen in sampled(found, arguments.sample):
        print(write(specimen, arguments.out), file=sys.stderr, flush=True)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
