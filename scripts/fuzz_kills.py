#!/usr/bin/env python
"""Kill a training run at random, again and again, and prove each time that nothing is lost: `make fuzz`.

    python scripts/fuzz_kills.py                                        # 200 kills, 50 of them inside a save; about 20 minutes
    python scripts/fuzz_kills.py --kills 12 --inside_save 4 --settings 1   # the short version of the tests
    python scripts/fuzz_kills.py --seed 7 --only_life 12                # one life again, as seed 7 drew it

A life is one run of a small pruned Llama on two processes (gloo): started, killed by SIGKILL, started again with `--resume auto`, and
so on until it completes. Its settings, and whom each kill hits when, are drawn from (seed, life, attempt):

    time             anywhere from the start of loading to the end
    save             so many ms after a save's staging folder appeared
    save operation   before the k-th file operation on checkpoints: the same number hits the same point of a save each time
    operation        before the k-th file operation of the whole run folder

Some attempts are asked to stop by a signal to one rank instead, and have to end with the exit code for it, no step lost.
Mostly both ranks die at once; where only one does, the other has to end by itself. After each kill every published checkpoint must
verify and none may be lost; the next attempt must go on from the newest; the completed run must equal one that was never killed, bit
for bit: losses, evaluations, final adapter, last checkpoint. A kill counts as inside a save only if the folder proves it.

Processes are real and run the command `lora-dist train`, but are forked from one that has imported everything (scripts/preloaded.py);
a share starts under torchrun instead. Exit code 1 at the first failure, with the command that repeats it; the folder is kept.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import random_llama
from fuzz_attempt import Attempt, ForkedRanks, HangError, Outcome, Torchrun, processes_of
from fuzz_checks import MOMENTS, RUNNING, Folder, damage, differences, last_step, moment, records, resumed_step, unfinished_save
from fuzz_plan import RANKS, Plan, Reference, Setting, draw_plan, draw_settings
from kill_moments import CHECKPOINT
from preloaded import Parent

from lora_dist.log import EXIT_STOPPED

MAX_KILLS_A_LIFE = 8
MAX_KILLS_TRAINED = 2
"""of them, once the last step is saved and only the end is left"""
WORKERS_END_S = 3
"""for processes of a killed rank, such as data workers, to end by themselves; torch's own watchdog would take 5"""


@dataclass
class Kill:
    """One kill and what came of it."""

    life: int
    attempt: int
    plan: str
    victims: tuple[int, ...]
    moment: str
    save: str | None
    """how far the save had come that it interrupted"""
    torchrun: bool
    steps_lost: int | None = None
    """None: killed while loading"""
    survivor_s: float | None = None
    """how long the other rank took to end"""
    next_step_s: float | None = None
    """from the restart to the next finished step; None: killed again before"""
    next_torchrun: bool = False


@dataclass
class Tally:
    """What has been done so far."""

    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    torchrun_starts: int = 0
    lives: int = 0
    stops_s: list[float] = field(default_factory=list)
    """from a signal that asks to stop to the end of all ranks"""

    @property
    def inside_save(self) -> int:
        return sum(kill.save is not None for kill in self.kills)


class FailureError(Exception):
    """Something was lost, or is not what the uninterrupted run has."""


