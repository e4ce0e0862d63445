"""accelerate's own idea of this process, which its trackers ask for before they log. Called by `engine/tracking.py`."""

from __future__ import annotations

from lora_dist.parallel.launch import World


def prepare_accelerate(world: World) -> None:
    """Tell accelerate which process this is: it takes over the process group that there is. No collective."""
    from accelerate.state import PartialState

    PartialState(cpu=world.device.type == "cpu")
