"""The house rules of imports, held by a walk over the source: imports go only downward, packages on one level never import each
other, and certain libraries, unpickling and the process's own surroundings belong to one room each.

The checker is in the first half, the tests of the project and of the checker itself in the second.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "lora_dist"
ROOT = Path(__file__).resolve().parents[1]

LEVELS = {
    "config": 0, "arguments": 0, "state": 0, "log": 0, "process": 0, "gemm": 0,
    "blocks": 1,
    "adapter": 2, "models": 2, "data": 2, "pruning": 2, "parallel": 2, "monitor": 2, "generation": 2,
    "evaluation": 3,
    "engine": 4, "operations": 4,
    "cli": 5,
    "__main__": 6,  # the verb table stands on cli/
}  # fmt: skip

# Library -> rooms that may import it. A longer name overrules a shorter one: `accelerate.tracking` is not `accelerate`.
SOLE_IMPORTERS = {
    "accelerate": {"parallel"},
    "accelerate.tracking": {"parallel", "monitor"},
    "deepspeed": {"parallel"},
    "peft": {"adapter"},
    "bitsandbytes": {"models", "adapter", "parallel"},
    "datasets": {"data"},
    "onnx": {"models"},
    "onnxruntime": {"models"},
    "onnxscript": {"models"},
    "wandb": {"monitor"},
    "tensorboard": {"monitor"},
    "torch.utils.tensorboard": {"monitor"},
    "lm_eval": {"evaluation"},
}
# Library -> files that may import it: whatever runs code when it opens a file.
UNPICKLING_FILE = "models/legacy.py"
SOLE_FILES = {library: {UNPICKLING_FILE} for library in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")}
# Names of the process's surroundings -> rooms that may read them.
SURROUNDINGS = {
    **{f"os.{name}": {"cli", "__main__", "parallel"} for name in ("environ", "environb", "getenv", "putenv", "unsetenv")},
    "sys.argv": {"cli", "__main__"},
}


@dataclass(frozen=True)
class Import:
    """One imported name, absolute: `from ..blocks import mask` in adapter/ gives `lora_dist.blocks.mask`."""

    name: str
    line: int


def _imports(tree: ast.AST, package: list[str]) -> Iterator[Import]:
    """Yield everything imported anywhere in a file, also inside functions and under TYPE_CHECKING.

    Args:
        package: dotted parts of the package that the file is in, which relative imports start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield Import(".".join([*base, alias.name]), node.lineno)
        elif isinstance(node, ast.Call) and _dotted(node.func) in {"importlib.import_module", "import_module", "__import__"}:
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno)


def _dotted(node: ast.AST) -> str:
    """Return `a.b.c` for an attribute chain on a name, else an empty string."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Map local names to what they were imported as, so that `import os as o; o.environ` is seen."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                aliases[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return aliases


def _uses(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the dotted name of every use of an imported thing (`os.environ`), with aliases resolved."""
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and (dotted := _dotted(node)):
            head, _, rest = dotted.partition(".")
            if head in aliases:
                yield ".".join(filter(None, [aliases[head], rest])), node


