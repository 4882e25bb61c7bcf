"""MCL in the batch: the loss of a step, what its gradient reaches, what a run learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mclfast import Cohort, models
from mclfast.config import TrainConfig
from mclfast.methods import MCL
from mclfast.train import build
from mclfast.types import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = torch.tensor([0, 1, 0, 2, 1, 2, 0])
TAU, T = 0.2, 3.0


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.one(x).mean((2, 3)))


def in_double(networks: int, **options: Any) -> tuple[Cohort, MCL, Any]:
    torch.manual_seed(networks)
    peers = [models.staged(Flat(), ["one"]) for _ in range(networks)]
    cohort = Cohort(peers, auxiliary_heads=False, projection_dim=5).double()
    method = MCL(cohort.feature_dims, MCL.Options(temperature=TAU, **options))
    return cohort, method, cohort(torch.randn(len(LABELS), 1, 8, 8, dtype=torch.float64))


def nce(similarities: Tensor) -> Tensor:
    """Mean over anchors and their positives; the diagonal is in neither sum."""
    rows = []
    for n, label in enumerate(LABELS):
        others = [j for j in range(len(LABELS)) if j != n]
        total = sum(similarities[n, j].exp() for j in others)
        found = [-(similarities[n, j].exp() / total).log() for j in others if LABELS[j] == label]
        rows.append(sum(found) / len(found))
    return torch.stack(rows).mean()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Over all columns, the diagonal too; the teacher is a constant."""
    p, q = ((x / T).softmax(1) for x in (teacher.detach(), student))
    return T * T * (p * (p / q).log()).sum(1).mean()


def published(outputs: Any, distill: str) -> dict[str, Tensor]:
    """Sections 3.2 to 3.4 of arXiv 2104.12565, with the sums of the published code."""
    v = [stages[-1] for stages in outputs.embeddings]
    logits = outputs.final_logits
    count = range(len(v))
    pairs = [(a, b) for a in count for b in count if a != b]
    ce = sum(-z.softmax(1).log()[range(len(LABELS)), LABELS].mean() for z in logits)
    terms = {
        "vcl": sum(nce(v[a] @ v[a].T / TAU) for a in count),
        "icl": sum((nce(v[a] @ v[b].T / TAU) for a, b in pairs), torch.zeros(())),
        "soft_vcl": sum(
            (kl(v[a] @ v[a].T / TAU, v[b] @ v[b].T / TAU) for a, b in pairs), torch.zeros(())
        ),
        "soft_icl": sum(
            (kl(v[a] @ v[b].T / TAU, v[b] @ v[a].T / TAU) for a, b in pairs), torch.zeros(())
        ),
    }
    total = ce + 0.1 * (terms["vcl"] + terms["icl"]) + terms["soft_vcl"] + terms["soft_icl"]
    if distill != "none":
        mean = sum(logits) / len(logits)
        students = logits if distill == "all" else logits[-1:]
        terms["distill"] = sum(kl(z, mean) for z in students)
        total = total + terms["distill"]
    return {"loss": total, "ce": ce, **terms}


@pytest.mark.parametrize("networks", [1, 2, 4])
@pytest.mark.parametrize("distill", ["none", "all", "last"])
def test_loss_of_a_step(networks, distill):
    cohort, method, outputs = in_double(networks, logit_distill=distill)
    found = method.loss(outputs, Batch(LABELS, torch.arange(len(LABELS)), 0, 0))
    expected = published(outputs, distill)
    assert found.keys() == expected.keys()
    # Cross entropies and the KL of logits are computed in float32.
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-6, atol=1e-6)
    names, parameters = zip(*cohort.named_parameters(), strict=True)
    grads = [
        torch.autograd.grad(v["loss"], parameters, retain_graph=True) for v in (found, expected)
    ]
    for name, got, want in zip(names, *grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)
        assert got.any(), name


def test_logit_distillation_reaches_its_students_alone():
    cohort, method, outputs = in_double(3, logit_distill="last")
    loss = method.loss(outputs, Batch(LABELS, torch.arange(len(LABELS)), 0, 0))["distill"]
    grads = torch.autograd.grad(loss, list(cohort.parameters()), allow_unused=True)
    reached = {
        name for (name, _), g in zip(cohort.named_parameters(), grads, strict=True)
        if g is not None and g.any()
    }  # fmt: skip
    last = dict(cohort.peers[2].backbone.named_parameters()).values()
    assert reached == {n for n, p in cohort.named_parameters() if any(p is q for q in last)}


@pytest.mark.parametrize(("method", "options"), [("mcl", {}), ("lmcl", {"bilevel_every": 20})])
def test_a_run_learns(method, options):
    values = {
        "method": method, "cohort": "resnet8,resnet8", "data": "digits-full", "device": "cpu",
        "train_per_class": 20, "batch_size": 20, "images_per_class": 2, "epochs": 3, "lr": 0.1,
        "projection_dim": 16,
    }  # fmt: skip
    result = build(TrainConfig.from_values(values | options)).fit(progress=False)
    assert result.history[-1]["train_ce"] < 0.7 * result.history[0]["train_ce"]
    assert min(*result.peers, result.ensemble) > 25
