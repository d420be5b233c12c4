"""The command line: `entropy-fast demo | sample | score | compare | sweep | calibrate`.

Each command reads its arguments, calls one function of the package and prints what came out: results on stdout,
progress and messages on stderr. What needs torch is imported when a command runs, so that `--help` is immediate.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entropy_fast._version import __version__
from entropy_fast.cli_options import (
    HOW,
    WHAT,
    WHERE,
    Commands,
    ConfigOption,
    DeviceOption,
    DTypeOption,
    ModelArgument,
    Precision,
    ResumeOption,
    RolloutsArgument,
    SetOption,
    example,
)
from entropy_fast.console import say, stage_bars
from entropy_fast.errors import InputError

if TYPE_CHECKING:
    from entropy_fast.config import Config


app = typer.Typer(
    cls=Commands,
    name="entropy-fast",
    help="By how much did a language model's policy entropy change, and can the number be believed?",
    epilog="Start with [bold]entropy-fast demo[/bold]: half a minute, nothing downloaded, and files to try the "
    "other commands on.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"entropy-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog=example("demo -o demo-report --seed 1"))
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("demo-report"),
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the samples.")] = 0,
    device: DeviceOption = None,
) -> None:
    """Train a tiny model, take two updates, and report how its entropy moved.

    Nothing is downloaded; it takes about half a minute on two CPU cores. The checkpoints and rollouts that it writes
    are there to try the other commands on.
    """
    from rich.console import Console

    from entropy_fast import demo as embedded
    from entropy_fast.report.table import render, render_views

    _quiet_transformers()
    with stage_bars() as bars:
        reports = embedded.run(output, seed=seed, device=device, progress=bars)
    console = Console()
    for report in reports.values():
        console.print(render(report))
        console.rule(style="dim")
    console.print(render_views(list(reports.values())))
    say(f"\nwritten to {output}/; things to try next:", style="dim")
    for line in (
        f"entropy-fast compare {output}/original {output}/updated-rl {output}/rollouts.jsonl "
        "--set entropy.unit=per_token -o report",
        f"entropy-fast score {output}/original {output}/rollouts.jsonl -o scores.csv",
        f"entropy-fast sample {output}/updated-rl {output}/prompts.jsonl -o longer.jsonl",
    ):
        say("  " + line)


@app.command(
    epilog=example(
        "sample demo-report/original demo-report/prompts.jsonl -g 16 -o rollouts.jsonl",
        "sample MODEL prompts.jsonl | entropy-fast score MODEL -",
    )
)
def sample(
    model: ModelArgument,
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS",
            help="JSON lines with prompt (text), prompt_ids or messages ('-' reads stdin).",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The rollouts file; '-' writes to stdout.")] = "-",
    group_size: Annotated[
        int, typer.Option("--group-size", "-g", min=1, help="Completions of each prompt.", rich_help_panel=HOW)
    ] = 8,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Limit of a completion.", rich_help_panel=HOW)
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="Divides the logits.", rich_help_panel=HOW)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draw.", rich_help_panel=HOW)] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.", rich_help_panel=WHERE)] = 64,
    device: DeviceOption = None,
    dtype: DTypeOption = Precision.auto,
) -> None:
    """Draw rollouts from a model: ids kept, log-probs with them, the whole distribution.

    Top-p, top-k and penalties in the model's generation config are switched off: a rollout drawn with them comes from
    another distribution than the one that is scored.
    """
    from entropy_fast.heads import eos_token_ids
    from entropy_fast.jsonl import read_prompts, write_rollouts
    from entropy_fast.loading import load_model
    from entropy_fast.sampling import encode_prompts, sample_rollouts

    if temperature <= 0:
        raise InputError(f"--temperature must be above 0, got {temperature}; for near-greedy text take 0.1")
    given = read_prompts(prompts)
    _quiet_transformers()
    loaded = load_model(model, device=device, dtype=dtype.value)
    ids = encode_prompts(given, loaded.tokenizer)
    with stage_bars() as bars:
        rollouts = sample_rollouts(
            loaded.model,
            ids,
            group_size=group_size,
            eos_token_ids=eos_token_ids(loaded.model, loaded.tokenizer),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            seed=seed,
            tokenizer=loaded.tokenizer,
            progress=lambda done, total: bars("sample", done, total),
        )
    write_rollouts(output, rollouts)
    stopped = sum(rollout.finish_reason == "stop" for rollout in rollouts)
    say(f"{len(rollouts):,} rollouts of {len(ids):,} prompts, {stopped:,} ended with an EOS", style="dim")


@app.command(
    epilog=example(
        "score demo-report/original demo-report/rollouts.jsonl -o scores.parquet",
        "score demo-report/original demo-report/rollouts.jsonl --per-token | head -1",
        "score MODEL rollouts.jsonl --resume parts -o scores.parquet",
    )
)
def score(
    model: ModelArgument,
    rollouts: RolloutsArgument,
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="A .parquet, .jsonl or .csv file; '-' writes JSON lines to stdout."),
    ] = "-",
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Also the log-prob and entropy of every token.", rich_help_panel=WHAT)
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    resume: ResumeOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = Precision.auto,
) -> None:
    """Score rollouts: log-prob sum S, entropy sum R and length L of every sequence.

    S and R are in nats, over the L tokens that count.
    """
    from entropy_fast.checkpoints import score_checkpoint
    from entropy_fast.jsonl import read_rollouts
    from entropy_fast.tables import check_table_path, score_rows, summary, write_table

    settings = _configuration(config, assignments)
    check_table_path(output)
    file = read_rollouts(rollouts)
    _quiet_transformers()
    with stage_bars() as bars:
        scores = score_checkpoint(model, file, settings, device=device, dtype=dtype.value, resume=resume, progress=bars)
    write_table(output, score_rows(file, scores, per_token=per_token))
    say(summary(scores), style="dim")


@app.command(
    epilog=example(
        "compare demo-report/original demo-report/updated-rl demo-report/rollouts.jsonl -o report",
        "compare BASE ADAPTER rollouts.jsonl --set entropy.unit=per_token --json | jq .verdict",
    )
)
def compare(
    original: Annotated[
        Path, typer.Argument(metavar="ORIGINAL", help="The policy that the rollouts were drawn from: a model folder.")
    ],
    updated: Annotated[
        Path, typer.Argument(metavar="UPDATED", help="The same model after the update, or a LoRA adapter on ORIGINAL.")
    ],
    rollouts: RolloutsArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for report.json and report.png.")] = Path(
        "report"
    ),
    json_: Annotated[
        bool, typer.Option("--json", help="Print report.json on stdout instead of the table.", rich_help_panel=WHAT)
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    resume: ResumeOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = Precision.auto,
) -> None:
    """Measure by how much the entropy changed from ORIGINAL to UPDATED, and whether to believe it."""
    import json

    from rich.console import Console

    from entropy_fast.checkpoints import compare_checkpoints
    from entropy_fast.jsonl import read_rollouts
    from entropy_fast.report import Report, check_folder
    from entropy_fast.report.table import render

    settings = _configuration(config, assignments)
    check_folder(output)
    file = read_rollouts(rollouts)
    _quiet_transformers()
    with stage_bars() as bars:
        change = compare_checkpoints(
            original, updated, file, settings, device=device, dtype=dtype.value, resume=resume, progress=bars
        )
    report = Report(
        change,
        f"{original.name} → {updated.name}",
        {"original": str(original), "updated": str(updated), "rollouts": file.source, "config": settings.to_dict()},
    )
    written = report.write(output)
    if json_:
        typer.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        Console().print(render(report))
    say("written: " + ", ".join(map(str, written)), style="dim")
    if len(written) == 1:
        say("for report.png: pip install entropy_fast[plot]", style="dim")


@app.command(
    epilog=example(
        "sweep demo-report/original demo-report/updated-rl demo-report/rollouts.jsonl --eta 0.5 --eta 1 --eta 2",
    )
)
def sweep(
    original: Annotated[
        Path, typer.Argument(metavar="ORIGINAL", help="The policy that the rollouts were drawn from: η = 0.")
    ],
    updated: Annotated[
        Path, typer.Argument(metavar="UPDATED", help="The same model after the update, or a LoRA adapter: η = 1.")
    ],
    rollouts: RolloutsArgument,
    eta: Annotated[
        list[float] | None,
        typer.Option("--eta", help="A step, in units of the update; repeatable.", rich_help_panel=WHAT),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for sweep.json and sweep.png.")] = Path(
        "sweep"
    ),
    config: ConfigOption = None,
    assignments: SetOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = Precision.auto,
) -> None:
    """Measure ΔH along the line from ORIGINAL to UPDATED: how it answers to the size of the step.

    Scores ORIGINAL once and θ + η (updated − original) for every η, fits a line and a parabola, and compares with the
    first-order prediction δH₁. Without --eta: 0.1, 0.3, 1, 2.
    """
    from rich.console import Console

    from entropy_fast.checkpoints import sweep_checkpoints
    from entropy_fast.jsonl import read_rollouts
    from entropy_fast.report import check_folder
    from entropy_fast.report.sweep import SweepReport, render

    settings = _configuration(config, assignments)
    check_folder(output)
    file = read_rollouts(rollouts)
    _quiet_transformers()
    with stage_bars() as bars:
        found = sweep_checkpoints(
            original,
            updated,
            file,
            eta or [0.1, 0.3, 1.0, 2.0],
            settings,
            device=device,
            dtype=dtype.value,
            progress=bars,
        )
    report = SweepReport(
        found,
        f"{original.name} + η ({updated.name} − {original.name})",
        {"original": str(original), "updated": str(updated), "rollouts": file.source, "config": settings.to_dict()},
    )
    written = report.write(output)
    Console().print(render(report))
    say("written: " + ", ".join(map(str, written)), style="dim")


@app.command(epilog=example("calibrate demo-report/original demo-report/rollouts.jsonl"))
def calibrate(
    model: ModelArgument,
    rollouts: RolloutsArgument,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON instead of the table.", rich_help_panel=WHAT)
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = Precision.auto,
) -> None:
    """Measure the noise floor: what ΔH reads when nothing changed but the rounding.

    Scores MODEL twice in one batch layout, which must agree bit for bit, and once in another, in float32 and in the
    precision it was loaded in.
    """
    import json

    from rich.console import Console

    from entropy_fast.checkpoints import calibrate_checkpoint
    from entropy_fast.jsonl import read_rollouts
    from entropy_fast.report.calibration import render

    settings = _configuration(config, assignments)
    file = read_rollouts(rollouts)
    _quiet_transformers()
    with stage_bars() as bars:
        found = calibrate_checkpoint(model, file, settings, device=device, dtype=dtype.value, progress=bars)
    if json_:
        typer.echo(json.dumps([noise.to_dict() for noise in found], indent=2))
    else:
        Console().print(render(found))


def main() -> None:
    """The console script."""
    # so that a `kill` runs the clean-up of half-written files too
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()


def _configuration(path: Path | None, assignments: list[str] | None) -> Config:
    from entropy_fast.config import Config

    config = Config() if path is None else Config.from_yaml(path)
    return config.override(assignments or [])


def _quiet_transformers() -> None:
    """Its bars and warnings would write over ours; what matters in them is checked when a model is loaded."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
