"""A plan in lines for a person."""

from __future__ import annotations

from dataclasses import asdict

from firefly.train.plan import Plan


def describe(plan: Plan) -> list[str]:
    """Model, memory by part and the verdict, then time and disk."""
    work = plan.workload
    parts = [f"{name} {count:,}" for name, count in plan.parameters.items() if count and name != "total"]
    lines = [
        f"{plan.name}: {plan.base} on {plan.device.name}",
        f"parameters  {plan.parameters['total']:,} ({', '.join(parts)})",
        f"batches     {work.tokens_per_step:,.0f} tokens a step, {work.target_share:.0%} of them learned; "
        f"the largest at once {work.largest.tokens:,} ({work.source})",
        "memory",
    ]
    lines += [f"  {name:12}{_gib(size):>10}" for name, size in asdict(plan.memory).items()]
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
                "choose a smaller base model or a larger device"
            )
    lines.append(f"time        {_time(plan)}")
    room = "enough" if plan.disk_bytes <= plan.disk_free_bytes else "NOT enough"
    lines.append(
        f"disk        {_gib(plan.disk_bytes)} for checkpoints of {_gib(plan.checkpoint_bytes)} and the model of "
        f"{_gib(plan.model_bytes)}; {_gib(plan.disk_free_bytes)} are free here, {room}"
    )
    return lines


def _time(plan: Plan) -> str:
    if plan.tokens_per_s is None or plan.hours is None:
        return "unknown for this device; name the GPU, such as --gpu 4090"
    hours = f"{plan.hours:,.1f} hours" if plan.hours >= 1 else f"{plan.hours * 60:,.1f} minutes"
    return (
        f"about {hours} for {plan.workload.steps:,} steps, {plan.tokens_per_s:,.0f} tokens/s "
        "(roofline at half of the peak)"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
