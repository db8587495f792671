"""A job, driven through every order of events: it ends once, in the way it should, and nothing changes after that."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delineate.serving import jobs
from delineate.serving.jobs import (
    Acknowledged,
    Cancelled,
    Committed,
    Event,
    Failed,
    Finished,
    GivenUp,
    Job,
    Leased,
    Lost,
    Released,
    Reported,
    Stale,
    after,
)
from delineate.serving.protocol import Open, Output, Part, Problem

ID = "0123abcd-0123-0123-0123-0123456789ab"
RECEIVING = Job(
    key="k",
    id=ID,
    owner="anna",
    request=Open(job=ID, model="liver", parts=(Part(format="nii.gz", size=9),)),
    model_sha256="0" * 64,
    created=1.0,
    changed=1.0,
)
LEASES = ("a", "b", "c")

times = st.floats(2, 1e6)
leases = st.sampled_from(LEASES)
problems = st.sampled_from([Problem("E_FORMAT", "not a scan"), Problem("E_WORKER", "the worker failed")])
outputs = leases.map(lambda lease: (Output(f"label.{lease}", 1, "0" * 64),))
events = st.one_of(
    st.builds(Committed, now=times, sha256=st.just(("f" * 64,))),
    st.builds(Leased, now=times, lease=leases, worker=st.just("w")),
    st.builds(Reported, now=times, lease=leases, stage=st.sampled_from(["decode", "segment"]), fraction=st.just(0.5)),
    st.builds(Finished, now=times, lease=leases, outputs=outputs),
    st.builds(Failed, now=times, lease=leases, problem=problems),
    st.builds(Released, now=times, lease=leases),
    st.builds(Lost, now=times, lease=leases),
    st.builds(GivenUp, now=times, problem=problems),
    st.builds(Cancelled, now=times),
    st.builds(Acknowledged, now=times),
)
histories = st.lists(events, max_size=40)


def lived(history: Sequence[Event], job: Job = RECEIVING) -> list[tuple[Job, Event, Job]]:
    """What each event made of a job, leaving out those that it was past."""
    steps = []
    for event in history:
        try:
            changed = after(job, event)
        except Stale:
            continue
        steps.append((job, event, changed))
        job = changed
    return steps


@settings(max_examples=150, deadline=None)
@given(histories)
def test_a_job_ends_at_most_once_and_nothing_but_its_fetching_changes_after_that(history) -> None:
    steps = lived(history)
    assert sum(now.over and not before.over for before, _, now in steps) <= 1
    for before, event, now in steps:
        if before.over:
            assert isinstance(event, Acknowledged)
            assert not before.fetched
            assert jobs.replace(now, fetched=False, changed=before.changed) == before


@settings(max_examples=150, deadline=None)
@given(histories)
def test_a_result_is_taken_once_from_whoever_holds_the_job(history) -> None:
    steps = lived(history)
    done = [(before, event, now) for before, event, now in steps if now.state == "done" and before.state != "done"]
    assert len(done) <= 1
    for before, event, now in done:
        assert isinstance(event, Finished)
        assert before.lease == event.lease == now.taken
        assert now.outputs == event.outputs
        assert not before.cancelling
    if not done:
        assert not any(now.outputs or now.taken for *_, now in steps)


@settings(max_examples=150, deadline=None)
@given(histories)
def test_a_worker_holds_a_job_exactly_while_it_runs_and_old_leases_change_nothing(history) -> None:
    for before, event, now in lived(history):
        assert bool(now.lease) == (now.state == "running")
        if hasattr(event, "lease") and not isinstance(event, Leased):
            assert (before.state, before.lease) == ("running", event.lease)


@settings(max_examples=150, deadline=None)
@given(histories)
def test_only_losses_count_as_losses_and_the_second_one_ends_the_job(history) -> None:
    lost = 0
    for before, event, now in lived(history):
        lost += isinstance(event, Lost)
        assert now.losses == lost
        quarantined = now.problem is not None and now.problem.code == "E_QUARANTINED"
        assert quarantined == (lost == jobs.MOST_LOSSES and not before.cancelling and now.state == "failed")
        if lost == jobs.MOST_LOSSES:
            assert now.over


@settings(max_examples=150, deadline=None)
@given(histories)
def test_what_was_cancelled_never_has_a_result(history) -> None:
    cancelled = False
    for _, event, now in lived(history):
        cancelled |= isinstance(event, Cancelled)
        if cancelled:
            assert now.state in ("running", "cancelled")
            assert not now.outputs
            assert now.problem is None


@settings(max_examples=150, deadline=None)
@given(histories, st.integers(1, 5))
def test_a_committed_job_ends_whatever_happened_before_if_workers_go_on(history, releases) -> None:
    """From any state, a worker that takes the job and finishes it brings it to its end."""
    job = lived([Committed(now=2.0, sha256=("f" * 64,)), *history])[-1][-1]
    for number in range(releases):
        end = (
            Released(now=9.0, lease=f"n{number}")
            if number < releases - 1
            else Finished(now=9.0, lease=f"n{number}", outputs=())
        )
        steps = lived([Released(now=9.0, lease=job.lease), Leased(now=9.0, lease=f"n{number}", worker="w"), end], job)
        job = steps[-1][-1] if steps else job
    assert job.over


def test_a_job_keeps_its_place_in_the_queue_when_its_worker_is_lost() -> None:
    [*_, (_, _, job)] = lived(
        [Committed(now=2.0, sha256=()), Leased(now=3.0, lease="a", worker="w"), Lost(now=9.0, lease="a")]
    )
    assert (job.state, job.queued) == ("queued", 2.0)


def test_reports_do_not_put_off_the_end_of_a_job_that_is_cancelled() -> None:
    history = [
        Committed(now=2.0, sha256=()),
        Leased(now=3.0, lease="a", worker="w"),
        Cancelled(now=4.0),
        Cancelled(now=5.0),
        Reported(now=6.0, lease="a", stage="segment", fraction=0.9),
    ]
    [*_, (_, _, job)] = lived(history)
    assert job.changed == 4.0


@pytest.mark.parametrize("state", ["receiving", "queued", "running", "done"])
def test_every_state_can_be_cancelled_but_the_end(state) -> None:
    history = [
        Committed(now=2.0, sha256=()),
        Leased(now=3.0, lease="a", worker="w"),
        Finished(now=4.0, lease="a", outputs=()),
    ]
    length = ["receiving", "queued", "running", "done"].index(state)
    job = lived(history[:length])[-1][-1] if length else RECEIVING
    assert job.state == state
    if state == "done":
        with pytest.raises(Stale):
            after(job, Cancelled(now=5.0))
    else:
        cancelled = after(job, Cancelled(now=5.0))
        assert cancelled.cancelling if state == "running" else cancelled.state == "cancelled"
