"""torchrun, ended by the kernel when the doctor that started it ends, however that ends. Linux only; elsewhere plain torchrun.

`python -m lora_dist.operations.doctor.launcher OPTIONS OF TORCHRUN`, started by `processes.py`.
"""

from __future__ import annotations

import ctypes
import signal
import sys

if __name__ == "__main__":
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from torch.distributed.run import main

    main()
