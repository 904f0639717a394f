"""Groups of ranks that are copies, as commands are: see `commands.py`."""

import json
import os
import sys
from pathlib import Path

from embedshard.launch.rehearsing import LocalGroup, rehearse_for_starter
from tests.commands import start_python


class CopiedGroup(LocalGroup):
    """A `LocalGroup` that does not import torch and TorchRec anew."""

    def _launch(self, theirs, folder):
        return start_python(__file__, self._local_world_size, folder, passes=[end for ends in theirs for end in ends])


if __name__ == "__main__":
    local_world_size, folder, passed = sys.argv[1:]
    os.setsid()
    log = os.open(Path(folder) / "start.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    numbers = json.loads(passed)
    rehearse_for_starter(list(zip(numbers[::2], numbers[1::2], strict=True)), local_world_size, folder)
