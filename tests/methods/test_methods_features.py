"""Methods that learn from features, maps and banks: losses, gradients, schedules, whole runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import golden
from mclfast import Batch, Cohort, models
from mclfast.banks.sampler import ContrastIndices
from mclfast.cohort.heads import ProjectionHead
from mclfast.cohort.outputs import PeerOutputs, Setup
from mclfast.config import TrainConfig
from mclfast.methods import Method, method_class
from mclfast.methods.ffl import FusionModule
from mclfast.train.builder import build
from mclfast.train.trainer import Trainer

METHODS = ("afd", "ffl", "mcl-okd", "pcl")
TINY = {
    "data": "digits",
    "cohort": "resnet8,resnet8",
    "epochs": 2,
    "batch_size": 20,
    "images_per_class": 2,
    "projection_dim": 16,
    "device": "cpu",
}
BATCH, CLASSES = 6, 4


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(method: str, run_dir: Any = None, **values: Any) -> Trainer:
    if method == "mcl-okd":
        values = {"num_negatives": 16} | values
    return build(TrainConfig.from_values(TINY | {"method": method} | values), run_dir)


def leaf(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (scale * values).requires_grad_()


def fake_outputs(shapes: Sequence[tuple[int, int]], *, teacher: bool = False) -> PeerOutputs:
    """Random outputs of networks with maps of a width and a side each."""

    def logits(first_seed: int) -> tuple[tuple[Tensor], ...]:
        seeds = range(first_seed, first_seed + len(shapes))
        return tuple((leaf(BATCH, CLASSES, seed=seed, scale=2),) for seed in seeds)

    found = PeerOutputs(
        features=tuple((leaf(BATCH, w, seed=i),) for i, (w, _) in enumerate(shapes)),
        logits=logits(10),
        embeddings=(),
        maps=tuple(leaf(BATCH, w, s, s, seed=20 + i) for i, (w, s) in enumerate(shapes)),
    )
    return found._replace(teacher=found._replace(logits=logits(30)) if teacher else None)


def prepared(name: str, outputs: PeerOutputs, **options: Any) -> Method:
    cls = method_class(name)
    torch.manual_seed(0)
    method = cls([[f.shape[1]] for f in outputs.final_features], cls.Options(**options))
    method.prepare(Setup(torch.arange(12) % CLASSES, CLASSES, None, outputs, 0))
    return method


def batch(epoch: int = 0) -> Batch:
    return Batch(torch.arange(BATCH) % CLASSES, torch.arange(BATCH), 0, epoch)


def doubles(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().double() for k, v in module.named_parameters()}


def ce64(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = logits.double() - logits.double().exp().sum(1, keepdim=True).log()
    return -log_p[torch.arange(len(labels)), labels].mean()


def kd64(student: Tensor, teacher: Tensor, t: float = 3.0) -> Tensor:
    def distribution(z: Tensor) -> Tensor:
        e = (z.double() / t).exp()
        return e / e.sum(1, keepdim=True)

    p, q = distribution(teacher.detach()), distribution(student)
    return t**2 * (p * (p / q).log()).sum(1).mean()


def rampup64(epoch: int, length: int) -> float:
    return math.exp(-5 * (1 - min(max(epoch, 0), length) / length) ** 2)


def close(got: Tensor, want: Tensor | float, tolerance: float = 1e-5) -> None:
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def gradient(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(inputs), retain_graph=True, materialize_grads=True))


def check_loss(got: Tensor, want: Tensor, outputs: PeerOutputs) -> None:
    """Value of a loss, and its gradient to all that the networks put out and were taught by."""
    close(got, want)
    inputs = [*outputs.final_logits, *outputs.final_features, *outputs.maps]
    inputs += [e for (e,) in outputs.embeddings]
    if outputs.teacher is not None:
        inputs += outputs.teacher.final_logits
    for g, w in zip(gradient(got, inputs), gradient(want, inputs), strict=True):
        close(g, w)


# ---------------------------------------------------------------- PCL


@pytest.mark.parametrize("epoch", [0, 1, 5, 40, 79, 80, 81, 299])
def test_loss_of_pcl(epoch):
    outputs = fake_outputs([(3, 2), (3, 2), (5, 2)], teacher=True)
    method = prepared("pcl", outputs, distill_weight=0.7, distill_temperature=2.0)
    got = method.loss(outputs, batch(epoch))
    labels = batch().labels
    z, t = outputs.final_logits, outputs.teacher.final_logits
    p = doubles(method.classifier)
    together = torch.cat([f.double() for f in outputs.final_features], 1) @ p["weight"].T
    together = together + p["bias"]
    w = 0.7 * rampup64(epoch, 80)
    want = ce64(together, labels)
    for j in range(3):
        others = [kd64(z[j], t[i], 2.0) for i in range(3) if i != j]
        want = want + ce64(z[j], labels) + w * (kd64(z[j], together, 2.0) + sum(others) / 2)
    check_loss(got["loss"], want, outputs)


def test_teachers_of_pcl_are_constants_and_the_ensemble_reaches_every_peer():
    outputs = fake_outputs([(3, 2), (4, 2)], teacher=True)
    method = prepared("pcl", outputs, rampup_epochs=0)
    got = method.loss(outputs, batch())
    got["loss"].backward(retain_graph=True)
    assert all(t.grad is None for t in outputs.teacher.final_logits)
    # Features and classifier learn from the labels alone: the ensemble is no student.
    inputs = [*outputs.final_features, *method.classifier.parameters()]
    for live, alone in zip(inputs, gradient(got["ensemble_ce"], inputs), strict=True):
        assert alone.abs().max() > 0
        torch.testing.assert_close(live.grad, alone)


def test_average_of_pcl():
    trainer = tiny("pcl", average_decay=0.9)
    decays = [trainer.method.teacher_decay(step) for step in (0, 1, 2, 9, 10, 10**6)]
    assert decays == pytest.approx([0, 1 / 2, 2 / 3, 0.9, 0.9, 0.9])
    assert prepared("pcl", fake_outputs([(3, 2)] * 2)).teacher_decay(10**7) == 0.999
    images, first = drawn(trainer)
    assert len(images) == 2 and not torch.equal(images[0], images[1])
    seen = trainer.train_step.outputs(images, first).teacher
    for peer, view, stages in zip(
        trainer.train_step.average.peers, images, seen.logits, strict=True
    ):
        torch.testing.assert_close(stages[-1], peer.backbone(view))
        assert not stages[-1].requires_grad
    trainer.train_step(images, first)
    cohort = trainer.cohort.state_dict()
    average = {
        name: value.clone() for name, value in trainer.train_step.average.state_dict().items()
    }
    assert all(torch.equal(value, cohort[name]) for name, value in average.items())
    for step, decay in ((1, 1 / 2), (2, 2 / 3)):
        trainer.train_step(images, Batch(first.labels, first.index, step, 0))
        changed = trainer.cohort.state_dict()
        for name, value in trainer.train_step.average.state_dict().items():
            if value.is_floating_point():
                want = decay * average[name].double() + (1 - decay) * changed[name].double()
                torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(value, changed[name])
            average[name] = value.clone()


def test_pcl_wants_the_average():
    outputs = fake_outputs([(3, 2), (3, 2)])
    with pytest.raises(ValueError, match="^outputs: expected outputs of the moving average"):
        prepared("pcl", outputs).loss(outputs, batch())


# ---------------------------------------------------------------- FFL


def norm_relu64(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    x = (x - mean) / (variance + 1e-5).sqrt()
    return (x * weight[:, None, None] + bias[:, None, None]).clamp_min(0)


def fuse64(module: FusionModule, maps: Sequence[Tensor]) -> Tensor:
    """Fused logits from maps of one size, widths brought to the largest where they differ."""
    p = doubles(module)
    own = []
    for i, m in enumerate(maps):
        m = m.double()
        if f"transfers.{i}.weight" in p:
            mixed = torch.einsum("oc,bchw->bohw", p[f"transfers.{i}.weight"][:, :, 0, 0], m)
            m = mixed + p[f"transfers.{i}.bias"][:, None, None]
        own.append(m)
    x = torch.cat(own, 1)
    (height, width), padded = x.shape[2:], F.pad(x, (1, 1, 1, 1))
    x = sum(
        padded[:, :, i : i + height, j : j + width] * p["layers.0.weight"][:, 0, i, j, None, None]
        for i in range(3)
        for j in range(3)
    )
    x = norm_relu64(x, p["layers.1.weight"], p["layers.1.bias"])
    x = torch.einsum("oc,bchw->bohw", p["layers.3.weight"][:, :, 0, 0], x)
    x = norm_relu64(x, p["layers.4.weight"], p["layers.4.bias"]).mean((2, 3))
    return x @ p["layers.8.weight"].T + p["layers.8.bias"]


@pytest.mark.parametrize("epoch", [0, 1, 40, 80, 299])
@pytest.mark.parametrize("widths", [(5, 5), (5, 3)])
def test_loss_of_ffl(epoch, widths):
    outputs = fake_outputs([(w, 3) for w in widths])
    method = prepared("ffl", outputs, distill_temperature=2.0)
    got = method.loss(outputs, batch(epoch))
    labels, (one, two) = batch().labels, outputs.final_logits
    fused = fuse64(method.fusion, outputs.maps)
    want = ce64(one, labels) + ce64(two, labels) + ce64(fused, labels)
    pairs = ((one, fused), (two, fused), (fused, (one + two) / 2))
    distill = sum(kd64(student, teacher, 2.0) for student, teacher in pairs)
    check_loss(got["loss"], want + rampup64(epoch, 80) * distill, outputs)


def test_gradients_of_ffl():
    outputs = fake_outputs([(4, 3), (4, 3)])
    method = prepared("ffl", outputs, rampup_epochs=0)
    got = method.loss(outputs, batch())
    got["loss"].backward(retain_graph=True)
    # The fused logits as teacher, and the mean as theirs, are constants.
    inputs = [*outputs.maps, *method.fusion.parameters()]
    alone = gradient(got["fusion_ce"] + got["fusion_distill"], inputs)
    for live, want in zip(inputs, alone, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(live.grad, want)
    logits = outputs.final_logits
    for live, want in zip(logits, gradient(got["ce"] + got["distill"], logits), strict=True):
        torch.testing.assert_close(live.grad, want)


def test_fusion_of_maps_of_different_sizes():
    maps = [leaf(2, 4, 6, 4, seed=0), leaf(2, 7, 3, 2, seed=1)]
    torch.manual_seed(0)
    module = FusionModule([4, 7], CLASSES)
    assert module.layers[-1].in_features == 7
    small = maps[0].reshape(2, 4, 3, 2, 2, 2).mean((3, 5))
    close(module(maps), fuse64(module, [small, maps[1]]))


def test_fusion_module_is_the_published_one_with_its_own_weight_decay():
    assert sum(p.numel() for p in FusionModule([64, 64], 100).parameters()) == 16_228
    trainer = tiny("ffl", weight_decay=3e-4)
    networks, fusion = trainer.train_step.optimizer.param_groups
    assert (networks["weight_decay"], fusion["weight_decay"]) == (3e-4, 1e-5)
    assert fusion["lr"] == networks["lr"]
    assert {id(p) for p in fusion["params"]} == {id(p) for p in trainer.method.parameters()}


# ---------------------------------------------------------------- AFD


def judge64(parameters: dict[str, Tensor], a: int, x: Tensor) -> Tensor:
    """Output of discriminator a."""
    p = golden.by_prefix(parameters, f"{a}.")
    hidden = F.conv2d(x.double(), p["0.weight"], p["0.bias"], padding=1)
    hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
    return 1 / (1 + (-F.conv2d(hidden, p["2.weight"], p["2.bias"], padding=1)).exp())


def judges_gradients(judges: nn.Module, maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of the loss of three discriminators: network 0 imitates 2, 1 imitates 0, 2 imitates 1."""
    p = {k: v.requires_grad_() for k, v in doubles(judges).items()}
    loss = torch.zeros((), dtype=torch.float64)
    for a, real in ((0, 2), (1, 0), (2, 1)):
        says_real, says_own = (judge64(p, a, maps[i].detach()) for i in (real, a))
        loss = loss + ((1 - says_real) ** 2).mean() + (says_own**2).mean()
    return dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))


