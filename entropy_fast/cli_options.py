"""What the commands share: options, examples, and how an error becomes one line and an exit status."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from entropy_fast.console import quiet_libraries, say, say_error
from entropy_fast.errors import InputError


class Commands(TyperGroup):
    """Turns what a user can mend into one line and exit status 2, and Ctrl-C into 130; no tracebacks for either."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            with quiet_libraries():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted; nothing half-written was left behind")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except InputError as error:
            say_error(str(error))
            raise typer.Exit(2) from None
        except OSError as error:
            say_error(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
            raise typer.Exit(2) from None


class Precision(StrEnum):
    """The choices of `--dtype`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


WHAT, HOW, WHERE = "What to compute", "How", "Machine"

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that transformers can load.")]
RolloutsArgument = Annotated[
    str, typer.Argument(metavar="ROLLOUTS", help="Rollouts, JSON lines ('-' reads stdin); see docs/rollouts.md.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="YAML", help="A configuration file.", rich_help_panel=WHAT)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Set one configuration key, [bold]entropy.unit=per_token[/bold] say; repeatable.",
        rich_help_panel=WHAT,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, ...; by default the GPU where there is one.", rich_help_panel=WHERE),
]
DTypeOption = Annotated[
    Precision,
    typer.Option(
        metavar="DTYPE",
        help="The weights' precision: float32, bfloat16, float16, or auto for the checkpoint's own.",
        rich_help_panel=WHERE,
    ),
]

ResumeOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep finished parts in FOLDER; the same command, killed and started again, goes on from there.",
        rich_help_panel=HOW,
    ),
]


def example(*commands: str) -> str:
    """The epilog of a command's help."""
    return "\n\n".join(["Examples:", *(f"[cyan]entropy-fast {command}[/cyan]" for command in commands)])
