"""The memory bank: initial entries, updates, dtypes, state."""

from __future__ import annotations

import pytest
import torch

from helpers import golden
from mclfast import MemoryBank, bank_mcl_terms
from mclfast._base.tensors import unit_norm

pytestmark = pytest.mark.usefixtures("backend")


def test_updates_of_the_published_code(golden_dir):
    for name, index in (("lmcl_bank_m2_l3", "pos_idx"), ("mcl_okd_m4", "index")):
        g = golden.load(golden_dir / f"{name}.npz")
        bank = MemoryBank(*g["bank"].shape, momentum=float(g["bank_momentum"]), dtype=torch.float64)
        bank.banks.copy_(g["bank"])
        e = g["embeddings"]
        last = e[:, -1].contiguous() if e.dim() == 4 else e
        where = g[index][:, 0].contiguous() if g[index].dim() == 2 else g[index]
        bank.update(where, last)
        assert golden.relative(bank.banks, g["bank_after"]) < 1e-9


def test_the_last_of_equal_samples_counts():
    g = torch.Generator().manual_seed(0)
    bank = MemoryBank(2, 9, 4, momentum=0.25, dtype=torch.float64)
    before = bank.banks.clone()
    e = unit_norm(torch.randn(2, 5, 4, generator=g, dtype=torch.float64))
    bank.update(torch.tensor([3, 7, 3, 1, 3]), e)
    for number, r in ((3, 4), (7, 1), (1, 3)):
        mixed = 0.25 * before[:, number] + 0.75 * e[:, r]
        want = mixed / mixed.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(bank.banks[:, number], want)
    untouched = [i for i in range(9) if i not in (3, 7, 1)]
    assert torch.equal(bank.banks[:, untouched], before[:, untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stored_precision(dtype):
    bank = MemoryBank(2, 50, 16, dtype=dtype)
    before = bank.banks.double()
    e = unit_norm(torch.randn(2, 6, 16))
    index = torch.randperm(50)[:6]
    bank.update(index, e)
    want = unit_norm(0.5 * before[:, index] + 0.5 * e.double())
    assert bank.banks.dtype == dtype
    error = (bank.banks[:, index].double() - want).abs().max()
    assert error <= torch.finfo(dtype).eps
    norms = bank.banks[:, index].double().norm(dim=-1)
    assert (norms - 1).abs().max() < 4 * torch.finfo(dtype).eps


def test_initial_entries():
    bank = MemoryBank(2, 4000, 32, seed=3)
    assert bank.banks.abs().max() <= (3 / 32) ** 0.5
    assert bank.banks.square().sum(-1).mean() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(bank.banks, MemoryBank(2, 4000, 32, seed=3).banks)
    assert not torch.equal(bank.banks, MemoryBank(2, 4000, 32, seed=4).banks)
    assert not torch.equal(bank.banks[0], bank.banks[1])


def test_state_and_casts():
    bank = MemoryBank(1, 8, 4, dtype=torch.bfloat16)
    other = MemoryBank(1, 8, 4, dtype=torch.bfloat16, seed=1)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.banks, other.banks)
    # A model that is cast keeps what its bank stores; one that moves takes it along.
    holder = torch.nn.ModuleList([bank]).double()
    assert bank.banks.dtype == torch.bfloat16
    holder.to("meta")
    assert bank.banks.device.type == "meta"
    holder.to_empty(device="cpu")
    assert bank.banks.device.type == "cpu" and bank.banks.shape == (1, 8, 4)
    other.share_memory()
    assert other.banks.is_shared()
    assert "dtype=torch.bfloat16" in repr(other)


def test_an_update_between_loss_and_backward_is_an_error(backend):
    if backend == "reference":
        pytest.skip("the plain form keeps copies of the rows")
    bank = MemoryBank(2, 30, 4)
    e = unit_norm(torch.randn(2, 3, 4)).requires_grad_()
    pos, neg = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.randint(30, (3, 4))
    terms = bank_mcl_terms(e, bank.banks, pos, neg)
    bank.update(pos[:, 0].contiguous(), e.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        terms.icl.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "^num_samples: expected an integer >= 1"),
        ({"momentum": 1.0}, ValueError, r"^momentum: expected a value in \[0, 1\)"),
        ({"dtype": torch.int8}, ValueError, "^dtype: expected one of .*got 'int8'"),
    ],
)
def test_wrong_settings(change, error, message):
    with pytest.raises(error, match=message):
        MemoryBank(**({"num_networks": 1, "num_samples": 4, "dim": 2} | change))


def test_pinned_memory_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="^device: expected a GPU"):
        MemoryBank(1, 4, 2, device="pinned")


def test_wrong_updates():
    bank = MemoryBank(2, 8, 4)
    with pytest.raises(ValueError, match=r"^embeddings: expected shape \[2, B, 4\]"):
        bank.update(torch.zeros(3).long(), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"^index: expected shape \[3\]"):
        bank.update(torch.zeros(2).long(), torch.zeros(2, 3, 4))
    before = bank.banks.clone()
    for backend in ("auto", "reference"):
        for wrong in (-1, 8):
            with pytest.raises(RuntimeError, match=f"^index must be in 0 .. 7, got {wrong}"):
                bank.update(torch.tensor([0, 1, wrong]), torch.ones(2, 3, 4), backend=backend)
    assert torch.equal(bank.banks, before), "nothing is half written"
