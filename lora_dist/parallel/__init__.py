"""Launch environment, collectives and strategies."""

from lora_dist.parallel.launch import World, close_world, init_world
from lora_dist.parallel.replicated import Replicated

__all__ = ["Replicated", "World", "close_world", "init_world"]
