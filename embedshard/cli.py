"""The command line: parses, calls one function, prints.

Imports that take long happen inside the commands, so that `--help` is quick and the environment of threads is set before
torch reads it.
"""

from __future__ import annotations

__all__ = ["app", "main"]

import enum
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedshard import __version__
from embedshard.errors import ConfigError, EmbedshardError
from embedshard.launch.importing import long_imports
from embedshard.launch.processes import leave_error, run_workers, stop_with_launcher
from embedshard.launch.request import TrainRequest, parse_workers
from embedshard.quantities import size
from embedshard.world import set_process_environment

if TYPE_CHECKING:
    from embedshard.models.summary import Row

app = typer.Typer(
    name="embedshard",
    help="Trains embedding tables from Parquet, with TorchRec and FBGEMM: on a laptop, on many workers, on Ray.",
    epilog="Start with: embedshard train pipelines/synthetic/two_tower.yaml. "
    "Exit codes: 0 done, 1 a check failed, 2 a mistake in what was given, 143 stopped by SIGTERM with a checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
config_app = typer.Typer(help="About config files.", no_args_is_help=True)
app.add_typer(config_app, name="config")
data_app = typer.Typer(help="About the data that a config names.", no_args_is_help=True)
app.add_typer(data_app, name="data")
checkpoint_app = typer.Typer(help="About the checkpoints of a run.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")

vocabulary_app = typer.Typer(help="About the ids that have rows.", no_args_is_help=True)
app.add_typer(vocabulary_app, name="vocabulary")

ConfigPath = Annotated[Path, typer.Argument(help="A YAML config.", show_default=False)]
RunPath = Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run's folder: a path or a URI.", show_default=False)]
# Never a Path: it makes s3:/bucket of s3://bucket.
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a value of the config, in YAML. Can be repeated."),
]


class Launcher(enum.StrEnum):
    """What starts the workers."""

    local = enum.auto()
    ray = enum.auto()


Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]

_INTERRUPTED = 130
_TERMINATED = 143


def _tell(
    found: Any,
    as_json: bool,
    show: Callable[[Any, Console], None],
    console: Console | None = None,
    default: Callable[[Any], Any] | None = None,
) -> None:
    """Prints what was found: JSON alone, or as `show` does; `default` makes JSON of what has none."""
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, default=default))
    else:
        show(found, Console(highlight=False) if console is None else console)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"embedshard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML config. With --resume, the run's own where left out.")
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the run: a path, or a URI such as s3://. Default: runs/NAME-TIME.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN_DIR", help="Continue a run from its newest checkpoint.", show_default=False),
    ] = None,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Continue the run in --run-dir if it has begun, else begin it.")
    ] = False,
    continues: Annotated[
        str | None,
        typer.Option(
            "--continue", metavar="RUN_DIR", help="Begin with a finished run's weights, on what is new.", show_default=False
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Train new partitions as they come, until told to stop.")] = False,
    poll: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="With --watch: between two looks.")] = 10.0,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Processes that train together; with Ray a range such as 2:8 goes on with what is left. Default: one.",
            show_default=False,
        ),
    ] = None,
    launcher: Annotated[
        Launcher, typer.Option(help="What starts the workers: this program, on this machine, or Ray, on a cluster.")
    ] = Launcher.local,
    use_ray: Annotated[bool, typer.Option("--ray", help="Short for --launcher ray.")] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="auto, or a cluster's address. Default: RAY_ADDRESS, else a cluster of its own.",
            show_default=False,
        ),
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option(min=0.01, help="CPUs that a worker reserves on a Ray cluster.")] = 1.0,
    max_failures: Annotated[int, typer.Option(min=-1, help="Deaths of Ray workers that are survived; -1: any number.")] = 3,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Replay a plan that 'embedshard plan --save' wrote.", show_default=False),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a config, evaluate it, and leave a run's folder behind."""
    request = TrainRequest(
        config, tuple(overrides or []), run_dir, resume, auto_resume, device, plan, continues, poll if watch else None
    ).resolved()
    least, most = parse_workers(workers or "1")
    if request.config is not None:
        from embedshard.config import load_config

        load_config(request.config, os.environ, request.overrides)  # a mistake is told before torch is imported
    console = Console(soft_wrap=True, highlight=False)
    if use_ray or launcher is Launcher.ray:
        from embedshard.launch.ray import RayRequest, train_on_ray

        spread = RayRequest(least, most, ray_address, cpus_per_worker, max_failures)
        outcome = train_on_ray(request, spread, os.environ, console)
    elif ray_address is not None or least != most:
        raise ConfigError(
            f"{'--ray-address' if ray_address else f'--workers {workers}'} needs --launcher ray: a cluster that can give "
            f"workers and take them away."
        )
    elif workers is not None:
        errors, place = Console(stderr=True, soft_wrap=True), request.resume or request.run_dir or "RUN_DIR"
        after_death = (
            f"Go on from the last checkpoint with: embedshard train --resume {shlex.quote(str(place))} --workers {workers}"
        )
        raise typer.Exit(run_workers(request.arguments(), most, os.environ, errors, after_death))
    else:
        with long_imports():
            from embedshard.launch.local import train_here

        outcome = train_here(request, os.environ, console)
    if outcome.stopped_by is not None:
        raise typer.Exit(_INTERRUPTED if outcome.stopped_by == "SIGINT" else _TERMINATED)


