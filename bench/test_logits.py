"""pytest-benchmark entries (wall clock, launches included): `pytest bench/test_logits.py --benchmark-enable`."""

import pytest
import torch

from bench.logits import eager
from entropy_fast import token_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 4096 if DEVICE == "cuda" else 32


def _problem(vocab):
    return torch.randn(ROWS, vocab, device=DEVICE), torch.zeros(ROWS, dtype=torch.int64, device=DEVICE)


def _finished(function, *arguments):
    result = function(*arguments)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("vocab", [32000, 128256])
@pytest.mark.parametrize("function", [token_stats, eager], ids=["entropy_fast", "eager"])
def test_forward(benchmark, function, vocab):
    """Log-prob and entropy."""
    logits, targets = _problem(vocab)
    logprob, entropy, *_ = benchmark(_finished, function, logits, targets)
    expected = eager(logits.double(), targets)
    assert (logprob - expected[0]).abs().max() < 1e-4
    assert (entropy - expected[1]).abs().max() < 1e-4


@pytest.mark.parametrize("function", [token_stats, eager], ids=["entropy_fast", "eager"])
def test_backward(benchmark, function):
    """The gradient of both outputs."""
    logits, targets = _problem(32000)
    logits.requires_grad_()
    logprob, entropy, *_ = function(logits, targets)
    loss = (logprob + entropy).sum()
    gradient = benchmark(lambda: _finished(lambda: torch.autograd.grad(loss, logits, retain_graph=True)))[0]
    assert gradient.isfinite().all()
