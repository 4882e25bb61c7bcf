"""Training against memory banks: the loss of a step, what it writes, resuming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mclfast import Batch, Cohort
from mclfast._base.tensors import unit_norm
from mclfast.cohort.outputs import Setup
from mclfast.config import TrainConfig
from mclfast.losses import reference_banks
from mclfast.methods import method_class
from mclfast.train import checkpoint
from mclfast.train.builder import build
from mclfast.train.folder import CHECKPOINT
from mclfast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("backend")

TINY = {
    "data": "digits",
    "cohort": "resnet8,resnet8",
    "epochs": 2,
    "batch_size": 20,
    "images_per_class": 2,
    "loss": "bank",
    "num_negatives": 24,
    "projection_dim": 16,
    "bilevel_every": 3,
    "temperature": 0.2,
}


def tiny(run_dir: Any = None, **values: Any) -> Trainer:
    return build(TrainConfig.from_values(TINY | values), run_dir)


def drawn(trainer: Trainer) -> tuple[Tensor, Batch]:
    rows = trainer.sampler.epoch(0)[:1]
    images, labels, index = next(trainer.feed.batches(rows, first_step=0))
    return images, Batch(labels, index, trainer.step, 0)


@pytest.mark.parametrize("distill", ["none", "all", "last"])
def test_loss_of_mcl(distill):
    trainer = tiny(method="mcl", logit_distill=distill)
    method, (images, batch) = trainer.method, drawn(trainer)
    outputs = trainer.cohort(images)
    got = method.loss(outputs, batch)

    pos, neg = method.sampler.sample(batch.index, 0, backend="reference")
    nodes = torch.stack([stages[-1] for stages in outputs.embeddings]).double()
    rows = reference_banks.bank_mcl_rows(
        nodes, (0, 1), method.bank.banks.double(), pos, neg, temperature=0.2, kl_temperature=3.0
    )
    want = 0.1 * rows.vcl.mean(1).sum() + 0.1 * rows.icl.mean(-1).sum()
    want = want + rows.soft_vcl.mean(-1).sum() + rows.soft_icl.mean(-1).sum()
    logits = [z.double() for z in outputs.final_logits]
    want = want + sum(cross_entropy(z, batch.labels) for z in logits)
    teacher = ((logits[0] + logits[1]).detach() / 2 / 3).softmax(1)
    for z in {"none": [], "all": logits, "last": logits[1:]}[distill]:
        kl = (teacher * (teacher.log() - (z / 3).log_softmax(1))).sum(1)
        want = want + 9 * kl.mean()
    torch.testing.assert_close(got["loss"].double(), want, rtol=1e-5, atol=1e-5)
    assert ("distill" in got) == (distill != "none")


def test_loss_of_layerwise_mcl_uses_all_stages_and_the_last_banks():
    trainer = tiny(method="lmcl")
    method, (images, batch) = trainer.method, drawn(trainer)
    outputs = trainer.cohort(images)
    got = method.loss(outputs, batch)
    pos, neg = method.sampler.sample(batch.index, 0, backend="reference")
    nodes = torch.stack([e for stages in outputs.embeddings for e in stages]).double()
    rows = reference_banks.bank_mcl_rows(
        nodes,
        (0, 0, 0, 1, 1, 1),
        method.bank.banks.double(),
        pos,
        neg,
        temperature=0.2,
        kl_temperature=3.0,
    )
    weights = method.matcher(outputs.features).double()
    # Every ordered pair of nodes adds both of its directions with its weight.
    want = dict.fromkeys(("vcl", "soft_vcl", "icl", "soft_icl"), 0.0)
    for a in range(6):
        for b in range(6):
            if a // 3 == b // 3:
                continue
            w = weights[a, b].detach()
            want["vcl"] += (w * (rows.vcl[a] + rows.vcl[b])).mean()
            want["icl"] += (w * (rows.icl[a // 3, b] + rows.icl[b // 3, a])).mean()
            want["soft_vcl"] += (w * (rows.soft_vcl[a, b] + rows.soft_vcl[b, a])).mean()
            want["soft_icl"] += (w * (rows.soft_icl[a, b] + rows.soft_icl[b, a])).mean()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["mcl", "lmcl"])
def test_a_step_writes_the_last_embeddings_of_its_batch(method):
    trainer = tiny(method=method)
    images, batch = drawn(trainer)
    before = trainer.method.bank.banks.clone()
    seen: list[Any] = []
    trainer.cohort.register_forward_hook(lambda module, args, out: seen.append(out))
    trainer.train_step(images, batch)
    new = torch.stack([stages[-1] for stages in seen[0].embeddings])
    want = before.clone()
    want[:, batch.index] = unit_norm(0.5 * before[:, batch.index] + 0.5 * new.detach())
    torch.testing.assert_close(trainer.method.bank.banks, want)


def test_bilevel_step_learns_through_the_banks_and_leaves_them():
    trainer = tiny(method="lmcl")
    images, batch = drawn(trainer)
    trainer.train_step(images, batch)
    banks = trainer.method.bank.banks.clone()
    matcher = [p.detach().clone() for p in trainer.method.meta_parameters()]
    cohort = {k: v.clone() for k, v in trainer.cohort.state_dict().items()}
    trainer.train_step.bilevel(images, batch, lr=0.1)
    assert torch.equal(trainer.method.bank.banks, banks)
    assert all(torch.equal(v, cohort[k]) for k, v in trainer.cohort.state_dict().items())
    meta = trainer.method.meta_parameters()
    changed = [not torch.equal(a, b) for a, b in zip(matcher, meta, strict=True)]
    assert any(changed)


@pytest.mark.parametrize("method", ["mcl", "lmcl"])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, method):
    whole = tiny(tmp_path / "whole", method=method)
    want = whole.fit(progress=False)
    tiny(tmp_path / "cut", method=method).fit(progress=False, stop_after=1)
    state = checkpoint.load(tmp_path / "cut" / CHECKPOINT)
    assert state["method"]["bank.banks"].shape == (2, 100, 16)
    rest = tiny(tmp_path / "cut", method=method)
    got = rest.fit(progress=False)
    assert got.peers == want.peers
    assert torch.equal(rest.method.bank.banks, whole.method.bank.banks)


def test_shared_negatives_and_half_banks_train():
    trainer = tiny(
        method="mcl", shared_negatives=True, bank_dtype="bfloat16", batch_size=8, images_per_class=2
    )
    record = trainer.fit(progress=False).history[-1]
    assert all(torch.tensor(list(record.values())).isfinite())
    assert trainer.method.bank.banks.dtype == torch.bfloat16


def test_banks_want_a_prepared_method_and_a_fitting_device():
    cls = method_class("mcl")
    cohort = Cohort(tiny().cohort.peers, projection_dim=8)
    method = cls(cohort.feature_dims, cls.Options(loss="bank"))
    outputs = cohort(torch.zeros(2, 1, 16, 16))
    batch = Batch(torch.zeros(2).long(), torch.arange(2), 0, 0)
    with pytest.raises(RuntimeError, match=r"prepare\(\)"):
        method.loss(outputs, batch)
    with pytest.raises(ValueError, match="^projection_dim"):
        method.prepare(Setup(torch.arange(2), 2, None, outputs, 0))
    with pytest.raises(ValueError, match="^bank_storage: expected 'device' on a cpu device"):
        tiny(method="mcl", bank_storage="pinned")
    with pytest.raises(ValueError, match=r"^bank_momentum: expected a value in \[0, 1\)"):
        cls.Options(bank_momentum=1.0)