def test_loss_of_afd():
    outputs = fake_outputs([(4, 3)] * 3)
    options = {"adversarial_weight": 0.3, "distill_weight": 0.6, "distill_temperature": 2.0}
    method = prepared("afd", outputs, **options)
    got = method.loss(outputs, batch())
    z, labels, p = outputs.final_logits, batch().labels, doubles(method.discriminators)
    want = 0.0
    for a in range(3):
        others = [kd64(z[a], z[b], 2.0) for b in range(3) if b != a]
        fooled = ((1 - judge64(p, a, outputs.maps[a])) ** 2).mean()
        want = want + ce64(z[a], labels) + 0.6 * sum(others) / 2 + 0.3 * fooled
    check_loss(got["loss"], want, outputs)


def test_discriminators_learn_in_a_cycle_from_constant_maps():
    outputs = fake_outputs([(4, 3)] * 3)
    lr, decay = 1e-3, 0.2
    method = prepared("afd", outputs, discriminator_lr=lr, discriminator_weight_decay=decay)
    method.loss(outputs, batch())["loss"].backward()
    assert all(p.grad is None for p in method.discriminators.parameters())
    before = doubles(method.discriminators)
    grads = judges_gradients(method.discriminators, outputs.maps)
    maps_before = [m.grad.clone() for m in outputs.maps]
    method.after_step(outputs, batch())
    assert all(torch.equal(m.grad, b) for m, b in zip(outputs.maps, maps_before, strict=True))
    for name, now in method.discriminators.named_parameters():
        g = grads[name]
        assert g.abs().max() > 0
        # The first step of Adam with decoupled weight decay.
        want = before[name] * (1 - lr * decay) - lr * g / (g.abs() + 1e-8)
        known = g.abs() > 1e-6
        assert known.double().mean() > 0.9
        close(now[known], want[known], 1e-6)
    # What a step leaves in the gradients is no part of the next one's.
    grads = judges_gradients(method.discriminators, outputs.maps)
    method.after_step(outputs, batch())
    for name, now in method.discriminators.named_parameters():
        close(now.grad, grads[name])


