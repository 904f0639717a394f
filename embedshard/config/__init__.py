"""Configs: what a run is, as data."""

from embedshard.config.load import (
    Loaded,
    build_config,
    differences,
    dump_tree,
    load_config,
    parse_config,
    schema_json,
    variable_values,
    variables,
)
from embedshard.config.lookups import (
    Lookup,
    TableSpec,
    bias_key,
    context_key,
    negative_key,
    node_key,
    num_negative_slots,
    table_specs,
)
from embedshard.config.metrics import LOSS, POINTWISE_METRICS, Metric, parse_metric
from embedshard.config.root import Config

__all__ = [
    "LOSS",
    "POINTWISE_METRICS",
    "Config",
    "Loaded",
    "Lookup",
    "Metric",
    "TableSpec",
    "bias_key",
    "build_config",
    "context_key",
    "differences",
    "dump_tree",
    "load_config",
    "negative_key",
    "node_key",
    "num_negative_slots",
    "parse_config",
    "parse_metric",
    "schema_json",
    "table_specs",
    "variable_values",
    "variables",
]
