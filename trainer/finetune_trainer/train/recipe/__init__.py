"""The process that trains. Start with `sft`, the recipe, and read it from top to bottom.

train_worker    the program: runs the recipe, and leaves its result or its reason
sft             the recipe
data            rows as token ids and labels; which rows train together in which step
lora            which layers get an adapter, and faster layers on a CPU
packing         rows end to end, checked on the model itself; attention over them on a CPU
trainer         TRL's trainer with this order of rows, this loss and an exact evaluation
saving          checkpoints, and resuming bit for bit
watch           trouble while it trains, early stopping, answers that don't follow from questions
diagnosis       what curves say about a training; pure
training_log    the Trainer's log as progress, for trackers, and as curves, metrics and history
processes       several processes that train together, and the program that starts them
unsloth_engine  the other engine
"""
