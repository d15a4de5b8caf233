"""What each strategy needs of a run, side by side; which ones fit, and which of these is the cheapest. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launch.memory import Need, Setting, checkpoint_bytes, need, numbers_of, training_flops
from launch.outline import Outline, outline
from launch.recipe import ModelUse
from launch.strategy import Strategy
from launch.topology import Device

CHEAPEST_FIRST = (
    Strategy.SINGLE,
    Strategy.DDP,
    Strategy.ZERO1,
    Strategy.ZERO2,
    Strategy.FSDP2,
    Strategy.ZERO3,
    Strategy.ZERO2_OFFLOAD,
    Strategy.FSDP2_OFFLOAD,
    Strategy.ZERO3_OFFLOAD,
)
"""By what is exchanged in an update: gradients; the same in two steps; weights too, twice; over the link to the CPU."""

TAKEN_BY_AUTO = (Strategy.SINGLE, Strategy.DDP, Strategy.FSDP2, Strategy.FSDP2_OFFLOAD, Strategy.XLA)
"""What `parallel.strategy=auto` chooses among: those that keep the weights in fp32 and need no other package."""

HEADROOM = {"cpu": 0.75, "cuda": 0.92, "mps": 0.75, "xla": 0.92}
"""Share of the memory that a need may fill: of the rest allocators keep pieces, glibc on a CPU up to a quarter."""

LIBRARIES = {"cpu": 415 * 10**6, "cuda": 800 * 10**6, "mps": 0, "xla": 0}
"""Bytes of a process before it has a model: measured of Python with torch and transformers; CUDA's context and NCCL."""

CUDA_BUILD = {"cpu": 355 * 10**6, "cuda": 0, "mps": 0, "xla": 0}
"""Bytes of main memory more where torch was built for CUDA: what its libraries take though no GPU is used."""

METRIC_LIBRARIES = {"cpu": 150 * 10**6, "cuda": 0, "mps": 0, "xla": 0}
"""Bytes of main memory more in the process that measures: `evaluate`, pandas, SciPy and scikit-learn or the like."""


@dataclass(frozen=True)
class Comparison:
    """Bytes that a process needs on its device with each strategy."""

    needs: dict[Strategy, Need]
    """As the run is set, the cheapest first."""
    checkpointed: dict[Strategy, Need]
    """The same with activation checkpointing."""
    libraries: int
    """Bytes that a process needs in any case."""
    capacity: int | None
    """Bytes that a process may fill; None where it is not known."""
    parameters: int
    """Numbers in all weights."""
    trained: int
    """Numbers in those that are trained."""
    checkpoint: int
    """Bytes of a checkpoint."""
    flops: int
    """Operations for one sample of the greatest length, forward and backward."""
    token_flops: float | None
    """The same for one token, without what checkpointing does again; None where samples differ in length."""

    def bytes(self, strategy: Strategy, *, checkpointing: bool = False) -> int:
        """All that a process needs on its device."""
        return (self.checkpointed if checkpointing else self.needs)[strategy].total + self.libraries

    def fits(self, strategy: Strategy, *, checkpointing: bool = False) -> bool | None:
        """Whether it does; None where it is not known."""
        return None if self.capacity is None else self.bytes(strategy, checkpointing=checkpointing) <= self.capacity

    def choose(self) -> Strategy:
        """What `parallel.strategy=auto` takes: the cheapest that fits, and where none does what needs the least.

        Where the memory is not known, it is the cheapest.
        """
        among = [each for each in self.needs if each in TAKEN_BY_AUTO]
        if self.capacity is None:
            return among[0]
        fitting = (each for each in among if self.fits(each))
        return next(fitting, min(among, key=lambda each: self.needs[each].total))


def compare(
    use: ModelUse, setting: Setting, device: Device, memory_bytes: int | None, *, cuda_build: bool = False
) -> Comparison | None:
    """The needs of all strategies that can be; None where the architecture is not known.

    `memory_bytes` is what a process has; `cuda_build`: whether its torch was built for CUDA.
    """
    drawn: dict[str, Outline | None] = {}

    def need_of(strategy: Strategy, *, checkpointing: bool) -> Need | None:
        numbers = numbers_of(strategy, setting.numbers_low)
        if numbers not in drawn:
            drawn[numbers] = outline(use, numbers)
        found = drawn[numbers]
        return need(found, strategy, replace(setting, checkpointing=checkpointing)) if found else None

    needs, checkpointed = {}, {}
    for strategy in possible(setting.world_size, device):
        plain, again = (need_of(strategy, checkpointing=on) for on in (setting.checkpointing, True))
        if plain is None or again is None:
            return None
        needs[strategy], checkpointed[strategy] = plain, again
    found = next(each for each in drawn.values() if each)
    libraries = LIBRARIES[device] + CUDA_BUILD[device] * cuda_build + METRIC_LIBRARIES[device] * use.metric_libraries
    return Comparison(
        needs,
        checkpointed,
        libraries,
        int(memory_bytes * HEADROOM[device]) if memory_bytes else None,
        found.parameters,
        found.trained,
        checkpoint_bytes(found, setting),
        training_flops(found, checkpointing=setting.checkpointing),
        None if use.padded else training_flops(found, checkpointing=False) / use.tokens,
    )


def possible(world_size: int, device: Device) -> list[Strategy]:
    """Strategies of so many processes, the cheapest first; on a CPU there is nothing to offload to."""
    if device == "xla":
        return [Strategy.XLA]
    if world_size == 1:
        return [Strategy.SINGLE]
    return [each for each in CHEAPEST_FIRST[1:] if device == "cuda" or not each.offload]
