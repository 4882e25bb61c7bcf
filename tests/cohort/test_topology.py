"""Topologies: groups, what is shared and how often it runs, gradients, published sizes."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from mclfast import Cohort, models
from mclfast.cohort.heads import LayerMatcher
from mclfast.cohort.outputs import PeerOutputs
from mclfast.cohort.topology import Topology, topology

# name: split stage, parameters and mega-MACs of four networks that share stem and first stages.
SHARED_STEM = {
    "resnet32": (1, 1_819_552, 204.4),
    "resnet56": (1, 3_318_944, 374.3),
    "resnet110": (1, 4_517_344, 507.3),
    "vgg16": (1, 53_884_368, 681.5),
    "densenet_40_12": (1, 592_384, 130.0),
    "hcgnet_a1": (1, 4_057_426, 427.7),
    "hcgnet_a2": (1, 11_169_209, 1215),
    "wrn_16_2": (1, 2_712_864, 302.5),
    "wrn_40_2": (1, 8_697_632, 982.0),
    "wrn_28_4": (1, 22_679_776, 2557),
    "shufflenet_v2_x0_5_cifar": (1, 1_754_272, 35.8),
    "shufflenet_v2_x1_0_cifar": (1, 5_331_752, 153.2),
    "resnet18": (2, 44_708_832, 4282),
    "resnet34": (2, 83_146_976, 9600),
}
# Two second transitions (240 + 120 x 60 parameters each) that the published parameters of the
# DenseNet tree count beyond one per pair; its multiply-adds do not, so they are not run.
IDLE = {"densenet_40_12": 2 * 7_440}
# name: the same for the tree of CL-ILR: one stage shared by all, one by pairs.
TREE = {
    "resnet32": (1_642_016, 159.3),
    "resnet110": (4_077_536, 394.0),
    "vgg16": (42_078_672, 492.7),
    "densenet_40_12": (482_224, 98.9),
    "hcgnet_a1": (3_074_584, 295.5),
}
# name: parameters and mega-MACs of ONE and of OKDDip: four networks with their own last stage.
LAST_STAGE = {
    "resnet32": (1_553_388, 136.8, 1_554_272, 136.8),
    "resnet110": (3_858_156, 337.4, 3_874_016, 337.4),
    "vgg16": (36_177_884, 398.3, 36_241_360, 398.5),
    "densenet_40_12": (405_076, 83.4, 409_048, 83.4),
    "hcgnet_a1": (2_583_679, 229.4, 2_625_391, 229.5),
}
# name: parameters of PCL's three peers with their own last stage and its classifier of all three,
# mega-MACs with a view for each.
THREE_PEERS = {
    "resnet32": (1_212_384, 207.4),
    "resnet110": (3_038_944, 502.4),
    "wrn_20_8": (17_431_008, 3069),
    "vgg16": (30_771_664, 941.5),
    "densenet_40_12": (371_488, 217.2),
}
# What each peer has there beyond this package's network: two hidden linear layers of 512, and no
# batch norm at the end. Parameters and MACs.
IN_PCL = {"vgg16": (2 * (512 * 512 + 512), 2 * 512 * 512), "densenet_40_12": (-2 * 132, 0)}
FAMILIES = [
    models.resnet8,
    lambda: models.WideResNet(10, 1),
    lambda: models.CifarShuffleNetV2((8, 12, 16), feature_width=20),
    lambda: models.Vgg(((4, 1), (6, 1), (8, 1))),
    lambda: models.CifarDenseNet(1, 4),
    lambda: models.HcgNet((4, 4, 4), 1),
    lambda: models.ImageNetResNet(models.imagenet_resnet.BasicBlock, (1, 1, 1, 1), width=4),
    lambda: models.ImageNetShuffleNetV2((8, 12, 16), feature_width=20),
]


def cohort_of(
    make=models.resnet8, name="tree", count=4, *, split=1, rescale=False, heads=False
) -> Cohort:
    networks = [make() for _ in range(count)]
    shape = topology(
        name, count, len(networks[0].stages), split_stage=split, rescale_gradients=rescale
    )
    return Cohort(networks, auxiliary_heads=heads, projection_dim=None, topology=shape)


def on_meta(name: str, shape: str, count: int, split: int) -> Cohort:
    with torch.device("meta"):
        return cohort_of(lambda: models.create(name), shape, count, split=split)


class OwnViews(nn.Module):
    """PCL's graph: a view of the image for each peer, one classifier on all features."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__()
        self.cohort = cohort
        width = sum(peer.feature_dim for peer in cohort.peers)
        self.ensemble = nn.Linear(width, 100, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        out = self.cohort([x.clone() for _ in self.cohort.peers])
        return self.ensemble(torch.cat(out.final_features, dim=1))


def runs(cohort: Cohort, views: Tensor | list[Tensor]) -> Counter[str]:
    """Calls of each stem convolution and stage, under the name of the first that has it."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, key=name: calls.update([key]))
        for name, module in cohort.named_modules()
        if name.split(".")[-1] in ("conv1", "layer1", "layer2", "layer3") and name.count(".") == 3
    ]
    cohort(views)
    for handle in handles:
        handle.remove()
    return Counter({key.removeprefix("networks."): n for key, n in calls.items()})


def key(network: int, part: str) -> str:
    return f"{network}.backbone.{part}"


def test_groups() -> None:
    assert topology("independent", 3, 2, split_stage=1).groups == ((0, 1, 2),) * 3
    stem = topology("shared_stem", 3, 3, split_stage=1)
    assert stem.groups == ((0, 0, 0), (0, 0, 0), (0, 1, 2), (0, 1, 2))
    assert topology("shared_stem", 2, 2, split_stage=0).groups == ((0, 0), (0, 1), (0, 1))
    tree = topology("tree", 5, 3, split_stage=1)
    own = (0, 1, 2, 3, 4)
    assert tree.groups == ((0,) * 5, (0,) * 5, (0, 0, 1, 1, 2), own)
    assert (stem.common_levels, tree.common_levels) == (2, 2)
    assert topology("independent", 3, 2, split_stage=1).common_levels == 0
    assert stem.shares and tree.shares and not topology("independent", 2, 2, split_stage=1).shares
    assert [stem.branches(level, 0) for level in range(4)] == [1, 3, 1, 1]
    assert [tree.branches(level, 0) for level in range(4)] == [1, 3, 2, 1]
    # The odd network has nobody to share its pair with.
    assert tree.branches(2, 2) == 1


@pytest.mark.parametrize("name", SHARED_STEM)
def test_sizes_with_a_shared_stem(name: str) -> None:
    split, params, mega = SHARED_STEM[name]
    cohort = on_meta(name, "shared_stem", 4, split)
    assert models.parameter_count(cohort) == params
    digits = 1 if isinstance(mega, float) else 0
    side = 224 if split == 2 else 32
    assert round(models.macs(cohort, side) / 1e6, digits) == mega


@pytest.mark.parametrize("name", TREE)
def test_sizes_of_the_tree(name: str) -> None:
    params, mega = TREE[name]
    cohort = on_meta(name, "tree", 4, 1)
    assert models.parameter_count(cohort) + IDLE.get(name, 0) == params
    assert round(models.macs(cohort, 32) / 1e6, 1) == mega


@pytest.mark.parametrize("name", LAST_STAGE)
def test_sizes_with_four_last_stages(name: str) -> None:
    one, one_mega, okddip, okddip_mega = LAST_STAGE[name]
    cohort = on_meta(name, "shared_stem", 4, 2)
    params, macs = models.parameter_count(cohort), models.macs(cohort, 32)
    shared = cohort(torch.empty(2, 3, 32, 32, device="meta")).shared.shape[1]
    width = cohort.peers[0].feature_dim
    # ONE: a gate of one linear layer and batch norm.
    assert params + 4 * (shared + 1) + 8 == one
    assert round((macs + 4 * shared) / 1e6, 1) == one_mega
    # OKDDip: two projections of the feature, of three auxiliary peers.
    assert params + 2 * width * (width // 8) == okddip
    assert round((macs + 3 * 2 * width * (width // 8)) / 1e6, 1) == okddip_mega


@pytest.mark.parametrize("name", THREE_PEERS)
def test_sizes_with_own_last_stages(name: str) -> None:
    params, mega = THREE_PEERS[name]
    cohort = OwnViews(on_meta(name, "shared_stem", 3, 2))
    more, more_macs = IN_PCL.get(name, (0, 0))
    assert models.parameter_count(cohort) + 3 * more == params
    digits = 1 if isinstance(mega, float) else 0
    assert round((models.macs(cohort, 32) + 3 * more_macs) / 1e6, digits) == mega


def test_sizes_of_what_pcl_deploys() -> None:
    for name, params in {"wrn_20_8": 6_871_220, "vgg16": 15_299_748}.items():
        (peer,) = on_meta(name, "independent", 1, 1).peers
        assert models.parameter_count(peer) + IN_PCL.get(name, (0, 0))[0] == params


@pytest.mark.parametrize(
    ("name", "params", "width"), [("resnet32", 2_563_704, 64), ("wrn_28_4", 31_922_424, 256)]
)
def test_sizes_of_a_layerwise_pair(name: str, params: int, width: int) -> None:
    with torch.device("meta"):
        pair = Cohort([models.create(name) for _ in range(2)], projection_dim=128)
        matcher = LayerMatcher(pair.feature_dims, 128)
    assert models.parameter_count(pair.networks) == params
    # A projection of two linear layers, and one of the matcher, per network and stage.
    heads, layers = pair.projections, 2 * 3
    assert models.parameter_count(heads) == layers * (width * 128 + 128 + 128 * 128 + 128)
    assert models.parameter_count(matcher) == layers * (width * 128 + 128)


def test_size_of_the_two_networks_of_ffl() -> None:
    assert models.parameter_count(on_meta("resnet32", "shared_stem", 2, 2)) == 832_920


def test_sharing_is_by_identity() -> None:
    first, second, third, fourth = (peer.backbone for peer in cohort_of().peers)
    for other in (second, third, fourth):
        for part in ("conv1", "bn1", "layer1"):
            assert getattr(other, part) is getattr(first, part)
        assert other.layer3 is not first.layer3 and other.fc is not first.fc
    assert second.layer2 is first.layer2 and fourth.layer2 is third.layer2
    assert third.layer2 is not first.layer2


@pytest.mark.parametrize("make", FAMILIES)
def test_tail_and_classifier_are_never_shared(make) -> None:
    cohort = cohort_of(make, "shared_stem", 2, split=len(make().stages) - 1)
    first, second = (peer.backbone for peer in cohort.peers)
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    own = nn.ModuleList([first.stages[-1], first.tail, first.classifier])
    expected = {id(p) for p in first.parameters()} - {id(p) for p in own.parameters()}
    assert shared == expected and shared


def test_shared_parts_run_once_for_one_view() -> None:
    x = torch.randn(2, 3, 8, 8)
    once = [key(0, part) for part in ("conv1", "layer1", "layer2", "layer3")]
    once += [key(2, "layer2"), *(key(j, "layer3") for j in (1, 2, 3))]
    assert runs(cohort_of(), x) == Counter(once)
    assert runs(cohort_of(), [x, x, x, x]) == Counter(once)


def test_shared_parts_run_once_per_view() -> None:
    views = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    calls = runs(cohort_of(), views)
    assert calls[key(0, "conv1")] == calls[key(0, "layer1")] == 4
    assert calls[key(0, "layer2")] == calls[key(2, "layer2")] == 2
    assert calls[key(3, "layer3")] == 1
    first, second = views[:2]
    calls = runs(cohort_of(), [first, second, first, second])
    assert calls[key(0, "layer1")] == 2 and calls[key(0, "layer2")] == 2


def test_the_shared_map() -> None:
    cohort = cohort_of(name="shared_stem", split=2).eval()
    x = torch.randn(2, 3, 8, 8)
    taps = cohort.peers[3].backbone.forward_taps(x)
    assert torch.equal(cohort(x).shared, taps.maps[1])
    assert cohort([x, x + 1, x, x]).shared is None
    assert cohort_of(name="independent")(x).shared is None


@pytest.mark.parametrize("name", ["shared_stem", "tree"])
@pytest.mark.parametrize("make", FAMILIES)
def test_each_backbone_deploys_alone(make, name: str) -> None:
    torch.manual_seed(0)
    cohort = cohort_of(make, name)
    views = [torch.randn(3, 3, 16, 16) for _ in range(4)]
    cohort(views)
    cohort.eval()
    for images in (views[0], views):
        outputs = cohort(images)
        for j, peer in enumerate(cohort.peers):
            alone = make().eval()
            alone.load_state_dict(peer.backbone.state_dict())
            view = images if isinstance(images, Tensor) else images[j]
            torch.testing.assert_close(alone(view), outputs.final_logits[j])
    first, second = cohort(views[0]).final_logits[:2]
    assert not torch.equal(first, second)


def test_auxiliary_heads_are_each_networks_own() -> None:
    cohort = cohort_of(heads=True).eval()
    x = torch.randn(2, 3, 8, 8)
    out = cohort(x)
    for peer, logits in zip(cohort.peers, out.logits, strict=True):
        for got, expected in zip(logits, peer(x).logits, strict=True):
            torch.testing.assert_close(got, expected)
    owned = [{id(p) for p in peer.auxiliary.parameters()} for peer in cohort.peers]
    assert len(set.union(*owned)) == sum(map(len, owned))


@pytest.mark.parametrize("different_views", [False, True])
def test_gradients_are_divided_where_the_tree_splits(different_views: bool) -> None:
    """Level by level: 1/4 in what all share, 1/2 in what pairs share, all of it behind."""
    torch.manual_seed(0)
    plain = cohort_of().double()
    divided = cohort_of(rescale=True).double()
    divided.load_state_dict(plain.state_dict())
    views = [torch.randn(3, 3, 8, 8, dtype=torch.float64) for _ in range(4)]
    images = views if different_views else views[0]
    for cohort in (plain, divided):
        logits = cohort(images).final_logits
        sum((j + 1) * z.square().mean() for j, z in enumerate(logits)).backward()
    share = {"conv1": 4, "bn1": 4, "layer1": 4, "layer2": 2, "layer3": 1, "fc": 1}
    whole = dict(plain.named_parameters())
    for name, parameter in divided.named_parameters():
        part = name.split(".")[3]
        torch.testing.assert_close(parameter.grad, whole[name].grad / share[part])
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "count", "peer", "first", "second"),
    [
        # Three pairs, the last of one network: nothing splits behind its second stage.
        ("tree", 5, 0, 6, 2),
        ("tree", 5, 4, 3, 1),
        ("tree", 6, 4, 6, 2),
        ("tree", 3, 2, 2, 1),
        ("shared_stem", 3, 1, 3, 1),
        ("shared_stem", 5, 1, 5, 1),
    ],
)
def test_gradients_are_divided_by_the_number_of_branches(
    name: str, count: int, peer: int, first: int, second: int
) -> None:
    """Of one network's loss; what the first and the second stage get of it."""
    torch.manual_seed(0)
    plain = cohort_of(name=name, count=count).double()
    divided = cohort_of(name=name, count=count, rescale=True).double()
    divided.load_state_dict(plain.state_dict())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for cohort in (plain, divided):
        cohort(x).final_logits[peer].square().mean().backward()
    ours, theirs = (c.peers[peer].backbone for c in (plain, divided))
    for stage, share in (("layer1", first), ("layer2", second), ("layer3", 1)):
        whole, part = (getattr(net, stage)[0].conv1.weight.grad for net in (ours, theirs))
        torch.testing.assert_close(part, whole / share)
        assert whole.abs().sum() > 0


def test_divided_gradients_can_be_differentiated_again() -> None:
    torch.manual_seed(0)
    cohort = cohort_of(lambda: models.WideResNet(10, 1, num_classes=2), rescale=True).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weight = cohort.peers[0].backbone.block1[0].conv1.weight
    loss = sum(z.square().sum() for z in cohort(x).final_logits)
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), weight)
    assert second.isfinite().all() and second.abs().sum() > 0


