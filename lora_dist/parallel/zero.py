"""Strategies `zero1`, `zero2`, `zero3`: DeepSpeed's engine, its optimizer state, gradients and base sharded, or offloaded.

The engine runs in float32 mode with torch's AdamW: the frozen base keeps the half precision it was loaded in, adapter and gradients
are float32, and the loss scale of fp16 is handed to the engine step by step, so precision, clipping and skipped steps mean what they
mean under the other strategies. The engine averages gradients over processes; the loss is multiplied by their number.

Traps that shape this file (deepspeed 0.19): `safe_set_full_fp32_param` leaves working copies stale until the next step; optimizer
state does not exist before a first step; the `step` counter inside torch's AdamW is nobody's but the caller's.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_dist.blocks import Piece
from lora_dist.log import UserError
from lora_dist.parallel.heap import return_freed_memory
from lora_dist.parallel.launch import World, name_ranks
from lora_dist.parallel.loss_scale import LossScale
from lora_dist.parallel.optimizers import AdamWArgs, make_optimizer, set_rate
from lora_dist.parallel.strategy import Reader, Strategy, StrategyError, Update, check_optimizer_tensors, plain_name

MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(world: World) -> Any:
    """DeepSpeed, told which device it works on before it looks for one itself, and joined to torch's process group."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    name_ranks(world)  # zero.Init reads them
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # Its collectives have names that torch 2.13 gave others; users can do nothing about it.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    # Its shared-memory collectives for CPUs would be compiled at the first start, for minutes, where there is a compiler at all.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