def _covers(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def violations(package_dir: Path) -> list[str]:
    """Check every file of a package against the rules; one line a violation, `file:line: what and why`."""
    found = []
    for path in sorted(package_dir.rglob("*.py")):
        relative = path.relative_to(package_dir)
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        room = relative.parts[0].removesuffix(".py")
        label = relative.as_posix()
        if room != "__init__" and room not in LEVELS:
            found.append(f"{label}:1: {room} has no level; give it one in {Path(__file__).name} and in the design")
            continue
        package = [PACKAGE, *relative.parts[:-1]]
        found += [f"{label}:{line}: {what}" for line, what in sorted(set(_file_violations(tree, room, label, package)))]
    return found


def _file_violations(tree: ast.AST, room: str, label: str, package: list[str]) -> Iterator[tuple[int, str]]:
    for item in _imports(tree, package):
        if _covers(item.name, PACKAGE):
            yield from _house_violations(item, room)
            continue
        rule = max((rule for rule in SOLE_IMPORTERS if _covers(item.name, rule)), key=len, default=None)
        if rule and room not in SOLE_IMPORTERS[rule]:
            yield item.line, f"imports {rule}, which belongs to {' and '.join(sorted(SOLE_IMPORTERS[rule]))}"
        for library, files in SOLE_FILES.items():
            if _covers(item.name, library) and label not in files:
                yield item.line, f"imports {library}, which belongs to {' and '.join(sorted(files))}"
    for dotted, node in _uses(tree):
        for name, rooms in SURROUNDINGS.items():
            if _covers(dotted, name) and room not in rooms:
                yield node.lineno, f"uses {name}, which belongs to {', '.join(sorted(rooms))}"
    if label != UNPICKLING_FILE:
        for line in _unpickling(tree):
            yield line, f"opens a pickle, which belongs to {UNPICKLING_FILE}"


def _house_violations(item: Import, room: str) -> Iterator[tuple[int, str]]:
    if room == "__init__":
        return  # the facade may (lazily) offer anything
    target = item.name.split(".")[1] if "." in item.name else ""
    if target == "__version__" or target == room:
        return
    if target not in LEVELS:
        yield item.line, f"imports {item.name}: rooms import from rooms, not from the facade"
    elif LEVELS[target] > LEVELS[room]:
        yield item.line, f"imports {item.name}: upward, level {LEVELS[room]} to {LEVELS[target]}"
    elif LEVELS[target] == LEVELS[room]:
        yield item.line, f"imports {item.name}: {room} and {target} are on the same level, {LEVELS[room]}"


def _unpickling(tree: ast.AST) -> Iterator[int]:
    """Yield the lines of calls that unpickle: `torch.load(weights_only=...)` not literally True, `np.load(allow_pickle=...)`."""
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = _dotted(node.func).partition(".")
        function = ".".join(filter(None, [aliases.get(head, head), rest]))
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if function == "torch.load" and keyword.arg == "weights_only" and value is not True:
                yield node.lineno
            if function == "numpy.load" and keyword.arg == "allow_pickle" and value is not False:
                yield node.lineno


# --- the project --------------------------------------------------------------------------------------------------------------


def test_the_project_keeps_the_rules() -> None:
    found = violations(ROOT / PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_every_file_was_walked() -> None:
    """A checker that looks at nothing passes too."""
    rooms = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert {"blocks", "adapter", "engine", "cli"} <= rooms <= set(LEVELS)


HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "sklearn", "scipy.stats", "deepspeed", "wandb", "matplotlib")
HEAVY += ("torch._inductor.compile_fx",)


def _loads(code: str) -> set[str]:
    """Return which heavy libraries a fresh Python has loaded after running `code`."""
    probe = textwrap.dedent(code) + textwrap.dedent(
        f"""
        import sys
        print("LOADED", *(n for n in {HEAVY!r} if n in sys.modules))
        """
    )
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


def test_the_bare_package_loads_nothing_heavy() -> None:
    """`import lora_dist` is cheap; its public names load what they need when they are asked for."""
    assert _loads(f"import {PACKAGE}") == set()


def test_a_run_loads_what_it_needs_only() -> None:
    """bitsandbytes, which PEFT imports, hands functions to torch.compile; they are compiled where they are called, after its import too."""
    code = f"""
        import {PACKAGE}.engine.train, bitsandbytes, torch
        assert torch.compile.__module__ == "torch", torch.compile
        with {PACKAGE}._compile_when_called():
            doubled = torch.compile(lambda x: 2 * x, backend="eager")
        assert torch.compile.__module__ == "torch", torch.compile
        assert doubled(torch.ones(2)).tolist() == [2, 2] and doubled(torch.ones(2)).tolist() == [2, 2]
        """
    assert _loads(code) == {"torch", "transformers", "peft", "accelerate", "datasets"}


@pytest.mark.skipif(not (ROOT / PACKAGE / "__main__.py").exists(), reason="no command yet")
def test_help_loads_nothing_heavy() -> None:
    assert (
        _loads(
            f"""
            import runpy, sys
            sys.argv = ["lora-dist", "--help"]
            try:
                runpy.run_module("{PACKAGE}", run_name="__main__")
            except SystemExit as end:
                assert not end.code, end.code
            """
        )
        == set()
    )


def test_verbs_load_nothing_heavy_before_they_are_called() -> None:
    """`lora-dist VERB --help` answers at once: a verb imports what it works with inside its functions."""
    modules = [f"{PACKAGE}.cli.{path.stem}" for path in sorted((ROOT / PACKAGE / "cli").glob("[!_]*.py"))]
    assert _loads("\n".join(f"import {module}" for module in [f"{PACKAGE}.cli", *modules])) == set()


# --- the checker --------------------------------------------------------------------------------------------------------------


def _package(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    return tmp_path / PACKAGE


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("blocks/mask.py", "import lora_dist.adapter", "upward, level 1 to 2"),
        ("blocks/mask.py", "from lora_dist.engine.loop import run", "upward, level 1 to 4"),
        ("blocks/mask.py", "from ..engine import loop", "upward, level 1 to 4"),
        ("blocks/deep/mask.py", "from ...engine import loop", "upward, level 1 to 4"),
        ("blocks/mask.py", "from lora_dist import engine", "upward, level 1 to 4"),
        ("blocks/mask.py", "def f():\n    from lora_dist import engine", "upward, level 1 to 4"),
        ("blocks/mask.py", "import importlib\nimportlib.import_module('lora_dist.engine')", "upward, level 1 to 4"),
        ("adapter/layer.py", "from lora_dist.models import load", "adapter and models are on the same level, 2"),
        ("engine/loop.py", "import lora_dist.operations", "engine and operations are on the same level, 4"),
        ("config.py", "from lora_dist import log", "config and log are on the same level, 0"),
        ("cli/train.py", "from lora_dist.__main__ import main", "upward, level 5 to 6"),
        ("engine/loop.py", "from lora_dist import attach", "not from the facade"),
        ("helpers/odd.py", "", "helpers has no level"),
        ("engine/loop.py", "import accelerate", "imports accelerate, which belongs to parallel"),
        ("monitor/trackers.py", "from accelerate import Accelerator", "imports accelerate, which belongs to parallel"),
        ("engine/loop.py", "from accelerate.tracking import WandBTracker", "which belongs to monitor and parallel"),
        ("engine/loop.py", "from deepspeed.utils import logger", "imports deepspeed, which belongs to parallel"),
        ("engine/loop.py", "from peft import LoraConfig", "imports peft, which belongs to adapter"),
        ("data/text.py", "import bitsandbytes as bnb", "imports bitsandbytes, which belongs to adapter and models and parallel"),
        ("engine/loop.py", "import datasets", "imports datasets, which belongs to data"),
        ("cli/train.py", "import wandb", "imports wandb, which belongs to monitor"),
        ("cli/eval.py", "import lm_eval.tasks", "imports lm_eval, which belongs to evaluation"),
        ("__init__.py", "import peft", "imports peft, which belongs to adapter"),
        ("models/load.py", "import pickle", "imports pickle, which belongs to models/legacy.py"),
        ("data/text.py", "from dill import loads", "imports dill, which belongs to models/legacy.py"),
        ("models/load.py", "import torch\ntorch.load('f', weights_only=False)", "models/load.py:2: opens a pickle"),
        ("models/load.py", "import torch as t\nt.load('f', weights_only=flag)", "models/load.py:2: opens a pickle"),
        ("models/load.py", "from torch import load\nload('f', weights_only=False)", "models/load.py:2: opens a pickle"),
        ("data/text.py", "import numpy as np\nnp.load('f', allow_pickle=True)", "data/text.py:2: opens a pickle"),
        ("engine/loop.py", "import os\nrank = os.environ['RANK']", "engine/loop.py:2: uses os.environ"),
        ("engine/loop.py", "import os as o\no.environ.get('RANK')", "uses os.environ"),
        ("engine/loop.py", "from os import environ\nenviron['RANK']", "uses os.environ"),
        ("data/text.py", "import os\nos.getenv('HOME')", "uses os.getenv"),
        ("engine/loop.py", "import sys\nprint(sys.argv)", "uses sys.argv"),
        ("parallel/launch.py", "import sys\nprint(sys.argv)", "uses sys.argv"),
    ],
)  # fmt: skip
def test_a_violation_is_seen(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    found = violations(_package(tmp_path, {file: source}))
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "adapter/layer.py",
            "from lora_dist.blocks import mask\nfrom lora_dist.log import E\nfrom .config import C\nimport peft",
        ),
        ("adapter/layer.py", "import lora_dist.adapter.config\nfrom lora_dist import __version__"),
        ("adapter/deep/layer.py", "from ..config import C\nfrom ...blocks import mask"),
        ("__init__.py", "def __getattr__(name):\n    from lora_dist.engine import loop"),
        ("__main__.py", "import sys\nfrom lora_dist.cli import train\nsys.argv"),
        ("monitor/trackers.py", "import wandb\nfrom accelerate.tracking import WandBTracker"),
        ("parallel/launch.py", "import os\nimport accelerate, deepspeed\nos.environ['RANK']"),
        ("cli/train.py", "import os, sys\nos.environ, sys.argv\nfrom lora_dist.engine import loop"),
        ("models/load.py", "import torch\ntorch.load('f', weights_only=True)\nimport bitsandbytes"),
        ("models/legacy.py", "import pickle, torch\ntorch.load('f', weights_only=False)"),
        ("engine/loop.py", "import os, sys\nos.replace('a', 'b')\nsys.stdout\nenviron = {}\nenviron['A']"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    assert violations(_package(tmp_path, {file: source})) == []
