"""Taking one training step and taking it back, bit for bit.

A step is exactly what the optimizer does to the model's own weights. What it may change is copied first and written
back after, whatever happens in between: parameters, buffers, gradients, the optimizer's state (whether there was any
or not) and hyperparameters, and the random number generators.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_fast.errors import InputError
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scorer, Scoring

TrainingLoss = Literal["nll", "rl"]
_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StepReport:
    """What one training step did.

    Attributes:
        loss: the loss's value before the step.
        grad_norm: the 2-norm of the gradient over all trainable parameters.
        unchanged_share: of the weights with a gradient, the share whose bits the step left as they were. Near 1 in
            bf16 training: a small step is lost to rounding there, and that is the true update of such training.
    """

    loss: float
    grad_norm: float
    unchanged_share: float


class Snapshot:
    """Copies of all that a training step may change, and the way back.

    Args:
        model: every parameter that the optimizer holds is copied, and every buffer; other parameters cannot change.
        optimizer: its state and hyperparameters are copied too. None copies all parameters of the model.
        device: where the copies wait: `same`, or a device's name.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, device: str = "same") -> None:
        self._device = device
        self._parameters = list(model.parameters()) if optimizer is None else optimized_parameters(optimizer)
        # the data tensors themselves are remembered as well: a step on master weights replaces them
        self._data = [(p, p.data, self._copy(p.data)) for p in self._parameters]
        self._buffers = [(b, self._copy(b)) for b in model.buffers()]
        everything = dict.fromkeys([*model.parameters(), *self._parameters])
        self._grads = [(p, p.grad, None if p.grad is None else self._copy(p.grad)) for p in everything]
        self._optimizer = None if optimizer is None else _OptimizerSnapshot(optimizer, self._copy)
        self._random = _random_state()

    def restore(self) -> None:
        """Put everything back: the same tensor objects with the same bits."""
        with torch.no_grad():
            for parameter, data, saved in self._data:
                parameter.data = data
                data.copy_(saved)
            for buffer, saved in self._buffers:
                buffer.copy_(saved)
            for parameter, grad, saved_grad in self._grads:
                parameter.grad = grad
                if grad is not None and saved_grad is not None:
                    grad.copy_(saved_grad)
            if self._optimizer is not None:
                self._optimizer.restore()
        _set_random_state(self._random)

    def difference(self) -> dict[nn.Parameter, Tensor]:
        """For every parameter, its present value less the copied one, in float32 or wider: the update vector v."""
        return {
            p: p.data.to(_wide(p.dtype)) - saved.to(p.device, _wide(p.dtype))
            for (p, _, saved) in self._data
            if p.requires_grad
        }

    def unchanged_share(self) -> float:
        """Of the weights with a gradient other than 0, the share that still has the copied bits."""
        same = total = 0
        for parameter, _, saved in self._data:
            if parameter.grad is not None:
                pushed = parameter.grad != 0
                same += int((pushed & (parameter.data == saved.to(parameter.device))).sum())
                total += int(pushed.sum())
        return same / total if total else 1.0

    def _copy(self, tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        return copied if self._device == "same" else copied.to(self._device)


class _OptimizerSnapshot:
    def __init__(self, optimizer: torch.optim.Optimizer, copy_tensor: Any) -> None:
        self._optimizer = optimizer

        def save(value: Any) -> tuple[Any, Any]:
            return value, copy_tensor(value) if isinstance(value, Tensor) else copy.deepcopy(value)

        self._state = {p: {k: save(v) for k, v in entry.items()} for p, entry in optimizer.state.items()}
        self._groups = [{k: save(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        # step counters that schedulers hang on the optimizer
        self._plain = {k: v for k, v in vars(optimizer).items() if isinstance(v, (bool, int, float, str, type(None)))}

    def restore(self) -> None:
        def put_back(target: dict, saved: Mapping) -> None:
            for key in [k for k in target if k not in saved and k != "params"]:
                del target[key]
            for key, (original, copied) in saved.items():
                if isinstance(original, Tensor):
                    original.copy_(copied)
                    target[key] = original
                else:
                    target[key] = copy.deepcopy(copied)

        state = self._optimizer.state
        for parameter in [p for p in state if p not in self._state]:
            del state[parameter]
        for parameter, saved in self._state.items():
            put_back(state[parameter], saved)
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=True):
            put_back(group, saved)
        vars(self._optimizer).update(self._plain)


def optimized_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Every parameter of every group, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def token_coefficients(rollouts: Rollouts, generated: Tensor, loss: TrainingLoss) -> Tensor:
    """(N, T) float64 c with loss = Σ c · logprob.

    `nll` is the mean cross entropy over all generated tokens. `rl` is −mean_b Σ_{g,t} A logp / (G L_max_b), with
    L_max_b the prompt's generation limit, or its longest completion where the rollouts name no limit.

    Raises:
        InputError: `rl` without advantages.
    """
    if loss == "nll":
        return -generated.double() / generated.sum()
    if rollouts.advantages is None:
        raise InputError(
            "training_loss: rl needs advantages, one for each sequence, and the rollouts have none; add them, or use "
            "training_loss: nll"
        )
    prompts, group = torch.unique(rollouts.prompt_index, return_inverse=True)
    sizes = torch.bincount(group, minlength=len(prompts))
    if rollouts.max_lengths is not None:
        limit = rollouts.max_lengths
    else:
        longest = torch.zeros_like(prompts).scatter_reduce(0, group, generated.sum(1), "amax", include_self=True)
        limit = longest[group].clamp_min(1)
    weight = rollouts.advantages.double() / (len(prompts) * sizes[group] * limit)
    return -weight[:, None] * generated


def accumulate_gradients(scorer: Scorer, coefficients: Tensor) -> float:
    """Add the gradient of Σ coefficients · logprob to the parameters' `.grad`, a microbatch at a time.

    Args:
        scorer: its model's parameters receive the gradients.
        coefficients: (N, T), see `token_coefficients`.

    Returns:
        The sum's value.
    """
    total = 0.0
    with torch.enable_grad(), scorer.scope():
        for batch, stats in scorer.run():
            rows, columns = scorer.target_of(batch)
            c = coefficients[rows, columns].to(stats.logprob)
            value = (stats.logprob * c).sum()
            value.backward()
            total += float(value.detach())
    return total


@dataclass(frozen=True)
class Gradients:
    """The gradient of a training loss, standing in the parameters' `.grad`, clipped.

    Attributes:
        loss: the loss's value.
        norm: the gradient's 2-norm over all trainable parameters, before clipping.
        coefficients: (N, T) float64, the loss as Σ c · logprob, scaled by the clipping.
        snapshot: what the model and the optimizer were before.
    """

    loss: float
    norm: float
    coefficients: Tensor
    snapshot: Snapshot


@contextlib.contextmanager
def gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    scoring: Scoring,
    *,
    loss: TrainingLoss = "nll",
    max_grad_norm: float | None = None,
    snapshot_device: str = "same",
) -> Iterator[Gradients]:
    """Inside the `with`, the optimizer's parameters hold the loss's gradient; afterwards everything is as it was.

    Args:
        model: trained in the mode (train or eval) that it is in.
        optimizer: whose parameters are meant, and whose state is kept safe.
        rollouts: what the loss is taken on.
        scoring: temperature and microbatches of the loss.
        loss: see `token_coefficients`.
        max_grad_norm: clip the gradient's 2-norm to this, None for no clipping.
        snapshot_device: see `Snapshot`.

    Raises:
        InputError: no parameter of the optimizer takes a gradient, or `rl` without advantages.
    """
    trainable = [p for p in optimized_parameters(optimizer) if p.requires_grad]
    if not trainable:
        raise InputError("the optimizer holds no parameter that requires a gradient; there is nothing to update")
    snapshot = Snapshot(model, optimizer, snapshot_device)
    try:
        model.zero_grad(set_to_none=True)
        scorer = Scorer(model, rollouts, replace(scoring, layout=None, entropy=False))
        coefficients = token_coefficients(rollouts, scorer.masks.generated, loss)
        value = accumulate_gradients(scorer, coefficients)
        limit = max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(trainable, limit))
        clipped = min(1.0, limit / (norm + 1e-6)) if norm > 0 else 1.0  # as clip_grad_norm_ does
        yield Gradients(value, norm, coefficients * clipped, snapshot)
    finally:
        snapshot.restore()


@contextlib.contextmanager
def one_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    scoring: Scoring,
    *,
    loss: TrainingLoss = "nll",
    master_weights: bool = False,
    max_grad_norm: float | None = None,
    snapshot_device: str = "same",
) -> Iterator[tuple[StepReport, Snapshot]]:
    """Inside the `with`, the model is one optimizer step further; afterwards everything is as it was, bit for bit.

    Args:
        model, optimizer, rollouts, scoring, loss, max_grad_norm, snapshot_device: see `gradients`. The optimizer steps
            once, as it is: its own state, weight decay and parameter groups.
        master_weights: step float32 copies of low-precision weights, so that no part of the step is rounded away.
            Score with `precision="float32"` inside. Frozen weights are not copied.

    Raises:
        InputError: see `gradients`.
    """
    with gradients(
        model,
        optimizer,
        rollouts,
        scoring,
        loss=loss,
        max_grad_norm=max_grad_norm,
        snapshot_device=snapshot_device,
    ) as gradient:
        if master_weights:
            _raise_to_float32(optimizer)
        optimizer.step()
        report = StepReport(gradient.loss, gradient.norm, gradient.snapshot.unchanged_share())
        model.zero_grad(set_to_none=True)  # the gradients have done their work; scoring needs the memory
        yield report, gradient.snapshot


def _raise_to_float32(optimizer: torch.optim.Optimizer) -> None:
    """Low-precision weights, their gradients and their state become float32; `Snapshot.restore` undoes it."""
    for parameter in optimized_parameters(optimizer):
        if parameter.dtype in _LOW and parameter.requires_grad:
            grad, parameter.grad = parameter.grad, None
            parameter.data = parameter.data.float()
            parameter.grad = None if grad is None else grad.float()
        entry = optimizer.state.get(parameter, {})
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.dtype in _LOW:
                entry[key] = value.float()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _LOW else dtype


def _random_state() -> tuple[Tensor, list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
