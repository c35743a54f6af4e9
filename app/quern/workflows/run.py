"""The course of a workflow for one response: pure functions from what is known to what may run next."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from quern.jobs.model import ENDED, NewJob, State
from quern.workflows.condition import holds
from quern.workflows.definition import Workflow, queue_of

Steps = dict[str, str]
"""Step to the state of its job."""


@dataclass(frozen=True)
class Advance:
    """What changes next: steps to release, steps to skip, and the states after that."""

    release: list[str]
    skip: list[str]
    steps: Steps


def advance(workflow: Workflow, steps: Steps, answers: dict[str, Any], results: dict[str, Any]) -> Advance:
    """Release every blocked step whose needs have ended, or skip it; skips may set off further ones.

    A step whose condition does not hold is skipped, and so is one whose need did not succeed, unless it says
    `after_failure: run`. A step that was skipped only for a need that has succeeded since (by a replay) is released.
    """
    now = dict(steps)
    facts = {"answers": answers, "results": results}
    release: list[str] = []
    skip: list[str] = []
    changed = True
    while changed:
        changed = False
        for step in workflow.steps:
            state = State(now[step.name])
            if state not in (State.BLOCKED, State.SKIPPED) or step.name in release or step.name in skip:
                continue
            if not all(State(now[need]) in ENDED for need in step.needs):
                continue
            succeeded = all(State(now[need]) is State.DONE for need in step.needs)
            wanted = step.when is None or holds(step.when, facts)
            runs = wanted and (succeeded or step.after_failure == "run")
            if runs:
                release.append(step.name)
                now[step.name] = State.QUEUED.value
                changed = True
            elif state is State.BLOCKED:
                skip.append(step.name)
                now[step.name] = State.SKIPPED.value
                changed = True
    return Advance(release, skip, now)


def begin(workflow: Workflow, answers: dict[str, Any]) -> Steps:
    """The states of all steps when a response arrives."""
    blocked = {step.name: State.BLOCKED.value for step in workflow.steps}
    return advance(workflow, blocked, answers, {}).steps


def status(workflow: Workflow, steps: Steps) -> str:
    """`processing` while a step may still run; then `processed`, or `incomplete` if a step failed or was cancelled."""
    states = {State(steps[step.name]) for step in workflow.steps}
    if not states <= ENDED:
        return "processing"
    return "incomplete" if states & {State.DEAD, State.CANCELLED} else "processed"


def job_id(tenant: str, response: str, step: str) -> str:
    """The identifier of the job that a response's step makes."""
    return NewJob.derived_id(tenant, response, step)


def jobs(workflow: Workflow, response: dict[str, Any]) -> list[NewJob]:
    """The jobs of a response that has just arrived, one a step.

    A step that is skipped from the start gets its job too, already ended, so that it can be looked at. A pure function
    of both arguments: making the jobs twice makes the same ones.
    """
    made = []
    outbox = response["outbox"]
    for step in workflow.steps:
        state = State(response["steps"][step.name])
        deadline = response["created"] + timedelta(seconds=step.deadline_seconds) if step.deadline_seconds else None
        made.append(
            NewJob(
                id=job_id(response["tenant"], response["_id"], step.name),
                tenant=response["tenant"],
                queue=queue_of(step),
                kind=step.type,
                payload={"step": step.name},
                subject=response["_id"],
                due=response["created"],
                deadline=deadline,
                state=state,
                request_id=outbox.get("request_id"),
                traceparent=outbox.get("traceparent"),
            )
        )
    return made
