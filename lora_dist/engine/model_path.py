"""What a path that workflow W2 calls a model means: a model directory, a run folder with one in it, or a pickle.

Called by `scripts/run_evaluation.py`.
"""

from __future__ import annotations

from pathlib import Path

from lora_dist.log import UserError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def model_directory(path: str) -> str:
    """The model directory that a path means; a hub name as it is.

    Raises:
        UserError: nothing there, a folder without a model or with several, or a pickle.
    """
    where = Path(path).expanduser()
    if where.is_file():
        raise UserError(f"model_path: {path} is a file, expected a model directory: make one of a pickle with lora-dist convert")
    if not where.is_dir() or (where / "config.json").is_file():
        return path  # loading says what is wrong with it, if anything is
    found = sorted(folder for folder in where.iterdir() if not folder.name.startswith(".") and _is_model(folder))
    if len(found) == 1:
        return str(found[0])
    if found:
        raise UserError(
            f"model_path: {path} holds {', '.join(folder.name for folder in found)}, expected one of these to be named"
        )
    if (where / "adapter_config.json").is_file():
        raise UserError(f"model_path: {path} is an adapter, expected the model that it was trained on, and --adapter {path}")
    pickles = sorted(file.name for file in where.glob("*.bin"))
    hint = f": make one of {pickles[0]} with lora-dist convert" if pickles else ""
    raise UserError(f"model_path: {path} holds no model, expected config.json and weights in it or in a folder of it{hint}")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
