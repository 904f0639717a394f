"""embedshard: distributed training of sharded embedding tables from Parquet."""

__version__ = "0.1.0"