def test_state_dict_round_trip() -> None:
    torch.manual_seed(0)
    source, target = cohort_of(heads=True), cohort_of(heads=True)
    x = torch.randn(3, 3, 8, 8)
    source(x)
    target.load_state_dict(source.state_dict())
    for got, expected in zip(
        target.eval()(x).final_logits, source.eval()(x).final_logits, strict=True
    ):
        assert torch.equal(got, expected)
    first, second = (peer.backbone for peer in target.peers[:2])
    assert first.layer1 is second.layer1 and first.layer2 is second.layer2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_keeps_sharing(clone) -> None:
    cohort = cohort_of(rescale=True).eval()
    copied = clone(cohort)
    assert models.parameter_count(copied) == models.parameter_count(cohort)
    assert len(list(copied.buffers())) == len(list(cohort.buffers()))
    ours, theirs = ({id(p) for p in c.parameters()} for c in (cohort, copied))
    assert not ours & theirs
    assert copied.topology == cohort.topology
    x = torch.randn(2, 3, 8, 8)
    for got, expected in zip(copied(x).final_logits, cohort(x).final_logits, strict=True):
        assert torch.equal(got, expected)
    assert runs(copied, x) == runs(cohort, x)


def test_a_shared_part_trains_as_one() -> None:
    cohort = cohort_of(name="shared_stem", count=2)
    step = torch.optim.SGD(cohort.parameters(), lr=0.1)
    sum(z.square().mean() for z in cohort(torch.randn(2, 3, 8, 8)).final_logits).backward()
    step.step()
    first, second = (peer.backbone for peer in cohort.peers)
    assert torch.equal(first.conv1.weight, second.conv1.weight)
    assert first.bn1.num_batches_tracked == 1
    assert not torch.equal(first.layer3[0].conv1.weight, second.layer3[0].conv1.weight)


