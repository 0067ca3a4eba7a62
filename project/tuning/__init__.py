"""Hyperparameter search: the space, the storage, the trials, the report. The searching is Optuna's."""
