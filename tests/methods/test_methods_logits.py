"""Methods that distil between logits: their losses, gradients, schedules and whole runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mclfast import models, recipe
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.cohort.topology import topology
from mclfast.config import TrainConfig
from mclfast.losses.distillation import kd_loss, kd_loss_through_teacher
from mclfast.methods import Method, method_class
from mclfast.methods._options import sigmoid_rampup
from mclfast.methods._simplex import best_mixture
from mclfast.methods.kdcl import general_weights
from mclfast.methods.okddip import PeerAttention
from mclfast.methods.one import BranchGate
from mclfast.train.builder import build
from mclfast.train.trainer import Trainer

B, C, D = 5, 4, 16
STEM = {"topology": "shared_stem", "split_stage": 2}
# Every method as a run needs it, KDCL with each of its teachers.
RUNS: dict[str, dict[str, Any]] = {
    "dml": {"method": "dml", "cohort": "resnet8,resnet8,resnet8"},
    "dml on a stem": {"method": "dml", "cohort": "resnet8,resnet8"} | STEM,
    "cl-ilr": {"method": "cl-ilr", "cohort": "resnet8,resnet8,resnet8", "topology": "tree"},
    "one": {"method": "one", "cohort": "resnet8,resnet8"} | STEM,
    "okddip": {"method": "okddip", "cohort": "resnet8,resnet8,resnet8"} | STEM,
    "okddip apart": {"method": "okddip", "cohort": "resnet8,resnet8,resnet8"},
    **{
        f"kdcl {t}": {"method": "kdcl", "cohort": "resnet8,resnet8", "teacher": t}
        for t in ("naive", "linear", "minlogit", "general")
    },
}


pytestmark = pytest.mark.usefixtures("one_thread")


# Losses, written out from the papers in float64.


def literal_probabilities(row: Tensor, temperature: float) -> Tensor:
    e = (row / temperature - row.detach().max() / temperature).exp()
    return e / e.sum()


def literal_ce(logits: Tensor, labels: Tensor) -> Tensor:
    rows = [-literal_probabilities(z, 1.0)[y].log() for z, y in zip(logits, labels, strict=True)]
    return sum(rows[1:], start=rows[0]) / len(rows)


def literal_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    total = student.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        p, q = (literal_probabilities(z, temperature) for z in (t, s))
        for c in range(len(p)):
            total = total + p[c] * (p[c].log() - q[c].log())
    return temperature**2 * total / len(student)


@dataclass
class Case:
    """Random outputs of M networks in float64, every one of them a leaf."""

    outputs: PeerOutputs
    batch: Batch

    @property
    def logits(self) -> tuple[Tensor, ...]:
        return self.outputs.final_logits

    @property
    def leaves(self) -> list[Tensor]:
        shared = [] if self.outputs.shared is None else [self.outputs.shared]
        return [*self.outputs.final_features, *self.logits, *shared]


def make_case(networks: int, *, epoch: int = 0, scale: float = 3.0, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    features = tuple((leaf(B, D),) for _ in range(networks))
    logits = tuple(
        (torch.randn(B, C, generator=g, dtype=torch.float64).mul(scale).requires_grad_(),)
        for _ in range(networks)
    )
    labels = torch.randint(0, C, (B,), generator=g)
    batch = Batch(labels, torch.arange(B), step=0, epoch=epoch)
    return Case(PeerOutputs(features, logits, (), (), leaf(B, 6, 3, 2)), batch)


def make_method(name: str, case: Case, **options: Any) -> Method:
    cls = method_class(name)
    torch.manual_seed(1)
    method = cls([[D]] * len(case.logits), cls.Options(**options))
    method.prepare(Setup(case.batch.labels, C, None, case.outputs, seed=0))
    return method.double()


def check_loss(method: Method, case: Case, expected: Tensor) -> None:
    """The loss, and its gradient to every output and every parameter of the method."""
    inputs = [*case.leaves, *method.parameters()]
    found = method.loss(case.outputs, case.batch)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    got = torch.autograd.grad(found, inputs, allow_unused=True)
    want = torch.autograd.grad(expected, inputs, allow_unused=True)
    for g, w, x in zip(got, want, inputs, strict=True):
        zero = torch.zeros_like(x)
        torch.testing.assert_close(
            zero if g is None else g, zero if w is None else w, rtol=1e-9, atol=1e-13
        )


@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("options", [{}, {"distill_temperature": 1.0}])
def test_dml_loss(networks, options):
    case = make_case(networks)
    t, y, z = options.get("distill_temperature", 2.0), case.batch.labels, case.logits
    expected = sum(literal_ce(x, y) for x in z)
    for a, b in itertools.permutations(range(networks), 2):
        expected = expected + literal_kd(z[a], z[b].detach(), t) / (networks - 1)
    check_loss(make_method("dml", case, **options), case, expected)


@pytest.mark.parametrize("networks", [2, 3, 4])
@pytest.mark.parametrize(("weight", "t"), [(0.5, 2.0), (0.2, 1.5)])
def test_cl_ilr_loss(networks, weight, t):
    case = make_case(networks)
    y, z, expected = case.batch.labels, case.logits, torch.zeros((), dtype=torch.float64)
    for a in range(networks):
        others = sum(z[b].detach() for b in range(networks) if b != a) / (networks - 1)
        expected = expected + (1 - weight) * literal_ce(z[a], y)
        expected = expected + weight * literal_kd(z[a], others, t)
    options = {} if weight == 0.5 else {"distill_weight": weight, "distill_temperature": t}
    check_loss(make_method("cl-ilr", case, **options), case, expected)


def literal_gate(method: Method, shared: Tensor) -> Tensor:
    """[B, M], with the batch's own statistics."""
    p = dict(method.named_parameters())
    raw = shared.sum((2, 3)) / shared[0, 0].numel()
    raw = raw @ p["gate.linear.weight"].T + p["gate.linear.bias"]
    centred = raw - raw.sum(0) / B
    norm = centred / (centred.square().sum(0) / B + 1e-5).sqrt()
    e = (norm * p["gate.norm.weight"] + p["gate.norm.bias"]).clamp(min=0).exp()
    return e / e.sum(1, keepdim=True)