def test_errors_of_names_and_splits() -> None:
    with pytest.raises(ValueError, match=r"topology: expected one of .*; got 'trees' \(did you"):
        topology("trees", 4, 3, split_stage=1)
    with pytest.raises(ValueError, match=r"split_stage: expected a value < 3 for 3 stages in a sh"):
        topology("shared_stem", 4, 3, split_stage=3)
    with pytest.raises(ValueError, match=r"split_stage: .* < 2 for 3 stages in a tree .*, got 2"):
        topology("tree", 4, 3, split_stage=2)
    with pytest.raises(ValueError, match="split_stage: expected an integer >= 0, got -1"):
        topology("shared_stem", 4, 3, split_stage=-1)
    with pytest.raises(ValueError, match=r"groups: expected networks of one group at level 1"):
        Topology(((0, 1), (0, 0)))
    with pytest.raises(ValueError, match=r"groups: expected one group number .* got \[2, 1\]"):
        Topology(((0, 0), (0,)))


def test_errors_of_networks_that_cannot_share() -> None:
    shared = topology("shared_stem", 2, 3, split_stage=1)
    for other in (models.resnet20(), models.resnet8(num_classes=100, in_channels=1)):
        with pytest.raises(ValueError, match="topology: expected equal networks to share parts"):
            Cohort([models.resnet8(), other], topology=shared)
    stages = ["layer1", "layer2", "layer3"]
    adapted = [models.staged(models.resnet8(), stages) for _ in range(2)]
    with pytest.raises(ValueError, match=r"expected networks of mclfast.models .* got _Adapted"):
        Cohort(adapted, topology=shared)
    with pytest.raises(ValueError, match=r"one for 3 networks of 3 stages, got one for 2 of 3"):
        Cohort([models.resnet8() for _ in range(3)], topology=shared)
    four = topology("shared_stem", 2, 4, split_stage=1)
    with pytest.raises(ValueError, match=r"one for 2 networks of 3 stages, got one for 2 of 4"):
        Cohort([models.resnet8() for _ in range(2)], topology=four)
    with pytest.raises(ValueError, match=r"images: expected 4 views, got 3"):
        cohort_of()([torch.randn(2, 3, 8, 8)] * 3)


