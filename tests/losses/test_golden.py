"""The published implementations' values, gradients and second-order gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers import golden
from mclfast import (
    LayerMatcher,
    LogitAggregator,
    ProjectionHead,
    bilevel_gradient,
    layerwise_mcl_terms,
    mcl_terms,
)

TOLERANCE = 1e-9

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("name", ["m2_l3", "m3_l2", "m4_l4_sym"])
def test_layerwise_mcl_to_second_order(golden_dir, name):
    g = golden.load(golden_dir / f"lmcl_inbatch_{name}.npz")
    embeddings = g["embeddings"].requires_grad_()
    weights = g["weights"].requires_grad_()
    terms = layerwise_mcl_terms(
        embeddings,
        g["labels"],
        golden.pair_weights(weights),
        temperature=float(g["tau"]),
        kl_temperature=float(g["kd_T"]),
    )
    for term in golden.TERMS:
        value = getattr(terms, term)
        assert golden.relative(value, g[term]) < TOLERANCE
        (grad,) = torch.autograd.grad(value, embeddings, retain_graph=True)
        assert golden.relative(grad, g[f"grad_embeddings_{term}"]) < TOLERANCE
    loss = terms.weighted_sum(*g["coef"].tolist())
    first = torch.autograd.grad(loss, [embeddings, weights], create_graph=True)
    assert golden.relative(first[0], g["grad_embeddings"]) < TOLERANCE
    assert golden.relative(first[1], g["grad_weights"]) < TOLERANCE
    product = (first[0] * g["cot_grad_embeddings"]).sum() + (first[1] * g["cot_grad_weights"]).sum()
    second = torch.autograd.grad(product, [embeddings, weights])
    assert golden.relative(second[0], g["second_embeddings"]) < TOLERANCE
    assert golden.relative(second[1], g["second_weights"]) < TOLERANCE


@pytest.mark.parametrize("name", ["m2", "m4"])
def test_mcl(golden_dir, name):
    g = golden.load(golden_dir / f"mcl_inbatch_{name}.npz")
    embeddings = g["embeddings"].requires_grad_()
    terms = mcl_terms(
        embeddings, g["labels"], temperature=float(g["tau"]), kl_temperature=float(g["kd_T"])
    )
    for term in golden.TERMS:
        assert golden.relative(getattr(terms, term), g[term]) < TOLERANCE
    (grad,) = torch.autograd.grad(terms.weighted_sum(*g["coef"].tolist()), embeddings)
    assert golden.relative(grad, g["grad_embeddings"]) < TOLERANCE


def test_aggregator(golden_dir):
    g = golden.load(golden_dir / "aggregator_m2_l3.npz")
    networks, stages, _, width = g["features"].shape
    aggregator = LogitAggregator([width] * networks, stages).double()
    aggregator.load_state_dict(
        {
            f"proj_heads.{i}.{name}": value
            for i in range(networks)
            for name, value in golden.by_prefix(g, f"proj_head_{i}.").items()
        }
    )
    features = [list(network) for network in g["features"]]
    logits = [list(network) for network in g["logits"]]
    got = torch.stack(aggregator(features, logits))
    assert golden.relative(got, g["aggregated"]) < TOLERANCE


class ToyCohort(nn.Module):
    """The recorded toy networks: f_l = tanh(W f + b), a head and a projection head per stage."""

    def __init__(self, networks: int, stages: int, arrays: dict[str, torch.Tensor]) -> None:
        super().__init__()
        net = golden.by_prefix(arrays, "net.")
        self.stage = nn.ModuleList()
        self.head = nn.ModuleList()
        self.project = nn.ModuleList()
        for i in range(networks):
            shapes = [net[f"stage.{i}.{k}.weight"].shape for k in range(stages)]
            self.stage.append(nn.ModuleList(nn.Linear(s[1], s[0]) for s in shapes))
            self.head.append(
                nn.ModuleList(
                    nn.Linear(s[0], net[f"head.{i}.{k}.weight"].shape[0])
                    for k, s in enumerate(shapes)
                )
            )
            dim = arrays[f"crit.embed_list.{i}.0.proj_head.0.weight"].shape[0]
            self.project.append(nn.ModuleList(ProjectionHead(s[0], dim) for s in shapes))
        self.double()
        self.load_state_dict(self.renamed(arrays, ""))

    def renamed(self, arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        """This module's parameters among the recorded ones."""

        def recorded(name: str) -> str:
            if name.startswith("project."):
                _, i, k, _, rest = name.split(".", 4)
                return f"{prefix}crit.embed_list.{i}.{k}.proj_head.{rest}"
            return f"{prefix}net.{name}"

        return {name: arrays[recorded(name)] for name, _ in self.named_parameters()}

    def forward(self, x):
        features, logits, embeddings = [], [], []
        for stages, heads, projections in zip(self.stage, self.head, self.project, strict=True):
            h, row = x, []
            for stage in stages:
                h = torch.tanh(stage(h))
                row.append(h)
            features.append(row)
            logits.extend(head(f) for head, f in zip(heads, row, strict=True))
            embeddings.append([p(f) for p, f in zip(projections, row, strict=True)])
        return features, logits, embeddings


