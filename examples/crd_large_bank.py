"""Contrastive representation distillation with a memory bank of 17 million samples.

    python examples/crd_large_bank.py                      # 17 million samples, 9 GiB of host RAM
    python examples/crd_large_bank.py --samples 200000     # seconds

A student learns from a frozen teacher by CRD (arXiv 1910.10699): each embeds the batch, and each is
contrasted with stored embeddings of the other by noise-contrastive estimation, which is
``BankNCELoss`` of two networks with the normalising constants of the first batch. The two banks
are kept in bfloat16 in host memory; on a machine with a GPU they are pinned and the GPU reads the
rows it needs in place. In float32, as usual, they would take twice the memory, and lie on the GPU.

The "data set" is synthetic: features of sample i follow from i and its class, so that nothing but
the banks has the size of the data. The point is memory: what is printed is the size of the banks
and what everything else adds to it.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mclfast import BankNCELoss, ContrastSampler, MemoryBank, ProjectionHead, env

GIB = 2**30
WIDTH = 64


def resident() -> float:
    """GiB of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / GIB


class Features:
    """Features of sample i: its class's centre and noise of its own, the same each time."""

    def __init__(self, labels: Tensor, device: torch.device) -> None:
        self.labels, self.device = labels, device
        generator = torch.Generator().manual_seed(1)
        self.centres = torch.randn(4096, WIDTH, generator=generator)

    def __getitem__(self, index: Tensor) -> Tensor:
        """[B] -> [B, WIDTH]."""
        centre = self.centres[self.labels[index.cpu()] % len(self.centres)]
        phase = index.cpu()[:, None] * torch.arange(1, WIDTH + 1)
        return (centre + 0.3 * torch.sin(phase.double()).float()).to(self.device)


class Distiller(nn.Module):
    """Student and frozen teacher, each with a projection head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(WIDTH, 512), nn.ReLU(), nn.Linear(512, 256))
        self.student = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 64))
        self.teacher.requires_grad_(False)
        self.heads = nn.ModuleList([ProjectionHead(64, dim), ProjectionHead(256, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, WIDTH] -> embeddings of student and teacher [2, B, dim]."""
        features = (self.student(x), self.teacher(x))
        return torch.stack([h(f) for h, f in zip(self.heads, features, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=17_000_000)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--negatives", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--results", type=Path, help="file for the figures, as JSON")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = resident()
    began = time.perf_counter()
    bank = MemoryBank(
        2,
        args.samples,
        args.dim,
        dtype=getattr(torch, args.dtype),
        device="pinned" if device.type == "cuda" else "cpu",
    )
    bank_gib = bank.banks.nbytes / GIB
    print(
        f"banks: 2 x {args.samples:,} x {args.dim} {args.dtype}, {bank_gib:.2f} GiB, filled in "
        f"{time.perf_counter() - began:.0f} s; process {start:.2f} -> {resident():.2f} GiB"
    )
    labels = torch.randint(min(args.classes, args.samples // 2), (args.samples,))
    sampler = ContrastSampler(labels, args.negatives, num_positives=0).to(device)
    features = Features(labels, device)
    print(f"labels and sampler tables: process {resident():.2f} GiB")

    distiller = Distiller(args.dim).to(device)
    trained = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    criterion = BankNCELoss(temperature=0.07, freeze_normalizer=True)
    seconds, losses = [], []
    for step in range(args.steps):
        # Few distinct samples, so that stored embeddings are met again within a short run.
        index = torch.randint(min(args.samples, 4 * args.batch), (args.batch,)).to(device)
        embeddings = distiller(features[index])
        began = time.perf_counter()
        contrast = torch.cat(sampler.sample(index, step), dim=1)
        loss = criterion(embeddings, bank.banks, contrast)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        optimizer.step()
        bank.update(index, embeddings.detach())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gathered = 2 * args.batch * (1 + args.negatives) * args.dim * 4 / GIB
    print(
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; sampling, loss and backward "
        f"{sorted(seconds)[len(seconds) // 2] * 1e3:.0f} ms a step"
    )
    print(
        f"memory: peak {peak:.2f} GiB, of which banks {bank_gib:.2f}; gathered rows of one batch "
        f"would be {gathered:.2f} GiB in float32, and are never held"
    )
    if args.results is not None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(
            json.dumps(
                {
                    "samples": args.samples,
                    "dim": args.dim,
                    "dtype": args.dtype,
                    "batch": args.batch,
                    "negatives": args.negatives,
                    "device": device.type,
                    "bank_gib": round(bank_gib, 3),
                    "peak_gib": round(peak, 3),
                    "before_gib": round(start, 3),
                    "gathered_gib_float32": round(gathered, 3),
                    "first_loss": losses[0],
                    "last_loss": losses[-1],
                    "command": shlex.join(["python", *sys.argv]),
                    "torch": torch.__version__,
                    "mclfast": env.report_dict()["mclfast"]["version"],
                    "commit": env.report_dict()["mclfast"]["git"],
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