@app.command()
def evaluate(
    run_dir: RunPath,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="STEP", help="Default: the one that the run selected.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
    baselines: Annotated[bool, typer.Option(help="Measure the config's baselines too.")] = True,
    device: Device = "auto",
) -> None:
    """Measure a run's checkpoint on its validation and test sets, beside baselines."""
    with long_imports():
        from embedshard.launch.local import evaluate_here
        from embedshard.train.tracking import json_text, metrics_table

    evaluation = evaluate_here(
        run_dir,
        checkpoint,
        device,
        environment=os.environ,
        with_baselines=baselines,
        say=lambda sentence: Console(stderr=True, soft_wrap=True, highlight=False).print(sentence),
    )
    if as_json:
        typer.echo(json_text(evaluation, indent=2))
        return
    splits = [split for split in ("validation", "test") if split in evaluation]
    compared = {f"{name}, {splits[-1]}": values for name, values in evaluation.get("baselines", {}).items()}
    columns = {split: evaluation[split] for split in splits} | compared
    Console().print(metrics_table(f"{run_dir}, step {evaluation['step']}", columns))


@app.command()
def summary(
    config: ConfigPath,
    overrides: Overrides = None,
    ids: Annotated[
        list[str] | None,
        typer.Option(metavar="TABLE=N", help="Different ids that a hashed table is to hold: how many collide is told."),
    ] = None,
) -> None:
    """Show every table and layer of a config: shape, parameters, bytes."""
    with long_imports():
        from embedshard.launch.local import summarise_config

    found = summarise_config(config, overrides or [], os.environ, ids or [])
    console = Console()
    table = Table(title="Tables (one row each is for unknown ids) and layers", title_justify="left")
    for heading, justify in (
        ("name", "left"), ("shape", "right"), ("parameters", "right"), ("weights", "right"),
        ("optimizer state", "right"), ("", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # rich's type is a Literal
    for row in found.tables:
        table.add_row(*_cells(row))
    table.add_section()
    for row in found.layers:
        table.add_row(*_cells(row))
    table.add_section()
    table.add_row(*_cells(found.total))
    console.print(table)
    console.print("The result is a function of config, data and seed, except:" if found.exceptions else "")
    for exception in found.exceptions:
        console.print(f"  - {exception}", highlight=False)


def _cells(row: Row) -> list[str]:
    shape = " x ".join(f"{size:,}" for size in row.shape)
    return [row.name, shape, f"{row.parameters:,}", size(row.weight_bytes), size(row.state_bytes), row.note]


@app.command()
def plan(
    config: ConfigPath,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Workers that are to train together.")] = 1,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="MACHINE", help="A named machine, such as h200x8, or a YAML file that describes one. cpu: this machine."
        ),
    ] = "cpu",
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan, for 'train --plan'.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Tell, without the hardware, whether a config fits it, what lies where and why. Exit code 1 if it does not fit."""
    with long_imports():
        from embedshard.launch.plan_view import show
        from embedshard.launch.planning import plan_here

    found = plan_here(config, overrides or [], workers, hardware, os.environ, Console(stderr=True))
    if save is not None:
        found.draft.plan.save(save)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        show(found, Console(highlight=False))
        if save is not None:
            typer.echo(f"Plan: {save}. Train with it: embedshard train {config} --workers {workers} --plan {save}")
    if not found.draft.fits:
        raise typer.Exit(1)


@app.command()
def bench(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML config. Default: generated data of Criteo's shape, and two towers.")
    ] = None,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that exchange ids and vectors.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long each measure may take.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print tables as Markdown.")] = False,
    device: Device = "auto",
    report_to: Annotated[Path | None, typer.Option(hidden=True, help="Of a worker that bench started.")] = None,
) -> None:
    """Measure what this machine allows and how near training comes, stage by stage, and where a step's time goes."""
    if as_json and as_markdown:
        raise ConfigError("--json and --markdown are two ways to print the same. Give one of them.")
    with long_imports():
        from embedshard.launch.bench import bench_as_worker, bench_here, show
        from embedshard.train.tracking import json_text

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # as an exception, so that all that it made is removed
    if report_to is not None and config is not None:
        bench_as_worker(config, overrides or [], os.environ, seconds=seconds, device=device, report=report_to)
        return
    err = Console(stderr=True, soft_wrap=True, highlight=False)
    found = bench_here(config, overrides or [], os.environ, workers=workers, seconds=seconds, device=device, console=err)
    if as_json:
        typer.echo(json_text(found.to_json(), indent=2))
    else:
        show(found, Console(highlight=False), as_markdown=as_markdown)


@app.command()
def verify(
    config: ConfigPath,
    steps: Annotated[int, typer.Option(min=1, help="How many of the first steps are trained.")] = 20,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Train the first steps under every sharding type in worlds of 1, 2 and 4 and compare. Exit code 1 if any differs."""
    from embedshard.config import load_config
    from embedshard.launch.verify import show, verify_plans

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # as an exception, so that the workers are ended
    loaded = load_config(config, os.environ, overrides or [])
    found = verify_plans(loaded.config, steps=steps, console=Console(stderr=True))
    _tell(found, as_json, show, Console())
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def similar(
    place: Annotated[
        str, typer.Argument(metavar="RUN_DIR", help="A run's folder, or an export: a path or a URI.", show_default=False)
    ],
    id_: Annotated[
        str, typer.Argument(metavar="ID", help="An id or a string of the table's vocabulary.", show_default=False)
    ],
    count: Annotated[int, typer.Option("-k", min=1, help="How many neighbours.")] = 10,
    table: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Default: the table of the model's items or of its list.", show_default=False),
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(metavar="PARQUET", help="What is known of ids: their column and others.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="STEP", help="Default: the one that the run selected.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Show which ids' vectors are nearest to an id's, by cosine."""
    with long_imports():
        from embedshard.launch.similar import show, similar_to

    found = similar_to(place, id_, count, os.environ, table=table, metadata=metadata, checkpoint_step=checkpoint)
    _tell(found, as_json, show, default=str)


@app.command()
def export(
    run_dir: RunPath,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A new folder, or an earlier export: a path or a URI.", show_default=False)
    ],
    index: Annotated[str, typer.Option(metavar="KIND", help="flat, hnsw, ivf, or auto: by the number of items.")] = "auto",
    verify: Annotated[bool, typer.Option(help="Replay held-out users through what was exported.")] = True,
    tolerance: Annotated[float, typer.Option(min=0, help="How far a metric may be from the run's.")] = 1e-3,
    index_tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Which share of the exact lists the index may miss.")
    ] = 0.05,
    quantise: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT",
            help="int8 or fp16: tables in fewer bits beside those in float32. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="STEP", help="Default: the one that the run selected.", show_default=False)
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="MANIFEST", help="Of an earlier export: write what changed alone, for 'apply'.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
    device: Device = "cpu",
) -> None:
    """Write vectors, the dense part and an index of items out of a run, and verify them. Exit code 1 if they differ."""
    with long_imports():
        from embedshard.launch.export import export_here, show
        from embedshard.launch.export_since import export_since, show_delta

    err = Console(stderr=True, soft_wrap=True, highlight=False)
    options: dict[str, Any] = {
        "checkpoint_step": checkpoint, "index": index, "verifies": verify, "metric_tolerance": tolerance,
        "index_tolerance": index_tolerance, "quantise": ",".join(quantise or ["none"]), "device": device,
        "say": lambda part: err.print(f"... {part}"),
    }  # fmt: skip
    if since is not None:
        delta = export_since(run_dir, out, since, os.environ, **options)
        _tell(delta, as_json, show_delta)
        if delta.manifest is None:
            raise typer.Exit(1)
        return
    found = export_here(run_dir, out, os.environ, **options)
    _tell(found, as_json, show)
    if found.manifest is None:
        raise typer.Exit(1)


