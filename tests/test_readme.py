"""The README's lines run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from entropy_fast.cli import app
from entropy_fast.config import Config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_lines_run(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    change, error, *status = result.stdout.split()
    assert abs(float(change)) < 1
    assert 0 < float(error) < 0.1
    assert " ".join(status) in ("believable", "caution", "not believable")


def test_every_command_is_one():
    commands = {command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"^entropy-fast (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE))
    assert named == commands - {"demo"}


def test_the_configuration_shown_is_the_default():
    assert Config.from_dict(yaml.safe_load(blocks("yaml")[0])) == Config()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
