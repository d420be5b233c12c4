"""docs/statistics.md: its tutorial runs and prints what it shows, its table and its thresholds are the real ones."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from entropy_fast.estimators import Thresholds
from entropy_fast.estimators.enumerable import Policy, list_sequences

PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"


def test_the_tutorial_prints_what_it_shows():
    blocks = re.findall(r"```python\n(.*?)```\s+```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    namespace: dict = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(PAGE), "exec"), namespace)
        assert printed.getvalue().strip() == shown.strip()


def test_the_table_of_mistakes():
    listing, old, new = list_sequences(), Policy(0.0), Policy(0.3)
    body = listing.counted(include_eos=False)

    def row(probability, mask=listing.generated, power=1.0):
        p = probability / probability.sum()
        s0, s1 = ((policy.logprob * mask).sum(dim=-1) for policy in (old, new))
        w = (power * (s1 - s0)).exp()
        surprise = ((old.logprob + old.entropy) * mask).sum(dim=-1)
        change = (p * w * -s1).sum() / (p * w).sum() + (p * s0).sum()
        return [float(change), float((p * w).sum()), float((p * surprise).sum())]

    expected = {
        "right": row(old.probability),
        "EOS left out of S and of w": row(old.probability, mask=body),
        "truncated sequences dropped": row(old.probability * listing.has_eos),
        "sampled at temperature 0.7, scored at 1": row(Policy(0.0, temperature=0.7).probability),
        "sampled at top-p 0.9, scored in full": row(Policy(0.0, top_p=0.9).probability),
        "w^(1/L) as the weight": row(old.probability, power=1 / listing.generated.sum(dim=-1)),
    }
    text = PAGE.read_text(encoding="utf-8").replace("−", "-")
    for name, numbers in expected.items():
        cells = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.MULTILINE).group(1).split("|")
        assert [float(cell) for cell in cells] == pytest.approx(numbers, abs=5.1e-4), name


def test_the_thresholds():
    limits = Thresholds()
    text = PAGE.read_text(encoding="utf-8")
    for name, caution, fail in (
        ("surprise, mean Σ(log p + H) under π0, as z", limits.z_caution, limits.z_fail),
        ("mean weight, as z from 1", limits.z_caution, limits.z_fail),
        ("sampler's log-probs, KL per token (and z ≥ 4)", limits.sampler_kl_caution, limits.sampler_kl_fail),
        ("ESS = (Σw)² / Σw²", limits.ess_caution, limits.ess_fail),
        ("ESS/n ≈ exp(−2 KL)", limits.ess_fraction_caution, limits.ess_fraction_fail),
        ("largest share of the weight", limits.share_caution, limits.share_fail),
        ("clipped mass", limits.cut_mass_caution, limits.cut_mass_fail),
    ):
        cells = re.search(rf"^\| {re.escape(name)} \|(.*)$", text, re.MULTILINE).group(1).split("|")
        assert [float(cells[1]), float(cells[2])] == [caution, fail], name
    assert f"p < {10.0**limits.endings_log10:.0e}".replace("e-0", "e-") in text
    assert f"≥ {limits.few_prompts} | fewer" in text
    assert f"| 0 | {limits.bias_in_se} |" in text
    assert f"ESS/n > {limits.near_one}" in text