@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize(("epoch", "length"), [(0, 80), (30, 80), (79, 80), (80, 80), (0, 0)])
def test_one_loss(networks, epoch, length):
    case = make_case(networks, epoch=epoch)
    method = make_method("one", case, rampup_epochs=length, distill_temperature=2.0)
    r = 1.0 if epoch >= length else math.exp(-5 * (1 - epoch / length) ** 2)
    y, z = case.batch.labels, case.logits
    g = literal_gate(method, case.outputs.shared)
    ensemble = sum(g[:, a, None] * z[a] for a in range(networks))
    expected = sum(literal_ce(x, y) for x in z) + literal_ce(ensemble, y)
    for x in z:
        expected = expected + r * literal_kd(x, ensemble.detach(), 2.0)
    check_loss(method, case, expected)


@pytest.mark.parametrize("networks", [3, 4])
@pytest.mark.parametrize(("epoch", "length"), [(0, 80), (30, 80), (80, 80), (0, 0)])
def test_okddip_loss(networks, epoch, length):
    case = make_case(networks, epoch=epoch)
    method = make_method("okddip", case, rampup_epochs=length, distill_temperature=2.0)
    r = 1.0 if epoch >= length else math.exp(-5 * (1 - epoch / length) ** 2)
    y, z, h = case.batch.labels, case.logits, case.outputs.final_features
    p = dict(method.named_parameters())
    query, key = p["attention.query.weight"], p["attention.key.weight"]
    assert query.shape == key.shape == (D // 8, D)
    peers = range(networks - 1)
    expected = sum(literal_ce(x, y) for x in z)
    for a in peers:
        target = []
        for n in range(B):
            scores = torch.stack([(query @ h[a][n]) @ (key @ h[b][n]) for b in peers])
            share = scores.exp() / scores.exp().sum()
            target.append(sum(share[b] * z[b][n] for b in peers))
        expected = expected + r * literal_kd(z[a], torch.stack(target), 2.0)
    mean = sum(z[b] for b in peers) / (networks - 1)
    expected = expected + r * literal_kd(z[-1], mean, 2.0)
    check_loss(method, case, expected)


def literal_teacher(name: str, z: list[Tensor], labels: Tensor) -> Tensor:
    if name == "naive":
        rows = []
        for n, y in enumerate(labels):
            losses = [-literal_probabilities(x[n], 1.0)[y].log() for x in z]
            rows.append(z[losses.index(min(losses))][n])
        return torch.stack(rows)
    return torch.stack(
        [
            torch.stack([min(x[n, c] - x[n, y] for x in z) for c in range(C)])
            for n, y in enumerate(labels)
        ]
    )


@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("teacher", ["naive", "minlogit", "linear", "general"])
def test_kdcl_loss(networks, teacher):
    case = make_case(networks)
    method = make_method("kdcl", case, teacher=teacher, distill_weight=0.7, distill_temperature=1.5)
    y, z = case.batch.labels, case.logits
    constant = [x.detach() for x in z]
    if teacher in ("naive", "minlogit"):
        target = literal_teacher(teacher, constant, y)
    else:
        if teacher == "linear":
            weights = best_mixture(torch.stack(constant), y)
        else:
            weights = torch.tensor([1.25, *[-0.25 / (networks - 1)] * (networks - 1)])
            method.weights.copy_(weights)
        target = sum(w * x for w, x in zip(weights.double(), constant, strict=True))
    expected = sum(literal_ce(x, y) for x in z)
    for x in z:
        expected = expected + 0.7 * literal_kd(x, target, 1.5)
    check_loss(method, case, expected)


def test_defaults():
    """The published values, where the docstring does not call them choices."""
    ramp = {"distill_temperature": 3.0, "rampup_epochs": 80}
    wanted = {
        "dml": {"distill_temperature": 2.0},
        "kdcl": {
            "teacher": "linear",
            "distill_temperature": 2.0,
            "distill_weight": 1.0,
            "holdout_share": 0.1,
            "ridge": 1e-3,
        },
        "cl-ilr": {"distill_temperature": 2.0, "distill_weight": 0.5},
        "one": ramp,
        "okddip": ramp,
    }
    for name, values in wanted.items():
        assert values.items() <= vars(method_class(name).Options()).items(), name


# Pieces.


@pytest.mark.parametrize(
    ("epoch", "length", "expected"),
    [
        (0, 80, math.exp(-5)),
        (-3, 80, math.exp(-5)),
        (40, 80, math.exp(-1.25)),
        (79, 80, math.exp(-5 / 6400)),
        (80, 80, 1.0),
        (10_000, 80, 1.0),
        (0, 1, math.exp(-5)),
        (1, 1, 1.0),
        (0, 0, 1.0),
        (-1, 0, 1.0),
    ],
)
def test_sigmoid_rampup(epoch, length, expected):
    assert sigmoid_rampup(epoch, length) == pytest.approx(expected, rel=1e-12)


def test_sigmoid_rampup_rises():
    values = [sigmoid_rampup(epoch, 20) for epoch in range(21)]
    assert values == sorted(set(values))


def test_distillation_through_the_teacher():
    s, t = (x.requires_grad_() for x in torch.randn(2, B, C, dtype=torch.float64).mul(4))
    live, constant = kd_loss_through_teacher(s, t, 2.0), kd_loss(s, t, 2.0)
    torch.testing.assert_close(live, constant, rtol=1e-12, atol=0)
    assert torch.autograd.grad(constant, t, allow_unused=True)[0] is None
    assert torch.autograd.gradcheck(lambda a, b: kd_loss_through_teacher(a, b, 2.0), (s, t))


@pytest.mark.parametrize("function", [kd_loss, kd_loss_through_teacher])
def test_distillation_of_half_precision_is_that_of_its_float32_values(function):
    s, t = torch.randn(2, B, C).mul(4).bfloat16()
    found = function(s, t, 2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, function(s.float(), t.float(), 2.0))


def mixture_ce(weights: Tensor, logits: Tensor, labels: Tensor) -> float:
    return float(cross_entropy((weights[:, None, None] * logits.double()).sum(0), labels))


def random_problem(networks: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (32,), generator=g)
    logits = scale * torch.randn(networks, 32, 10, generator=g)
    rise = scale * torch.linspace(0.3, 1.5, networks)[:, None]
    logits[:, torch.arange(32), labels] += rise
    return logits, labels


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize(("networks", "parts"), [(2, 400), (3, 60)])
def test_mixture_is_best(networks, parts, scale):
    """Against every point of a grid on the simplex."""
    logits, labels = random_problem(networks, scale, seed=networks)
    weights = best_mixture(logits, labels)
    assert weights.dtype == torch.float64
    assert weights.min() >= 0 and float(weights.sum()) == pytest.approx(1, abs=1e-12)
    grid = [p for p in itertools.product(range(parts + 1), repeat=networks) if sum(p) == parts]
    points = torch.tensor(grid, dtype=torch.float64) / parts
    least = min(mixture_ce(point, logits, labels) for point in points)
    assert mixture_ce(weights, logits, labels) <= least + 1e-4


@pytest.mark.parametrize("networks", [2, 4, 8])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 300.0])
def test_mixture_meets_its_tolerance(networks, scale):
    """A subgradient bound of convex functions: f(a) - min f <= max_i grad . (a - e_i)."""
    for seed in range(3):
        logits, labels = random_problem(networks, scale, seed)
        weights = best_mixture(logits, labels, tolerance=1e-6).requires_grad_()
        mixed = (weights[:, None, None] * logits.double()).sum(0)
        (gradient,) = torch.autograd.grad(cross_entropy(mixed, labels), weights)
        assert float(weights.detach() @ gradient - gradient.min()) <= 1.001e-6


