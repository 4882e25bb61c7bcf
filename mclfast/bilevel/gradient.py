"""The exact gradient of a bilevel objective through a few SGD steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mclfast._base.checks import (
    FLOAT_DTYPES,
    check_integer,
    check_not_negative,
    check_positive,
    describe,
)
from mclfast._base.random import rng_restored
from mclfast.bilevel.dual_ops import ConvolutionTape
from mclfast.bilevel.forward_choice import ForwardChoice
from mclfast.bilevel.known_ops import reads
from mclfast.bilevel.param_vector import ParamVector
from mclfast.bilevel.split_step import NetworkFunctions, Part, SplitStep
from mclfast.bilevel.step import Step, grad, zeros_for_none
from mclfast.bilevel.twice import named_refusals


class BilevelResult(NamedTuple):
    """Result of :func:`bilevel_gradient`.

    Attributes:
        grads: gradient of the final outer loss for each hyperparameter, in the order given.
        inner_losses: value of ``inner`` before each inner step, 0-dim each.
        outer_loss: value of ``outer`` after all steps, 0-dim.
    """

    grads: tuple[Tensor, ...]
    inner_losses: tuple[Tensor, ...]
    outer_loss: Tensor


def bilevel_gradient(
    inner: Callable[[Any], Tensor],
    outer: Callable[[Any], Tensor],
    params: Mapping[str, Tensor],
    hyperparams: Iterable[Tensor],
    *,
    network: Part | Sequence[Part] | None = None,
    inner_steps: int = 2,
    outer_steps: int = 1,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> BilevelResult:
    """Gradient of the outer loss after a few SGD steps with respect to ``hyperparams``.

    Starting from ``params`` with zero momentum, takes ``inner_steps`` SGD steps (PyTorch's update,
    no Nesterov) on ``inner``, then ``outer_steps`` on ``outer`` with the same momentum buffers, and
    differentiates ``outer`` at the end through all of them. Equals autograd through the unrolled
    steps, without keeping them: each step is recomputed from its stored parameters in the reverse
    sweep

        u = V - lr A;   X = <g(theta, phi), u>;   A <- A + wd u + dX/dtheta;   V <- momentum u

    where A and V are the adjoints of the parameters and of the momentum. (The published code
    leaves the factor wd off the momentum adjoint.)

    Without ``network``, X is differentiated as the product of a gradient. With it, X = <dL/do, J u>
    for a loss L of outputs o: forward mode gives J u, one backward pass the gradient of the later
    steps, and the first step needs no backward pass through the networks at all. The whole takes
    about 10 ordinary steps' time and twice the activations of one, see
    :mod:`mclfast.bilevel.split_step`. A list of networks keeps the activations of one network at a
    time, and runs each network twice as often.

    Forward mode is taken only if the graphs of the networks hold no operation but those whose rules
    are known to be right (:mod:`mclfast.bilevel.known_ops`; attention is not among them), and if no
    network reads ``hyperparams``. Otherwise X is differentiated as without ``network``, and a line
    in the log of ``mclfast.bilevel`` says why. Attention of PyTorch is computed by its plain
    operations, because the fused ones cannot be differentiated twice. PyTorch's second derivative
    of ``weight_norm`` is wrong, and with it the gradient through unrolled steps, this one too; the
    log says so.

    The outer loss may depend on ``hyperparams`` directly too. Hyperparameters may be among the
    parameters or lead to them, as learned initial values do: the gradient then goes on through
    ``params``.

    Args:
        inner: function from parameters (with the keys of ``params``), or from the outputs of
            ``network``, to a 0-dim loss that depends on ``hyperparams``; differentiable twice.
        outer: function like ``inner``, of the objective that ``hyperparams`` should lower.
        params: parameters before the first step; one that a loss does not use has gradient zero. A
            ``torch.nn.Parameter`` without ``requires_grad`` takes no part in the steps; a plain
            tensor always does.
        hyperparams: tensors with ``requires_grad`` that the losses or ``network`` read.
        network: function from parameters to outputs, any nest of tuples, lists, named tuples,
            mappings and dataclasses with tensors; or a list of such functions, and the losses then
            take the list of their outputs. It (or the losses, without it) must use the values that
            it is passed, e.g. by ``torch.func.functional_call``, and do the same operations
            whenever it is run.
        inner_steps: number of steps on ``inner``, >= 1.
        outer_steps: number of steps on ``outer``, >= 0.
        lr: learning rate of the SGD steps differentiated through, > 0.
        momentum, weight_decay: settings of the SGD steps differentiated through, >= 0.

    Returns:
        BilevelResult(grads, inner_losses, outer_loss). Parameters, ``.grad`` fields and the state
        of the random number generators are left as they were; the objectives draw the same random
        numbers when recomputed. Objectives and networks that change buffers should work on copies
        of them (:mod:`mclfast.cohort.functions` does).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
        NotImplementedError: an operation cannot be differentiated twice; the text names it.

    Examples:
        >>> import torch
        >>> from mclfast import bilevel_gradient
        >>> params = {"w": torch.tensor(1.0)}
        >>> weight = torch.tensor(0.5, requires_grad=True)              # what is learned
        >>> result = bilevel_gradient(
        ...     lambda p: weight * p["w"] ** 2, lambda p: (p["w"] - 0.5) ** 2, params, [weight],
        ...     inner_steps=1, outer_steps=0, lr=0.1, momentum=0.0, weight_decay=0.0,
        ... )
        >>> # w = 1 - 0.1 * 2 * 0.5 = 0.9, so the gradient is 2 * (0.9 - 0.5) * -0.1 * 2.
        >>> torch.allclose(result.grads[0], torch.tensor(-0.16))
        True

    Source: layer-wise MCL, arXiv 2207.11518, section 3.4; forward mode over a backward pass:
    Pearlmutter, Neural Computation 1994.
    """
    check_integer("inner_steps", inner_steps, 1)
    check_integer("outer_steps", outer_steps, 0)
    check_positive("lr", lr)
    check_not_negative("momentum", momentum)
    check_not_negative("weight_decay", weight_decay)
    trained = _checked_params(params)
    hyperparams = _checked_hyperparams(hyperparams)
    networks = _checked_networks(network)
    if len(trained) < len(params):
        # Whatever takes parameters is given those that do not train too, as constants.
        with_all = _with_constants(params, trained)
        if networks is None:
            inner, outer = with_all(inner), with_all(outer)
        else:
            networks = networks._replace(parts=tuple(map(with_all, networks.parts)))
    objectives = [("inner", inner)] * inner_steps + [("outer", outer)] * outer_steps

    #: Whether the parameters are hyperparameters (learned initial values), or computed from some.
    from_hyperparams = reads(trained.values(), hyperparams)
    choice = ForwardChoice(hyperparams, 0 if networks is None else len(networks.parts))

    def step_at(number: int, values: ParamVector) -> Step:
        theta = dict(zip(trained, values.tensors, strict=True))
        argument, loss = objectives[number] if number < len(objectives) else ("outer", outer)
        if networks is None:
            return Step(argument, loss, theta)
        # Only the last step keeps outputs: they are used up before any step has a graph again.
        # Outputs of an earlier step would take memory on top of the graph of another.
        tape = ConvolutionTape() if number == len(objectives) - 1 else None
        return SplitStep(argument, loss, networks, theta, choice, tape)

    with rng_restored(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), named_refusals():
        like = [p.detach() for p in trained.values()]
        theta, velocity = ParamVector(like, like), ParamVector(like)
        steps: list[Step] = []
        losses: list[Tensor] = []
        for number in range(len(objectives)):
            steps.append(step_at(number, theta))
            loss, grads, _ = steps[-1].gradient()
            losses.append(loss)
            velocity.mul_(momentum).add_(ParamVector(like, grads)).add_(theta, weight_decay)
            del grads
            theta = theta.plus(velocity, -lr)
        del velocity
        # The outer loss may read hyperparameters itself, beside the parameters they led to.
        outer_loss, grads, hyper_grads = step_at(len(objectives), theta).gradient(hyperparams)
        adjoint, momentum_adjoint = ParamVector(like, grads), ParamVector(like)
        del grads

        while steps:
            u = momentum_adjoint.plus(adjoint, -lr)
            # Where the parameters before the first step are given, their adjoint is not needed.
            with_params = len(steps) > 1 or from_hyperparams
            product = steps.pop().product
            along, for_hyper = product(u.tensors, hyperparams, with_params=with_params)
            del product
            hyper_grads = [a + b for a, b in zip(hyper_grads, for_hyper, strict=True)]
            adjoint.add_(u, weight_decay).add_(ParamVector(like, along))
            momentum_adjoint = u.mul_(momentum)
        if from_hyperparams:
            start = list(trained.values())
            found = grad(start, hyperparams, adjoint.tensors, retain_graph=True)
            more = zeros_for_none(found, hyperparams)
            hyper_grads = [a + b for a, b in zip(hyper_grads, more, strict=True)]

    return BilevelResult(tuple(hyper_grads), tuple(losses[:inner_steps]), outer_loss)


def _checked_params(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that train."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a mapping of tensors, got {describe(params)}")
    if not params:
        raise ValueError("params: expected at least one tensor, got none")
    for name, value in params.items():
        if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"params[{name!r}]: expected a floating-point tensor, got {describe(value)}"
            )
    trained = {
        name: value
        for name, value in params.items()
        if value.requires_grad or not isinstance(value, nn.Parameter)
    }
    if not trained:
        raise ValueError("params: expected at least one parameter with requires_grad, got none")
    return trained


def _with_constants(
    params: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Turns a function of all parameters into one of those that train."""
    constants = {name: value.detach() for name, value in params.items() if name not in trained}

    def of_trained(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda theta: function(
            {name: theta[name] if name in theta else constants[name] for name in params}
        )

    return of_trained


def _checked_hyperparams(hyperparams: Iterable[Tensor]) -> list[Tensor]:
    # A lone tensor is iterable too: its rows would pass for hyperparameters that no loss uses.
    if isinstance(hyperparams, Tensor) or not isinstance(hyperparams, Iterable):
        raise TypeError(f"hyperparams: expected a list of tensors, got {describe(hyperparams)}")
    found = list(hyperparams)
    for i, hyperparam in enumerate(found):
        if not isinstance(hyperparam, Tensor):
            raise TypeError(f"hyperparams[{i}]: expected a tensor, got {describe(hyperparam)}")
        if not hyperparam.requires_grad:
            raise ValueError(
                f"hyperparams[{i}]: expected a tensor with requires_grad, got one without it"
            )
    return found


def _checked_networks(network: Part | Sequence[Part] | None) -> NetworkFunctions | None:
    if network is None:
        return None
    parts = (network,) if callable(network) else network
    if not isinstance(parts, Sequence) or not all(callable(part) for part in parts):
        raise TypeError(
            f"network: expected a function of the parameters or a list of them, got "
            f"{describe(network)}"
        )
    if not parts:
        raise ValueError("network: expected at least one function, got none")
    return NetworkFunctions(tuple(parts), callable(network))
