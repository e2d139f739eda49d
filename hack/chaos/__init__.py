"""Bad days for the operator: many FineTuneJobs on kwok's nodes while parts fail all the time.

    python -m hack.chaos --jobs 200 --faults 300 --seed 7

Scheduler, Job controller, garbage collector and API server are the real ones. What the operator
promises is checked on what a recorder of its own has seen of Jobs, pods and FineTuneJobs.
"""