ExportPath = Annotated[str, typer.Argument(metavar="EXPORT", help="An export: a path or a URI.", show_default=False)]


@app.command()
def apply(
    delta: Annotated[
        str, typer.Argument(metavar="DELTA", help="What 'export --since' wrote: a path or a URI.", show_default=False)
    ],
    onto: ExportPath,
    keep: Annotated[int, typer.Option(min=0, help="How many earlier exports can be rolled back to.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Make the later export of the earlier one, in its folder, file by file what a whole export is."""
    from embedshard.export.delta_apply import apply_delta
    from embedshard.launch.export_since import show_applied

    err = Console(stderr=True, soft_wrap=True, highlight=False)
    applied = apply_delta(delta, onto, keep, lambda part: err.print(f"... {part}"))
    _tell(applied, as_json, show_applied)


@app.command()
def check(
    out: Annotated[str, typer.Argument(metavar="OUT", help="An export, or a delta: a path or a URI.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Compare all files of an export, or a delta, with their hashes. Exit code 1 if any is not as it was written."""
    from embedshard.export.check import check_files
    from embedshard.launch.check_export import show_checked

    err = Console(stderr=True, soft_wrap=True, highlight=False)
    found = check_files(out, lambda file: err.print(f"... {file}"))
    _tell(found, as_json, show_checked)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def rollback(
    onto: ExportPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Restore the export to which the newest delta was applied."""
    from embedshard.export.delta_apply import roll_back
    from embedshard.launch.export_since import show_applied

    err = Console(stderr=True, soft_wrap=True, highlight=False)
    applied = roll_back(onto, lambda part: err.print(f"... {part}"))
    _tell(applied, as_json, show_applied)


@app.command()
def recommend(
    out: Annotated[str, typer.Argument(metavar="OUT", help="An export: a path or a URI.", show_default=False)],
    user: Annotated[str | None, typer.Option(metavar="ID", help="Of a user that the data have.", show_default=False)] = None,
    history: Annotated[
        str | None,
        typer.Option(
            metavar="IDS", help="Of items that an unseen user met, oldest first: 1,5,9, or LIST=1,5,9.", show_default=False
        ),
    ] = None,
    count: Annotated[int, typer.Option("-k", min=1, help="How many items.")] = 10,
    metadata: Annotated[
        str | None,
        typer.Option(metavar="PARQUET", help="What is known of items: their ids' column and others.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Show the best items for a user, or for who met some items, from an export alone, without those met."""
    from embedshard.export.recommend import recommend as recommended
    from embedshard.launch.recommend import show

    found = recommended(out, user, count, metadata, history)
    _tell(found, as_json, show, default=str)


@app.command()
def serve(
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="An export, or a folder of exports: a path or a URI.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="To listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that answer, each with the export.")] = 1,
    cpus_per_replica: Annotated[float, typer.Option(min=0.01, help="CPUs that each takes, and threads.")] = 1.0,
    token_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Holds the tokens, one a line. Default: EMBEDSHARD_SERVE_TOKEN.", show_default=False
        ),
    ] = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="Let in whoever reaches it.")] = False,
    poll: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks for a newer export.")] = 10.0,
    max_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Requests that are answered together.")] = 32,
    batch_wait_ms: Annotated[float, typer.Option(min=0, help="For which a request waits for others.")] = 2.0,
    max_k: Annotated[int, typer.Option("--max-k", min=1, metavar="N", help="Longest list.")] = 1000,
    max_users: Annotated[int, typer.Option(min=1, metavar="N", help="Users, or items to /similar, in a request.")] = 100,
    max_items: Annotated[int, typer.Option(min=1, metavar="N", help="Items to score, exclude or as history.")] = 1000,
    max_body_kib: Annotated[int, typer.Option(min=1, metavar="KIB", help="Size of a request.")] = 1024,
    max_pending: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at a time, a replica; then 503.")] = 256,
    metadata: Annotated[
        str | None,
        typer.Option(metavar="PARQUET", help="What is known of items: their ids' column and others.", show_default=False),
    ] = None,
) -> None:
    """Answer over HTTP from an export, on Ray Serve: lists, near items, scores. A newer export takes over as it comes."""
    from embedshard.launch.serve import ServeRequest, serve_here
    from embedshard.serve.settings import Settings

    settings = Settings(
        out=out, metadata=metadata, replicas=replicas, cpus_per_replica=cpus_per_replica, poll_s=poll, max_batch=max_batch,
        batch_wait_ms=batch_wait_ms, max_k=max_k, max_users=max_users, max_items=max_items,
        max_body_bytes=1024 * max_body_kib, max_pending=max_pending,
    )  # fmt: skip
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    stopped_by = serve_here(ServeRequest(settings, host, port, token_file, no_token), os.environ, console.print)
    raise typer.Exit(_INTERRUPTED if stopped_by == "SIGINT" else 0)


@app.command()
def report(
    run_dirs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_DIR...", help="A run's folder, or several to compare.", show_default=False),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Default: RUN_DIR/report.html; comparison.html here for several.", show_default=False
        ),
    ] = None,
) -> None:
    """Write what a run's folder tells as one HTML page; of several runs, a comparison."""
    from embedshard.report import write_report

    typer.echo(f"{'Report' if len(run_dirs) == 1 else 'Comparison'}: {write_report(run_dirs, out).uri}")


@app.command()
def audit(run_dir: RunPath, as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False) -> None:
    """Prove from a run's ledger that each row was trained exactly once an epoch. Exit code 1 if it is not proved."""
    from embedshard.launch.audit import audit_here, show

    audited = audit_here(run_dir, os.environ, Console(stderr=True))
    _tell(audited, as_json, show, Console())
    if not audited.is_proved:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Look at this machine and name the fix for what is wrong."""
    from embedshard.launch.doctor import examine

    console = Console(highlight=False)
    marks = {"ok": "[green]ok   [/]", "note": "[yellow]note [/]", "wrong": "[red]wrong[/]"}
    wrong = 0
    for finding in examine(os.environ, Path("runs")):
        console.print(f"{marks[finding.state]} {finding.what}: {finding.found}", soft_wrap=True)
        if finding.fix:
            console.print(f"      {finding.fix}", soft_wrap=True)
        wrong += finding.state == "wrong"
    if wrong:
        raise typer.Exit(1)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of config files, for editors."""
    from embedshard.config import schema_json

    typer.echo(schema_json())


@data_app.command("check")
def data_check(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Read all data of a config and tell what they hold and what a run would refuse. Exit code 1 if anything."""
    from embedshard.launch.data_check import check_here, show

    report = check_here(config, overrides or [], os.environ, Console(stderr=True))
    _tell(report, as_json, show, Console())
    if report.refused:
        raise typer.Exit(1)


@vocabulary_app.command("build")
def vocabulary_build(
    config: ConfigPath,
    tables: Annotated[
        list[str] | None,
        typer.Option("--table", metavar="NAME", help="Can be repeated. Default: all whose vocabulary is auto or file."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder for DIR/TABLE.parquet: a path or a URI. Default: the path of a file vocabulary, else vocabularies.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="What it may take; beyond it spills to TMPDIR.")] = "2GB",
    min_count: Annotated[
        int | None,
        typer.Option(min=1, help="How often an id is met at least. Default: the config's.", show_default=False),
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option(min=1, help="Ids that have a row at most. Default: the config's.", show_default=False),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace files that are there already.")] = False,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Count the ids of the training set and write vocabularies: Parquet of (id, count, row), the most frequent first."""
    from dataclasses import asdict

    from embedshard.launch.vocabulary import build_here, parse_memory, show

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # as an exception, so that what was spilled is removed
    built = build_here(
        config,
        overrides or [],
        os.environ,
        Console(stderr=True),
        tables=tables or (),
        out=out,
        memory_bytes=parse_memory(memory),
        min_count=min_count,
        max_size=max_size,
        replace=replace,
    )
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in built], indent=2))
    else:
        show(built, Console(highlight=False))


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
Step = Annotated[
    int | None,
    typer.Option("--checkpoint", metavar="STEP", help="Default: the one that the run selected.", show_default=False),
]


