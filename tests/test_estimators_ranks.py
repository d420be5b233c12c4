"""Rung 6 of the ladder: the same sequences on one rank and on several, unevenly spread, give the same numbers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_fast.estimators import PairedScores, TokenScores, diagnose, entropy_change, first_order
from entropy_fast.estimators.enumerable import Policy, score
from entropy_fast.psis import psislw

SHARES = (1, 402, 37, 200)  # the first rank holds a single sequence; prompts are split between ranks
TOLERANCE = 1e-12


class Threads:
    """Ranks as threads of this process."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size)
        self._slots: list[Tensor] = [torch.empty(0)] * size

    def rank(self, place: int) -> ThreadRank:
        return ThreadRank(self, place)

    def exchange(self, place: int, tensor: Tensor) -> list[Tensor]:
        self._slots[place] = tensor.clone()
        self._barrier.wait(timeout=60)
        everyone = list(self._slots)
        self._barrier.wait(timeout=60)
        return everyone

    def run(self, work: Callable[[ThreadRank], Any]) -> list[Any]:
        results: list[Any] = [None] * len(self._slots)

        def body(place: int) -> None:
            try:
                results[place] = work(self.rank(place))
            except Exception as error:  # handed to the test; the others must not wait for this rank
                results[place] = error
                self._barrier.abort()

        threads = [threading.Thread(target=body, args=(place,)) for place in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results


@dataclasses.dataclass
class ThreadRank:
    group: Threads
    place: int

    def max(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.group.exchange(self.place, tensor)).amax(dim=0)

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.group.exchange(self.place, tensor)).sum(dim=0)

    def gather(self, vector: Tensor) -> tuple[list[Tensor], int]:
        return self.group.exchange(self.place, vector), self.place


@cache
def whole() -> PairedScores:
    old = Policy(0.0)
    draws = old.sample(40, 16, torch.Generator().manual_seed(3))
    assert len(draws.sequence) == sum(SHARES)
    # no two weights alike, so that which of them is smoothed to which value is no matter of ties
    scores = score(draws, old, Policy(0.5))
    jitter = 1e-4 * torch.rand(len(scores), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return dataclasses.replace(scores, log_weight=scores.log_weight + jitter)


def part_of(scores: PairedScores, place: int) -> PairedScores:
    start = sum(SHARES[:place])
    rows = slice(start, start + SHARES[place])
    tokens = scores.tokens
    assert tokens is not None
    longest = int(tokens.generated[rows].sum(dim=1).max())  # ranks pad to their own longest sequence
    fields = {
        field.name: None if getattr(scores, field.name) is None else getattr(scores, field.name)[rows]
        for field in dataclasses.fields(scores)
        if field.name != "tokens"
    }
    columns = [getattr(tokens, field.name)[rows, :longest] for field in dataclasses.fields(tokens)]
    return PairedScores(**fields, tokens=TokenScores(*columns))


def assert_same_numbers(one: dict, many: dict) -> None:
    assert one.keys() == many.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same_numbers(value, many[key])
        elif isinstance(value, list):
            assert many[key] == pytest.approx(value, abs=TOLERANCE, nan_ok=True), key
        elif isinstance(value, float):
            # z-scores and weights far from 0 carry their rounding with them
            assert many[key] == pytest.approx(value, abs=TOLERANCE, rel=TOLERANCE, nan_ok=True), key
        else:
            assert many[key] == value, key


@pytest.mark.parametrize("unit", ["sequence", "per_token"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "is"},
        {"method": "clip", "clip": 1.5},
        {"method": "psis"},
        {"estimator": "prefix"},
        {"estimator": "prefix", "integrand": "rao_blackwell"},
        {"control_variate": True},
    ],
    ids=str,
)
def test_entropy_change(options, unit):
    one = entropy_change(whole(), unit=unit, **options)
    many = Threads(len(SHARES)).run(
        lambda rank: entropy_change(part_of(whole(), rank.place), unit=unit, collective=rank, **options)
    )
    for result in many:
        assert_same_numbers(one.to_dict(), result.to_dict())
    torch.testing.assert_close(torch.cat([r.influence for r in many]), one.influence, atol=1e-11, rtol=0)
    torch.testing.assert_close(torch.cat([r.contributions for r in many]), one.contributions, atol=TOLERANCE, rtol=0)


