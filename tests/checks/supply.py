"""List what an installation of offramp consists of, from the metadata of the installed distributions.

    python -m tests.checks.supply licences docs/licences.md     # licence of each distribution that an extra brings
    python -m tests.checks.supply sbom sbom.json                # software bill of materials, CycloneDX 1.6

Only what is installed for this Python and system is listed. Equal installations give equal files.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PROJECT = "offramp"
EXTRAS = ("", "edge", "divide", "torch", "data", "train", "vision", "report", "sweep", "search", "demo")
"""Extras that a user installs; "" stands for offramp alone."""
LONGEST = 60
"""Longest text that names a licence; a longer one is the licence itself."""
HEAD = """# Licences of the dependencies

offramp itself is under Apache-2.0. These distributions are installed with it, by extra: `pip install 'offramp[EXTRA]'`.
The licences are those that their metadata state; none of them is part of our files. Written by `make licences` on
Python {python}, {system}, with the versions of `constraints.txt`; another system may need others.

| distribution | version | licence | extras |
|---|---|---|---|
"""


def main() -> None:
    """Write one of the two lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("licences", "sbom"))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.write_text(licences() if args.kind == "licences" else json.dumps(bill(), indent=1) + "\n")


def licences() -> str:
    """Return the table of licences as a page."""
    extras: dict[str, list[str]] = {}
    for extra in EXTRAS:
        for name in sorted(brought_by(extra)):
            extras.setdefault(name, []).append(extra or "(always)")
    rows = []
    for name, found in sorted(extras.items()):
        dist = metadata.distribution(name)
        named = "all" if "(always)" in found else ", ".join(found)
        rows.append(f"| {dist.name} | {dist.version} | {licence_of(dist)} | {named} |\n")
    version = ".".join(map(str, sys.version_info[:2]))
    return HEAD.format(python=version, system=sys.platform) + "".join(rows)


def brought_by(extra: str) -> set[str]:
    """Return the installed distributions that an extra needs, without offramp."""
    found: set[str] = set()
    waiting = [(PROJECT, extra)]
    seen = set()
    while waiting:
        item = waiting.pop()
        if item not in seen:
            seen.add(item)
            found.add(item[0])
            waiting += needs(*item)
    return found - {PROJECT}


def needs(name: str, extra: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, extra) of each installed distribution that one needs with an extra ("": without any)."""
    for text in metadata.distribution(name).requires or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        needed = canonical(requirement.name)
        if is_installed(needed):
            yield from ((needed, each) for each in ("", *sorted(requirement.extras)))


def is_installed(name: str) -> bool:
    """Return whether a distribution is installed."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def canonical(name: str) -> str:
    """Return the normal form of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(dist: metadata.Distribution) -> str:
    """Return the licence as the metadata state it: an SPDX expression, a short name, or classifiers."""
    expression, text = dist.metadata.get("License-Expression"), dist.metadata.get("License", "")
    if expression:
        return expression
    classifiers = [
        line.rpartition(" :: ")[2] for line in dist.metadata.get_all("Classifier") or () if line.startswith("License")
    ]
    if text and text != "UNKNOWN" and len(text) <= LONGEST and "\n" not in text:
        return text
    return ", ".join(classifiers) or "not stated: see its files"


def bill() -> dict[str, Any]:
    """Return the software bill of materials of what a user installs, as CycloneDX."""
    names = sorted(set().union(*(brought_by(extra) for extra in EXTRAS)))
    project = component(metadata.distribution(PROJECT), "application")
    components = [component(metadata.distribution(name), "library") for name in names]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": project},
        "components": components,
        "dependencies": [
            {
                "ref": reference(name),
                "dependsOn": sorted({reference(each) for each in dependencies(name)} - {reference(name)}),
            }
            for name in (PROJECT, *names)
        ],
    }


def dependencies(name: str) -> set[str]:
    """Return the distributions that one needs directly; those of all extras for offramp."""
    return {needed for extra in (EXTRAS if name == PROJECT else ("",)) for needed, _ in needs(name, extra)}


def component(dist: metadata.Distribution, kind: str) -> dict[str, Any]:
    """Return one distribution as a component of CycloneDX."""
    expression, found = dist.metadata.get("License-Expression"), licence_of(dist)
    licence = {"expression": expression} if expression else {"license": {"name": found}}
    about = {"name": dist.name, "version": dist.version, "purl": reference(canonical(dist.name)), "licenses": [licence]}
    return {"type": kind, "bom-ref": reference(canonical(dist.name)), **about}


def reference(name: str) -> str:
    """Return the package URL of an installed distribution."""
    return f"pkg:pypi/{name}@{metadata.version(name)}"


if __name__ == "__main__":
    main()
