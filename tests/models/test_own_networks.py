"""``staged`` on networks as other packages build them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, max_pool2d, relu

from helpers.own_networks import (
    NETWORKS,
    FunctionalResNet,
    HuggingFace,
    SqueezeNet,
    Swin,
    UNetEncoder,
    VisionTransformer,
    make,
    parameters_without_gradient,
)
from mclfast.execution.parallel import equal_groups
from mclfast.models import PeerNetwork, staged
from mclfast.models.pooling import Pooling
from mclfast.models.staged import fresh_copy


def logits_of(name: str, output: object) -> Tensor:
    key = NETWORKS[name][2].get("output")
    if key is None:
        assert isinstance(output, Tensor)
        return output
    return output[key] if isinstance(key, int) else output.logits


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_give_what_the_network_itself_would(name: str) -> None:
    """A head of copied weights in place of fresh ones is the rest of the network."""
    torch.manual_seed(0)
    net = make(name).double().eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    peer = PeerNetwork(net).eval()
    later = list(net.stages)
    for k, head in enumerate(peer.auxiliary):
        head.stages.load_state_dict(nn.Sequential(*later[k + 1 :]).state_dict())
        head.tail.load_state_dict(net.tail.state_dict())
        with torch.no_grad():
            head.classifier.weight.copy_(net.classifier.weight.flatten(1))
            head.classifier.bias.copy_(net.classifier.bias)
    out = peer(x)
    expected = logits_of(name, net.module(x))
    assert torch.equal(net(x), expected) and torch.equal(out.logits[-1], expected)
    assert out.final_map.dim() == 4 and out.final_map.shape[1] == net.feature_dim
    # These have functions between pooling and classifier, or before it, that a head leaves out.
    if name not in ("squeezenet", "functional"):
        for feature, logits in zip(out.features, out.logits, strict=True):
            torch.testing.assert_close(feature, out.features[-1])
            torch.testing.assert_close(logits, expected)


def test_calls_between_stages_run_in_the_heads() -> None:
    torch.manual_seed(0)
    net = make("functional").double().train()
    module, x = net.module, torch.randn(4, 3, 8, 8, dtype=torch.float64)
    peer = PeerNetwork(net).train()
    two, three = peer.auxiliary[0].stages, peer.auxiliary[1].stages
    taps = net.forward_taps(x)
    first = module.layer1(relu(module.conv1(x)))
    torch.testing.assert_close(taps.maps[0], first)
    own = [m for m in two.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    y = own[1](own[0](max_pool2d(relu(first), 2)))
    y = own[3](own[2](relu(y * 1.5)))
    torch.testing.assert_close(peer.auxiliary[0](taps.maps[0])[0], y.mean((2, 3)))
    own = [m for m in three.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    y = own[1](own[0](relu(taps.maps[1] * 1.5)))
    torch.testing.assert_close(peer.auxiliary[1](taps.maps[1])[0], y.mean((2, 3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_all_parameters(name: str) -> None:
    torch.manual_seed(0)
    peer = PeerNetwork(make(name)).train()
    out = peer(torch.randn(4, 3, 8, 8))
    assert {tuple(z.shape) for z in out.logits} == {(4, 3)}
    sum(z.square().sum() for z in out.logits).backward()
    assert list(parameters_without_gradient(peer)) == []
    names = list(peer.backbone.state_dict())
    assert names == [f"module.{key}" for key in peer.backbone.module.state_dict()]
    again = pickle.loads(pickle.dumps(copy.deepcopy(peer))).eval()
    torch.testing.assert_close(again(torch.zeros(2, 3, 8, 8)), peer.eval()(torch.zeros(2, 3, 8, 8)))


class Dropping(FunctionalResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(dropout(self.layer1(self.conv1(x)), 0.5, self.training))
        return self.fc(self.layer3(x).mean((2, 3)))


def test_calls_that_depend_on_training() -> None:
    net = staged(Dropping(), ["layer1", "layer2", "layer3"])
    head = PeerNetwork(net).auxiliary[0].eval()
    x = torch.randn(2, 5, 8, 8)
    assert torch.equal(head(x)[0], head(x)[0])
    head.train()
    assert not torch.equal(head(x)[0], head(x)[0])


class Reading(FunctionalResNet):
    """Calls between stages that a trace takes for constant."""

    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(x)) * self.factor)
        return self.fc(self.layer3(x).mean((2, 3)))


class Learned(FunctionalResNet):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(x)) * self.scale)
        return self.fc(self.layer3(x).mean((2, 3)))


def test_calls_that_a_head_cannot_repeat_are_refused() -> None:
    stages, x = ["layer1", "layer2", "layer3"], torch.randn(2, 3, 8, 8)
    message = "stages: expected the calls between 'layer1' and 'layer2' to depend on nothing else"
    for training in (True, False):
        net = staged(Reading(), stages).train(training)
        net.forward_taps(x)
        net = staged(Reading(), stages).train(training)
        net.module.factor = 3.0
        with pytest.raises(ValueError, match=message):
            net.forward_taps(x)
    with pytest.raises(ValueError, match="expected the input of 'layer2' to be the output of"):
        staged(Learned(), stages).forward_taps(x)


def test_no_stages_for_methods_that_read_none() -> None:
    net = staged(Learned(), classifier="fc")
    assert net.stages == ()
    out = PeerNetwork(net)(torch.randn(2, 3, 8, 8))
    assert len(out.logits) == 1 and out.features[0].shape == (2, 7)
    assert torch.equal(out.final_map[:, :, 0, 0], out.features[0])


def test_stages_are_checked_where_heads_read_them() -> None:
    net = staged(Learned(), ["layer1", "layer2", "layer3"])
    assert len(PeerNetwork(net, auxiliary_heads=False)(torch.randn(2, 3, 8, 8)).logits) == 1
    with pytest.raises(ValueError, match="layer2"):
        PeerNetwork(net)(torch.randn(2, 3, 8, 8))


def test_outputs() -> None:
    x = torch.randn(2, 3, 8, 8)
    bare = staged(HuggingFace(), classifier="classifier")
    message = r"expected the output of the module to be \[B, 3\], got ModelOutput; name .* output="
    with pytest.raises(ValueError, match=message):
        bare(x)
    for output in ("scores", 7):
        wrong = staged(HuggingFace(), classifier="classifier", output=output)
        message = "output: expected .* got ModelOutput with logits, hidden_states"
        with pytest.raises(ValueError, match=message):
            wrong(x)
    wrong = staged(HuggingFace(), classifier="classifier", output="hidden_states")
    with pytest.raises(ValueError, match=r"output of the module to be \[B, 3\], got shape"):
        wrong(x)


def test_inputs_of_a_layer_that_are_not_its_defaults() -> None:
    class Masked(HuggingFace):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            x = self.patches(x).flatten(2).mT
            for layer in self.layer:
                x = layer(x, None, True)[0]
            return self.classifier(x[:, 0])

    net = staged(Masked(), ["layer.0", "layer.1"], classifier="classifier", pool="first")
    message = "stages: expected 'layer.1' to take one positional input, got 3 positional"
    with pytest.raises(ValueError, match=message):
        net.forward_taps(torch.randn(2, 3, 8, 8))


def test_parameters_without_a_rule() -> None:
    class Biased(nn.Module):
        def __init__(self, table: Tensor) -> None:
            super().__init__()
            self.table = nn.Parameter(table)

    torch.manual_seed(0)
    assert torch.equal(fresh_copy(Biased(torch.full((3,), 0.1))).table, torch.full((3,), 0.1))
    trained = Biased(torch.randn(3))
    with pytest.raises(ValueError, match="cannot re-initialise Biased at '': it owns table but"):
        fresh_copy(trained)
    with pytest.raises(ValueError, match="cannot re-initialise Biased"):
        fresh_copy(trained, lambda module: None)

    def rule(module: nn.Module) -> None:
        if isinstance(module, Biased):
            nn.init.zeros_(module.table)

    assert torch.equal(fresh_copy(trained, rule).table, torch.zeros(3))
    assert trained.table.isfinite().all()
    net = staged(
        nn.Sequential(nn.Conv2d(3, 4, 1), trained, nn.Linear(4, 2)),
        ["0", "1"],
        classifier="2",
        init_weights=rule,
    )
    assert torch.equal(PeerNetwork(net).auxiliary[0].stages[0].table, torch.zeros(3))


def test_pooling() -> None:
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5)
    for pooling, given, feature, seen in (
        (Pooling(3), x, x.mean((2, 3)), x),
        (Pooling(5), x, x.mean((1, 2)), x.permute(0, 3, 1, 2)),
        (Pooling(5), x[:, 0], x[:, 0].mean(1), x[:, 0].mT[..., None]),
        (Pooling(4), x[:, 0], x[:, 0].mean(2), x[:, 0][..., None]),
        (Pooling(5, "first"), x[:, 0], x[:, 0, 0], x[:, 0, 1:].mT[..., None]),
        (Pooling(4), x[:, 0, :, 0], x[:, 0, :, 0], x[:, 0, :, :1, None]),
    ):
        torch.testing.assert_close(pooling(given), feature)
        torch.testing.assert_close(pooling.as_map(given), seen)
    square = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(Pooling(4)(square), square.mean((2, 3)))
    torch.testing.assert_close(Pooling(4, layout="channels_last")(square), square.mean((1, 2)))
    torch.testing.assert_close(Pooling(4)(square[0]), square[0].mean(1))
    with pytest.raises(ValueError, match="pool: expected tokens .* got shape .*pool='mean'"):
        Pooling(4, "first")(square)
    with pytest.raises(ValueError, match="tail: expected a map of 4 channels"):
        Pooling(4, layout="channels_last")(x)


def test_a_wrong_pool_is_not_silent() -> None:
    net = staged(Swin(), ["layers.0", "layers.1"], classifier="head", tail=["norm"], pool="first")
    with pytest.raises(ValueError, match="pool: expected tokens"):
        PeerNetwork(net)(torch.randn(2, 3, 8, 8))


def test_a_classifier_of_wide_windows_is_refused() -> None:
    module = SqueezeNet()
    with pytest.raises(ValueError, match="classifier: .* a Conv2d of one pixel, got Conv2d"):
        staged(module, classifier="features.0")
    assert {UNetEncoder, VisionTransformer} <= {cls for cls, _, _ in NETWORKS.values()}


def test_networks_that_pool_otherwise_do_not_run_as_one() -> None:
    stages = ["blocks.0", "blocks.1"]
    first, mean, again = (
        PeerNetwork(staged(VisionTransformer(), stages, classifier="head", pool=pool))
        for pool in ("first", "mean", "first")
    )
    assert equal_groups([first, mean, again]) == [[0, 2], [1]]
    assert equal_groups([PeerNetwork(make("functional")) for _ in range(2)]) == [[0, 1]]
