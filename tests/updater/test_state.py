"""Every edge of the table may be taken and no other."""

import itertools

import pytest

from oppu.errors import IllegalTransition
from oppu.metrics import fresh
from updater.state import EDGES, Machine, State

PATH = [State.IDLE, State.CLAIMED, State.SCORING, State.TRAINING, State.VALIDATING, State.PUBLISHING]


def machine_at(state: State) -> Machine:
    machine = Machine("user", fresh())
    for step in PATH[1 : PATH.index(state) + 1] if state in PATH else [state]:
        machine.advance(step)
    return machine


@pytest.mark.parametrize(("a", "b"), [*itertools.product(State, State)])
def test_an_edge_is_taken_where_the_table_has_it_and_nowhere_else(a: State, b: State) -> None:
    machine = machine_at(a)
    if b in EDGES[a]:
        machine.advance(b)
        assert machine.state is b
    else:
        with pytest.raises(IllegalTransition, match=f"{a} to {b}"):
            machine.advance(b)
        assert machine.state is a


def test_the_table_is_the_design() -> None:
    for a, b in itertools.pairwise([*PATH, State.IDLE]):
        assert b in EDGES[a]
    for state in State:
        assert {State.FAILED, State.DRAINING} - {state} <= EDGES[state]
    assert State.TRAINING not in EDGES[State.CLAIMED]
    assert State.PUBLISHING not in EDGES[State.TRAINING]


def test_changes_are_counted() -> None:
    metrics = fresh()
    Machine("user", metrics).advance(State.CLAIMED)
    assert metrics.registry.get_sample_value("oppu_updater_transitions_total", {"state": "claimed"}) == 1
