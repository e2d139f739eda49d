"""The decision: what to do about a FineTuneJob, given what is. Pure."""

from finetune_operator.plan.decide import plan, refuse
from finetune_operator.plan.draft import Action, Event, Plan, Policy, StartStage, StopJob

__all__ = ["Action", "Event", "Plan", "Policy", "StartStage", "StopJob", "plan", "refuse"]
