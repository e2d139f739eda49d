"""finetune, also `kubectl finetune`: FineTuneJobs from the command line.

It speaks to the API server as kubectl does, and to the bucket with the user's own keys. It never
imports torch; what a single command needs is imported by that command, so that `--help` and
completion start at once.

main       the commands and what ends them
exits      errors and exit codes
options    kubectl's options, for each command that needs a cluster
cluster    the API server
job        a FineTuneJob as the API server has it
output     tables, JSON, YAML
curve      a line drawn in text
frame      what `watch` shows
documents  FineTuneJobs in files, with the lines of their fields
bucket     the artifacts in their store
version    one version of them, by its manifest
estimate   what a job needs: memory, disk, time, price
rows       the first rows of a dataset
commands   one module for each group of commands
"""