def test_maps_that_differ_are_imitated_through_a_transfer():
    outputs = fake_outputs([(4, 6), (3, 3)])
    method = prepared("afd", outputs, adversarial_weight=1.0)
    got = method.loss(outputs, batch())
    t, p = doubles(method.transfers), doubles(method.discriminators)
    small = outputs.maps[0].double().reshape(BATCH, 4, 3, 2, 3, 2).mean((3, 5))
    want = 0.0
    for a, own in enumerate((small, outputs.maps[1].double())):
        moved = torch.einsum("oc,bchw->bohw", t[f"{a}.weight"][:, :, 0, 0], own)
        moved = moved + t[f"{a}.bias"][:, None, None]
        want = want + ((1 - judge64(p, a, moved)) ** 2).mean()
    close(got["adversarial"], want)
    got["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in method.transfers.parameters())
    kept = [p.grad.clone() for p in method.transfers.parameters()]
    method.after_step(outputs, batch())
    grads = [p.grad for p in method.transfers.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


def test_optimizers_of_afd_share_nothing():
    cohort = Cohort(
        [models.create(n, num_classes=10, in_channels=1) for n in ("resnet8", "wrn_16_2")],
        auxiliary_heads=False,
        projection_dim=None,
    )
    cls = method_class("afd")
    method = cls(cohort.feature_dims)
    assert method.own_optimizers() == {}
    trainer = Trainer(cohort, method, tiny("afd").data, TrainConfig.from_values(TINY))
    ordinary = {id(p) for g in trainer.train_step.optimizer.param_groups for p in g["params"]}
    own = method.own_optimizers()["discriminators"]
    apart = {id(p) for g in own.param_groups for p in g["params"]}
    assert apart == {id(p) for p in method.discriminators.parameters()}
    assert ordinary == {id(p) for m in (cohort, method.transfers) for p in m.parameters()}
    assert len(list(method.transfers.parameters())) == 4
    images, first = drawn(trainer)
    trainer.train_step(images, first)


# ---------------------------------------------------------------- MCL-OKD


def fake_embeddings(m: int, width: int) -> PeerOutputs:
    outputs = fake_outputs([(3, 2)] * m)
    units = tuple((F.normalize(leaf(BATCH, width, seed=40 + i), dim=1),) for i in range(m))
    return outputs._replace(embeddings=units)


def banked(outputs: PeerOutputs, samples: int, **options: Any) -> Any:
    cls = method_class("mcl-okd")
    method = cls([[3]] * len(outputs.logits), cls.Options(**options))
    width = outputs.embeddings[0][0].shape[1]
    method.prepare(Setup(torch.arange(samples) % CLASSES, CLASSES, width, outputs, 0))
    return method


@pytest.mark.usefixtures("backend")
def test_loss_of_mcl_okd():
    outputs = fake_embeddings(3, 8)
    options = {"num_negatives": 5, "temperature": 0.2, "distill_temperature": 2.0}
    method = banked(outputs, 20, **options, ce_weight=0.5, distill_weight=0.6, nce_weight=0.7)
    got = method.loss(outputs, batch())
    _, (own, negatives) = method.contrast(batch())
    assert own.tolist() == [[i] for i in range(BATCH)]
    assert ((negatives % CLASSES) != batch().labels[:, None]).all()
    chosen = torch.cat([own, negatives], 1)
    banks, noise = method.bank.banks.double(), 5 / 20
    nce = 0.0
    for i in range(3):
        for j in range(3):
            if i != j:
                v = outputs.embeddings[j][0].double()
                s = (torch.einsum("bkd,bd->bk", banks[i][chosen], v) / 0.2).exp()
                p = s / (20 * s.mean()).detach()
                fits = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log()
                differs = (noise / (p[:, 1:] + noise + 1e-7)).log().sum(1)
                nce = nce - (fits + differs).mean()
    z, labels = outputs.final_logits, batch().labels
    ce = sum(ce64(x, labels) for x in z)
    distill = kd64(z[2], (z[0] + z[1] + z[2]).double() / 3, 2.0)
    check_loss(got["loss"], 0.5 * ce + 0.6 * distill + 0.7 * nce, outputs)
    first, second, last = gradient(got["distill"], z)
    assert not first.any() and not second.any() and last.any()
    assert all(e.any() for e in gradient(got["nce"], [e for (e,) in outputs.embeddings]))


@pytest.mark.usefixtures("backend")
def test_mcl_okd_is_the_published_loss_and_update(golden_dir, monkeypatch):
    g = golden.load(golden_dir / "mcl_okd_m4.npz")
    embeddings = g["embeddings"].requires_grad_()
    rows = len(g["index"])
    logits = tuple((torch.zeros(rows, CLASSES, dtype=torch.float64),) for _ in embeddings)
    outputs = PeerOutputs(
        tuple((torch.zeros(rows, 3),) for _ in embeddings), logits, tuple((e,) for e in embeddings)
    )
    method = banked(
        outputs,
        int(g["n_data"]),
        temperature=float(g["tau"]),
        bank_momentum=float(g["bank_momentum"]),
        num_negatives=40,
    )
    method.bank.register_buffer("banks", g["bank"].clone())
    indices = ContrastIndices(g["contrast_idx"][:, :1], g["contrast_idx"][:, 1:])
    monkeypatch.setattr(method.sampler, "sample", lambda *args, **kwargs: indices)
    given = Batch(torch.zeros(rows).long(), g["index"], 0, 0)
    got = method.loss(outputs, given)
    assert golden.relative(got["nce"], g["loss"]) < 1e-9
    # Without the cross entropy of equal logits, log C a network, only the weighted term is left.
    rest = got["loss"] - 4 * math.log(CLASSES)
    assert golden.relative(rest, 0.025 * g["loss"]) < 1e-9
    (grad,) = torch.autograd.grad(got["nce"], embeddings)
    assert golden.relative(grad, g["grad_embeddings"]) < 1e-9
    method.after_step(outputs, given)
    assert golden.relative(method.bank.banks, g["bank_after"]) < 1e-9


def test_projections_of_mcl_okd_are_linear():
    trainer = tiny("mcl-okd")
    names = {n for n, _ in trainer.cohort.projections.named_parameters()}
    assert names == {f"{m}.0.layers.0.{p}" for m in range(2) for p in ("weight", "bias")}
    head = trainer.cohort.projections[0][0]
    feature = leaf(3, 64, seed=0)
    raw = feature @ head.layers[0].weight.T + head.layers[0].bias
    torch.testing.assert_close(head(feature), raw / raw.norm(dim=1, keepdim=True))
    assert len(ProjectionHead(4, 2).layers) == 3
    with pytest.raises(ValueError, match="^projection: expected one of linear, mlp; got 'conv'"):
        Cohort(trainer.cohort.peers, projection="conv")


# ---------------------------------------------------------------- all of them


def drawn(trainer: Trainer) -> tuple[Any, Batch]:
    rows = trainer.sampler.epoch(0)[:1]
    images, labels, index = next(trainer.feed.batches(rows, first_step=0))
    return images, Batch(labels, index, 0, 0)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_changes_what_it_must(name):
    trainer = tiny(name, weight_decay=0)
    modules = {"cohort": trainer.cohort, "method": trainer.method}
    named = {f"{m}.{n}": p for m, mod in modules.items() for n, p in mod.named_parameters()}
    before = {n: p.detach().clone() for n, p in named.items()}
    images, first = drawn(trainer)
    parts = trainer.train_step(images, first)
    assert all(v.dtype == torch.float32 and v.dim() == 0 for v in parts.values())
    assert [n for n, p in named.items() if torch.equal(p, before[n])] == []
    if name == "mcl-okd":
        assert trainer.method.bank.banks.shape == (2, 100, 16)


@pytest.mark.parametrize("name", METHODS)
def test_mixed_precision(name):
    trainer = tiny(name, amp="bf16")
    parts = trainer.train_step(*drawn(trainer))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in parts.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_shared_stem_trains(name):
    trainer = tiny(name, topology="shared_stem", split_stage=2)
    parts = trainer.train_step(*drawn(trainer))
    assert parts["loss"].isfinite()


@pytest.mark.parametrize("name", METHODS)
def test_a_run_learns(name):
    trainer = tiny(name, epochs=5, train_per_class=20, lr=0.1)
    result = trainer.fit(progress=False)
    first, last = result.history[0]["train_ce"], result.history[-1]["train_ce"]
    # Of four seeds, the worst came to 0.32 and 79 %; a tenth would be chance.
    assert last < 0.7 * first
    assert min(*result.peers, result.ensemble) > 30


def flat(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, entry in items:
        nested = isinstance(entry, (dict, list, tuple))
        found |= flat(entry, f"{path}/{key}") if nested else {f"{path}/{key}": entry}
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, name):
    whole = tiny(name)
    want = whole.fit(progress=False)
    tiny(name, tmp_path / "cut").fit(progress=False, stop_after=1)
    rest = tiny(name, tmp_path / "cut")
    assert rest.fit(progress=False).peers == want.peers
    kinds = ("cohort", "method", "optimizer", "own_optimizers", "average")
    states = [flat({k: t.state()[k] or {} for k in kinds}) for t in (whole, rest)]
    assert states[0].keys() == states[1].keys()
    for path, value in states[0].items():
        same = (
            torch.equal(value, states[1][path])
            if isinstance(value, Tensor)
            else (value == states[1][path])
        )
        assert same, path
    assert any("own_optimizers" in path for path in states[0]) == (name == "afd")
    assert any("average" in path for path in states[0]) == (name == "pcl")


def test_defaults():
    """The published values, where the docstring does not call them choices."""
    wanted = {
        "afd": {
            "distill_temperature": 3.0,
            "distill_weight": 1.0,
            "adversarial_weight": 0.1,
            "discriminator_lr": 2e-5,
            "discriminator_weight_decay": 0.1,
        },
        "ffl": {"distill_temperature": 3.0, "rampup_epochs": 80, "fusion_weight_decay": 1e-5},
        "mcl-okd": {
            "temperature": 0.1,
            "num_negatives": 256,
            "bank_momentum": 0.5,
            "ce_weight": 1.0,
            "distill_weight": 1.0,
            "nce_weight": 0.025,
            "distill_temperature": 3.0,
        },
        "pcl": {
            "distill_temperature": 3.0,
            "rampup_epochs": 80,
            "distill_weight": 1.0,
            "average_decay": 0.999,
        },
    }
    for name, values in wanted.items():
        assert values.items() <= vars(method_class(name).Options()).items(), name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_not_prepared(name):
    outputs = fake_outputs([(3, 2)] * 2, teacher=True)
    with pytest.raises(RuntimeError, match=r"^loss: expected prepare\(\) to be called before"):
        method_class(name)([[3], [3]]).loss(outputs, batch())


@pytest.mark.parametrize("name", METHODS)
def test_one_network_is_refused(name):
    with pytest.raises(ValueError, match="^cohort: expected (at least|exactly) 2 networks") as e:
        tiny(name, cohort="resnet8")
    assert "\n" not in str(e.value)


def test_ffl_refuses_three_networks():
    with pytest.raises(ValueError, match="^cohort: expected exactly 2 networks .*got 3"):
        tiny("ffl", cohort="resnet8,resnet8,resnet8")


@pytest.mark.parametrize("name", ["pcl", "ffl"])
def test_the_ensemble_is_the_classifier_on_all_features(name):
    outputs = fake_outputs([(3, 3), (3, 3)])
    method = prepared(name, outputs).eval()
    if name == "pcl":
        p = doubles(method.classifier)
        both = torch.cat(outputs.final_features, 1).double()
        want = both @ p["weight"].T + p["bias"]
    else:
        want = method.fusion(outputs.maps).double()
    close(method.ensemble(outputs), want)
    mean = torch.stack(outputs.final_logits).mean(0)
    assert not torch.allclose(method.ensemble(outputs), mean, atol=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pcl", {"average_decay": 1.5}, r"^average_decay: expected a value in \[0, 1\], got 1.5"),
        ("pcl", {"distill_weight": -1}, "^distill_weight: expected a finite number >= 0"),
        ("pcl", {"rampup_epochs": -1}, "^rampup_epochs: expected an integer >= 0, got -1"),
        ("ffl", {"fusion_weight_decay": -1}, "^fusion_weight_decay: expected a finite number"),
        ("ffl", {"rampup_epochs": -1}, "^rampup_epochs: expected an integer >= 0, got -1"),
        ("afd", {"discriminator_lr": 0}, "^discriminator_lr: expected a finite number > 0"),
        ("afd", {"adversarial_weight": -1}, "^adversarial_weight: expected a finite number >= 0"),
        ("mcl-okd", {"nce_weight": -1}, "^nce_weight: expected a finite number >= 0"),
        ("mcl-okd", {"num_negatives": 0}, "^num_negatives: expected an integer >= 1"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        method_class(name).Options(**options)