def check_config(world: World, config: dict[str, Any], name: str) -> None:
    """Let DeepSpeed itself read a configuration, before anything is loaded.

    Args:
        name: where it is from, for the message.

    Raises:
        UserError: what DeepSpeed says of a key or value that it does not take.
    """
    deepspeed = import_deepspeed(world)
    with _refused(name):
        deepspeed.DeepSpeedConfig(copy.deepcopy(config))
    if config["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme":
        _check_nvme(Path(config["zero_optimization"]["offload_optimizer"]["nvme_path"]))


def _check_nvme(folder: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not folder.is_dir():
        raise UserError(f"parallel.nvme_path: found no folder {folder}, expected one on a fast local disk")
    if shutil.which("c++") is None or not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "parallel.offload_optimizer: found nvme, but DeepSpeed cannot compile its file access here: install a C++ compiler and "
            "libaio (Debian: apt-get install g++ libaio-dev)"
        )


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """What DeepSpeed raises within the block is a user's mistake in the configuration called `name`."""
    try:
        yield
    except (ValueError, AssertionError, TypeError, KeyError, NotImplementedError, ImportError) as error:
        raise UserError(
            f"parallel.ds_config: {name}: DeepSpeed does not take it ({' '.join(str(error).split())[:300]})"
        ) from error
    except Exception as error:
        if type(error).__name__ != "DeepSpeedConfigError":
            raise
        raise UserError(
            f"parallel.ds_config: {name}: DeepSpeed does not take it ({' '.join(str(error).split())[:300]})"
        ) from error


def _without_pinning(config: dict[str, Any]) -> None:
    """Page-locked memory is for copies to a GPU; without one, DeepSpeed would compile an extension to no purpose."""
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(config["zero_optimization"].get(key), dict):
            config["zero_optimization"][key]["pin_memory"] = False


def _limit_gathered(zero: dict[str, Any], model: nn.Module, device: torch.device) -> None:
    """How much of the base may stay gathered, where the JSON does not say: nothing that was used, and about a decoder layer that is
    fetched ahead; on CPUs, whose cores do the fetching, nothing. By DeepSpeed's own limits, 1e9 parameters each, a process holds all
    of a base of that size beside its shards."""
    hidden = getattr(getattr(model, "config", None), "hidden_size", 1024)
    zero.setdefault("stage3_max_live_parameters", 0 if device.type == "cpu" else 12 * hidden * hidden)
    zero.setdefault("stage3_max_reuse_distance", 0)


class Zero(Strategy):
    """A model driven by DeepSpeed's engine.

    Args:
        model: the PEFT model; for stage 3 its base may be in placeholders (`models/streaming.py`).
        config: complete, from `ds_config.zero_config`.
        reader: reads the weights of a base in placeholders; None where the base is whole already. Stage 3 only.
        prime: a forward pass that costs little, returning a loss.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        stage: int,
        config: dict[str, Any],
        reader: Reader | None,
        adamw: AdamWArgs,
        max_grad_norm: float = 0.0,
        loss_scale: LossScale | None = None,
        prime: Callable[[nn.Module], Tensor],
    ):
        """Collective."""
        super().__init__(world, max_grad_norm=max_grad_norm, loss_scale=loss_scale)
        self.stage, self.name, self.sharded_base = stage, f"zero{stage}", stage == 3
        self._prime = prime
        self.shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        deepspeed = import_deepspeed(world)
        if world.device.type == "cpu":
            _without_pinning(config)
        if stage == 3:
            return_freed_memory(world.device)
            _limit_gathered(config["zero_optimization"], model, world.device)
            self._partition(deepspeed, model, config, reader)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._adamw, optimizer = adamw, make_optimizer(trainable, adamw)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        self.model, self.module = model, self.engine  # its forward pass tells the parameters that they may be gathered
        self.trainable = trainable
        self._bad: dict[str, Tensor] = {}
        for name, parameter in trainable.items():
            parameter.register_hook(self._note_non_finite(name))

    def _partition(
        self,
        deepspeed: Any,
        model: nn.Module,
        config: dict[str, Any],
        reader: Reader | None,
    ) -> None:
        """Cut the parameters module by module, so that only one of them is ever whole. Rank 0 reads, the others get it by broadcast."""
        for prefix, part in model.named_modules():
            own = dict(part.named_parameters(recurse=False))
            if not own:
                continue
            for key, parameter in own.items():
                name = plain_name(f"{prefix}.{key}")
                if parameter.requires_grad and not parameter.is_contiguous():  # a placeholder that nothing is read into
                    parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                if reader is None or name not in reader or hasattr(parameter, "ds_id"):
                    continue
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                if self.world.is_main:
                    whole.copy_(reader.whole(name))
                parameter.data = whole
            with torch.no_grad():
                deepspeed.zero.Init(module=part, config_dict_or_path=config)

    def _note_non_finite(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            bad = ~torch.isfinite(gradient).all()
            self._bad[name] = self._bad[name] | bad if name in self._bad else bad

        return hook

    def zero_grad(self) -> None:
        """The engine does it after every step."""
        self._bad.clear()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self.loss_scale is not None:
            self.engine.optimizer.override_loss_scale(self.loss_scale.scale)
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def update(self, rate: float) -> Update:
        set_rate(self.engine.optimizer, rate)
        self.engine.step()
        overflow = bool(self.engine.optimizer.overflow)
        if self.loss_scale is not None:
            self.loss_scale.update(overflow=overflow)
        norm = self.engine.get_global_grad_norm()
        return Update(not overflow, float("inf") if overflow else float(norm))

    def discard(self) -> None:
        """The engine has one way to drop what it has reduced and kept: a step whose gradient norm is not finite. This makes it so."""
        optimizer, nan = self.engine.optimizer, float("nan")
        if self.stage == 3:
            self._spoil_own_partition(nan)
        elif optimizer.cpu_offload:
            for key in optimizer.norm_for_param_grads:
                optimizer.norm_for_param_grads[key] = torch.tensor(nan)
        else:
            for gradients in optimizer.averaged_gradients.values():
                for gradient in gradients or ():
                    gradient.fill_(nan)
        self.engine.step()
        if not optimizer.overflow:
            raise RuntimeError(f"{self.name}: the engine has taken a step that was to be dropped")

    def _spoil_own_partition(self, value: float) -> None:
        """Stage 3: write into the first parameter of which this process holds elements, and no padding, which is never written again."""
        from deepspeed.utils import safe_set_local_grad

        for parameter in self.trainable.values():
            if self.piece(parameter).tensor.numel():
                spoilt = torch.zeros(parameter.ds_tensor.numel(), device=self.world.device)  # type: ignore[attr-defined]
                spoilt[0] = value
                safe_set_local_grad(parameter, spoilt)
                return

    def own_gradients_finite(self) -> bool:
        return not self.non_finite()

    def non_finite(self) -> list[str]:
        return [name for name, bad in self._bad.items() if bool(bad)]

    def trainable_tensors(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return self._gathered(safe_get_full_fp32_param)

    def _gathered(self, get: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        full = {}
        for name, parameter in self.trainable.items():
            whole = get(parameter)
            if self.world.is_main:
                full[name] = whole.detach().view(self.shapes[name]).to("cpu", copy=True).contiguous()
        return full

    @torch.no_grad()
    def load_trainable(self, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        deepspeed = import_deepspeed(self.world)
        if self.stage == 3:
            self.engine.empty_partition_cache()  # an evaluation leaves behind what it fetched ahead for a backward pass; none came
        for name, parameter in self.trainable.items():
            full = tensors[name].to(self.world.device)
            safe_set_full_fp32_param(parameter, full)
            if self.stage == 3:  # the working copies; modified on rank 0, cut anew from there
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.world.is_main:
                        parameter.copy_(full)
            else:
                parameter.copy_(full)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = self._step_counters()
        if not steps:
            return {}
        found: dict[str, Tensor] = {}
        for key in MOMENTS:
            part = self._gathered(partial(safe_get_full_optimizer_state, optim_state_key=key))
            found |= {f"{name}.{key}": tensor for name, tensor in part.items()}
        if self.world.is_main:
            found |= {f"{name}.step": steps[0].detach().to("cpu", torch.float32, copy=True) for name in self.trainable}
        return found

    def _step_counters(self) -> list[Tensor]:
        return [state["step"] for state in self.engine.optimizer.optimizer.state.values() if "step" in state]

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        state = check_optimizer_tensors(self.shapes, tensors, self._adamw)
        if not state:
            return
        self._take_empty_step()
        for name, parameter in self.trainable.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[name][key].to(self.world.device), key)
        step = float(next(iter(state.values()))["step"])
        for counter in self._step_counters():
            counter.fill_(step)

    def _take_empty_step(self) -> None:
        """Make the optimizer's state: a step of rate 0 and gradient 0, which moves nothing."""
        self.zero_grad()
        self.backward(self._prime(self.module) * 0.0, last=True)
        scale, self.loss_scale = self.loss_scale, None
        self.update(0.0)
        self.loss_scale = scale
        self.zero_grad()

    def piece(self, parameter: nn.Parameter) -> Piece:
        if self.stage != 3:
            return Piece.whole(parameter)
        part: Any = parameter
        start = part.ds_tensor.ds_numel * self.world.rank
        inside = max(0, min(part.ds_tensor.ds_numel, part.ds_numel - start))  # the last pieces may end in padding
        return Piece(part.ds_tensor.detach().view(-1)[:inside], tuple(part.ds_shape), start)

    def trainable_elements(self) -> int:
        optimizer = self.engine.optimizer
        flats = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        return sum(flat.numel() for flat in flats)

    def check_in_force(self) -> None:
        from deepspeed import DeepSpeedEngine
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        wanted = DeepSpeedZeroOptimizer_Stage3 if self.stage == 3 else DeepSpeedZeroOptimizer
        if not isinstance(self.engine, DeepSpeedEngine) or not isinstance(self.engine.optimizer, wanted):
            raise StrategyError(
                f"parallel.strategy: asked for {self.name}, but the optimizer is {type(self.engine.optimizer).__name__}"
            )
        if self.engine.zero_optimization_stage() != self.stage:
            raise StrategyError(
                f"parallel.strategy: asked for {self.name}, but the engine's stage is {self.engine.zero_optimization_stage()}"
            )
        if self.engine.dp_world_size != self.world.size:
            raise StrategyError(
                f"parallel.strategy: asked for {self.world.size} processes, but the engine sees {self.engine.dp_world_size}"
            )
        if self.stage == 3:
            whole = [n for n, p in self.model.named_parameters() if not hasattr(p, "ds_tensor")]
            if whole:
                raise StrategyError(f"parallel.strategy: asked for zero3, but {whole[0]} is not cut ({len(whole)} such)")