def test_mixture_of_special_networks():
    logits, labels = random_problem(1, 1.0, seed=0)
    assert best_mixture(logits, labels).tolist() == [1.0]
    same = best_mixture(logits.expand(3, -1, -1), labels)
    assert same.tolist() == pytest.approx([1 / 3] * 3)
    # One network that is always right against its opposite.
    right = 8 * torch.nn.functional.one_hot(labels, 10).float()
    found = best_mixture(torch.stack((-right, right)), labels)
    assert found[1] > 0.999
    # A run that diverged is for the trainer to report, not for a search without end.
    assert best_mixture(logits.expand(2, -1, -1) * float("nan"), labels).shape == (2,)
    live, labels = random_problem(2, 1.0, seed=0)
    assert not best_mixture(live.requires_grad_(), labels).requires_grad


def test_general_weights():
    logits, labels = random_problem(3, 2.0, seed=0)
    ridge = 0.01
    correlation = [[0.0] * 3 for _ in range(3)]
    for i, j, k in itertools.product(range(3), range(3), range(32)):
        target = torch.zeros(10, dtype=torch.float64)
        target[labels[k]] = 1
        errors = [literal_probabilities(logits[m, k].double(), 1.0) - target for m in (i, j)]
        correlation[i][j] += float(errors[0] @ errors[1]) / 32
    mean = sum(correlation[i][i] for i in range(3)) / 3
    for i in range(3):
        correlation[i][i] += ridge * mean
    inverse = torch.linalg.inv(torch.tensor(correlation, dtype=torch.float64))
    expected = inverse.sum(1) / inverse.sum()
    torch.testing.assert_close(general_weights(logits, labels, ridge), expected)


