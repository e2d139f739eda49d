"""Whole lives of FineTuneJobs on kwok's nodes, with the real scheduler and Job controller."""
