"""The one declaration of every training option: name, type, default, help line and check.

Names follow transformers' `TrainingArguments` and peft's `LoraConfig` where they have one. Read by `cli/options.py` (defaults <
YAML < dotted command line) and by `engine/setup.py`, which hands plain values on: no room below sees these classes.
"""

from lora_dist.config.checks import seconds
from lora_dist.config.data import DataArgs
from lora_dist.config.model import AdapterArgs, ModelArgs
from lora_dist.config.parallel import ParallelArgs
from lora_dist.config.run import RunConfig
from lora_dist.config.train import TrainArgs, steps_of, weights_of
from lora_dist.config.watching import GuardArgs, HealthArgs, TrackerArgs

__all__ = [
    "AdapterArgs",
    "DataArgs",
    "GuardArgs",
    "HealthArgs",
    "ModelArgs",
    "ParallelArgs",
    "RunConfig",
    "TrackerArgs",
    "TrainArgs",
    "seconds",
    "steps_of",
    "weights_of",
]
