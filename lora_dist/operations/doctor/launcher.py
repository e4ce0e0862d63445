"""torchrun, ended by the kernel when the doctor that started it ends, however that ends. Started by `processes.py` with `command`."""

from __future__ import annotations

import os
import sys

from lora_dist.process import end_with_parent


def main(parent: int) -> None:
    """Be torchrun; its options are the command line's. `parent`: the process that wants it."""
    end_with_parent()
    if os.getppid() != parent:
        return  # it ended before the kernel could be asked
    from torch.distributed.run import main as torchrun

    torchrun()


def command(*options: str) -> list[str]:
    """Starts torchrun with these options, as a child of this process."""
    return [sys.executable, "-c", f"from {__name__} import main; main({os.getpid()})", *options]
