"""MoCo-MCL: the loss of a step, the queue, the key networks, resuming, what it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from helpers.images import encoded, make_folder
from mclfast import Batch
from mclfast.banks.key_queue import KeyQueue
from mclfast.cohort.average import frozen_copy, update_average
from mclfast.cohort.cohort import Cohort
from mclfast.config import TrainConfig
from mclfast.data import ImageSet, load
from mclfast.data.augment_contrastive import CONTRASTIVE, augment_contrastive
from mclfast.data.feed import TrainingFeed, _step_seed
from mclfast.data.source import Views
from mclfast.data.stream import decode
from mclfast.execution.batch_parts import forward_in_parts, shuffled_order
from mclfast.methods import MomentumMCL
from mclfast.methods.moco_mcl import momentum_mcl_sums, sums_of_rows
from mclfast.train import checkpoint
from mclfast.train.builder import build
from mclfast.train.folder import CHECKPOINT
from mclfast.train.trainer import Trainer

TINY = {
    "method": "moco-mcl",
    "data": "digits-full",
    "train_per_class": 8,
    "cohort": "resnet8,resnet8",
    "epochs": 2,
    "batch_size": 40,
    "sampler": "shuffle",
    "queue_size": 80,
    "norm_parts": 2,
    "projection_dim": 16,
    "key_momentum": 0.9,
    "lr": 0.03,
    "device": "cpu",
}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(run_dir: Any = None, **values: Any) -> Trainer:
    return build(TrainConfig.from_values(TINY | values), run_dir)


def drawn(trainer: Trainer) -> tuple[list[Tensor], Batch]:
    rows = trainer.sampler.epoch(0)[:1]
    images, labels, index = next(trainer.feed.batches(rows, first_step=0))
    return images, Batch(labels, index, trainer.step, 0)


def directions(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def expected(queries: Tensor, keys: Tensor, queue: Tensor, tau: float, t: float) -> list[Tensor]:
    """The four terms by their definition, one anchor at a time."""
    networks, batch = queries.shape[:2]
    terms = [torch.zeros((), dtype=torch.float64) for _ in range(4)]

    def row(a: int, b: int, n: int) -> Tensor:
        others = torch.stack([keys[b, n], *queue[b]])
        return (others * queries[a, n]).sum(1) / tau

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = (teacher.detach() / t).softmax(0), (student / t).softmax(0)
        return t**2 * (p * (p / q).log()).sum()

    for n in range(batch):
        for a in range(networks):
            for b in range(networks):
                own = -row(a, b, n).softmax(0)[0].log() / batch
                if a == b:
                    terms[0] = terms[0] + own
                    continue
                terms[1] = terms[1] + kl(row(a, a, n), row(b, b, n)) / batch
                terms[2] = terms[2] + own
                terms[3] = terms[3] + kl(row(a, b, n), row(b, a, n)) / batch
    return terms


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("networks", [1, 2, 3])
# Beyond the rows computed at a time, too.
@pytest.mark.parametrize("batch", [1, 67])
def test_sums_equal_the_definition_to_the_gradient(networks, batch):
    queries = directions(networks, batch, 5).requires_grad_()
    keys, queue = directions(networks, batch, 5, seed=1), directions(networks, 7, 5, seed=2)
    got = momentum_mcl_sums(queries, keys, queue, 0.3, 2.0) / batch
    want = torch.stack(expected(queries, keys, queue, 0.3, 2.0))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    weights = torch.tensor([0.5, 2.0, 3.0, 0.7], dtype=torch.float64)
    (grad,) = torch.autograd.grad((weights * got).sum(), queries)
    (wanted,) = torch.autograd.grad((weights * want).sum(), queries)
    torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)
    constants = [keys.requires_grad_(), queue.requires_grad_()]
    again = momentum_mcl_sums(queries, *constants, 0.3, 2.0).sum()
    assert torch.autograd.grad(again, constants, allow_unused=True) == (None, None)


def test_no_matrix_of_all_similarities_is_kept():
    queries = directions(2, 64, 4).requires_grad_()
    keys, queue = directions(2, 64, 4, seed=1), directions(2, 512, 4, seed=2)

    def largest_kept(function: Callable[..., Tensor]) -> int:
        kept: list[int] = [0]

        def pack(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            function(queries, keys, queue, 0.1, 3.0)
        return max(kept)

    assert largest_kept(sums_of_rows) >= 64 * 512
    assert largest_kept(momentum_mcl_sums) < 64 * 512


def test_loss_of_a_step():
    weights = {"vcl_weight": 0.5, "soft_vcl_weight": 2, "icl_weight": 0.3, "soft_icl_weight": 1.5}
    trainer = tiny(temperature=0.1, kl_temperature=2, **weights)
    images, batch = drawn(trainer)
    outputs = trainer.train_step.outputs(images, batch)
    got = trainer.method.loss(outputs, batch)
    queries = torch.stack([e[-1] for e in outputs.embeddings]).double()
    keys = torch.stack([e[-1] for e in outputs.teacher.embeddings]).double()
    want = expected(queries, keys, trainer.method.queue.keys.double(), 0.1, 2.0)
    for name, value in zip(("vcl", "soft_vcl", "icl", "soft_icl"), want, strict=True):
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)
    total = 0.5 * want[0] + 2 * want[1] + 0.3 * want[2] + 1.5 * want[3]
    torch.testing.assert_close(got["loss"].double(), total, rtol=1e-5, atol=1e-5)


def test_defaults_as_published():
    wanted = {
        "temperature": 0.07,
        "kl_temperature": 3.0,
        "vcl_weight": 1.0,
        "soft_vcl_weight": 1.0,
        "icl_weight": 1.0,
        "soft_icl_weight": 1.0,
        "key_momentum": 0.999,
        "head": "linear",
        "augmentation": "moco-v1",
    }
    assert wanted.items() <= vars(MomentumMCL.Options()).items()


@pytest.mark.parametrize("name", ["moco-v1", "moco-v2"])
def test_images_are_augmented_as_asked_for(name):
    trainer = tiny(augmentation=name)
    feed = TrainingFeed(
        trainer.data, device=trainer.device, seed=0, views=2, contrastive=CONTRASTIVE[name]
    )
    views, _, _ = next(feed.batches(trainer.sampler.epoch(0)[:1], first_step=0))
    torch.testing.assert_close(drawn(trainer)[0], views)


def test_gradients_reach_the_queries_networks_alone():
    trainer = tiny()
    images, batch = drawn(trainer)
    trainer.method.loss(trainer.train_step.outputs(images, batch), batch)["loss"].backward()
    without = {n for n, p in trainer.cohort.named_parameters() if p.grad is None}
    assert without == {f"networks.{i}.backbone.fc.{p}" for i in (0, 1) for p in ("weight", "bias")}
    assert all(bool(p.grad.any()) for p in trainer.cohort.parameters() if p.grad is not None)
    assert all(p.grad is None for p in trainer.train_step.average.parameters())


def test_labels_change_nothing_in_training():
    first, second = tiny(), tiny()
    shuffled = second.data.train
    other = ImageSet(shuffled.images, shuffled.labels.flip(0))
    object.__setattr__(second.data, "train", other)
    for trainer in (first, second):
        trainer.train_step(*drawn(trainer))
    a, b = first.cohort.state_dict(), second.cohort.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- the queue


def test_queue_starts_with_unit_norm_and_wraps_around():
    queue = KeyQueue(2, 6, 4, seed=3)
    assert torch.equal(queue.keys, KeyQueue(2, 6, 4, seed=3).keys)
    assert not torch.equal(queue.keys, KeyQueue(2, 6, 4, seed=4).keys)
    torch.testing.assert_close(queue.keys.norm(dim=-1), torch.ones(2, 6))
    first = queue.keys.clone()
    batches = [directions(2, 2, 4, seed=s).float() for s in range(4)]
    queue.update(batches[0])
    assert torch.equal(queue.keys, torch.cat([batches[0], first[:, 2:]], dim=1))
    for b in batches[1:]:
        queue.update(b)
    assert torch.equal(queue.keys, torch.cat([batches[3], batches[1], batches[2]], dim=1))
    assert int(queue.position) == 2
    assert torch.equal(tiny(seed=5).method.queue.keys, KeyQueue(2, 80, 16, seed=5).keys)


def test_queue_wants_batches_that_fill_it_evenly():
    with pytest.raises(ValueError, match=r"^queue_size: expected a multiple of the batch of 4"):
        KeyQueue(1, 6, 2).update(directions(1, 4, 2))
    with pytest.raises(ValueError, match=r"^keys: expected shape \[1, B, 2\]"):
        KeyQueue(1, 6, 2).update(directions(1, 3, 3))
    with pytest.raises(ValueError, match=r"^size: expected an integer >= 1"):
        KeyQueue(1, 0, 2)


def test_a_step_puts_its_keys_into_the_queue(monkeypatch):
    trainer = tiny()
    queue, loss = trainer.method.queue, trainer.method.loss
    before, given = queue.keys.clone(), []
    monkeypatch.setattr(
        trainer.method, "loss", lambda outputs, batch: given.append(outputs) or loss(outputs, batch)
    )
    trainer.train_step(*drawn(trainer))
    keys = torch.stack([stages[-1] for stages in given[0].teacher.embeddings])
    assert torch.equal(queue.keys, torch.cat([keys, before[:, 40:]], dim=1))


# ---------------------------------------------------------------- the key networks


def test_keys_average_parameters_before_they_run_and_keep_their_own_statistics():
    trainer = tiny()
    trainer.train_step(*drawn(trainer))
    keys = dict(trainer.train_step.average.named_parameters())
    before = {n: p.clone() for n, p in keys.items()}
    now = {n: p.detach().clone() for n, p in trainer.cohort.named_parameters()}
    statistics = {n: b.clone() for n, b in trainer.train_step.average.named_buffers()}
    seen: list[dict[str, Tensor]] = []
    trainer.train_step.average.register_forward_pre_hook(
        lambda m, args: seen.append({n: p.clone() for n, p in m.named_parameters()})
    )
    trainer.train_step(*drawn(trainer))
    for name, value in before.items():
        want = 0.9 * value + 0.1 * now[name]
        torch.testing.assert_close(seen[0][name], want, rtol=1e-6, atol=1e-7)
        assert torch.equal(keys[name], seen[0][name])
    assert trainer.train_step.average.training
    changed = {
        n
        for n, b in trainer.train_step.average.named_buffers()
        if not torch.equal(b, statistics[n])
    }
    assert changed == set(statistics)
    assert int(trainer.train_step.average.networks[0].backbone.bn1.num_batches_tracked) == 4


def test_a_frozen_copy_is_a_constant_in_evaluation_mode():
    shared = torch.nn.Linear(2, 2)
    module = torch.nn.Sequential(shared, torch.nn.BatchNorm1d(2), shared)
    copy = frozen_copy(module)
    assert not any(p.requires_grad for p in copy.parameters())
    assert not any(m.training for m in copy.modules())
    assert copy[0] is copy[2] and copy[0] is not shared
    assert all(p.requires_grad for p in module.parameters()) and module.training


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=rf"^decay: expected a value in \[0, 1\], got {decay}$"):
        update_average(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), decay)


def test_an_average_of_parameters_alone():
    module = torch.nn.BatchNorm1d(2)
    average = frozen_copy(module)
    module.weight.data.fill_(3.0)
    module.running_mean.fill_(5.0)
    update_average(average, module, 0.5, buffers=False)
    assert average.weight.tolist() == [2.0, 2.0] and average.running_mean.tolist() == [0.0, 0.0]


def test_the_second_view_and_its_order_go_to_the_keys():
    trainer = tiny()
    images, batch = drawn(trainer)
    assert isinstance(images, list) and len(images) == 2
    assert not torch.equal(images[0], images[1])
    given: dict[str, list[Tensor]] = {"cohort": [], "average": []}
    for name, seen in given.items():
        getattr(trainer.train_step, name).register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0])
        )
    outputs = trainer.train_step.outputs(images, batch)
    order = shuffled_order(40, seed=0, step=0, device=trainer.device)
    assert sorted(order.tolist()) == list(range(40)) and order.tolist() != list(range(40))
    assert torch.equal(torch.cat(given["cohort"]), images[0])
    assert torch.equal(torch.cat(given["average"]), images[1][order])
    assert [len(x) for x in given["average"]] == [20, 20]

    # In evaluation mode nothing of parts and order is left.
    trainer.train_step.average.eval()
    with torch.no_grad():
        plain = trainer.train_step.average(images[1])
        mixed = forward_in_parts(trainer.train_step.average, images[1], 4, order)
    for a, b in zip(plain.embeddings, mixed.embeddings, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(plain.maps, mixed.maps)
    assert mixed.shared is None and mixed.teacher is None
    assert not torch.allclose(outputs.teacher.features[0][0], plain.features[0][0], atol=1e-3)


def test_orders_are_of_seed_and_step():
    orders = {
        tuple(shuffled_order(30, seed=s, step=t, device=torch.device("cpu")).tolist())
        for s in range(3)
        for t in range(3)
        for _ in range(2)
    }
    assert len(orders) == 9


def test_statistics_of_one_part_do_not_depend_on_the_order_those_of_more_do():
    trainer = tiny(norm_parts=1)
    images, _ = drawn(trainer)
    orders = (None, torch.arange(40) * 7 % 40)
    with torch.no_grad():
        plain, mixed = (
            [forward_in_parts(trainer.cohort, images[0], p, o).embeddings[0][0] for o in orders]
            for p in (1, 2)
        )
    torch.testing.assert_close(*plain, rtol=1e-4, atol=1e-4)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-2


def test_views_of_several_peers_go_in_parts():
    trainer = tiny()
    trainer.cohort.eval()
    views, _ = drawn(trainer)
    got = forward_in_parts(trainer.cohort, views, 2).embeddings
    want = trainer.cohort(views).embeddings
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="^parts: expected a divisor of the batch of 40, got 3"):
        forward_in_parts(trainer.cohort, views[0], 3)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"queue_size": 100}, "^queue_size: expected a multiple of the batch of 40, got 100"),
        ({"norm_parts": 3}, "^norm_parts: expected a divisor of batch_size 40, got 3"),
        ({"sampler": "balanced", "images_per_class": 4}, "^sampler: expected shuffle for method"),
        ({"key_momentum": 1.0}, r"^key_momentum: expected a value in \[0, 1\), got 1.0"),
        ({"temperature": 0.0}, "^temperature"),
        ({"icl_weight": -1.0}, "^icl_weight"),
        ({"head": "deep"}, "^head: .*linear"),
    ],
)
def test_settings_that_cannot_work(values, message):
    with pytest.raises(ValueError, match=message):
        tiny(**values)


@pytest.mark.parametrize(("head", "layers"), [("linear", 1), ("mlp", 3)])
def test_heads(head, layers):
    trainer = tiny(head=head)
    heads = [h for stages in trainer.cohort.projections for h in stages]
    assert [len(h.layers) for h in heads] == [layers, layers]
    with pytest.raises(ValueError, match="^projection: expected one of linear, mlp"):
        Cohort(tiny().cohort.peers, projection="deep")


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    # The next keys go into the middle of the queue.
    whole = tiny(tmp_path / "whole", queue_size=120)
    want = whole.fit(progress=False)
    tiny(tmp_path / "cut", queue_size=120).fit(progress=False, stop_after=1)
    state = checkpoint.load(tmp_path / "cut" / CHECKPOINT)
    assert state["method"]["queue.keys"].shape == (2, 120, 16)
    rest = tiny(tmp_path / "cut", queue_size=120)
    assert rest.fit(progress=False).peers == want.peers
    for name in ("cohort", "method", "average"):
        mine, theirs = (getattr(t.train_step, name).state_dict() for t in (rest, whole))
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs), name


def test_half_precision_keeps_the_losses_wide():
    trainer = tiny(amp="bf16", epochs=1)
    images, batch = drawn(trainer)
    assert trainer.train_step(images, batch)["loss"].dtype == torch.float32
    assert trainer.method.queue.keys.dtype == torch.float32


def test_four_networks_with_a_common_stem():
    trainer = tiny(cohort="resnet8,resnet8,resnet8,resnet8", topology="shared_stem", epochs=1)
    record = trainer.fit(progress=False).history[-1]
    assert all(torch.tensor(list(record.values())).isfinite())


# ---------------------------------------------------------------- streamed images


@pytest.mark.parametrize("workers", [0, 1])
def test_two_views_of_streamed_images_come_in_one_pass(tmp_path, workers):
    root = make_folder(tmp_path)
    data = load("imagefolder", root=root, workers=workers, image_size=16)
    a = CONTRASTIVE["moco-v1"]
    feed = TrainingFeed(data, device=torch.device("cpu"), seed=5, views=2, contrastive=a)
    rows = torch.randperm(24).view(6, 4)
    batches = list(feed.batches(rows, first_step=3))
    assert [len(views) for views, _, _ in batches] == [2] * 6
    for i, (views, labels, index) in enumerate(batches):
        assert torch.equal(index, rows[i]) and torch.equal(labels, data.train.labels[rows[i]])
        for view, seed in zip(views, feed._seeds, strict=True):
            asked = Views(seed, 3 + i, min_area=0.2)
            (pixels,) = data.train.pixels(rows[i : i + 1], "cpu", views=asked)
            # The source has cropped and flipped.
            plain = replace(a, crop=False, flip=False)
            want = augment_contrastive(
                pixels, plain, mean=data.mean, std=data.std, seed=_step_seed(seed, 3 + i)
            )
            assert torch.equal(view, want)
        assert not torch.equal(*views)
    # A run that goes on from the middle.
    again = list(feed.batches(rows[4:], first_step=7))
    assert all(torch.equal(x, y) for x, y in zip(again[0][0], batches[4][0], strict=True))


def test_smallest_area_of_streamed_crops():
    boxes = [
        decode.random_box(400, 300, decode.view_generator(0, step, 0), 0.5) for step in range(300)
    ]
    shares = [(r - x) * (b - y) / 120_000 for x, y, r, b in boxes]
    assert 0.49 < min(shares) < 0.55
    generators = (decode.view_generator(0, 1, 0) for _ in range(2))
    content = encoded(1, (400, 300))
    small, large = (
        decode.training_view(content, 8, g, min_area=m)
        for g, m in zip(generators, (0.08, 0.99), strict=True)
    )
    assert not torch.equal(small, large)


def test_a_run_on_streamed_images(tmp_path):
    root = make_folder(tmp_path)
    values = {
        "data": "imagefolder",
        "data_root": str(root),
        "image_size": 16,
        "workers": 0,
        "train_per_class": None,
        "batch_size": 8,
        "queue_size": 16,
        "epochs": 1,
    }
    record = tiny(**values).fit(progress=False).history[-1]
    assert record["step"] == 3
    assert all(torch.tensor(list(record.values())).isfinite())
