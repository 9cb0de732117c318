"""Which rooms does the code have, and which does each use? Drawn from the imports, into docs/architecture.md.

    python docs/draw_rooms.py

An arrow stands for at least one import, deferred ones included. The picture leaves an arrow out where a longer way
leads to the same room; the table has them all.
"""

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from imports import imports_of  # noqa: E402 - what reads imports belongs to the tests

PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- Drawn by docs/draw_rooms.py: -->\n", "<!-- end of the drawing -->\n"
LAYERS = ("ptq", "tasks", "flows", "deployments")


@dataclass
class Room:
    """A room's question, and the other rooms that they import from."""

    question: str
    uses: set[str] = field(default_factory=set)


def room_of(name: str) -> str:
    """Returns the room of a dotted name: of `ptq` and `tasks` the part below, of the others the whole.

    >>> room_of("ptq.numerics.amax"), room_of("ptq.config"), room_of("flows.cli")
    ('ptq.numerics', 'ptq.config', 'flows')
    """
    top, *below = name.split(".")
    return ".".join([top, *below[:1]]) if top in ("ptq", "tasks") else top


def rooms_of_the_code() -> dict[str, Room]:
    """Returns the rooms, as the files and their imports tell."""
    rooms: dict[str, Room] = {}
    for path in (path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))):
        file, source = path.relative_to(ROOT), path.read_text()
        is_package = path.name == "__init__.py"
        name = room_of(".".join(file.parent.parts if is_package else file.with_suffix("").parts))
        if name in ("ptq", "tasks"):
            continue
        room = rooms.setdefault(name, Room(str(ast.get_docstring(ast.parse(source))).partition("\n")[0]))
        room.uses |= {room_of(found.name) for found in imports_of(source, str(file)) if found.top in LAYERS}
        room.uses -= {name, "ptq", "tasks"}
    return rooms


def floors(rooms: Mapping[str, Room]) -> dict[str, int]:
    """Returns how many rooms stand below each on the longest way down.

    Raises:
        ValueError: rooms use each other in a circle.
    """
    found: dict[str, int] = {}
    while len(found) < len(rooms):
        ready = [name for name, room in rooms.items() if name not in found and room.uses <= found.keys()]
        if not ready:
            raise ValueError(
                f"These rooms use each other in a circle: {', '.join(sorted(rooms.keys() - found.keys()))}."
            )
        found |= {name: max((found[used] + 1 for used in rooms[name].uses), default=0) for name in ready}
    return found


def arrows(rooms: Mapping[str, Room]) -> dict[str, set[str]]:
    """Returns the uses for which no longer way stands."""
    below: dict[str, set[str]] = {}
    for name in sorted(floors(rooms), key=floors(rooms).__getitem__):
        below[name] = rooms[name].uses.union(*(below[used] for used in rooms[name].uses))
    return {name: room.uses - set().union(*(below[used] for used in room.uses)) for name, room in rooms.items()}


def drawing(rooms: Mapping[str, Room]) -> str:
    """Returns the picture, as Mermaid text, and the table of all uses, from the top floor down."""
    floor, kept = floors(rooms), arrows(rooms)
    order = sorted(rooms, key=lambda name: (-floor[name], name))
    label = {name: name.replace(".", "_") for name in order}
    lines = ["```mermaid", "flowchart TD", *(f'    {label[name]}["{name}"]' for name in order)]
    lines += [f"    {label[name]} --> {label[used]}" for name in order for used in order if used in kept[name]]
    lines += ["```", "", "| floor | room | question | uses |", "| --- | --- | --- | --- |"]
    for name in order:
        uses = ", ".join(used for used in order if used in rooms[name].uses) or "nothing"
        lines.append(f"| {floor[name]} | `{name}` | {rooms[name].question} | {uses} |")
    return "\n".join(lines) + "\n"


def with_drawing(page: str, picture: str) -> str:
    """Returns the page with the picture between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{picture}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_drawing(PAGE.read_text(), drawing(rooms_of_the_code())))
