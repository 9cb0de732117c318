"""Which share of each room's lines do the tests run? Read from what `pytest --cov` leaves."""

from collections import Counter
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parents[2]


def main():
    measured = coverage.Coverage()
    measured.load()
    lines, missed = Counter(), Counter()
    # Templates are traced too, and are no Python.
    for file in (each for each in measured.get_data().measured_files() if each.endswith(".py")):
        _, statements, _, missing, _ = measured.analysis2(file)
        room = str(Path(file).relative_to(ROOT).parent)
        lines[room] += len(statements)
        missed[room] += len(missing)
    for room in sorted(+lines):
        share = 100 * (1 - missed[room] / lines[room])
        print(f"{room:<20} {lines[room]:>6,} lines {share:>6.1f} % covered")  # noqa: T201


if __name__ == "__main__":
    main()
