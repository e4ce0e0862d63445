"""Options of `push`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class PushArgs:
    """Upload an adapter or a model to the Hugging Face Hub, with a model card, in one commit."""

    folder: str = ""
    """What train, merge, prune or export wrote; of a run folder its final adapter, no checkpoints and no logs."""
    hub_model_id: str = ""
    """Repository, OWNER/NAME; it is made if it is not there."""
    hub_private: bool = False
    """Make a new repository private, and refuse one that is public."""
    base_model: str | None = None
    """Name of the base on the hub, for the card and adapter_config.json, where the adapter was trained on a local folder."""
    revision: str | None = None
    """Branch to commit to; default: the main one."""
    commit_message: str = "Upload with lora_dist"
    """Title of the commit."""
    dry_run: bool = False
    """Show files, sizes and card, and upload nothing; needs no network and no token."""

    def problems(self) -> Iterator[str]:
        if not self.folder:
            yield "FOLDER: found nothing, expected lora-dist push FOLDER --hub_model_id OWNER/NAME"
        if not self.hub_model_id:
            yield "hub_model_id: found nothing, expected OWNER/NAME"