@pytest.mark.parametrize("split", [False, True])
def test_bilevel_step_of_a_toy_cohort(golden_dir, split):
    g = golden.load(golden_dir / "meta_step_m2_l3.npz")
    networks, stages = int(g["M"]), int(g["L"])
    cohort = ToyCohort(networks, stages, g)
    dims = [[g[f"match.proj.{i}.{k}.weight"].shape[1] for k in range(stages)] for i in range(2)]
    matcher = LayerMatcher(dims).double()
    matcher.load_state_dict(golden.by_prefix(g, "match."))

    def network(params):
        return functional_call(cohort, params, (g["x"],))

    def inner(outputs):
        features, _, embeddings = outputs
        terms = layerwise_mcl_terms(
            embeddings,
            g["y"],
            matcher(features),
            temperature=float(g["tau"]),
            kl_temperature=float(g["kd_T"]),
        )
        return terms.weighted_sum(*g["coef"].tolist())

    def outer(outputs):
        return sum(nn.functional.cross_entropy(z, g["y"]) for z in outputs[1])

    start = dict(cohort.named_parameters())
    assert golden.relative(outer(network(start)), g["outer_loss_before"]) < TOLERANCE
    result = bilevel_gradient(
        inner if split else lambda params: inner(network(params)),
        outer if split else lambda params: outer(network(params)),
        start,
        list(matcher.parameters()),
        network=network if split else None,
        inner_steps=int(g["times"]),
        lr=float(g["lr"]),
        momentum=float(g["momentum"]),
        weight_decay=float(g["weight_decay"]),
    )
    assert golden.relative(result.inner_losses[0], g["inner_loss_before"]) < TOLERANCE
    assert golden.relative(result.outer_loss, g["outer_loss_after"]) < TOLERANCE
    want = golden.by_prefix(g, "exact_grad_match.")
    for (name, _), grad in zip(matcher.named_parameters(), result.grads, strict=True):
        assert golden.relative(grad, want[name]) < TOLERANCE, name


def test_recorded_match_weights(golden_dir):
    g = golden.load(golden_dir / "meta_step_m2_l3.npz")
    networks, stages = int(g["M"]), int(g["L"])
    cohort = ToyCohort(networks, stages, g)
    dims = [[g[f"match.proj.{i}.{k}.weight"].shape[1] for k in range(stages)] for i in range(2)]
    matcher = LayerMatcher(dims).double()
    matcher.load_state_dict(golden.by_prefix(g, "match."))
    weights = matcher(cohort(g["x"])[0])
    # Recorded in the order of the published loop: ordered pairs of networks, then of stages.
    got = torch.stack(
        [
            weights[i * stages + k, j * stages + z]
            for i in range(networks)
            for j in range(networks)
            if i != j
            for k in range(stages)
            for z in range(stages)
        ]
    )
    assert golden.relative(got, g["match_weights"]) < TOLERANCE