@pytest.mark.parametrize("name", ["independent", "shared_stem", "tree"])
@pytest.mark.parametrize("own_views", [False, True], ids=["one-view", "own-views"])
def test_a_peer_alone_puts_out_what_it_does_in_the_cohort(name: str, own_views: bool) -> None:
    torch.manual_seed(0)
    shape = topology(name, 4, 3, split_stage=1, rescale_gradients=True)
    networks = [models.resnet8(num_classes=5) for _ in range(4)]
    cohort = Cohort(networks, projection_dim=3, topology=shape).double()
    views = [torch.randn(3, 3, 16, 16, dtype=torch.float64) for _ in range(4 if own_views else 1)]
    images = views if own_views else views[0]

    def total(outputs: PeerOutputs) -> Tensor:
        parts = [*outputs.features, *outputs.logits, *outputs.embeddings, outputs.maps]
        return torch.stack([t.square().sum() for stages in parts for t in stages]).sum()

    joint = cohort(images)
    total(joint).backward()
    wanted = {n: p.grad.clone() for n, p in cohort.named_parameters()}
    cohort.zero_grad()
    for j, view in enumerate(cohort.views(images)):
        alone = cohort.peer_forward(j, view)
        for many, one in zip(joint[:3], alone[:3], strict=True):
            assert len(one) == 1 and all(map(torch.equal, many[j], one[0]))
        assert len(alone.maps) == 1 and torch.equal(joint.maps[j], alone.maps[0])
        assert (alone.shared is None) == (name == "independent")
        if joint.shared is not None:
            assert torch.equal(joint.shared, alone.shared)
        total(alone).backward()
    for n, p in cohort.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n], rtol=1e-12, atol=1e-12, msg=n)
