"""`lora-dist push FOLDER --hub_model_id OWNER/NAME`."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dist.arguments import PushArgs
from lora_dist.cli.options import Verb, parse


def main(argv: Sequence[str]) -> int:
    args = parse(PushArgs, argv, Verb("lora-dist push", PushArgs.__doc__ or "", positionals=("folder",)))
    from lora_dist.engine.push import CARD, plan_push, push

    plan = plan_push(args)
    sizes = {name: plan.size(name) for name in plan.files}
    visibility = "private" if args.hub_private else "public, if it is new"
    verb = "Would upload" if args.dry_run else "Uploading"
    print(f"{verb} {len(sizes)} files, {_size(sum(sizes.values()))}, from {plan.folder} to {plan.repo_id} ({visibility})")
    width = max(map(len, sizes))
    for name, size in sizes.items():
        print(f"  {name:<{width}}  {_size(size):>10}")
    for note in plan.notes:
        print(f"note: {note}")
    if args.dry_run:
        content = plan.files[CARD]
        text = content if isinstance(content, bytes) else content.read_bytes()
        print(f"\n--- {CARD}\n{text.decode('utf-8', 'replace')}", end="")
        return 0
    print(f"✅ Pushed: {push(args)}")
    return 0


def _size(size: int) -> str:
    return f"{size:,} B" if size < 1024 else f"{size / 1024:,.1f} KiB" if size < 2**20 else f"{size / 2**20:,.1f} MiB"
