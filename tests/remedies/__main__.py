"""Print what the table covers, for docs/results/faults.md: `python -m tests.remedies`; `--all` prints every entry.

`--lacking` prints the remedies that have no entry, as lines for `table.OPEN`.
"""

import argparse

from tests.remedies.entries import CLOSED, SIMULATED
from tests.remedies.places import House
from tests.remedies.table import OPEN, TABLE, lacking


def rows(places):
    """One row a room: places, those that advise, and how many of their remedies are carried out, simulated, closed."""
    for room in sorted({place.room for place in places}):
        own = [place for place in places if place.room == room]
        advising = [place for place in own if place.remedies]
        entries = [entry for entry in TABLE if entry.places(advising)]
        closed = [entry for entry in entries if entry.closed]
        simulated = [entry for entry in entries if entry.simulates]
        carried = len(entries) - len(closed) - len(simulated)
        yield room, len(own), len(advising), carried, len(simulated), len(closed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="print every entry")
    parser.add_argument("--lacking", action="store_true", help="print the remedies without an entry")
    args = parser.parse_args()
    places = House().places
    if args.lacking:
        print("\n".join(f"    {line!r}," for line in lacking(places)))
        return
    print("| room | places that refuse | of them advise | carried out | with a stand-in | not carried out |")
    print("|---|---|---|---|---|---|")
    found = list(rows(places))
    for row in (*found, ("all", *map(sum, zip(*(row[1:] for row in found), strict=True)))):
        print(f"| {' | '.join(map(str, row))} |")
    reasons = "; ".join(map(": ".join, CLOSED.items()))
    print(f"\nWithout an entry: {len(OPEN)}. Remedies that are not carried out: {reasons}.")
    print(f"\nStand-ins: {'; '.join(map(': '.join, SIMULATED.items()))}.")
    if args.all:
        print("\n| message | remedy | action | result |\n|---|---|---|---|")
    for entry in TABLE if args.all else ():
        result = entry.closed or ("the same work passes" if entry.again else "the corrected work passes")
        print(
            f"| {entry.place} | {entry.says} | {'-' if entry.closed else entry.action} | {result} |".replace("\n", " ")
        )


if __name__ == "__main__":
    main()
