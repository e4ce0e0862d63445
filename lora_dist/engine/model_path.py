"""What a path that workflow W2 calls a model means: a model directory, a run folder with one in it, or a pickle.

Called by `report.py`.
"""

from __future__ import annotations

from pathlib import Path

from lora_dist.engine.convert import converted
from lora_dist.log import UserError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def model_directory(
    path: str, *, trust_pickle: bool = False, config_name: str | None = None, fallback: Path | None = None
) -> str:
    """The model directory that a path means; a hub name as it is. A pickle is converted, unless that has been done before.

    Args:
        trust_pickle: open a pickle whatever classes it names.
        config_name: where a pickle's configuration comes from, if it has none.
        fallback: folder to convert to, if the pickle's own cannot be written.

    Raises:
        UserError: a folder without a model or with several; a pickle that is not harmless, or holds no model.
    """
    where = Path(path).expanduser()
    if where.is_file():
        return str(converted(where, fallback=fallback, trust_pickle=trust_pickle, config_name=config_name))
    if not where.is_dir() or (where / "config.json").is_file():
        return path  # loading says what is wrong with it, if anything is
    found = sorted(folder for folder in where.iterdir() if not folder.name.startswith(".") and _is_model(folder))
    if len(found) == 1:
        return str(found[0])
    if found:
        raise UserError(f"MODEL: {path} holds {', '.join(folder.name for folder in found)}, expected one of these to be named")
    if (where / "adapter_config.json").is_file():
        raise UserError(f"MODEL: {path} is an adapter, expected the model that it was trained on, and --adapter {path}")
    pickles = sorted(file.name for file in where.glob("*.bin"))
    hint = f": name the pickle, {where / pickles[0]}" if pickles else ""
    raise UserError(f"MODEL: {path} holds no model, expected config.json and weights in it or in a folder of it{hint}")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
