"""Checks `hub` and `tracker`: can Hugging Face's hub and wandb be reached, and is there a login. Tokens are never shown.

Neither is needed to train on local directories, so nothing here fails.
"""

from __future__ import annotations

import netrc
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from lora_dist.log import UserError
from lora_dist.operations.doctor.context import Context
from lora_dist.operations.doctor.report import Finding, fail, ok, one_line, size_text, skip, time_text, warn

HUB = "https://huggingface.co"
WANDB = "https://api.wandb.ai"
TIMEOUT_S = 5.0
SLOW_S = 2.0
CLOCK_OFF_S = 120.0
REFUSED = (403, 407, 502, 503, 504)
"""answers of a proxy or firewall in between, or of a server that is down"""


@dataclass(frozen=True)
class Answer:
    time_s: float
    problem: str = ""
    """empty where the server answered"""
    clock_off_s: float = 0.0
    """how far this machine's clock is ahead of the server's"""


def ask(url: str, timeout_s: float = TIMEOUT_S) -> Answer:
    """One HEAD request, through the proxies of the environment. Gives up after `timeout_s`, also where names do not resolve."""
    answers: list[Answer] = []
    start = time.monotonic()

    def request() -> None:
        answers.append(_request(url, timeout_s, start))

    thread = threading.Thread(target=request, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else Answer(time.monotonic() - start, f"no answer within {timeout_s:g} s")


def _request(url: str, timeout_s: float, start: float) -> Answer:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s) as answer:
            status, date = answer.status, answer.headers.get("Date")
    except urllib.error.HTTPError as error:  # an answer too: a page may want a login, or be missing
        status, date = error.code, error.headers.get("Date")
    except (OSError, ValueError) as error:
        return Answer(time.monotonic() - start, _reason(error))
    time_s = time.monotonic() - start
    return Answer(time_s, f"status {status}" if status in REFUSED else "", _clock_off(date))


def _reason(error: Exception) -> str:
    """What the system says of a failed connection, without the wrapping."""
    inner = getattr(error, "reason", error)
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return one_line(inner, 120) if isinstance(inner, BaseException) else str(inner)


def _clock_off(date: str | None) -> float:
    try:
        return time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0
    except ValueError:
        return 0.0


def check_hub(context: Context) -> Generator[Finding, None, None]:
    reason = context.offline_reason
    if reason:
        yield skip("hub", f"not asked ({reason}): models and texts have to be local, or in the cache")
        return
    endpoint = (context.env.get("HF_ENDPOINT") or HUB).rstrip("/")
    answer, login = ask(endpoint), _hub_token(context.env)
    host = _host(endpoint)
    if answer.problem:
        yield warn(
            "hub", f"{host} cannot be reached ({answer.problem}), {login}",
            "use local directories and HF_HUB_OFFLINE=1, a mirror in HF_ENDPOINT, or a proxy in https_proxy",
        )  # fmt: skip
    elif answer.time_s > SLOW_S:
        yield warn(
            "hub",
            f"{host} takes {time_text(answer.time_s)} to answer, {login}",
            "download before the job: hf download MODEL, then HF_HUB_OFFLINE=1",
        )
    else:
        yield ok("hub", f"{host} answers in {time_text(answer.time_s)}, {login}")
    if abs(answer.clock_off_s) > CLOCK_OFF_S:
        way = "ahead of" if answer.clock_off_s > 0 else "behind"
        yield warn(
            "clock",
            f"{time_text(abs(answer.clock_off_s))} {way} {host}'s",
            "timedatectl set-ntp true; certificates and Slurm's end times depend on it",
        )


def _host(url: str) -> str:
    """Host and port; an address may hold a login."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    return (parts.hostname or url) + (f":{parts.port}" if parts.port else "")


def _hub_token(env: Mapping[str, str]) -> str:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if env.get(name):
            return f"token in {name}"
    cache = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    file = Path(env.get("HF_TOKEN_PATH") or Path(env.get("HF_HOME") or cache) / "token")
    return "token in its file" if file.is_file() and file.stat().st_size else "no token"


def check_tracker(context: Context) -> Generator[Finding, None, None]:
    env = context.env
    mode = env.get("WANDB_MODE", "").lower()
    if find_spec("wandb") is None:
        yield skip("tracker", "wandb is not installed, metrics.jsonl is written anyway", "pip install 'lora-dist[trackers]'")
    elif mode in ("offline", "dryrun"):
        yield ok("tracker", f"wandb, WANDB_MODE={mode}: runs stay in the run folder until `wandb sync`")
    elif mode == "disabled" or context.args.offline:
        yield skip("tracker", f"wandb, not asked ({'--offline' if context.args.offline else 'WANDB_MODE=disabled'})")
    else:
        yield _wandb(env)


def _wandb(env: Mapping[str, str]) -> Finding:
    url = (env.get("WANDB_BASE_URL") or WANDB).rstrip("/")
    host, answer, login = _host(url), ask(url), _wandb_login(env, url)
    offline = "--tracker.wandb_mode offline (or WANDB_MODE=offline), and `wandb sync` later"
    if answer.problem:
        return warn("tracker", f"wandb: {host} cannot be reached ({answer.problem}), {login or 'not logged in'}", offline)
    if not login:
        return warn(
            "tracker", f"wandb: {host} answers in {time_text(answer.time_s)}, not logged in", f"wandb login, or {offline}"
        )
    return ok("tracker", f"wandb: {host} answers in {time_text(answer.time_s)}, {login}")


def _wandb_login(env: Mapping[str, str], url: str) -> str:
    if env.get("WANDB_API_KEY"):
        return "key in WANDB_API_KEY"
    file = Path(env.get("NETRC") or Path.home() / ".netrc")
    try:
        return f"key in {file.name}" if netrc.netrc(str(file)).authenticators(urlsplit(url).hostname or "") else ""
    except (OSError, netrc.NetrcParseError):
        return ""


def check_model(context: Context) -> Generator[Finding, None, None]:
    """Check `model`: the configuration can be read, the weights are there, and what is trained of it."""
    name = context.args.model
    if not name:
        yield skip("model", "none given", "--model DIR for the size of its checkpoints")
        return
    try:
        facts = context.model
    except UserError as error:
        reason = context.offline_reason
        not_asked = f", or download it before: hf download MODEL (the hub is not asked: {reason})" if reason else ""
        yield fail("model", error.problems[0], f"give the directory of a model: config.json and model.safetensors{not_asked}")
        return
    stored = f" in {size_text(facts.stored_bytes)}" if facts.stored_bytes else ""
    size, _ = context.checkpoint
    text = (
        f"{facts.parameters:,} parameters{stored}, {facts.linears} linears; r {context.args.r}: {facts.adapter_elements:,} trained, "
        f"a checkpoint has {size_text(size)}"
    )
    yield ok("model", text)
