"""A plan in lines for a person."""

from __future__ import annotations

from dataclasses import asdict

from firefly.train.plan import Plan
from firefly.train.scaling import Rank, Scaling


def describe(plan: Plan) -> list[str]:
    """Model, memory by part and the verdict, then time and disk."""
    work = plan.workload
    parts = [f"{name} {count:,}" for name, count in plan.parameters.items() if count and name != "total"]
    lines = [
        f"{plan.name}: {plan.base} on {plan.device.name}",
        f"parameters  {plan.parameters['total']:,} ({', '.join(parts)})"
        + (f"; {plan.learned_parameters:,} of adapters learn" if plan.method != "full" else ""),
        f"batches     {work.tokens_per_step:,.0f} tokens a step, {work.target_share:.0%} of them learned; "
        f"the largest at once {work.largest.tokens:,} ({work.source})",
        "memory",
    ]
    lines += [f"  {name:12}{_gib(size):>10}" for name, size in asdict(plan.memory).items()]
    if plan.host_bytes:
        lines.append(f"  {'elsewhere':12}{_gib(plan.host_bytes):>10}   in main memory, of each GPU")
    verdict = "fits" if plan.fits else "does NOT fit"
    lines.append(
        f"  {'peak':12}{_gib(plan.memory_bytes):>10}   {verdict} in {_gib(plan.device.memory_bytes)}"
    )
    if not plan.fits:
        lines.append(
            "what fits" if any(one.fits for one in plan.advice) else "nothing tried fits; the least is"
        )
        lines += [f"  {_gib(one.memory_bytes):>10}  {one.change}  ({one.cost})" for one in plan.advice[:4]]
        if not any(one.fits for one in plan.advice):
            lines.append(
                f"  weights and AdamW alone take {_gib(plan.memory.fixed)}: "
                "choose a smaller base model, a larger device, or several: --gpus 8 parallel.zero=3"
            )
    lines.append(f"time        {_time(plan)}")
    room = "enough" if plan.disk_bytes <= plan.disk_free_bytes else "NOT enough"
    lines.append(
        f"disk        {_gib(plan.disk_bytes)} for checkpoints of {_gib(plan.checkpoint_bytes)} and the model of "
        f"{_gib(plan.model_bytes)}; {_gib(plan.disk_free_bytes)} are free here, {room}"
    )
    return lines + (_scaling(plan.scaling) if plan.scaling else [])


def _scaling(scaling: Scaling) -> list[str]:
    """The fastest layouts of the asked number of GPUs, the one with least memory, and the best of each number."""
    cluster, samples = scaling.cluster, scaling.samples_per_step
    share = f"{samples:,} samples a step shared by all" if samples else "the recipe's batch on each rank"
    head = f"  {'GPUs':>4}  {'layout':42}{'a rank':>11}{'main memory':>13}{'step':>10}{'waiting':>9}{'tokens/s':>13}"
    lines = [
        f"{scaling.num_gpus} GPUs, {cluster.gpus_per_node} a node, {cluster.network} between nodes; {share}",
        head,
    ]
    fitting = [rank for rank in scaling.layouts if rank.fits]
    if not fitting:
        lines.append("  no layout fits; those with least memory are")
    shown = fitting[:6] or sorted(scaling.layouts, key=lambda rank: rank.memory_bytes)[:3]
    least = min(scaling.layouts, key=lambda rank: rank.memory_bytes)
    lines += [_rank(rank) for rank in shown if rank is not least] + [_rank(least)]
    lines += ["the best layout of", head]
    lines += [_rank(rank) for rank in scaling.curve]
    if scaling.worth_gpus:
        lines.append(
            f"beyond {scaling.worth_gpus} GPUs, doubling them brings less than half as much speed again"
            if scaling.curve[-1].layout.num_ranks > scaling.worth_gpus
            else f"adding GPUs pays up to {scaling.worth_gpus} at least"
        )
    return lines


def _rank(rank: Rank) -> str:
    layout = rank.layout
    parts = [f"zero {layout.zero}", f"dp {layout.dp}"]
    parts += [f"{name} {value}" for name, value in (("tp", layout.tp), ("hsdp", layout.hsdp)) if value > 1]
    parts += [f"offload {layout.offload}"] if layout.offload != "none" else []
    return (
        f"  {layout.num_ranks:>4}  {' '.join(parts):42}{_gib(rank.memory_bytes):>11}{_gib(rank.host_bytes):>13}"
        f"{rank.step_s * 1e3:>7,.0f} ms{rank.waiting_s / rank.step_s:>9.0%}{rank.tokens_per_s:>13,.0f}"
    )


def _time(plan: Plan) -> str:
    if plan.tokens_per_s is None or plan.hours is None:
        return "unknown for this device; name the GPU, such as --gpu 4090"
    hours = f"{plan.hours:,.1f} hours" if plan.hours >= 1 else f"{plan.hours * 60:,.1f} minutes"
    return (
        f"about {hours} for {plan.steps:,} steps, {plan.tokens_per_s:,.0f} tokens/s "
        "(roofline at half of the peak)"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
