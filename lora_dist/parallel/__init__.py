"""Launch environment, collectives and strategies."""

from lora_dist.parallel.launch import SideStore, World, close_world, init_world, launcher_restarts, lost_process, side_store
from lora_dist.parallel.launcher_env import launch_problems
from lora_dist.parallel.loss_scale import LossScale
from lora_dist.parallel.optimizers import AdamWArgs
from lora_dist.parallel.peers import notice_lost_peers
from lora_dist.parallel.replicated import Replicated
from lora_dist.parallel.strategy import Placement, Reader, Strategy, StrategyError, Update, plain_name

__all__ = [
    "AdamWArgs",
    "LossScale",
    "Placement",
    "Reader",
    "Replicated",
    "SideStore",
    "Strategy",
    "StrategyError",
    "Update",
    "World",
    "close_world",
    "init_world",
    "launch_problems",
    "launcher_restarts",
    "lost_process",
    "notice_lost_peers",
    "plain_name",
    "side_store",
]
