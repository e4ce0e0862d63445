"""`lora-dist push`, and what train does with `train.push_to_hub`: which files of a folder go to the hub, and the card beside them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_dist.adapter import ADAPTER_CONFIG, adapter_folder
from lora_dist.arguments import PushArgs
from lora_dist.config import RunConfig
from lora_dist.engine.card import gather_facts, model_card
from lora_dist.log import UserError
from lora_dist.models.publish import check_name, open_repo, upload

CARD = "README.md"
_KEY = "hub_model_id"
_PUBLISHED = (
    "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.onnx", "*.onnx.data", "*.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
_OWN_RECORDS = {"run.json", "status.json", "merge.json", "pruning.json", "export.json", "convert.json", "training_log.txt"}
"""they name paths of this machine; what they say is in the card"""


@dataclass(frozen=True)
class Plan:
    """What would be uploaded."""

    folder: Path
    repo_id: str
    files: dict[str, Path | bytes]
    """by path in the repository"""
    notes: tuple[str, ...]

    def size(self, name: str) -> int:
        """Bytes."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def plan_push(args: PushArgs) -> Plan:
    """Which files, and their card; touches nothing and needs no network.

    Raises:
        UserError: a folder without adapter or model, or a name that no repository can have.
    """
    check_name(args.hub_model_id, _KEY)
    folder = adapter_folder(args.folder)
    if not folder.is_dir():
        raise UserError(f"FOLDER: found no directory {args.folder}, expected what train, merge, prune or export wrote")
    facts = gather_facts(folder, args.base_model)
    files: dict[str, Path | bytes] = {}
    for pattern in _PUBLISHED:
        files |= {path.name: path for path in sorted(folder.glob(pattern)) if path.is_file() and path.name not in _OWN_RECORDS}
    notes = []
    if ADAPTER_CONFIG in files:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if args.base_model is not None:
            config["base_model_name_or_path"] = args.base_model
        elif not facts.base_on_hub:
            config["base_model_name_or_path"] = facts.base
            notes.append(
                f"the base is a local folder, named {facts.base} in the upload: give its name on the hub as --base_model"
            )
        files[ADAPTER_CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    if CARD in files:
        notes.append(f"{CARD} is taken from the folder")
    else:
        files[CARD] = model_card(facts, args.hub_model_id).encode()
    return Plan(folder, args.hub_model_id, dict(sorted(files.items())), tuple(notes))


def push(args: PushArgs) -> str:
    """Upload. Returns the commit's address.

    Raises:
        UserError: bad input, no permission, or an upload that was broken off; the same command goes on with it.
    """
    plan = plan_push(args)
    repo_id = open_repo(args.hub_model_id, private=args.hub_private, key=_KEY)
    return upload(
        plan.files,
        repo_id,
        message=args.commit_message,
        key=_KEY,
        revision=args.revision,
        again=command(args),
    )


def command(args: PushArgs) -> str:
    """The command line that does the same."""
    words = ["lora-dist", "push", args.folder, "--hub_model_id", args.hub_model_id]
    words += ["--hub_private"] if args.hub_private else []
    words += ["--base_model", args.base_model] if args.base_model else []
    words += ["--revision", args.revision] if args.revision else []
    return shlex.join(words)


def push_args(config: RunConfig) -> PushArgs:
    """Of a run that ends with a push."""
    train = config.train
    name = train.hub_model_id or Path(train.output_dir).resolve().name
    return PushArgs(
        folder=str(Path(train.output_dir) / train.adapter_subfolder), hub_model_id=name, hub_private=train.hub_private
    )


def require_hub(config: RunConfig) -> None:
    """Before a run: the repository can be written to. Raises UserError naming train.hub_model_id."""
    args = push_args(config)
    check_name(args.hub_model_id, "train.hub_model_id")
    open_repo(args.hub_model_id, private=args.hub_private, key="train.hub_model_id")


def push_final(config: RunConfig, say: Callable[[str], None]) -> bool:
    """Behind a complete run: whether its adapter is on the hub; if not, it is kept, and the command to try again is said."""
    args = push_args(config)
    try:
        say(f"Pushed to {push(args)}")
    except UserError as error:
        say(f"the adapter is complete in {args.folder}, but it could not be pushed ({error}); try again: {command(args)}")
        return False
    return True
