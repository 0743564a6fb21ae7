"""The pure heart of the coordinator: `step(state, event, now)` gives a new state, effects and a reason. No I/O."""

from coordinator.control.events import Effect, Event
from coordinator.control.state import AttemptView, Held, JobView, NodeStatus, State
from coordinator.control.step import Decision, step

__all__ = ["AttemptView", "Decision", "Effect", "Event", "Held", "JobView", "NodeStatus", "State", "step"]
