"""The run folder's part in setting a run up: what it goes on from, and, once all else is checked, taking the folder.

Called by `engine/setup.py`. Nothing but a lock is written before `claim`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lora_dist.config import RunConfig
from lora_dist.engine.attempts import Attempt, attempt_log, note_refusal
from lora_dist.engine.folder import FolderPlan, check_folder, claim_folder, wait_for_folder
from lora_dist.engine.held import HeldFolder
from lora_dist.log import UserError
from lora_dist.monitor.console import Console
from lora_dist.monitor.metrics import MetricsFile
from lora_dist.parallel import World
from lora_dist.parallel.slurm import job_ids
from lora_dist.state import LOG, METRICS


class Opening:
    """Collective: making one decides where the run goes on from, after waiting for the attempt before it.

    Attributes:
        plan: on every rank.
        folder, attempt: on rank 0, after `claim`.

    Raises:
        UserError: on every rank.
    """

    def __init__(self, config: RunConfig, world: World, console: Console):
        self._config, self._world, self._console = config, world, console
        self._lock: IO[str] | None = None
        self.folder: HeldFolder | None = None
        self.attempt: Attempt | None = None
        self.run_id, self.attempt_number = "", 0
        self.plan: FolderPlan = world.on_main(self._decide)
        self.metrics = MetricsFile(self.plan.folder / METRICS)

    def _decide(self) -> FolderPlan:
        train = self._config.train
        folder, resume = Path(train.output_dir), train.resume_from_checkpoint
        self._lock = wait_for_folder(folder, resume=resume, timeout_s=train.lock_timeout_s, note=self._console.note)
        needs_best = train.load_best_model_at_end and train.eval_strategy != "no"
        try:
            return check_folder(folder, resume=resume, overwrite=train.overwrite_output_dir, needs_best=needs_best)
        except UserError as error:
            if resume == "auto":
                note_refusal(folder, error.problems[0], exit_code=2)
            self.close()
            raise

    def refuse(self, error: BaseException) -> None:
        """The run is not to be: say so in its status, if this start was to go on with it, and let go of the folder."""
        if self._lock is not None and self.plan.own and self.attempt is None and isinstance(error, Exception):
            code = 2 if isinstance(error, UserError) else 1
            note_refusal(self.plan.folder, (str(error).splitlines() or [type(error).__name__])[0], exit_code=code)
        self.close()

    def close(self) -> None:
        """Let go of the folder, for a run that is not to be."""
        if self._lock is not None:
            self._lock.close()
        if self.folder is not None:
            self.folder.close()

    def claim(self, argv: Sequence[str], *, first_step: int, total_steps: int, resumed: bool) -> None:
        """Collective: take the folder, open its logs and the record of this attempt.

        Raises:
            UserError: on every rank.
        """

        def take() -> tuple[str, int]:
            config = dataclasses.asdict(self._config)
            claim = claim_folder(self.plan, config, self._console.note, self._lock)
            self.folder = claim.folder
            self.metrics.drop_after(first_step if resumed else -1)
            self.attempt = Attempt.begin(
                claim.folder,
                claim.attempt,
                config,
                processes=self._world.size,
                argv=argv,
                first_step=first_step,
                total_steps=total_steps,
                job=job_ids(),
                versions=versions(),
            )
            return claim.folder.run_id, claim.attempt

        self.run_id, self.attempt_number = self._world.on_main(take)
        self._console.open_log(self.plan.folder / LOG, attempt_log(self.plan.folder, self.attempt_number))


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors", "lora_dist")}