def test_diagnostics():
    has_eos = torch.arange(len(whole())) % 3 != 0
    sampler = whole().logprob0 + 0.01
    one = diagnose(whole(), has_eos=has_eos, sampler_logprob=sampler)

    def work(rank: ThreadRank):
        start = sum(SHARES[: rank.place])
        rows = slice(start, start + SHARES[rank.place])
        return diagnose(
            part_of(whole(), rank.place), has_eos=has_eos[rows], sampler_logprob=sampler[rows], collective=rank
        )

    for result in Threads(len(SHARES)).run(work):
        assert_same_numbers(one.to_dict(), result.to_dict())


def test_endings_and_first_order():
    scores = whole()
    u = scores.log_weight
    everyone_ended = torch.ones(len(scores), dtype=torch.bool)
    one = diagnose(scores, has_eos=everyone_ended).endings
    slope = first_order(u, -scores.logprob0, scores.length, scores.prompt_index, unit="per_token")

    def work(rank: ThreadRank):
        part = part_of(scores, rank.place)
        start = sum(SHARES[: rank.place])
        rows = slice(start, start + SHARES[rank.place])
        endings = diagnose(part, has_eos=everyone_ended[rows], collective=rank).endings
        order = first_order(u[rows], -part.logprob0, part.length, part.prompt_index, unit="per_token", collective=rank)
        return endings, order

    assert one is not None
    for endings, order in Threads(len(SHARES)).run(work):
        assert_same_numbers(dataclasses.asdict(one), dataclasses.asdict(endings))
        assert_same_numbers(slope.to_dict(), order.to_dict())


@pytest.mark.parametrize("ties", [False, True])
def test_psis_with_the_tail_spread_over_ranks(ties):
    x = 2 * torch.randn(sum(SHARES), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    if ties:
        x = x.round(decimals=1)
    one, khat = psislw(x)
    parts = x.split(SHARES)
    many = Threads(len(SHARES)).run(lambda rank: psislw(parts[rank.place], collective=rank))
    torch.testing.assert_close(torch.cat([smoothed for smoothed, _ in many]), one, atol=TOLERANCE, rtol=0)
    for _, other in many:
        assert float(other) == pytest.approx(float(khat), abs=TOLERANCE)


WORKER = """
import json, sys, torch
from entropy_fast.collective import ProcessGroup
from entropy_fast.psis import psislw
place, meet = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + meet, rank=place, world_size=2)
mine = torch.arange(30.0, dtype=torch.float64).sin().mul(3).split((7, 23))[place]
group = ProcessGroup()
smoothed, khat = psislw(mine, collective=group)
print(json.dumps([smoothed.tolist(), float(khat), group.sum(mine[:2]).tolist(), float(group.max(mine.max()))]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_the_process_group_reduces(tmp_path):
    """The same through torch.distributed, two processes with gloo."""
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(place), str(tmp_path / "meet")], stdout=subprocess.PIPE)
        for place in range(2)
    ]
    results = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    x = torch.arange(30.0, dtype=torch.float64).sin().mul(3)
    one, khat = psislw(x)
    assert results[0][0] + results[1][0] == pytest.approx(one.tolist(), abs=TOLERANCE)
    for _, other, summed, largest in results:
        assert other == pytest.approx(float(khat), abs=TOLERANCE)
        assert summed == pytest.approx((x[:2] + x[7:9]).tolist(), abs=TOLERANCE)
        assert largest == float(x.max())