def test_general_weights_of_equal_and_of_perfect_networks():
    logits, labels = random_problem(1, 2.0, seed=0)
    same = general_weights(logits.expand(4, -1, -1), labels, 1e-3)
    assert same.tolist() == pytest.approx([0.25] * 4)
    right = 1e4 * torch.nn.functional.one_hot(labels, 10).float()
    assert general_weights(right.expand(2, -1, -1), labels, 1e-3).tolist() == [0.5, 0.5]
    # Nearly equal, one of them worse: the worse one may be subtracted, the sum stays one.
    worse = torch.stack((logits[0], 0.9 * logits[0]))
    weights = general_weights(worse, labels, 1e-6)
    assert weights.min() < 0 and float(weights.sum()) == pytest.approx(1)


def test_ensembles():
    case = make_case(4)
    z = case.logits
    okddip = make_method("okddip", case)
    torch.testing.assert_close(okddip.ensemble(case.outputs), (z[0] + z[1] + z[2]) / 3)
    one = make_method("one", case)
    g = literal_gate(one, case.outputs.shared)
    expected = sum(g[:, a, None] * z[a] for a in range(4))
    torch.testing.assert_close(one.ensemble(case.outputs), expected)
    # In evaluation an image's ensemble does not depend on the others of its batch.
    one.eval()
    few = PeerOutputs((), tuple((x[:2],) for x in z), (), (), case.outputs.shared[:2])
    torch.testing.assert_close(one.ensemble(few), one.ensemble(case.outputs)[:2])
    for name in ("dml", "cl-ilr", "kdcl"):
        torch.testing.assert_close(make_method(name, case).ensemble(case.outputs), sum(z) / 4)