class Fuzzer:
    """Lives one after the other. `close` ends every process.

    Args:
        out: folder to work in; that of a failed life is kept.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.tally = args, Path(args.out).resolve(), Tally()
        self.base = self.out / "base"
        self._settings = draw_settings(args.seed, args.settings, args.strategies.split(","), args.steps)
        self._references: dict[Setting, Reference] = {}
        self._parents: dict[bool, Parent] = {}
        self._start = time.monotonic()

    def close(self) -> None:
        for parent in self._parents.values():
            parent.close()

    def life(self, number: int) -> None:
        """One run from its first start to its end.

        Raises:
            FailureError: with what was found.
        """
        setting = random.Random(f"{self.args.seed}:{number}").choice(self._settings)
        reference = self._reference(setting)
        folder = self.out / f"life-{number}"
        run = folder / "run"
        run.mkdir(parents=True)
        kills: list[Kill] = []
        trained = 0
        say(f"life {number}: {setting}")
        for attempt in range(1, 100):
            before, began = Folder.look(run), time.monotonic()
            key = f"{self.args.seed}:{number}:{attempt}"
            trained += before.newest == setting.steps
            plan = draw_plan(
                key,
                reference,
                setting.steps,
                before.newest,
                torchrun_every=self.args.torchrun_every,
                stop_share=self.args.stop_share,
            )
            if len(kills) >= MAX_KILLS_A_LIFE or trained > MAX_KILLS_TRAINED:
                plan = Plan()
            outcome = self._attempt(setting, plan, before, folder / f"attempt-{attempt}")
            console = (folder / f"attempt-{attempt}.rank-0.txt").read_text(errors="replace")
            after = Folder.look(run)
            self._judge(before, after, plan, outcome, console)
            if kills and outcome.first_step_at is not None:
                kills[-1].next_step_s = outcome.first_step_at - began
                kills[-1].next_torchrun = plan.torchrun
            if outcome.killed_at is None or outcome.codes[0] == 0:  # rank 0 writes: what counts is how it ended
                break
            if plan.stop:
                self.tally.stops_s.append(outcome.ended_at - outcome.killed_at)
                say(f"    attempt {attempt}: {plan} -> stopped after {self.tally.stops_s[-1]:.1f} s, checkpoint {after.newest}")
                continue
            kills.append(self._note(number, attempt, setting, plan, outcome, before, after, console))
        else:
            raise FailureError("100 attempts did not complete the run")
        found = differences(reference.run, run)
        if found:
            raise FailureError("the completed run is not the uninterrupted one:\n    " + "\n    ".join(found))
        self.tally.lives += 1
        say(f"  completed after {len(kills)} kills: identical to the uninterrupted run")
        shutil.rmtree(folder)

    def _attempt(self, setting: Setting, plan: Plan, before: Folder, files: Path) -> Outcome:
        run = before.path
        argv = setting.argv(self.base, run)
        launch = Torchrun(argv, files) if plan.torchrun else ForkedRanks(self._parent(setting), argv, files, run, plan)
        self.tally.starts += 1
        self.tally.torchrun_starts += plan.torchrun
        try:
            outcome = Attempt(launch, run, files, plan, before.newest).run()
        except HangError as error:
            raise FailureError(str(error)) from error
        self._leave_nothing(launch.sessions)
        return outcome

    def _judge(self, before: Folder, after: Folder, plan: Plan, outcome: Outcome, console: str) -> None:
        """Raises FailureError for whatever this attempt must not have done."""
        found = damage(before, after, best_needed=True)
        if RUNNING in console and resumed_step(console) != before.newest:
            found.append(
                f"the attempt went on from step {resumed_step(console)}, the newest checkpoint was of step {before.newest}"
            )
        expected = [0] if outcome.killed_at is None else []
        for rank, code in enumerate(outcome.codes):
            killed = plan.torchrun or rank in plan.victims or outcome.ended_by_launcher
            allowed = expected or ([EXIT_STOPPED, 0] if plan.stop else [-signal.SIGKILL, 0] if killed else [0, 1])
            if code not in allowed:
                found.append(f"rank {rank} ended with exit code {code}, expected {' or '.join(map(str, allowed))}")
        if plan.stop and 0 not in outcome.codes and last_step(after.path) != after.newest:
            found.append(f"stopped after step {last_step(after.path)}, but the newest checkpoint is of step {after.newest}")
        if found:
            raise FailureError("\n    ".join(found))

    def _note(
        self, life: int, attempt: int, setting: Setting, plan: Plan, o: Outcome, before: Folder, after: Folder, console: str
    ) -> Kill:
        save = unfinished_save(before, after, setting.save_total_limit) if RUNNING in console and 0 in plan.victims else None
        kill = Kill(life, attempt, str(plan), plan.victims, moment(console, save is not None), save, plan.torchrun)
        if RUNNING in console:
            kill.steps_lost = max(0, last_step(after.path) - after.newest)
        if len(plan.victims) == 1 and o.killed_at is not None and not o.ended_by_launcher:
            kill.survivor_s = o.ended_at - o.killed_at
        self.tally.kills.append(kill)
        lost = "" if kill.steps_lost is None else f", {kill.steps_lost} steps lost"
        say(
            f"  {len(self.tally.kills):4d} kills {self.tally.inside_save:3d} inside a save | attempt {attempt}: {plan} -> {kill.moment}"
            f"{f' ({save})' if save else ''}, checkpoint {after.newest}{lost}"
        )
        return kill

    def _leave_nothing(self, sessions: list[int]) -> None:
        """Wait for processes that killed ranks left behind, such as data workers, to end by themselves."""
        deadline = time.monotonic() + WORKERS_END_S
        while left := processes_of(sessions):
            if time.monotonic() > deadline:
                raise FailureError(f"processes {left} still run {WORKERS_END_S} s after their ranks ended")
            time.sleep(0.2)

    def _parent(self, setting: Setting) -> Parent:
        zero = setting.strategy.startswith("zero")
        if zero not in self._parents:
            say(f"  importing {'DeepSpeed and ' if zero else ''}everything once")
            self._parents[zero] = Parent(["deepspeed"] if zero else [])
        return self._parents[zero]

    def _reference(self, setting: Setting) -> Reference:
        """The uninterrupted run, made at the setting's first use."""
        if setting in self._references:
            return self._references[setting]
        folder = self.out / f"reference-{len(self._references) + 1}"
        run, files = folder / "run", folder / "attempt-1"
        run.mkdir(parents=True)
        parent, plan, start = self._parent(setting), Plan(), time.monotonic()
        o = Attempt(ForkedRanks(parent, setting.argv(self.base, run), files, run, plan), run, files, plan).run()
        if o.codes != [0] * RANKS or o.training_at is None or o.last_step_at is None or not o.saves_s:
            raise FailureError(f"the uninterrupted run ended with {o.codes}; see {files}.rank-0.txt")
        operations = files.with_name(f"{files.name}.operations.txt").read_text().splitlines()
        reference = Reference(
            run=run,
            loading_s=o.training_at - start,
            step_s=(o.last_step_at - o.training_at) / setting.steps,
            end_s=o.ended_at - o.last_step_at,
            save_s=statistics.median(o.saves_s),
            saved_steps=tuple(sorted({row["step"] for row in records(run, "save")})),
            operations=len(operations),
            save_operations=sum(CHECKPOINT in line for line in operations) // len(o.saves_s),
        )
        say(
            f"  uninterrupted: {o.ended_at - start:.1f} s, {reference.loading_s:.1f} of them loading; {len(o.saves_s)} saves of "
            f"{1000 * reference.save_s:.0f} ms and {reference.save_operations} file operations each"
        )
        self._references[setting] = reference
        return reference

    def repeat(self, life: int) -> str:
        """The command that lives this life again."""
        a = self.args
        options = f"--seed {a.seed} --only_life {life} --settings {a.settings} --strategies {a.strategies} --steps {a.steps}"
        return f"{shlex.quote(sys.executable)} scripts/fuzz_kills.py {options} --torchrun_every {a.torchrun_every} --stop_share {a.stop_share}"

    def summary(self) -> str:
        """The table at the end."""
        t = self.tally
        moments = collections.Counter(kill.moment for kill in t.kills)
        stages = collections.Counter(kill.save for kill in t.kills if kill.save)
        victims = collections.Counter("both ranks" if len(k.victims) == 2 else f"rank {k.victims[0]}" for k in t.kills)
        lost = [kill.steps_lost for kill in t.kills if kill.steps_lost is not None]
        rows = [
            ("kills", f"{len(t.kills)} (seed {self.args.seed})"),
            *(
                (f"  {'while ' if name in MOMENTS[:1] else 'in ' if name in MOMENTS[1:3] else ''}{name}", moments[name])
                for name in MOMENTS
            ),
            *((f"    {stage}", count) for stage, count in stages.most_common()),
            *((f"  of {who}", count) for who, count in victims.most_common()),
            ("graceful stops beside them, no step lost", f"{len(t.stops_s)}"),
            ("  s from the signal to the end", _spread(t.stops_s, "{:.1f}")),
            ("starts, of them under torchrun", f"{t.starts}, {t.torchrun_starts}"),
            ("lives, each identical to the uninterrupted run", t.lives),
            ("steps lost a kill, median and most", _spread(lost, "{:.0f}")),
            ("s from a restart to the next step (forked)", _spread(self._restarts(False), "{:.1f}")),
            ("s from a restart to the next step (torchrun)", _spread(self._restarts(True), "{:.1f}")),
            ("s until the other rank has ended", _spread([k.survivor_s for k in t.kills if k.survivor_s is not None], "{:.1f}")),
            ("minutes", f"{(time.monotonic() - self._start) / 60:.1f}"),
        ]
        return "\n".join(f"{name:<48} {value}" for name, value in rows)

    def _restarts(self, torchrun: bool) -> list[float]:
        return [k.next_step_s for k in self.tally.kills if k.next_step_s is not None and k.next_torchrun == torchrun]


