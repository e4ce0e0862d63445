"""Checks `versions`: what is installed against what lora-dist and its libraries ask for, and combinations known not to work.

Reads packages' metadata and imports none of them, so that a broken library cannot take the answer with it.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lora_dist.operations.doctor.context import Context
from lora_dist.operations.doctor.report import Finding, fail, ok, warn

DISTRIBUTION = "lora-dist"
SHOWN = ("transformers", "peft", "accelerate", "datasets", "safetensors")
LIBRARIES = ("torch", *SHOWN, "tokenizers", "numpy", "psutil")
"""without which no run starts"""
EXTRAS = {"deepspeed": "deepspeed", "bitsandbytes": "quantisation", "wandb": "trackers"}
"""library -> the extra of lora-dist that brings it"""
DRIVER_OF_CUDA = {12: 525, 13: 580}
"""CUDA major -> lowest Linux driver of NVIDIA (NVIDIA, CUDA compatibility, minor version compatibility, table 1)"""


@dataclass(frozen=True)
class Facts:
    """What the combinations are told by.

    Attributes:
        torch_cuda: CUDA version that torch was built for; None for a CPU build.
        driver: major version of NVIDIA's driver; None without one.
        device: the option.
    """

    torch: Version | None
    torch_cuda: str | None
    driver: int | None
    device: str


@dataclass(frozen=True)
class Combination:
    """A combination that is known not to work."""

    name: str
    applies: Callable[[Facts], bool]
    why: Callable[[Facts], str]
    remedy: str


KNOWN_BAD = (
    Combination(
        "GPU, CPU torch",
        lambda f: f.driver is not None and f.torch is not None and f.torch_cuda is None and f.device != "cpu",
        lambda f: f"NVIDIA driver {f.driver} is here, but torch {f.torch} is a CPU build, which sees no GPU",
        "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126 (or --device cpu)",
    ),
    Combination(
        "driver, CUDA",
        lambda f: f.driver is not None and f.torch_cuda is not None and f.driver < _lowest_driver(f.torch_cuda),
        lambda f: (
            f"torch is built for CUDA {f.torch_cuda}, which needs driver {_lowest_driver(f.torch_cuda or '0')}, found {f.driver}"
        ),
        "update NVIDIA's driver, or install a torch built for an older CUDA: https://pytorch.org/get-started/previous-versions",
    ),
    Combination(
        "torch, fsdp2",
        lambda f: f.torch is not None and f.torch < Version("2.6"),
        lambda f: f"torch {f.torch} has no torch.distributed.fsdp.fully_shard, which strategy fsdp2 is made of",
        "pip install -U torch",
    ),
)


def check_versions(context: Context) -> Generator[Finding, None, None]:
    bounds = _bounds()
    yield _python()
    installed = {name: version for name in (*LIBRARIES, *EXTRAS) if (version := _installed(name)) is not None}
    cuda, driver = torch_cuda(), nvidia_driver(Path("/proc/driver/nvidia/version"))
    if "torch" in installed:
        yield ok("torch", f"{installed['torch']}, {f'built for CUDA {cuda}' if cuda else 'CPU build'}")
    yield ok("libraries", _list(installed, SHOWN))
    yield ok("extras", (_list(installed, EXTRAS) or "none") + _missing_extras(installed) + _nvme(installed))
    problems = [
        *_out_of_bounds(installed, bounds),
        *_unmet(installed),
        *_combinations(Facts(installed.get("torch"), cuda, driver, context.args.device)),
    ]
    yield from problems
    if not problems:
        yield ok(
            "combinations", f"all within lora-dist's and each other's bounds; none of {len(KNOWN_BAD)} known-bad combinations"
        )


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}"
    wanted = _requires_python()
    if wanted is not None and not wanted.contains(platform.python_version(), prereleases=True):
        return fail("python", f"found {found}, expected {wanted}", "make PYTHON=python3.12 venv")
    return ok("python", found)


@cache
def _requires_python() -> SpecifierSet | None:
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    return SpecifierSet(about["Requires-Python"]) if "Requires-Python" in about else None


def _bounds() -> dict[str, SpecifierSet]:
    """Library -> the versions that lora-dist takes, by its own metadata. Empty where lora-dist is not installed."""
    bounds = {}
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    for requirement in map(Requirement, lines):
        extra = EXTRAS.get(requirement.name, "")
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            bounds[requirement.name] = requirement.specifier
    return bounds


def _installed(name: str) -> Version | None:
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def _list(installed: dict[str, Version], names: object) -> str:
    return ", ".join(f"{name} {installed[name]}" for name in names if name in installed)  # type: ignore[attr-defined]


def _missing_extras(installed: dict[str, Version]) -> str:
    missing = [name for name in EXTRAS if name not in installed]
    return f"; not installed: {', '.join(missing)}" if missing else ""


def _nvme(installed: dict[str, Version]) -> str:
    """DeepSpeed compiles its file access for offload to nvme, and nothing else that lora-dist uses."""
    return "; no C++ compiler, so no offload to nvme" if "deepspeed" in installed and shutil.which("c++") is None else ""


def _out_of_bounds(installed: dict[str, Version], bounds: dict[str, SpecifierSet]) -> Iterator[Finding]:
    if not bounds:
        yield warn("lora-dist", "not installed as a package, so versions have nothing to be compared with", "pip install -e .")
    for name, wanted in bounds.items():
        if name not in installed:
            if name in LIBRARIES:
                yield fail(name, f"not installed, expected {wanted}", f"pip install '{name}{wanted}'")
        elif not wanted.contains(installed[name], prereleases=True):
            # what every run imports ends it; what only some options need is told
            say = fail if name in LIBRARIES else warn
            yield say(name, f"found {installed[name]}, expected {wanted}", f"pip install '{name}{wanted}'")


def _unmet(installed: dict[str, Version]) -> Iterator[Finding]:
    """What the libraries ask of each other, such as transformers of tokenizers, which it refuses to be imported without."""
    for name in installed:
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = _installed(requirement.name)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                expected = f"{requirement.name}{requirement.specifier}"
                yield warn(
                    name, f"{name} {installed[name]} asks for {expected}, found {found or 'none'}", f"pip install '{expected}'"
                )


def _combinations(facts: Facts) -> Iterator[Finding]:
    for combination in KNOWN_BAD:
        if combination.applies(facts):
            yield fail(combination.name, combination.why(facts), combination.remedy)


def _lowest_driver(cuda: str) -> int:
    return DRIVER_OF_CUDA.get(int(cuda.split(".")[0]), 0)


@cache
def torch_cuda() -> str | None:
    """CUDA (or ROCm) version that torch was built for, from its `version.py`, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    found = re.search(r"^(?:cuda|hip)\b[^=\n]*= *'([\d.]+)", text, re.MULTILINE)
    return found.group(1) if found else None


def nvidia_driver(file: Path) -> int | None:
    """Major version of NVIDIA's kernel driver, from the file that it keeps under /proc; None without one."""
    try:
        found = re.search(r"Kernel Module[^\n]*?\s(\d{3,})\.\d", file.read_text())
    except OSError:
        return None
    return int(found.group(1)) if found else None
