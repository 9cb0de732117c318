"""Does docs/architecture.md show the rooms as the imports have them?"""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "docs" / "draw_rooms.py")
draw_rooms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(draw_rooms)

# A roof that uses all that is below it, and two rooms beside each other.
HOUSE = {"cellar": set(), "hall": {"cellar"}, "kitchen": {"cellar"}, "roof": {"cellar", "hall", "kitchen"}}


def house(**changes):
    return {name: draw_rooms.Room("What for?", uses=uses) for name, uses in {**HOUSE, **changes}.items()}


@pytest.fixture(scope="module")
def rooms():
    return draw_rooms.rooms_of_the_code()


def test_the_drawing_in_the_page_is_that_of_the_imports(rooms):
    page = draw_rooms.PAGE.read_text()
    drawn = draw_rooms.with_drawing(page, draw_rooms.drawing(rooms))
    assert page == drawn, "The imports have changed: `.venv/bin/python docs/draw_rooms.py` draws them again."


def test_rooms_of_every_layer_were_found(rooms):
    assert {"ptq.errors", "ptq.numerics", "tasks.stages", "flows", "deployments"} <= rooms.keys()
    assert "ptq.records" in rooms["ptq.numerics"].uses


def test_an_arrow_is_left_out_where_a_longer_way_leads_to_the_same_room():
    assert draw_rooms.arrows(house()) == {
        "cellar": set(), "hall": {"cellar"}, "kitchen": {"cellar"}, "roof": {"hall", "kitchen"},
    }  # fmt: skip


def test_a_room_stands_above_all_that_it_uses():
    assert draw_rooms.floors(house()) == {"cellar": 0, "hall": 1, "kitchen": 1, "roof": 2}
    assert draw_rooms.floors(house(kitchen={"hall"})) == {"cellar": 0, "hall": 1, "kitchen": 2, "roof": 3}


def test_rooms_that_use_each_other_are_refused():
    with pytest.raises(ValueError, match="in a circle: cellar, hall, kitchen, roof"):
        draw_rooms.floors(house(cellar={"roof"}))


def test_one_import_more_changes_the_drawing():
    before, after = draw_rooms.drawing(house()), draw_rooms.drawing(house(kitchen={"hall", "cellar"}))
    assert "    kitchen --> hall\n" in after
    assert "    kitchen --> hall\n" not in before
    assert "| 2 | `kitchen` | What for? | hall, cellar |" in after


def test_drawing_again_leaves_what_stands_around_the_drawing():
    page = f"Before.\n{draw_rooms.BEGIN}old\n{draw_rooms.END}After.\n"
    drawn = draw_rooms.with_drawing(page, "new\n")
    assert drawn == f"Before.\n{draw_rooms.BEGIN}\nnew\n\n{draw_rooms.END}After.\n"
    assert draw_rooms.with_drawing(drawn, "new\n") == drawn
