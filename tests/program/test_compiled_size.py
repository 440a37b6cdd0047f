"""What the first start of a plain disk compiles: how many functions, and how much of LLVM's language."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# 2 to 5 % above what was measured when this was written (2026-11-26). Raise one only for code that every disk needs;
# what only some disks need is a unit of theirs (docs/architecture.md, "Compiled units").
MOST_FUNCTIONS, MOST_TEXT, MOST_TEXT_OF_LOOP = 220, 1_052_000, 523_000

COUNTING = """
import json
from numba.core import event
from ringplane.block.sources.file import FileSource
from ringplane.compiler import pipeline
from ringplane.dataplane import compile_data_plane
from ringplane.dataplane.worker_state import UNITS
from ringplane.engines.uring import Uring

sizes = []
join = pipeline._join
pipeline._join = lambda module, texts: sizes.append(sum(map(len, texts.values()))) or join(module, texts)
with event.install_recorder("numba:compile") as recorder:
    compile_data_plane.load_loop()
    loop, = sizes
    compile_data_plane.load_rest()
    for unit in (*UNITS, *Uring.units, *FileSource.units):
        unit.address()
print(json.dumps([sum(each.is_start for _, each in recorder.buffer), sum(sizes), loop]))
"""


def test_a_plain_disk_on_io_uring(tmp_path: Path) -> None:
    environment = {**os.environ, "RINGPLANE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COUNTING], env=environment, capture_output=True, text=True, check=True)
    functions, text, loop = json.loads(done.stdout)
    assert functions <= MOST_FUNCTIONS, (
        f"the first start of a plain disk compiles {functions} functions, more than {MOST_FUNCTIONS}: "
        "make what only some disks need a unit, or raise the bound"
    )
    assert text <= MOST_TEXT, (
        f"the first start of a plain disk gives LLVM {text} bytes, more than {MOST_TEXT}: "
        "make what only some disks need a unit, or raise the bound"
    )
    assert loop <= MOST_TEXT_OF_LOOP, (
        f"the loop, the longest job of a first start, gives LLVM {loop} bytes, more than {MOST_TEXT_OF_LOOP}: "
        "make what few requests need a unit, or raise the bound"
    )
