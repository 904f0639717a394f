"""Objectives: one loss family a file. Each turns a model's output and a batch into one loss a row."""
