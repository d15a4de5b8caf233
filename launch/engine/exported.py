"""Uses an exported model as any user of it would: reload by plain `from_pretrained`, compare, continue a text.

python -m launch.engine.exported check    FOLDER PROBE DEVICE PROMPT [ADAPTER]
python -m launch.engine.exported continue FOLDER PROMPT MAX_NEW_TOKENS TEMPERATURE SEED

With ADAPTER, the folder of an adapter alone, FOLDER must be the model that it is merged into.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.imports import importing

with importing():
    import torch
    import transformers
    import transformers.modeling_layers  # that of any model
    from safetensors import safe_open
    from safetensors.torch import load_file

    from launch.engine.export import logits_of, plain_name, sum_of

TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit (at least 1)."""

BF16_TOLERANCE = 2e-2
"""The same where the live model computed in bf16, which has 8 bits of precision; 3e-3 was measured on a tiny GPT-2."""

SAMPLE_TOKENS = 40


def load_exported(folder: Path) -> tuple[Any, Any]:
    """Model (of the class its config names, with adapters where these were exported) and tokenizer."""
    adapters = folder / "adapter_config.json"
    if not adapters.is_file():
        return _model_in(str(folder)).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    from peft import PeftModel

    name = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"]
    base = _model_in(name, folder if (folder / "config.json").is_file() else None)
    return PeftModel.from_pretrained(base, folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def _model_in(name_or_folder: str, configured: Path | None = None) -> Any:
    """The model of a folder, with the configuration in another one if there is such."""
    config = transformers.AutoConfig.from_pretrained(configured or name_or_folder)
    loader = getattr(transformers, config.architectures[0])
    return loader.from_pretrained(name_or_folder, config=config, dtype=torch.float32)


def difference(model: Any, probe: Path, device: str) -> float:
    """Largest difference between the model's logits and those written when it was live, relative as in TOLERANCE."""
    tensors = load_file(probe)
    expected = {name: tensors.pop(name) for name in list(tensors) if name.endswith("logits")}
    with torch.no_grad():
        got = logits_of(model.to(device)(**{name: value.to(device) for name, value in tensors.items()}))
    if not expected or {n: v.shape for n, v in got.items()} != {n: v.shape for n, v in expected.items()}:
        return float("inf")
    differences = [
        (got[name] - value).abs().max() / value.abs().max().clamp(min=1.0) for name, value in expected.items()
    ]
    return float(torch.stack(differences).max())


def unlike(model: Any, probe: Path) -> list[str]:
    """Names of weights of the live model that the reloaded one lacks, or has in another shape or with other values.

    Logits alone do not tell: adapters that are empty, or all zero, change little after a short training.
    """
    with safe_open(probe, "pt") as file:
        sums = json.loads((file.metadata() or {}).get("sums", "{}"))
    found = dict(model.named_parameters(remove_duplicate=False))
    wrong = []
    for name, (shape, total) in sums.items():
        shape_now, total_now = sum_of(found[name]) if name in found else (None, 0.0)
        if shape_now != shape or abs(total_now - total) > 1e-6 * max(total, 1e-6):
            wrong.append(name)
    return wrong


def _unlike_merged(model: Any, adapter: Path) -> list[str]:
    from launch.engine.adapters import merged_weights, unlike_merged  # needs PEFT

    return unlike_merged(model, merged_weights(load_exported(adapter)[0]))


def untied(model: Any, probe: Path) -> list[str]:
    """Names of weights that were one when the model was live, and are several now: they would be trained apart."""
    with safe_open(probe, "pt") as file:
        groups = json.loads((file.metadata() or {}).get("tied", "[]"))
    found = {plain_name(name): value for name, value in model.named_parameters(remove_duplicate=False)}
    return [name for group in groups for name in group if found[name].data_ptr() != found[group[0]].data_ptr()]


def continue_text(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """`prompt` and its continuation, the likeliest one at temperature 0, else sampled.

    Of an encoder-decoder model, what it writes when it has read the prompt, after the prefix it was trained with.
    """
    torch.manual_seed(seed)
    reads = model.config.is_encoder_decoder
    text = (getattr(model.config, "prefix", None) or "") + prompt if reads else prompt
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=reads).to(model.device)
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def main(arguments: list[str]) -> None:
    """Answer one call from the command line."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    verb, folder = arguments[0], Path(arguments[1])
    model, tokenizer = load_exported(folder)
    if verb == "check":
        probe, device, prompt, *adapter = arguments[2:]
        wrong = _unlike_merged(model, Path(adapter[0])) if adapter else unlike(model, Path(probe))
        answer: dict[str, Any] = {"unlike": wrong, "untied": untied(model, Path(probe))}
        answer["difference"] = difference(model, Path(probe), device)
        if prompt:
            answer["sample"] = continue_text(model, tokenizer, prompt, SAMPLE_TOKENS, 0.7, 0)
        print(json.dumps(answer))
    else:
        if not model.can_generate():
            print(f"shoal: {folder}: a {type(model).__name__} writes no text", file=sys.stderr)
            sys.exit(ConfigError.exit_code)
        prompt, max_new_tokens, temperature, seed = arguments[2:]
        print(continue_text(model, tokenizer, prompt, int(max_new_tokens), float(temperature), int(seed)))


if __name__ == "__main__":
    main(sys.argv[1:])
