"""Options of every verb but train: name, type, default, help line and check, as in `config/`; one file a group of verbs.

Plain dataclasses without heavy imports, so that help and bad input are answered at once. Read by `cli/`, used by `engine/`.
"""

from lora_dist.arguments.adapters import AdaptersArgs
from lora_dist.arguments.classification import ClassifyArgs
from lora_dist.arguments.evaluation import EvalArgs
from lora_dist.arguments.generation import GenerateArgs, SamplingArgs
from lora_dist.arguments.hub import PushArgs
from lora_dist.arguments.models import ConvertArgs, ExportArgs, InspectArgs, MergeArgs, PruneArgs
from lora_dist.arguments.operations import DoctorArgs, RendezvousArgs, SubmitArgs
from lora_dist.arguments.planning import PlanArgs
from lora_dist.arguments.quantised import QuantisedArgs
from lora_dist.arguments.recipes import RecipeArgs
from lora_dist.arguments.watching import ReportArgs, WatchArgs

__all__ = [
    "AdaptersArgs",
    "ClassifyArgs",
    "ConvertArgs",
    "DoctorArgs",
    "EvalArgs",
    "ExportArgs",
    "GenerateArgs",
    "InspectArgs",
    "MergeArgs",
    "PlanArgs",
    "PruneArgs",
    "PushArgs",
    "QuantisedArgs",
    "RecipeArgs",
    "RendezvousArgs",
    "ReportArgs",
    "SamplingArgs",
    "SubmitArgs",
    "WatchArgs",
]
