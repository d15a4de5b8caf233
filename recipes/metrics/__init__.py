"""Metrics by name: those of this folder, a user's own file or folder, or one of the Hub.

Each file here is an `evaluate.Metric` that `evaluate.load(path)` takes too. Here they are imported as the modules they
are: `evaluate.load` would copy them into a cache that all processes lock, and that may be read-only or another user's.
Importing this package is cheap; `evaluate` and what a metric computes with are imported when it is first used.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError, DataError
from launch.hub import hub_trouble
from launch.topology import evaluate_modules_folder

if TYPE_CHECKING:
    from pydantic import JsonValue


@dataclass(frozen=True)
class Shipped:
    """A metric of this folder."""

    module: str
    library: str | None = None
    """What it is computed by, as it is imported."""


SHIPPED = {
    "accuracy": Shipped("accuracy", "sklearn"),
    "precision": Shipped("precision", "sklearn"),
    "recall": Shipped("recall", "sklearn"),
    "f1": Shipped("f1", "sklearn"),
    "matthews_correlation": Shipped("matthews_correlation", "sklearn"),
    "confusion_matrix": Shipped("confusion_matrix", "sklearn"),
    "bleu": Shipped("bleu", "sacrebleu"),
    "chrf": Shipped("chrf", "sacrebleu"),
    "rouge": Shipped("rouge", "rouge_score"),
    "exact_match": Shipped("exact_match"),
    "squad": Shipped("squad"),
    "seqeval": Shipped("entities", "seqeval"),
    "perplexity": Shipped("perplexity"),
}

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}
"""What `pip install` calls a library that is imported under another name."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check(names: Sequence[str], key: str = "metrics") -> None:
    """See, without any heavy import and in about two seconds at most, that each name can be loaded.

    Args:
        names: of this folder, a path (it ends in .py or starts with `.`, `/` or `~`), or a name on the Hub.
        key: where the names were given, for messages.

    Raises:
        ConfigError: there is no such metric, or a library is missing.
    """
    for name in names:
        if name in SHIPPED:
            library = SHIPPED[name].library
            for needed in ("evaluate", *([library] if library else [])):
                if importlib.util.find_spec(needed) is None:
                    install = _DISTRIBUTIONS.get(needed, needed)
                    raise ConfigError(f"{key}: {name}: needs {needed}, which is missing: pip install {install}")
        elif _is_path(name):
            _file_of(name, key)
        else:
            _check_hub(name, key)


def compute(
    names: Sequence[str],
    predictions: Any,
    references: Any,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    key: str = "metrics",
) -> dict[str, JsonValue]:
    """Values of all metrics over the same rows; one process computes, on the rows of all ranks.

    Args:
        names: as in `check`.
        predictions: one row each, as all metrics named take them: a list, an array or a CPU tensor.
        references: as many rows.
        options: by name of the metric, what else it is told, such as `{"bleu": {"tokenize": "zh"}}`.
        key: where the names were given, for messages.

    Returns:
        Plain numbers, texts and lists by their name; `METRIC_NAME` where an earlier metric has the same NAME.

    Raises:
        ConfigError: as `check`, or an option that a metric does not take.
        DataError: no rows, not as many predictions as references, or rows that a metric cannot take.
    """
    options = options or {}
    if unknown := [name for name in options if name not in names]:
        raise ConfigError(f"{key}: options for {unknown[0]}, which is not among the metrics: {', '.join(names)}")
    check(names, key)
    predictions, references = _rows(predictions), _rows(references)
    if len(predictions) != len(references):
        raise DataError(f"{key}: {len(predictions)} predictions but {len(references)} references; each row needs both")
    if not predictions:
        raise DataError(f"{key}: there are no rows to compute {', '.join(names)} of; let the evaluation have some")
    values: dict[str, JsonValue] = {}
    for name in names:
        for title, value in _compute_one(name, predictions, references, options.get(name, {}), key).items():
            values[title if title not in values else f"{Path(name).stem}_{title}"] = _plain(value)
    return values


def _compute_one(
    name: str, predictions: list[Any], references: list[Any], options: Mapping[str, Any], key: str
) -> dict[str, Any]:
    with _loaded(name, key) as metric:
        taken = inspect.signature(metric._compute).parameters
        allowed = [option for option in taken if option not in ("predictions", "references")]
        open_to_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        for option in options:
            if option not in allowed and not open_to_all:
                raise ConfigError(f"{key}: {name}: no option {option}; allowed: {', '.join(allowed) or 'none at all'}")
        try:
            metric.add_batch(predictions=predictions, references=references)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{key}: {name}: does not take such rows; it takes {_describe(metric.features)}, and got predictions "
                f"like {_short(predictions[0])}, references like {_short(references[0])}"
            ) from error
        values: dict[str, Any] = metric.compute(**options)
        return values


