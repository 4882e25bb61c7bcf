"""A plan as text and as JSON values."""

from __future__ import annotations

from typing import Any

from mclfast._base.sizes import format_bytes
from mclfast.plan.chooser import SHARE
from mclfast.plan.estimate import HEAP, HEAP_SHARE, PARTS
from mclfast.plan.planner import MOST, Plan, Row


def as_values(plan: Plan) -> dict[str, Any]:
    """All numbers in bytes, fit for JSON."""
    c = plan.config
    return {
        "method": c.method,
        "cohort": list(c.cohort),
        "batch_size": c.batch_size,
        "data": plan.data.name,
        "data_assumed": plan.data.assumed,
        "device": plan.device,
        "device_memory": plan.memory,
        "limit": plan.limit,
        "choices": [_row_values(row) for row in plan.rows],
        "left_out": [{**choice._asdict(), "reason": reason} for choice, reason in plan.left_out],
    }


def _row_values(row: Row) -> dict[str, Any]:
    e = row.estimate
    return {
        **e.choice._asdict(),
        "parts": {name: e.parts.get(name, 0) for name in PARTS},
        "step": e.step,
        "bilevel": e.bilevel,
        "evaluation": e.evaluation,
        "total": e.total,
        "host": e.host,
        "fits": row.fits,
        "largest_batch": row.largest_batch,
        "largest_cohort": row.largest_cohort,
        "whole_loss": e.whole_loss,
    }


def text(plan: Plan) -> str:
    """Two tables: what each choice needs, and what fits."""
    lines = [*_head(plan), "", *_needs(plan), "", *_fits(plan)]
    notes = _notes(plan)
    return "\n".join([*lines, "", *notes] if notes else lines)


def _head(plan: Plan) -> list[str]:
    c, d = plan.config, plan.data
    shape = " x ".join(map(str, d.image_shape))
    source = ", numbers of the published set" if d.assumed else ""
    return [
        f"method {c.method}, cohort {','.join(c.cohort)}, batch_size {c.batch_size}",
        f"data {d.name}: {d.train} training and {d.test} test images of {shape}{source}",
        f"memory: {format_bytes(plan.memory)} on a {plan.device} device; {SHARE:.0%} to plan with, "
        f"{format_bytes(plan.limit)}",
    ]


def _needs(plan: Plan) -> list[str]:
    names = [name for name in PARTS if any(row.estimate.parts.get(name) for row in plan.rows)]
    header = ["at the peak of a step", *names, "step"]
    extra = {
        "bilevel step": [row.estimate.bilevel for row in plan.rows],
        "evaluation": [row.estimate.evaluation for row in plan.rows],
        "in host memory": [row.estimate.host for row in plan.rows],
    }
    extra = {name: sizes for name, sizes in extra.items() if any(sizes)}
    table = [[*header, *extra]]
    for i, row in enumerate(plan.rows):
        e = row.estimate
        sizes = [*(e.parts.get(name, 0) for name in names), e.step, *(s[i] for s in extra.values())]
        table.append([str(e.choice), *(format_bytes(s) if s else "-" for s in sizes)])
    return _aligned(table)


def _fits(plan: Plan) -> list[str]:
    table = [["", "needed", "fits", "largest batch", "largest cohort"]]
    for row in plan.rows:
        needed = format_bytes(row.estimate.total)
        cohort = "fixed" if row.largest_cohort is None else _count(row.largest_cohort)
        fits = "yes" if row.fits else "no"
        table.append([str(row.estimate.choice), needed, fits, _count(row.largest_batch), cohort])
    return _aligned(table)


def _count(number: int) -> str:
    return "none" if number == 0 else f"over {MOST:,}" if number >= MOST else str(number)


def _notes(plan: Plan) -> list[str]:
    notes = [f"{choice}: left out; {reason}" for choice, reason in plan.left_out]
    if any(row.largest_cohort is not None for row in plan.rows):
        notes.append(f"largest cohort: with {plan.config.cohort[-1]} repeated, same batch")
    for name in ("compile_peers", "peers_parallel"):
        if getattr(plan.config, name) not in (False, "off"):
            notes.append(f"{name}: not counted; the networks are taken to run one by one as is")
    if plan.config.cuda_graphs:
        notes.append("cuda_graphs: memory of the recorded step is free for nothing else")
    if any(not row.estimate.whole_loss for row in plan.rows):
        notes.append(
            f"loss: that of {plan.config.method} depends on values; counted is a cross entropy"
        )
    if any(row.estimate.parts.get(HEAP) for row in plan.rows):
        notes.append(
            f"{HEAP}: {HEAP_SHARE:.0%} of what a step allocates, for gaps that the C library's "
            "allocator leaves on a CPU (0.06 to 1.46 were measured); --device cuda has none"
        )
    return notes


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
