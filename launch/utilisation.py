"""How much of what devices can compute a model makes use of (MFU). Pure.

The share of the vendor's dense arithmetic that the model's own operations take, forward and backward: what activation
checkpointing does again is no use (PaLM, appendix B, has the definition).
"""

from __future__ import annotations

from launch.devices import peak_of
from launch.plan import Plan


def utilisation_of_a_token(plan: Plan) -> float | None:
    """What one token a second, over all processes, is of all that the devices can do; None where that is not known.

    It is not where the device is no GPU of a known make, the architecture is not drawn, samples differ in length (the
    operations do not follow from the tokens then), or part of the weights is frozen (so is part of the backward pass).
    """
    memory, processes = plan.memory, plan.processes
    peak = peak_of(processes.device_name, plan.config.train.precision) if processes.device in ("cuda", "xla") else None
    if memory is None or memory.token_flops is None or peak is None or memory.trained != memory.parameters:
        return None
    return memory.token_flops / (peak * processes.replicas)
