"""Does the server's process collect its garbage where nobody waits for it?"""

import subprocess
import sys
from pathlib import Path

# A cycle whose last breath tells which thread it was drawn on; more than enough is allocated to start a collection.
PROGRAM = """
import gc, threading, time
from deployments.prefect_server import collect_elsewhere

class Cycle:
    def __init__(self):
        self.itself = self
    def __del__(self):
        found.append(threading.current_thread().name)

found = []
if {moved}:
    collect_elsewhere()
Cycle()
kept = [[] for _ in range(100_000)]
time.sleep(1.5)
print(gc.isenabled(), found)
"""


def told_by(program):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_garbage_is_collected_on_a_thread_of_its_own_and_by_default_on_the_one_that_allocates():
    assert told_by(PROGRAM.format(moved=True)) == "False ['garbage-collection']"
    assert told_by(PROGRAM.format(moved=False)) == "True ['MainThread']"
