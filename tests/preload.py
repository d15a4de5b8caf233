"""What the ranks of tests/gloo.py are forked from has imported: all that one of them may need, once for all of them."""

from launch.imports import importing

with importing():
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import evaluate  # noqa: F401
    import peft  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import launch.engine.run
    import launch.train  # noqa: F401
    import recipes.causal_lm  # noqa: F401

    # The first model that a process loads has Transformers compile its table of old names, which takes half a second.
    get_checkpoint_conversion_mapping("gpt2")
