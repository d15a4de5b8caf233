"""The verbs that use what a run left: `shoal checkpoints`, `export`, `eval`, `generate`, `push` and `sync`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch.checkpoint_export import export
from launch.cli_arguments import AsJson, Overrides, RunFolder
from launch.disk import size_in_words
from launch.errors import ConfigError, RunFolderError
from launch.evaluation import evaluate
from launch.inventory import TITLES, Entry, discard, inventory, newest, rows, superfluous
from launch.inventory import as_json as inventory_as_json
from launch.plan import python_environment
from launch.printing import print_table
from launch.push import plan_push, push
from launch.record import held, model_folder, read_plan
from launch.topology import worker_environment


def checkpoints_command(
    run: RunFolder,
    json_: AsJson = False,
    verify: Annotated[bool, typer.Option(help="Hash every file, or look at marks and sizes only.")] = True,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what need not be kept, and leftovers.")] = False,
    keep_last: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --prune: keep the newest N good ones [the run's save.keep_last]."),
    ] = None,
) -> None:
    """List the checkpoints of a run: which are good, which one `shoal resume` goes on from, which is the best.

    Ends with 5 where there are checkpoints and none is good.
    """
    if keep_last is not None and not prune:
        raise ConfigError(f"command line: --keep-last {keep_last}: says what --prune keeps; add --prune")
    if prune and not verify:
        raise ConfigError("command line: --prune --no-verify: what is kept must be seen to be good; drop --no-verify")
    config = read_plan(run).config
    save, rewinds = config.save, config.train.on_spike == "rewind"
    if prune:
        with held(run):
            entries = inventory(run, verify=True)
            every = save.every_steps if rewinds else None
            removed = discard(superfluous(entries, keep_last or save.keep_last, save.keep_best, every))
    else:
        entries, removed = inventory(run, verify=verify), []
    left = [entry for entry in entries if entry not in removed]
    if json_:
        print(json.dumps(inventory_as_json(run, left, removed, verified=verify), indent=2))
    else:
        _print_checkpoints(run, left, removed)
    if not newest(left) and any(entry.state == "damaged" for entry in left):
        raise RunFolderError(f"{run}: none of its checkpoints is good; `shoal resume` begins the run anew")


def _print_checkpoints(run: Path, entries: list[Entry], removed: list[Entry]) -> None:
    for entry in removed:
        print(f"removed {entry.name} ({size_in_words(entry.bytes)}, {entry.verdict})")
    if removed:
        print(f"{sum(entry.bytes for entry in removed):,} bytes freed")
    if not entries:
        return print(f"{run}: has no checkpoints (yet)")
    print_table(TITLES, rows(entries))
    damaged = [entry.update for entry in entries if entry.state == "damaged"]
    if (going_on := newest(entries)) and damaged and damaged[0] > going_on.update:
        print(f"The newest one is damaged: `shoal resume` sets it aside and goes on from {going_on.name}.")
    return None


def export_command(
    run: RunFolder,
    checkpoint: Annotated[
        str, typer.Option(metavar="NAME", help="Which one: newest, best (lowest validation loss), or its name.")
    ] = "newest",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where to write the model [RUN/export-<checkpoint>].")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone, not the merged model.")] = False,
    json_: AsJson = False,
) -> None:
    """Make a plain Hugging Face folder of a checkpoint, and see that it loads as what is stored."""
    read_plan(run)
    done = export(run, checkpoint, out, adapter=adapter)
    if json_:
        print(json.dumps({**asdict(done), "folder": str(done.folder), "checkpoint": str(done.checkpoint)}))
        return
    tied = "".join(f"; one weight: {', '.join(group)}" for group in done.tied)
    print(f"{done.parameters:,} parameters of {done.checkpoint.name}; {done.tensors} tensors load as stored{tied}")
    print(f"model: {done.folder}")


def eval_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of one of its checkpoints.")],
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="export, newest, best, or its name [export, of an unfinished run newest]."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="Evaluate on this instead; may be given several times."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where to keep it [RUN/eval/<checkpoint>-<time>].")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Evaluate a run again, without training: alone or on several processes, with the same numbers.

    Overrides may change devices and strategy, how it is evaluated, and the validation data.
    """
    result = evaluate(run, checkpoint, data or [], overrides or [], out, lambda text: print(text, file=sys.stderr))
    if json_:
        print(json.dumps(result))
        return
    for name, value in result["metrics"].items():
        print(f"{name}: {value:,.4f}")
    print(f"samples: {result['samples']:,}\nrun folder: {result['run_folder']}")


def generate_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or any Hugging Face model folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="With the base and RUN/adapter, not the merged model.")
    ] = False,
) -> None:
    """Continue a text with the model that a run exported."""
    folder = model_folder(run, adapter=adapter)
    command = [sys.executable, "-m", "launch.engine.exported", "continue", str(folder), prompt]
    command += [str(max_new_tokens), str(temperature), str(seed)]
    # A process of its own: this one stays free of torch.
    raise typer.Exit(subprocess.run(command, env=worker_environment(python_environment()), check=False).returncode)


def push_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or any Hugging Face model folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Its name on the Hub: your-name/your-model.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private, where it is not there yet.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone, not the merged model.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be brought there, and stop.")] = False,
    json_: AsJson = False,
) -> None:
    """Bring the model that a run exported, with its card, to the Hugging Face Hub."""
    planned = plan_push(run, repository, adapter=adapter)
    url = None if dry_run else push(planned, private=private)
    if json_:
        print(json.dumps({"repository": repository, "folder": str(planned.folder), "files": planned.files, "url": url}))
        return
    for name, size in planned.files.items():
        print(f"{size_in_words(size):>10}  {name}")
    print(f"{'would go' if dry_run else 'gone'} to {url or repository}: {size_in_words(planned.size)}")


def sync_command(run: RunFolder) -> None:
    """Send what Weights & Biases does not have of a run: one that was offline, or was killed. Twice does no harm."""
    read_plan(run)
    command = [sys.executable, "-m", "launch.follow", str(run.absolute()), "wandb", "--sync"]
    with held(run):
        # A process of its own: wandb starts services, and may hang.
        ended = subprocess.run(command, env=worker_environment(python_environment()), check=False)
    raise typer.Exit(ended.returncode)
