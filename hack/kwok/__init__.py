"""Fake nodes beside a real control plane, on which whole FineTuneJobs run within seconds.

Scheduler, Job controller and API server are the real ones. Only the kubelet is played, by kwok:
a pod that is bound to a node runs for a time and ends as `stages` says.
"""
