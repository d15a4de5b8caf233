"""What a run needs of memory, time and disk, in words. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from launch.devices import CPU_CORE, UTILISATION, peak_of
from launch.disk import size_in_words
from launch.plan import Plan
from launch.words import roughly

LENGTH = ("train.max_steps", "train.epochs", "train.global_batch_size")
SAVING = (
    *("save.every_steps", "save.every_minutes", "save.keep_last"),
    *("save.keep_best", "save.asynchronous"),
)
MEMORY = (
    *("parallel.strategy", "parallel.devices", "parallel.nodes"),
    *("train.micro_batch_size", "train.global_batch_size", "train.precision", "train.optimizer"),
    "train.activation_checkpointing",
)


@dataclass(frozen=True)
class Line:
    """One fact of a plan: a name, its value, and where the value follows from."""

    name: str
    value: str
    because: str = ""
    keys: tuple[str, ...] = ()
    """The keys of a run file that it follows from."""


def work_lines(plan: Plan) -> list[Line]:
    """How much memory and time a run needs."""
    memory, processes, batch = plan.memory, plan.processes, plan.batch
    if memory is None:
        return []
    strategy, of = processes.strategy, f" of {size_in_words(memory.capacity)}" if memory.capacity else ""
    need = memory.needs[strategy]
    parts = [
        f"{name} {size_in_words(value)}" for name, value in (need.parts() | {"libraries": memory.libraries}).items()
    ]
    if need.host:
        parts.append(f"besides {size_in_words(need.host)} of main memory")
    verdict = {True: "", False: ", too much", None: ""}[memory.fits(strategy)]
    lines = [
        Line("parameters", f"{memory.parameters:,}", _trained_explained(memory.parameters, memory.trained)),
        Line(
            "memory of a process",
            size_in_words(memory.bytes(strategy)) + of + verdict,
            f"{', '.join(parts)}; most in the {need.moment}",
            MEMORY,
        ),
    ]
    if plan.length.updates and (speed := _speed(plan)):
        rate, assumed = speed
        operations = memory.flops * batch.global_batch_size
        why = f"{operations:.2g} operations per update of the longest samples, at {assumed}"
        seconds = plan.length.updates * operations / rate
        lines.append(Line("time", f"about {roughly(seconds)}", f"{why}; without evaluations and saves", LENGTH))
    return lines


def _trained_explained(parameters: int, trained: int) -> str:
    return "all trained" if trained == parameters else f"{trained:,} of them trained"


def _speed(plan: Plan) -> tuple[float, str] | None:
    """Operations per second that all processes together are taken to do, and what is assumed; None: not known."""
    processes = plan.processes
    if processes.device == "cpu":
        cores = processes.world_size * processes.threads
        return (
            (cores * CPU_CORE * 1e12, f"{CPU_CORE * 1000:g}·10⁹ a second on each of {cores} cores") if cores else None
        )
    each = peak_of(processes.device_name, plan.config.train.precision)
    if each is None:
        return None
    kind = "TPU devices" if processes.device == "xla" else "GPUs"
    words = f"{UTILISATION:.0%} of {each / 1e12:g}·10¹² a second on each of {processes.replicas} {kind}"
    return processes.replicas * each * UTILISATION, words


def disk_lines(plan: Plan) -> list[Line]:
    """How much is written."""
    memory, save = plan.memory, plan.config.save
    if memory is None:
        return []
    each = f"{size_in_words(memory.checkpoint)} for each checkpoint"
    if save.keep_last is None:
        return [Line("disk", each, "all are kept", SAVING)]
    number = save.keep_last + save.keep_best + 1
    total = number * memory.checkpoint + 4 * memory.parameters * save.export
    return [Line("disk", size_in_words(total), f"{each}: {number - 1} kept, one being written; the export", SAVING)]


def needs_table(plan: Plan) -> list[list[str]]:
    """What each strategy needs, as rows of text: strategy, memory, with activation checkpointing, whether it fits."""
    memory = plan.memory
    assert memory is not None, "the architecture is known"
    rows = []
    for strategy, need in memory.needs.items():
        plain, checkpointed = (size_in_words(memory.bytes(strategy, checkpointing=on)) for on in (False, True))
        fits = {True: "yes", False: "no", None: ""}[memory.fits(strategy)]
        if fits == "no" and memory.fits(strategy, checkpointing=True):
            fits = "with checkpointing"
        parts = ", ".join(f"{name} {size_in_words(value)}" for name, value in need.parts().items())
        host = f"; main memory {size_in_words(need.host)}" if need.host else ""
        rows.append([strategy, plain, checkpointed, fits, parts + host])
    return rows
