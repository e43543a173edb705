"""torchrun, as the scripts use it: python scripts/launch.py --standalone --nproc_per_node 2 run_pretrain.py ...

Takes torchrun's options. Signals go to the program's processes, which save a checkpoint and exit, however long that
takes; and the exit status is the program's. (torchrun dies of SIGUSR1 and of a second SIGTERM, gives its processes 30 s,
and ends with status 1 and a traceback.)
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def hand_on(signum: int, _frame: object) -> None:
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(child), signum)


if __name__ == "__main__":
    api._terminate_process_handler = hand_on  # what torchrun installs for TERM, INT, HUP and QUIT
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, hand_on)
    try:
        run.main()
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        sys.exit(status if status > 0 else 128 - status)