# Real cohorts.


def run(name: str, **values: Any) -> TrainConfig:
    small = {
        "data": "digits-full",
        "train_per_class": 20,
        "batch_size": 20,
        "images_per_class": 2,
        "lr": 0.1,
        "device": "cpu",
    }
    return TrainConfig.from_values(small | RUNS[name] | values)


def first_step(trainer: Trainer) -> tuple[PeerOutputs, Batch]:
    rows = trainer.sampler.epoch(0)
    images, labels, index = next(iter(trainer.feed.batches(rows, first_step=0)))
    return trainer.cohort(images), Batch(labels, index, step=0, epoch=0)


def reached(loss: Tensor, trainer: Trainer) -> set[str]:
    """Names of the parameters that a loss gives a gradient other than zero."""
    named = {f"cohort.{n}": p for n, p in trainer.cohort.named_parameters()}
    named |= {f"method.{n}": p for n, p in trainer.method.named_parameters()}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        n for n, g in zip(named, grads, strict=True) if g is not None and bool(g.abs().sum() > 0)
    }


def of_network(names: set[str], i: int) -> set[str]:
    return {n for n in names if n.startswith(f"cohort.networks.{i}.")}


@pytest.mark.parametrize("name", RUNS)
def test_loss_reaches_every_parameter(name):
    trainer = build(run(name))
    outputs, batch = first_step(trainer)
    parts = trainer.method.loss(outputs, batch)
    everything = {f"cohort.{n}" for n, _ in trainer.cohort.named_parameters()}
    everything |= {f"method.{n}" for n, _ in trainer.method.named_parameters()}
    if name.startswith("one"):
        # The shift before a batch norm has no effect: what is left of its gradient is rounding.
        everything.discard("method.gate.linear.bias")
    assert everything <= reached(parts["loss"], trainer)


@pytest.mark.parametrize(
    ("name", "teacher"), [("dml", "distill"), ("cl-ilr", "distill"), ("kdcl linear", "distill")]
)
def test_teachers_are_constants(name, teacher):
    """The gradient of distillation alone is the same where the peers are copies without one."""
    trainer = build(run(name, topology="independent"))
    outputs, batch = first_step(trainer)
    frozen = [tuple(z.detach() for z in stages) for stages in outputs.logits]
    for i in range(len(frozen)):
        mixed = (*frozen[:i], outputs.logits[i], *frozen[i + 1 :])
        parts = trainer.method.loss(outputs._replace(logits=mixed), batch)
        names = reached(parts[teacher], trainer)
        assert names and names == of_network(names, i)
        # With all networks live, another network's share of the loss adds nothing to this one.
        mine = [p for n, p in trainer.cohort.named_parameters() if n.startswith(f"networks.{i}.")]
        everyone = trainer.method.loss(outputs, batch)[teacher]
        alone, together = (
            torch.autograd.grad(x, mine, retain_graph=True) for x in (parts[teacher], everyone)
        )
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b)


def test_one_gate_learns_from_the_ensembles_labels_only():
    trainer = build(run("one"))
    outputs, batch = first_step(trainer)
    parts = trainer.method.loss(outputs, batch)
    gate = {"method.gate.linear.weight", "method.gate.norm.weight", "method.gate.norm.bias"}
    names = {k: reached(parts[k], trainer) for k in ("ce", "ensemble_ce", "distill")}
    assert gate <= names["ensemble_ce"]
    for part in ("ce", "distill"):
        assert not any(n.startswith("method.") for n in names[part])
    assert all(of_network(names["ensemble_ce"], i) for i in range(2))


