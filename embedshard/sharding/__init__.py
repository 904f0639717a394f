"""Sharding: the only floor that imports `torchrec.distributed`."""
