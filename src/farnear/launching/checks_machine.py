"""The doctor's checks of what is built in and installed: packages, compiler, GPUs and how they are joined."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# As pip reads requirements; transformers and accelerate bring it.
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.launching.findings import Finding, Subject, fail, failed_by, gigabytes, note, ok
from farnear.tracking import is_installed, refuse_missing_trackers
from farnear.wording import counted

# Imported only where they are used, so that a machine may lack them.
USED_BY = {
    "deepspeed": "zero1, zero2 and zero3",
    "webdataset": "farnear shards, which writes them",
    "datasets": "farnear shards from-hf",
    "peft": "model.lora",
    "tensorboard": "training.report_to: tensorboard, the curves of every run",
}
TOLD = ("torch", "transformers", "sentence-transformers", "accelerate", "deepspeed")
NOT_OURS_BYTES = 1 << 30


def versions(subject: Subject) -> list[Finding]:
    """Python and packages against farnear's own requirements, those of extras that the run needs among them."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("farnear") or ()]
        python = str(importlib.metadata.metadata("farnear")["Requires-Python"])
    except importlib.metadata.PackageNotFoundError:
        return note(
            "farnear is imported from a folder and not installed, so its requirements are unknown", "pip install -e ."
        )
    findings = []
    if not SpecifierSet(python).contains(platform.python_version()):
        findings += fail(f"Python {platform.python_version()}, and farnear needs {python}", "make a new environment")
    extras = ["", *_extras(subject.config)]
    for requirement in requirements:
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            findings += _package(requirement, subject.config)
    if subject.config is not None:
        try:
            refuse_missing_trackers(subject.config.training.report_to)
        except UserError as error:
            findings += failed_by(error)
    if findings:
        return findings
    return ok(", ".join([f"Python {platform.python_version()}", *(f"{name} {_installed(name)}" for name in TOLD)]))


def _package(requirement: Requirement, config: RunConfig | None) -> list[Finding]:
    found = _installed(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    how = f"pip install --upgrade '{wanted}'"
    if found is None:
        if requirement.name in USED_BY and not _is_used(requirement.name, config):
            return note(f"{requirement.name} is not installed", f"for {USED_BY[requirement.name]}: {how}")
        return fail(f"{requirement.name} is not installed, and farnear needs {wanted}", how)
    if not requirement.specifier.contains(found, prereleases=True):
        return fail(f"{requirement.name} {found} is installed, and farnear needs {wanted}", how)
    return []


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_used(name: str, config: RunConfig | None) -> bool:
    if config is None:
        return False
    return {"deepspeed": config.strategy.startswith("zero"), "peft": config.model.lora is not None}.get(name, False)


def _extras(config: RunConfig | None) -> Iterator[str]:
    """Extras of farnear without which the run would stop."""
    if config is None:
        return
    data = config.data
    of_sources = [shards for source in data.sources.values() for shards in (*source.train, *source.corpus)]
    shards = [*data.train, *data.train_corpus, *data.eval, *data.eval_corpus, *of_sources]
    schemes = {name.partition("://")[0] for name in shards if "://" in name}
    if "s3" in schemes:
        yield "s3"
    if schemes & {"http", "https"}:
        yield "http"
    if config.training.optim == "adamw_8bit":
        yield "bnb"
    if "wandb" in config.training.report_to and is_installed("wandb"):
        yield "wandb"


def compiler(subject: Subject) -> list[Finding]:
    """What flex_attention and operators of DeepSpeed are compiled with when they are first used."""
    missing = []
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        missing.append("g++")
    if not shutil.which("ninja"):
        missing.append("ninja")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append("Python.h")
    if not missing:
        return ok("g++, ninja and Python.h are there")
    what, how = f"no {', no '.join(missing)} here", "apt-get install g++ ninja-build python3-dev, or load their modules"
    if subject.config is not None and subject.config.model.attn_implementation == "flex_attention":
        return fail(
            f"{what}, and flex_attention compiles its kernel in the first step", f"{how}, or set varlen or sdpa"
        )
    return note(what, f"farnear compiles nothing for this run; for flex_attention and DeepSpeed's own operators: {how}")


def gpus(subject: Subject) -> list[Finding]:
    """Each GPU that may be used, who else is on it, and whether torch can use it at all."""
    import torch

    table = _nvidia_smi("index,name,memory.total,memory.used,compute_cap,ecc.errors.uncorrected.volatile.total")
    if not torch.cuda.is_available():
        if table:
            build = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
            why = "torch was built without CUDA" if torch.version.cuda is None else "the driver is too old for it"
            return fail(
                f"nvidia-smi knows of {counted(len(table), 'GPU')}, and {build} sees none",
                f"{why}, or CUDA_VISIBLE_DEVICES hides them: compare with nvidia-smi",
            )
        return note("no GPU is here: ranks compute on the CPU and talk through gloo", "expect tiny models only")
    findings: list[Finding] = []
    for index, name, total, used, capability, errors in table:
        what = f"GPU {index}: {name}, {gigabytes(_number(total) * 2**20)}, compute capability {capability}"
        if _number(errors):
            findings += fail(f"{what}: {errors} uncorrected memory errors since it started", "leave it out, reset it")
        elif _number(used) * 2**20 > NOT_OURS_BYTES:
            findings += note(
                f"{what}, {gigabytes(_number(used) * 2**20)} of it taken by other processes",
                "end them (nvidia-smi names them), or leave it out with CUDA_VISIBLE_DEVICES",
            )
        elif _wants_bf16(subject.config) and 0 < _number(capability) < 8:
            findings += note(f"{what}, which computes bf16 slowly or not at all", "set training.fp16")
        else:
            findings += ok(what)
    return findings or ok(
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} (no nvidia-smi to ask for more)"
    )


def _wants_bf16(config: RunConfig | None) -> bool:
    return config is not None and (config.training.bf16 or config.training.pure_bf16)


def interconnect(subject: Subject) -> list[Finding]:
    """How the GPUs are joined, as `nvidia-smi topo -m` tells it."""
    if subject.gpus < 2:
        return ok("one GPU or none: nothing to join")
    text = _run("nvidia-smi", "topo", "-m")
    rows = [line.split() for line in text.splitlines() if re.match(r"\s*GPU\d+\s", line)]
    joins = {word for row in rows for word in row[1 : len(rows) + 1] if word != "X"}
    if not joins:
        return note(f"nvidia-smi does not say how {subject.gpus} GPUs are joined", "look at the measured bandwidth")
    named = ", ".join(sorted(joins))
    if all(join.startswith("NV") for join in joins):
        return ok(f"{len(rows)} GPUs joined by NVLink ({named})")
    return note(
        f"{len(rows)} GPUs joined over PCIe in part or whole ({named})",
        "SYS and NODE cross the processor: prefer zero1 or ddp to zero3 and fsdp2, which gather parameters",
    )


def _nvidia_smi(fields: str) -> list[list[str]]:
    text = _run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    is_chosen = all(word.isdigit() for word in visible)
    return [row for row in rows if len(row) == fields.count(",") + 1 and (row[0] in visible or not is_chosen)]


def _number(cell: str) -> float:
    """0 for what a GPU does not tell, such as [N/A]."""
    try:
        return float(cell)
    except ValueError:
        return 0.0


def _run(*command: str) -> str:
    """What a program prints; empty where it is not there, fails or hangs, as nvidia-smi does on a broken GPU."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