@checkpoint_app.command("ls")
def checkpoint_ls(
    run_dir: RunPath,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and check it. Exit code 1 if any differs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List a run's checkpoints."""
    from embedshard.launch.checkpoints import list_here, show_list

    found = list_here(run_dir, verify)
    if as_json:
        typer.echo(json.dumps([vars(one) for one in found], indent=2))
    else:
        show_list(found, Console(highlight=False))
    if any(one.damage is not None for one in found):
        raise typer.Exit(1)


@checkpoint_app.command("show")
def checkpoint_show(run_dir: RunPath, step: Step = None, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds: every tensor, how the tables lay, and the state beside them."""
    from embedshard.launch.checkpoints import show_here, show_tensors

    found = show_here(run_dir, step)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show_tensors(found, Console())


@checkpoint_app.command("diff")
def checkpoint_diff(
    run_dir: RunPath,
    before: Annotated[int, typer.Argument(metavar="STEP", help="Of the first checkpoint.", show_default=False)],
    after: Annotated[int, typer.Argument(metavar="STEP", help="Of the second.", show_default=False)],
    other: Annotated[
        str | None, typer.Option(metavar="RUN_DIR", help="The run that the second is of.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option("-k", min=1, help="How many of the rows that moved most are named.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show what moved between two checkpoints: rows of tables, and the dense part."""
    from embedshard.launch.checkpoint_diff import diff_here, show_diff

    found = diff_here(run_dir, before, after, os.environ, other=other, count=count)
    _tell(found, as_json, show_diff)


@checkpoint_app.command("resize")
def checkpoint_resize(
    run_dir: RunPath,
    table: Annotated[str, typer.Option(metavar="NAME", help="One whose vocabulary is managed.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="That ids can hold from now on.", show_default=False)],
) -> None:
    """Give a managed table more or fewer rows, in all checkpoints of a run. Its ids keep what they have learnt."""
    from embedshard.launch.resize import resize_here

    resize_here(
        run_dir,
        table,
        rows,
        os.environ,
        lambda one: typer.echo(
            f"step {one.step}: {one.rows_before:,} rows become {one.rows:,}; {one.kept:,} ids keep theirs, {one.lost:,} "
            f"lose it"
        ),
    )
    typer.echo(f"Train on: embedshard train --resume {shlex.quote(str(run_dir))}")


@checkpoint_app.command("extract")
def checkpoint_extract(
    run_dir: RunPath,
    out: Annotated[str, typer.Option(metavar="FILE", help="The Parquet file that is written.", show_default=False)],
    table: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Default: the table of the model's items or of its list.", show_default=False),
    ] = None,
    ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,...", help="Of these ids alone. Default: of all.", show_default=False)
    ] = None,
    ids_file: Annotated[
        str | None, typer.Option(metavar="PARQUET", help="Of the ids in this file.", show_default=False)
    ] = None,
    column: Annotated[str | None, typer.Option(metavar="NAME", help="Of the ids in --ids-file.", show_default=False)] = None,
    skip_unknown: Annotated[bool, typer.Option(help="Leave unknown ids out, and say how many.")] = False,
    step: Step = None,
) -> None:
    """Write vectors to Parquet: id, row, vector."""
    from embedshard.launch.extract import extract_here

    typed = None if ids is None else [text.strip() for text in ids.split(",") if text.strip()]
    found = extract_here(
        run_dir, out, os.environ, table=table, ids=typed, ids_file=ids_file, column=column,
        skip_unknown=skip_unknown, checkpoint_step=step,
    )  # fmt: skip
    if found.num_unknown:
        typer.echo(f"Left out, as unknown: {found.num_unknown:,} ids ({', '.join(found.unknown)})")
    typer.echo(f"{found.written:,} vectors of table '{found.table}', step {found.step}: {found.out}")


def main() -> None:
    """Runs the command line; a user's mistake is shown without a traceback."""
    set_process_environment()
    stop_with_launcher(os.environ)
    try:
        app()
    except Exception as error:
        if leave_error(error, os.environ):
            sys.exit(error.exit_code if isinstance(error, EmbedshardError) else 1)
        if not isinstance(error, EmbedshardError):
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]Error:[/] {escape(error.shown)}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
