"""Models and objectives: plain modules that do not know how they are sharded."""
