"""The course of a workflow: whatever fails, every step ends, and nothing runs that should not."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quern.jobs.model import ENDED, State
from quern.workflows import run
from quern.workflows.condition import holds
from quern.workflows.definition import Workflow

STATES = [State.DONE, State.DEAD, State.CANCELLED]


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    """Any acyclic workflow of up to eight steps, with conditions on answers and on the results that it may look at."""
    steps: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 8))):
        needs = draw(st.lists(st.sampled_from([step["name"] for step in steps]), unique=True)) if steps else []
        paths = ["answers.a", "answers.b", *(f"results.{need}.ok" for need in needs)]
        step: dict[str, Any] = {
            "name": f"s{number}",
            "type": "sentiment",
            "needs": needs,
            "after_failure": draw(st.sampled_from(["skip", "run"])),
        }
        if draw(st.booleans()):
            value = draw(st.booleans())
            step["when"] = {
                "path": draw(st.sampled_from(paths)),
                "op": draw(st.sampled_from(["eq", "ne"])),
                "value": value,
            }
        steps.append(step)
    order = draw(st.permutations(steps))
    return Workflow.model_validate({"steps": order})


ANSWERS = st.fixed_dictionaries({}, optional={"a": st.booleans(), "b": st.booleans()})


def play(
    workflow: Workflow, answers: dict[str, Any], rng: random.Random
) -> tuple[run.Steps, dict[str, Any], list[str]]:
    """Run queued steps in any order, each to any end; returns the states, the results, and which ran."""
    steps, results, ran = run.begin(workflow, answers), {}, []
    while queued := sorted(name for name, state in steps.items() if state == State.QUEUED):
        name = rng.choice(queued)
        ran.append(name)
        state = rng.choice(STATES)
        steps = {**steps, name: state.value}
        if state is State.DONE:
            results[name] = {"ok": rng.random() < 0.5}
        steps = run.advance(workflow, steps, answers, results).steps
    return steps, results, ran


@given(workflow=workflows(), answers=ANSWERS, seed=st.integers(0, 99))
def test_every_step_ends_and_runs_at_most_once(workflow: Workflow, answers: dict[str, Any], seed: int) -> None:
    steps, _, ran = play(workflow, answers, random.Random(seed))
    assert {State(state) for state in steps.values()} <= ENDED
    assert len(ran) == len(set(ran))
    assert set(ran) == {name for name, state in steps.items() if state != State.SKIPPED}
    assert run.status(workflow, steps) != "processing"


@given(workflow=workflows(), answers=ANSWERS, seed=st.integers(0, 99))
def test_a_step_runs_exactly_when_its_needs_and_condition_allow(
    workflow: Workflow, answers: dict[str, Any], seed: int
) -> None:
    steps, results, ran = play(workflow, answers, random.Random(seed))
    for step in workflow.steps:
        succeeded = all(steps[need] == State.DONE for need in step.needs)
        wanted = step.when is None or holds(step.when, {"answers": answers, "results": results})
        assert (step.name in ran) == (wanted and (succeeded or step.after_failure == "run")), step


@given(workflow=workflows(), answers=ANSWERS, seed=st.integers(0, 99))
def test_a_step_never_runs_before_its_needs_have_ended(workflow: Workflow, answers: dict[str, Any], seed: int) -> None:
    _, _, ran = play(workflow, answers, random.Random(seed))
    place = {name: number for number, name in enumerate(ran)}
    for step in workflow.steps:
        for need in step.needs:
            if step.name in place and need in place:
                assert place[need] < place[step.name]


@given(workflow=workflows(), answers=ANSWERS, seed=st.integers(0, 99))
def test_advancing_twice_changes_nothing(workflow: Workflow, answers: dict[str, Any], seed: int) -> None:
    steps, results, _ = play(workflow, answers, random.Random(seed))
    again = run.advance(workflow, steps, answers, results)
    assert (again.release, again.skip, again.steps) == ([], [], steps)


def test_a_replayed_step_brings_back_what_was_skipped_for_it() -> None:
    workflow = Workflow.model_validate(
        {"steps": [{"name": "a", "type": "sentiment"}, {"name": "b", "type": "embed", "needs": ["a"]}]}
    )
    skipped = run.advance(workflow, {"a": "dead", "b": "blocked"}, {}, {})
    assert (skipped.skip, run.status(workflow, skipped.steps)) == (["b"], "incomplete")
    back = run.advance(workflow, {**skipped.steps, "a": "done"}, {}, {"a": {}})
    assert (back.release, run.status(workflow, back.steps)) == (["b"], "processing")


@given(workflow=workflows(), answers=ANSWERS)
def test_the_jobs_of_a_response_are_the_same_however_often_they_are_made(
    workflow: Workflow, answers: dict[str, Any]
) -> None:
    from quern.store import clock

    now = clock.now()
    response = {"_id": "rsp_1", "tenant": "ten_a", "created": now, "steps": run.begin(workflow, answers), "outbox": {}}
    made = run.jobs(workflow, response)
    assert made == run.jobs(workflow, response)
    assert len({job.id for job in made}) == len(workflow.steps)
