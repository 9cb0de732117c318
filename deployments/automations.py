"""What does the server do by itself when the process of a run dies?

Automations of Prefect: a run that falls silent is marked as crashed, and one that crashed is scheduled again, which the
finished stages in the store make cheap. Attempts are bounded by the count of runs in the event, since an automation
itself remembers nothing.

All wait for silence. An automation that answers a crash at once is wrong twice: the worker reports a crash a second
time some seconds later, which would end the new attempt, and under load the server fires it several times.

On SQLite the server loses an event now and then, where it only ends a wait (database is locked). So each automation
is one whose action does no harm, or is refused, where the wait was over.
"""

from collections.abc import Iterable, Mapping
from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.server.schemas.states import StateType

# Every deployment of prefect.yaml has this tag, so that runs of other projects on the same server are left alone.
TAG = "ptq"
FLOWS = ("quantize-model", "quantize-checkpoint", "requantize-models", "watch-checkpoints")
MOST_ATTEMPTS = 3
# Three heartbeats of the 30 s that prefect.yaml sets.
SILENCE = timedelta(seconds=90)
PAUSE_BEFORE_ATTEMPT = timedelta(seconds=20)
# A run whose process never came to its first line is not counted: it is tried without end, so it is tried seldom.
PAUSE_BEFORE_START = timedelta(minutes=5)
# A worker that died took the run with it, which keeps its queue waiting. Longer than a container takes to start.
LONGEST_PENDING = timedelta(minutes=15)

_HEARTBEAT = "prefect.flow-run.heartbeat"
_CRASHED = "prefect.flow-run.Crashed"
_PENDING = "prefect.flow-run.Pending"
_SCHEDULED = {"prefect.flow-run.Scheduled", "prefect.flow-run.AwaitingRetry"}
# Each by itself shows that a run which was pending is not any more, so that one lost event does not matter.
_BEGUN = {"prefect.flow-run.pull-step.executed", "prefect.flow-run.Running", _HEARTBEAT}
# Not Crashed, whose event shall start the next wait and nothing else; the action is refused after any end.
_ENDS = {"prefect.flow-run.Completed", "prefect.flow-run.Failed", "prefect.flow-run.Cancelled"}


def automations() -> tuple[AutomationCore, ...]:
    """Returns the automations, not yet known to any server."""
    pause, start, pending = (
        PAUSE_BEFORE_ATTEMPT.seconds,
        PAUSE_BEFORE_START.seconds // 60,
        LONGEST_PENDING.seconds // 60,
    )
    deployed = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
    return (
        _automation(
            "ptq: a silent run has crashed",
            f"A run without a heartbeat for {SILENCE.seconds} s has lost its process.",
            # By the names of the flows: a flow that another one calls has no tag.
            of={"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)},
            after=_HEARTBEAT,
            unless={_HEARTBEAT} | _ENDS,
            within=SILENCE,
            action=ChangeFlowRunState(
                state=StateType.CRASHED, message=f"No heartbeat for {SILENCE.seconds} s: the process is gone."
            ),
        ),
        _automation(
            "ptq: a crashed run goes on",
            f"From its finished stages, {pause} s after the crash; {MOST_ATTEMPTS} attempts in all.",
            of=deployed,
            after=_CRASHED,
            unless=_SCHEDULED,
            within=PAUSE_BEFORE_ATTEMPT,
            run_counts=range(1, MOST_ATTEMPTS),
            action=ChangeFlowRunState(state=StateType.SCHEDULED, message="Scheduled again after a crash."),
        ),
        _automation(
            "ptq: a run that crashed before it began is tried again",
            f"{start} minutes after the crash.",
            of=deployed,
            after=_CRASHED,
            unless=_SCHEDULED,
            within=PAUSE_BEFORE_START,
            run_counts=[0],
            action=ChangeFlowRunState(state=StateType.SCHEDULED, message="Scheduled again: it had not begun."),
        ),
        _automation(
            "ptq: a run that stays pending is tried again",
            f"{pending} minutes after a worker took it: the worker is gone.",
            of=deployed,
            after=_PENDING,
            unless=_BEGUN | _ENDS | _SCHEDULED | {_CRASHED, "prefect.flow-run.AwaitingConcurrencySlot"},
            within=LONGEST_PENDING,
            action=ChangeFlowRunState(state=StateType.SCHEDULED, message="Scheduled again: its worker is gone."),
        ),
    )


def set_up_automations() -> None:
    """Create the automations on the server in use; those of the same names are replaced by them."""
    with get_client(sync_client=True) as client:
        for automation in automations():
            known = client.read_automations_by_name(automation.name)
            if known:
                client.update_automation(known[0].id, automation)
            else:
                client.create_automation(automation)


def _automation(
    name: str,
    description: str,
    *,
    of: Mapping[str, str | list[str]],
    after: str,
    unless: set[str],
    within: timedelta,
    action: ChangeFlowRunState,
    run_counts: Iterable[int] = (),
) -> AutomationCore:
    """An automation for every run of this project that, after one event, is not heard of again."""
    match: dict[str, str | list[str]] = {"prefect.resource.id": "prefect.flow-run.*"}
    counts = [str(count) for count in run_counts]
    if counts:
        match["prefect.run-count"] = counts
    trigger = EventTrigger(
        after={after},
        expect=unless,
        match=match,
        match_related=dict(of),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=within,
    )
    return AutomationCore(name=name, description=description, trigger=trigger, actions=[action])
