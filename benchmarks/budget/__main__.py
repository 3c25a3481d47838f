"""Print what each load comes to: auto against none and against the best number of drafts in hindsight.

python -m benchmarks.budget
python -m benchmarks.budget --record NAME=graph.json.traces --record ...
"""

import argparse
import json
import random
from pathlib import Path

from benchmarks.budget.machines import BY_BLOCK
from benchmarks.budget.recorded import FILE, Recording, recordings
from benchmarks.budget.simulate import Phase, outcome

PAIRS = {
    32: (("LLaDA static", "LLaDA threshold"), ("LLaDA threshold", "LLaDA static")),
    8: (("SDAR static", "SDAR dynamic"),),
}
"""Whose drafts are simulated, by block length: the recording whose graph is served, and what it is mixed with."""


def loads(name: str, other: str) -> dict[str, list[Phase]]:
    """Return the loads by what they are called."""
    rng = random.Random(1)
    return {
        **{f"{n} at once": [Phase(n, max(32, 8 * n), (name,))] for n in (1, 2, 4, 8, 16)},
        "bursts of 16, 1 between": [Phase(1, 3, (name,)), Phase(16, 24, (name,))] * 6,
        "1 to 12, changing": [Phase(rng.choice((1, 2, 3, 4, 6, 8, 12)), rng.randint(1, 6), (name,)) for _ in range(40)],
        "4, of two policies": [Phase(4, 64, (name, other))],
        "4, half never accept": [Phase(4, 64, (name, "!" + name))],
        "8, then 8 that never accept, 2 at once": [Phase(2, 8, (name,)), Phase(2, 8, ("!" + name,))] * 3,
    }


def record(each: list[str]) -> None:
    """Write `recorded.json` anew, of traces of prompts half of which the graphs were not made of."""
    named = dict(text.split("=", 1) for text in each)
    found = {name: Recording.of_traces(Path(path), 0.5, 12).as_json() for name, path in named.items()}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="append", metavar="NAME=TRACES", help="read these instead of simulating")
    args = parser.parse_args()
    if args.record:
        record(args.record)
        return
    known = recordings()
    header = ["machine; recording", *loads("", "")]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for block_length, machines in BY_BLOCK.items():
        for machine_name, machine in machines.items():
            for name, other in PAIRS[block_length]:
                found = [outcome(machine, known, load) for load in loads(name, other).values()]
                cells = [f"{each.auto:.3f}, {each.of_best:.3f} ({-each.best[1]})" for each in found]
                print(f"| {machine_name}; {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