def test_okddip_targets_are_live():
    trainer = build(run("okddip apart"))
    outputs, batch = first_step(trainer)
    parts = trainer.method.loss(outputs, batch)
    attention = {"method.attention.query.weight", "method.attention.key.weight"}
    names = {k: reached(parts[k], trainer) for k in ("ce", "peer_distill", "leader_distill")}
    assert attention <= names["peer_distill"]
    assert not attention & (names["ce"] | names["leader_distill"])
    # The leader teaches nobody; the auxiliary peers learn from its distillation too.
    assert [bool(of_network(names["peer_distill"], i)) for i in range(3)] == [True, True, False]
    assert all(of_network(names["leader_distill"], i) for i in range(3))
    # The last block's features reach the attention without going through a classifier.
    frozen = tuple(tuple(z.detach() for z in stages) for stages in outputs.logits)
    constant = trainer.method.loss(outputs._replace(logits=frozen), batch)["peer_distill"]
    names_of_features = reached(constant, trainer)
    assert attention <= names_of_features
    assert [bool(of_network(names_of_features, i)) for i in range(3)] == [True, True, False]
    assert not any("classifier" in n or n.endswith("fc.weight") for n in names_of_features)


@pytest.mark.parametrize(
    ("networks", "stage2"), [(4, (0.5, 0.5)), (3, (0.5, 1.0)), (6, (0.5, 0.5, 0.5))]
)
def test_cl_ilr_divides_gradients_where_the_tree_splits(networks, stage2):
    trainer = build(run("cl-ilr", cohort=",".join(["resnet8"] * networks)))
    cohort = trainer.cohort
    assert cohort.topology is not None and cohort.topology.rescale_gradients

    def gradients(rescale: bool) -> dict[str, Tensor]:
        cohort.topology = topology("tree", networks, 3, split_stage=1, rescale_gradients=rescale)
        outputs, batch = first_step(trainer)
        loss = trainer.method.loss(outputs, batch)["loss"]
        named = dict(cohort.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    plain, divided = gradients(False), gradients(True)
    stages = [(k, peer.backbone.stages[k]) for k in range(3) for peer in cohort.peers]
    level = {id(p): k for k, stage in stages for p in stage.parameters()}
    seen = set()
    for name, p in cohort.named_parameters():
        if level.get(id(p)) == 2 or "fc" in name or "classifier" in name:
            torch.testing.assert_close(divided[name], plain[name])
            seen.add("own")
        elif level.get(id(p)) == 1:
            pair = int(name.split(".")[1]) // 2
            torch.testing.assert_close(divided[name], stage2[pair] * plain[name])
            seen.add(f"pair{pair}")
        elif networks != 3:
            # Divided by the number of pairs, and by two.
            want = plain[name] / networks
            torch.testing.assert_close(divided[name], want, rtol=1e-4, atol=1e-6)
            seen.add("trunk")
    assert seen >= {"own", "pair0", "pair1"} and ("trunk" in seen) == (networks != 3)


def test_kdcl_views_and_images_kept_back():
    trainer = build(run("kdcl general", holdout_share=0.2))
    assert len(trainer.data.train) == 160 and len(trainer.held_out) == 40
    images, _, _ = next(iter(trainer.feed.batches(trainer.sampler.epoch(0), first_step=0)))
    assert len(images) == 2 and not torch.equal(images[0], images[1])
    assert trainer.method.weights.tolist() == [0.5, 0.5]
    trainer._tell_held_out()
    weights = trainer.method.weights.clone()
    assert weights.tolist() != [0.5, 0.5] and float(weights.sum()) == pytest.approx(1)
    # A run that goes on within an epoch goes on with that epoch's weights.
    resumed = build(run("kdcl general", holdout_share=0.2))
    resumed.load_state(trainer.state())
    assert torch.equal(resumed.method.weights, weights)
    for teacher in ("naive", "linear", "minlogit"):
        other = build(run(f"kdcl {teacher}"))
        assert other.held_out is None and len(other.data.train) == 200
        other._tell_held_out()
        assert other.method.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", RUNS)
def test_half_precision(name):
    trainer = build(run(name, amp="bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, batch = first_step(trainer)
        assert outputs.final_logits[0].dtype == torch.bfloat16
        parts = trainer.method.loss(outputs, batch)
    for value in parts.values():
        assert value.dtype == torch.float32 and bool(value.isfinite())
    full = trainer.method.loss(
        outputs._replace(
            logits=tuple(tuple(z.float() for z in stages) for stages in outputs.logits),
            features=tuple(tuple(f.float() for f in stages) for stages in outputs.features),
            shared=None if outputs.shared is None else outputs.shared.float(),
        ),
        batch,
    )
    # What no module of the method has part in is computed in float32 from the same logits.
    exact = {"ce", "leader_distill"} | ({"distill"} if name != "one" else set())
    for key, value in parts.items():
        torch.testing.assert_close(value, full[key], rtol=1e-5 if key in exact else 2e-2, atol=0)


def test_gate_and_attention_of_half_precision_are_wide():
    torch.manual_seed(0)
    gate, attention = BranchGate(6, 3), PeerAttention(16)
    features = 300 * torch.randn(B, 3, 16)
    with torch.autocast("cpu", torch.float16):
        shares = gate(torch.randn(B, 6, 2, 2)), attention(features)
    for rows in shares:
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    # Scores beyond what float16 holds.
    scores = attention.query(features) @ attention.key(features).mT
    assert scores.abs().max() > 65504
    # Too large to tie: each peer listens to one.
    torch.testing.assert_close(shares[1], scores.softmax(-1), rtol=0, atol=1e-3)


def states(trainer: Trainer) -> dict[str, Tensor]:
    modules = {"cohort": trainer.cohort, "method": trainer.method}
    found = {f"{k}.{n}": t for k, m in modules.items() for n, t in m.state_dict().items()}
    momenta = trainer.train_step.optimizer.state_dict()["state"]
    return found | {f"momentum.{i}": s["momentum_buffer"] for i, s in momenta.items()}


@pytest.mark.parametrize(
    "name", ["dml on a stem", "cl-ilr", "one", "okddip", "kdcl linear", "kdcl general"]
)
def test_a_run_learns_and_resumes(name, tmp_path):
    # The weight of distillation changes within the run and between its parts.
    ramp = {"rampup_epochs": 3} if name.startswith(("one", "okddip")) else {}
    config = run(name, epochs=4, **ramp)
    whole = build(config)
    result = whole.fit(progress=False)
    assert min(result.peers) > 30 and result.ensemble > 30, result
    build(config, tmp_path).fit(progress=False, stop_after=1)
    resumed = build(config, tmp_path)
    again = resumed.fit(progress=False)
    assert (again.peers, again.ensemble) == (result.peers, result.ensemble)
    mine, theirs = states(whole), states(resumed)
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []


# Refusals and recipes.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(
            (
                {"method": m, "cohort": "resnet8"} | (STEM if m == "one" else {}),
                f"cohort: expected at least 2 networks for method {m}, got 1",
            )
            for m in ("dml", "kdcl", "cl-ilr", "one")
        ),
        (
            {"method": "okddip", "cohort": "resnet8,resnet8"},
            "cohort: expected at least 3 networks for method okddip, got 2",
        ),
        (
            {"method": "okddip", "cohort": "resnet8,wrn_16_2,resnet8"},
            "cohort: expected features of one width for method okddip in all networks but the "
            r"last, got \[64, 128\]",
        ),
        (
            {"method": "one", "cohort": "resnet8,resnet8"},
            "topology: expected shared_stem or tree for method one, whose gate needs a map "
            "shared by all networks, got networks that share none",
        ),
    ],
)
def test_cohorts_that_cannot_work(values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(TrainConfig.from_values({"data": "digits", "device": "cpu"} | values))


def test_different_networks():
    """Where nothing is shared, networks may differ; okddip's leader too."""
    for name, cohort in (
        ("dml", "resnet8,wrn_16_2"),
        ("kdcl linear", "resnet8,wrn_16_2"),
        ("cl-ilr", "resnet8,wrn_16_2"),
        ("okddip apart", "resnet8,resnet8,wrn_16_2"),
    ):
        trainer = build(run(name, cohort=cohort, topology="independent"))
        outputs, batch = first_step(trainer)
        assert bool(trainer.method.loss(outputs, batch)["loss"].isfinite())


@pytest.mark.parametrize(
    ("method", "name", "value", "message"),
    [
        ("dml", "distill_temperature", 0, r"expected a number in \[1e-6, 1e6\], got 0.0"),
        ("cl-ilr", "distill_weight", 1.5, r"expected a value in \[0, 1\], got 1.5"),
        ("cl-ilr", "distill_weight", float("nan"), r"expected a value in \[0, 1\], got nan"),
        ("kdcl", "distill_weight", -1, "expected a finite number >= 0, got -1.0"),
        ("kdcl", "ridge", 0, "expected a finite number > 0, got 0.0"),
        ("kdcl", "holdout_share", 1, r"expected a value in \(0, 1\), got 1.0"),
        ("kdcl", "teacher", "mean", "expected one of naive, linear, minlogit, general; got 'mean'"),
        ("one", "rampup_epochs", -1, "expected an integer >= 0, got -1"),
        ("okddip", "rampup_epochs", 2.5, "expected an integer, got 2.5"),
    ],
)
def test_options_out_of_range(method, name, value, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}$"):
        TrainConfig.from_values({"method": method, name: value})


def test_loss_before_prepare():
    case = make_case(2)
    one = method_class("one")([[D]] * 2)
    with pytest.raises(RuntimeError, match="^ensemble: expected prepare"):
        one.loss(case.outputs, case.batch)


# Parameters of the cohort and of the method together, as published for four networks.
PUBLISHED_PARAMETERS = {
    ("dml", "resnet32"): 1_819_552,
    ("cl-ilr", "resnet32"): 1_642_016,
    ("one", "resnet32"): 1_553_388,
    ("okddip", "resnet32"): 1_554_272,
    ("dml", "resnet110"): 4_517_344,
    ("cl-ilr", "resnet110"): 4_077_536,
    ("one", "resnet110"): 3_858_156,
    ("okddip", "resnet110"): 3_874_016,
}


@pytest.mark.parametrize(("name", "network"), PUBLISHED_PARAMETERS)
def test_recipes_build_the_published_networks(name, network):
    config = TrainConfig.from_values(recipe.load(f"{name}-cifar100"))
    cls = method_class(name)
    cohort = Cohort(
        [models.create(network, num_classes=100) for _ in range(4)],
        auxiliary_heads=cls.auxiliary_heads,
        projection_dim=None,
        topology=topology(config.topology, 4, 3, split_stage=config.split_stage),
    ).eval()
    method = cls(cohort.feature_dims, config.options)
    with torch.no_grad():
        example = cohort(torch.zeros(2, 3, 32, 32))
    method.prepare(Setup(torch.zeros(2, dtype=torch.int64), 100, None, example, seed=0))
    found = sum(p.numel() for m in (cohort, method) for p in m.parameters())
    assert found == PUBLISHED_PARAMETERS[name, network]


def test_recipes_hold_the_published_settings():
    common = {
        "data": "cifar100",
        "epochs": 300,
        "batch_size": 128,
        "sampler": "shuffle",
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
    }
    steps = {"schedule": "multistep", "milestones": [150, 225], "lr_decay": 0.1}
    ramp = {"distill_temperature": 3.0, "rampup_epochs": 80}
    stem = {"topology": "shared_stem"}
    expected = {
        "dml": {"cohort": ["resnet32"] * 4, "schedule": "cosine", "distill_temperature": 2.0}
        | {"split_stage": 1}
        | stem,
        "cl-ilr": {"cohort": ["resnet32"] * 4, "schedule": "cosine", "distill_weight": 0.5}
        | {"topology": "tree", "split_stage": 1, "distill_temperature": 2.0},
        "one": {"cohort": ["resnet32"] * 3, "split_stage": 2}
        | stem
        | ramp
        | steps
        | {"nesterov": False, "weight_decay": 1e-4, "milestones": [151, 225]},
        "okddip": {"cohort": ["resnet32"] * 4, "split_stage": 2} | stem | ramp | steps,
        "kdcl": {"cohort": ["resnet32", "wrn_16_2"], "topology": "independent"}
        | {"teacher": "general", "distill_temperature": 2.0, "distill_weight": 1.0},
    }
    for name, values in expected.items():
        found = TrainConfig.from_values(recipe.load(f"{name}-cifar100")).to_values()
        want = {"method": name} | common | values
        assert {k: found[k] for k in want} == want
