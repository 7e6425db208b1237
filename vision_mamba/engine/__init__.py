"""Training and evaluation of classifiers: configuration, loops, checkpoints, logs."""
