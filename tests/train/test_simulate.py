"""The simulated step agrees with its closed form, and with what must be true of both."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly.train.simulate import Step, closed_form_s, simulated_s

ALONE = Step(24, 1, False, False, False, forward_s=1.0, backward_s=2.0, root_s=3.0, update_s=4.0)

seconds = st.floats(0.0, 4.0)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    zero = draw(st.sampled_from([0, 2, 3]))
    offload = draw(st.booleans())
    return Step(
        num_layers=draw(st.integers(12, 60)),
        accumulation=draw(st.integers(1, 4)),
        gathers_again=zero == 3 or offload,
        scatters_again=zero >= 2,
        evicts_again=offload and zero >= 2,
        forward_s=(forward := draw(st.floats(0.5, 2.0))),
        backward_s=2 * forward,
        root_s=draw(seconds),
        update_s=draw(seconds),
        gather_s=draw(seconds) if zero else 0.0,
        scatter_s=draw(seconds),
        root_gather_s=draw(seconds) if zero else 0.0,
        root_scatter_s=draw(seconds),
        replicas_s=draw(st.sampled_from([0.0, 0.5, 3.0])),
        fetch_s=draw(seconds) if offload else 0.0,
        evict_s=draw(seconds) if offload else 0.0,
        host_update_s=draw(st.floats(0.0, 60.0)) if offload else 0.0,
        upload_s=draw(st.floats(0.0, 60.0)) if offload else 0.0,
    )


@given(steps())
@settings(max_examples=200, deadline=None)
def test_the_closed_form_is_what_the_simulation_takes(step: Step) -> None:
    assert closed_form_s(step) == pytest.approx(simulated_s(step), rel=0.1)


@given(steps())
@settings(max_examples=100, deadline=None)
def test_a_step_takes_at_least_its_arithmetic_and_at_most_everything_in_turn(step: Step) -> None:
    layer = step.gather_s * 2 + step.scatter_s + step.replicas_s + step.fetch_s * 2 + step.evict_s
    root = step.root_gather_s + step.root_scatter_s
    everything = step.busy_s + step.accumulation * (step.num_layers * layer + root)
    everything += step.host_update_s + step.upload_s
    assert step.busy_s <= simulated_s(step) * (1 + 1e-9)
    assert simulated_s(step) <= everything * (1 + 1e-9)


def test_alone_nothing_waits() -> None:
    assert simulated_s(ALONE) == closed_form_s(ALONE) == ALONE.busy_s == 24 * 3 + 7


def test_traffic_below_the_arithmetic_hides_behind_it_and_above_it_sets_the_pace() -> None:
    hidden = replace(ALONE, gathers_again=True, gather_s=0.5, scatter_s=0.5)
    assert simulated_s(hidden) - ALONE.busy_s < 2
    bound = replace(ALONE, gathers_again=True, gather_s=10.0, scatter_s=10.0)
    assert simulated_s(bound) == pytest.approx(24 * (10 + 20), rel=0.05)


def test_deeper_prefetch_helps_where_two_links_follow_each_other() -> None:
    chained = replace(ALONE, gathers_again=True, gather_s=1.0, fetch_s=1.0, backward_s=1.0)
    deeper = replace(chained, prefetch=3)
    assert simulated_s(deeper) < 0.95 * simulated_s(chained)