def _spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(statistics.median(values))}, {form.format(max(values))}" if values else "-"


def say(text: str) -> None:
    print(text, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="go on until so many (default %(default)s)")
    parser.add_argument("--inside_save", type=int, default=50, help="and so many inside a save (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of everything that is drawn (default: a new one, printed)")
    parser.add_argument("--only_life", type=int, default=None, help="live this life alone, as the seed draws it")
    parser.add_argument("--settings", type=int, default=8, help="different settings to draw lives from (default %(default)s)")
    parser.add_argument(
        "--strategies", default="ddp,ddp,fsdp2,ddp,ddp,zero2,ddp,fsdp2", help="of these settings, in turn (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a life (default %(default)s)")
    parser.add_argument(
        "--torchrun_every", type=int, default=20, help="one start in so many is torchrun's (default %(default)s; 0: none)"
    )
    parser.add_argument(
        "--stop_share", type=float, default=0.1, help="of attempts that get a signal to stop (default %(default)s)"
    )
    parser.add_argument("--out", default="out/fuzz", help="folder to work in; moved aside if it exists (default %(default)s)")
    args = parser.parse_args()
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(10**6)
    return args


def main() -> int:
    args = parse_arguments()
    fuzzer = Fuzzer(args)
    if fuzzer.out.exists():
        fuzzer.out.rename(fuzzer.out.with_name(f"{fuzzer.out.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))
    fuzzer.out.mkdir(parents=True)
    say(f"seed {args.seed}, in {fuzzer.out}")
    random_llama.make(fuzzer.base, "tiny", "float32")
    life, failed = args.only_life or 1, False
    try:
        while True:
            fuzzer.life(life)
            done = len(fuzzer.tally.kills) >= args.kills and fuzzer.tally.inside_save >= args.inside_save
            if done or args.only_life is not None:
                break
            life += 1
    except FailureError as error:
        failed = True
        say(f"\nFAILED in life {life}: {error}\n  kept: {fuzzer.out / f'life-{life}'}\n  again: {fuzzer.repeat(life)}")
    finally:
        fuzzer.close()
    say(f"\n{fuzzer.summary()}")
    report = {"seed": args.seed, "failed": failed, "kills": [asdict(kill) for kill in fuzzer.tally.kills]}
    (fuzzer.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
