"""Check `gpus`: what torch sees of each GPU, and a product computed on it.

Asked of a process of its own (`python -m lora_dist.operations.doctor.devices` prints one JSON object): a driver that hangs can be given
up on, and no GPU in exclusive mode is taken from the processes that are started later.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Generator, Iterator
from functools import cache
from typing import Any

from lora_dist.log import UserError
from lora_dist.operations.doctor.context import Context
from lora_dist.operations.doctor.report import Finding, fail, ok, size_text, skip, warn
from lora_dist.operations.doctor.versions import torch_cuda

BUSY_SHARE = 0.1
"""of a GPU's memory, taken by others"""


def check_gpus(context: Context) -> Generator[Finding, None, None]:
    wanted = context.args.device
    if wanted == "cpu":
        yield skip("gpus", "CPU only, as --device says")
    elif torch_cuda() is None and wanted == "auto":
        yield skip("gpus", "CPU only: torch is a CPU build")
    else:
        yield from judge(probe(context.args.timeout_s), wanted)


@cache
def probe(timeout_s: float) -> dict[str, Any]:
    """What torch says in a fresh process.

    Raises:
        UserError: it does not answer, or crashes.
    """
    try:
        done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"asking torch for its GPUs takes more than {timeout_s:g} s: see nvidia-smi and dmesg, restart the driver"
        ) from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"asking torch for its GPUs ended with {done.returncode} ({last}): see nvidia-smi and dmesg")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def judge(answer: dict[str, Any], wanted: str) -> Iterator[Finding]:
    """Findings from a probe's answer."""
    for text in dict.fromkeys(answer["warnings"]):
        yield warn(
            "gpus", f"torch says: {' '.join(text.split())[:240]}", "nvidia-smi shows driver and GPUs; match torch's build to them"
        )
    if not answer["gpus"]:
        if wanted == "cuda":
            yield fail(
                "gpus",
                "torch sees none",
                "nvidia-smi; a CUDA build of torch; CUDA_VISIBLE_DEVICES; docker run --gpus all; or --device cpu",
            )
        else:
            yield skip("gpus", "CPU only: torch sees no GPU")
        return
    for number, gpu in enumerate(answer["gpus"]):
        yield _one(f"gpu {number}", gpu)
    if len(answer["gpus"]) > 1:
        direct, pairs = answer["peer_pairs"], len(answer["gpus"]) * (len(answer["gpus"]) - 1)
        yield ok(
            "gpu peer access",
            f"{direct} of {pairs} ordered pairs" + ("" if direct == pairs else "; the others go through memory"),
        )


def _one(name: str, gpu: dict[str, Any]) -> Finding:
    used = gpu["total"] - gpu["free"]
    text = (
        f"{gpu['name']}, {size_text(gpu['free'])} free of {size_text(gpu['total'])}, compute capability {gpu['capability']}, "
        f"bf16 {'yes' if gpu['bf16'] else 'no'}"
    )
    if gpu["error"]:
        return fail(
            name,
            f"{text}; a product on it failed: {gpu['error']}",
            "a torch built for this compute capability; nvidia-smi -q shows faults",
        )
    if used > BUSY_SHARE * gpu["total"]:
        return warn(
            name, f"{text}; {size_text(used)} is taken", "nvidia-smi shows by whom; choose others with CUDA_VISIBLE_DEVICES"
        )
    if not gpu["bf16"]:
        return warn(name, text, "train with --train.fp16 instead of --train.bf16")
    return ok(name, text)


def _look() -> dict[str, Any]:
    """Runs in the process of its own."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = [_describe(number) for number in range(count)]
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return {"gpus": gpus, "peer_pairs": direct, "warnings": texts}


def _describe(number: int) -> dict[str, Any]:
    import torch

    facts = torch.cuda.get_device_properties(number)
    error = ""
    free, total = 0, facts.total_memory
    try:
        free, total = torch.cuda.mem_get_info(number)  # before this process takes any
        ones = torch.ones(256, 256, device=f"cuda:{number}")
        if float((ones @ ones)[0, 0]) != 256.0:  # a wait for the device
            error = "256 ones did not sum to 256"
    except RuntimeError as raised:
        error = str(raised).splitlines()[0]
    return {
        "name": facts.name,
        "free": free,
        "total": total,
        "capability": f"{facts.major}.{facts.minor}",
        "bf16": facts.major >= 8,  # in hardware; torch.cuda.is_bf16_supported() counts emulation
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(_look()))