# --- which one is meant ----------------------------------------------------------------------------------


def file_of(name: str) -> Path | None:
    """The file of a metric of this folder or of a user's own; None of one on the Hub.

    Raises:
        ConfigError: there is no such file.
    """
    if name in SHIPPED:
        return Path(__file__).with_name(f"{SHIPPED[name].module}.py")
    return _file_of(name, "metrics") if _is_path(name) else None


def _is_path(name: str) -> bool:
    """Never by what lies in the working directory: a folder ./accuracy is not meant by `accuracy`."""
    return name.endswith(".py") or name.startswith((".", "/", "~"))


def _file_of(name: str, key: str) -> Path:
    path = Path(name).expanduser().absolute()
    file = path / f"{path.name}.py" if path.is_dir() else path
    if not (file.is_file() and file.suffix == ".py"):
        wanted = f"no file {file.name} in that folder" if path.is_dir() else "no such .py file or folder"
        raise ConfigError(f"{key}: {name}: {wanted}; {_ways(name)}")
    return file


def _check_hub(name: str, key: str) -> None:
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{key}: {name!r}: no such metric; {_ways(name)}")
    local = Path(name) / f"{Path(name).name}.py"
    if local.is_file():
        raise ConfigError(
            f"{key}: {name}: is a folder here too, whose code would run instead of that of the Hub; if it is meant, "
            f"write ./{name}, else go to another folder"
        )
    if not (why := _hub_is_out_of_reach()) or _is_cached(name):
        return
    raise ConfigError(
        f"{key}: {name}: no such metric; {_ways(name)}, but {why} and it is not in the cache; where there is a "
        f"network, `python -c \"import evaluate; evaluate.load('{name}')\"` puts it there"
    )


def _hub_is_out_of_reach() -> str:
    """Why, or nothing if it can be reached."""
    return hub_trouble("/api/spaces?limit=1")


def _is_cached(name: str) -> bool:
    kinds = ("metric", "comparison", "measurement")
    cached = [name.replace("/", "--")] if "/" in name else [f"evaluate-{kind}--{name}" for kind in kinds]
    return any(any((evaluate_modules_folder() / folder).glob("*/*.py")) for folder in cached)


def _ways(name: str) -> str:
    close = difflib.get_close_matches(name, SHIPPED, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return (
        f"{hint}ours: {', '.join(SHIPPED)}; your own: the path of its file or folder, ./my_metric.py; or the name of "
        "one on the Hub"
    )


# --- loading ---------------------------------------------------------------------------------------------


@contextmanager
def _loaded(name: str, key: str) -> Iterator[Any]:
    """An instance of its own, which keeps the rows in memory."""
    import evaluate
    from evaluate.loading import import_main_class

    private = {"keep_in_memory": True, "experiment_id": uuid.uuid4().hex}
    if name in SHIPPED:
        # Every metric makes a folder, though ours leave nothing in it; that of the home may be read-only.
        with TemporaryDirectory(prefix="shoal-metric-") as folder:
            yield import_main_class(f"recipes.metrics.{SHIPPED[name].module}")(cache_dir=folder, **private)
        return
    try:
        if _is_path(name):
            metric = evaluate.load(str(_file_of(name, key)), **private)
        else:
            with _without_waiting():
                metric = evaluate.load(name, **private)
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {name}: no such metric; {_ways(name)}, where there is none") from error
    except ImportError as error:
        raise ConfigError(f"{key}: {name}: cannot be imported: {' '.join(str(error).split())}") from error
    yield metric


@contextmanager
def _without_waiting() -> Iterator[None]:
    """If the Hub is out of reach, what is cached is taken at once, not after all attempts to reach it."""
    from evaluate import config

    before = config.HF_EVALUATE_OFFLINE
    config.HF_EVALUATE_OFFLINE = before or bool(_hub_is_out_of_reach())
    try:
        yield
    finally:
        config.HF_EVALUATE_OFFLINE = before


# --- rows and values -------------------------------------------------------------------------------------


def _rows(values: Any) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _plain(value: Any) -> Any:
    """Without numpy's types."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _describe(features: Any) -> str:
    forms = features if isinstance(features, list) else [features]
    return " or ".join(", ".join(f"{side}: {kind}" for side, kind in form.items()) for form in forms)


def _short(row: Any) -> str:
    text = repr(row)
    return text if len(text) <= 60 else text[:59] + "…"
