"""Sends a training to a Ray cluster as a job, follows its log, and ends with its exit code.

    python cluster/submit.py --address http://127.0.0.1:8265 --workers 4 CONFIG [options of embedshard train]

The driver runs on the cluster, so a laptop may sleep: the log is followed anew, and `--follow JOB` comes back to it.
"""

from __future__ import annotations

__all__ = ["app"]

import asyncio
import itertools
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
import yaml
from bundle import bundle
from dashboard import check_dashboard, find_token

from embedshard.config import Config, load_config, variables
from embedshard.errors import ConfigError, EmbedshardError
from embedshard.launch.request import parse_workers

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_QUIET_S: Final = 60.0
"""After so long without a word the connection is made anew: one that was lost without notice stays silent for ever."""
_GIVE_UP_S: Final = 600.0
_STOP_WAIT_S: Final = "240"
"""What `ray job stop` gives the driver to save a checkpoint; Ray's own is 3 s."""
_STOPPED: Final = 143
_INTERRUPTED: Final = 130
_RESUME: Final = "embedshard_resume"
_RUN: Final = "embedshard_run"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class LostError(EmbedshardError):
    """The cluster does not answer any more, or does not know the job."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """What is asked of the cluster.

    Attributes:
        working_dir: what is sent.
        config: below `working_dir`; None for the run's own.
        run_dir: the run's folder, on the cluster.
        resumes: whether the run is continued.
        workers: as of `--workers`.
        options: of `embedshard train`, passed on.
        forwarded: names of this environment's variables that the job gets.
    """

    working_dir: Path
    config: Path | None
    run_dir: str
    resumes: bool
    workers: str | None
    options: tuple[str, ...]
    forwarded: tuple[str, ...]

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs, in `working_dir`."""
        words = ["embedshard", "train", *([str(self.config)] if self.config else []), "--launcher", "ray"]
        words += ["--workers", self.workers] if self.workers else []
        words += ["--resume" if self.resumes else "--run-dir", self.run_dir]
        return shlex.join([*words, *self.options])


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [TRAIN OPTIONS]", help="A YAML config, then options of embedshard train.", show_default=False
        ),
    ] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    workers: Annotated[
        str | None, typer.Option(metavar="N", help="4, or a range such as 2:8. Default: one.", show_default=False)
    ] = None,
    runs: Annotated[
        str | None,
        typer.Option(
            envvar="EMBEDSHARD_RUNS",
            metavar="DIR",
            help="Folder that all nodes share: the run gets a new one below it.",
            show_default=False,
        ),
    ] = None,
    run_dir: Annotated[
        str | None, typer.Option(help="The run's folder itself, on the cluster, instead of --runs.", show_default=False)
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN_DIR", help="Continue this run of the cluster.", show_default=False)
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="Sent with the job: the config and your modules. Data, runs and keys stay.")
    ] = Path(),
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave out of it. Can be repeated.", show_default=False)
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Give the job this variable of your environment, as those that the config names. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[
        str | None, typer.Option(metavar="JOB", help="Send nothing: follow a job that was sent before.", show_default=False)
    ] = None,
    anyone_may_run_code: Annotated[
        bool, typer.Option("--anyone-may-run-code", help="Send it to a cluster that asks for no token, not on loopback.")
    ] = False,
) -> None:
    """Train on a Ray cluster as a job: send it, follow its log, end with its exit code."""
    given = list(arguments or [])
    config = Path(given.pop(0)) if given and not given[0].startswith("-") else None
    address = address.rstrip("/")
    if follow is not None:
        if config or given or resume:
            raise ConfigError(
                f"--follow {follow} sends nothing, so it takes neither a config nor options of embedshard train."
            )
        client = _connect(address, os.environ, anyone_may_run_code)
        raise typer.Exit(_follow_to_the_end(client, address, follow))
    if config is None and resume is None:
        raise ConfigError(
            "Give a config: python cluster/submit.py [OPTIONS] CONFIG [TRAIN OPTIONS]; or a run: --resume RUN_DIR."
        )
    if workers is not None:
        parse_workers(workers)
    job = _plan(config, working_dir, resume, run_dir, runs, workers, given, env or [], os.environ)
    client = _connect(address, os.environ, anyone_may_run_code)
    resumed = replace(job, resumes=True)
    command = _resume_command(resumed, address, working_dir, config, env or [], exclude or [], anyone_may_run_code)
    name = _send(client, job, exclude or [], command, os.environ)
    _say(f"Job {name}: {job.entrypoint}")
    _say(f"Run: {job.run_dir}, on the cluster. If it is interrupted, this goes on from its newest checkpoint:\n  {command}")
    raise typer.Exit(_follow_to_the_end(client, address, name))


def _plan(
    config: Path | None,
    working_dir: Path,
    resume: str | None,
    run_dir: str | None,
    runs: str | None,
    workers: str | None,
    options: Sequence[str],
    env: Sequence[str],
    environment: Mapping[str, str],
) -> Job:
    """Decides what is asked of the cluster; tells mistakes of the config before anything is sent."""
    top = working_dir.resolve()
    if not top.is_dir():
        raise ConfigError(f"--working-dir {working_dir} is not a folder.")
    needed: set[str] = set()
    name = "run"
    inside = None
    if config is not None:
        if not config.resolve().is_relative_to(top):
            raise ConfigError(
                f"{config} is not in the working directory {top}, which is what is sent. Name another: --working-dir."
            )
        inside = config.resolve().relative_to(top)
        name, needed = _read_config(config, options, environment)
    for word in env:
        if word not in environment:
            what = "is not set here" if "=" not in word else "has a value in it, which a list of processes would show"
            raise ConfigError(f"--env {word.partition('=')[0]} {what}. Export the variable, and give its name alone.")
    if resume is not None and run_dir is not None and resume != run_dir:
        raise ConfigError(f"--run-dir {run_dir} and --resume {resume} name two folders. A run continues in its own.")
    place = resume or run_dir or (f"{runs.rstrip('/')}/{name}-{datetime.now():%Y%m%d-%H%M%S}" if runs else None)
    if place is None or not ("://" in place or place.startswith("/")):
        met = "No --runs and no --run-dir is given" if place is None else f"{place} is a relative path"
        raise ConfigError(
            f"{met}. A job begins in a copy of the working directory that goes with the cluster, and each node has its own: "
            f"the run needs a folder that all nodes share. Give --runs /PATH/ON/THE/CLUSTER, or export EMBEDSHARD_RUNS."
        )
    forwarded = sorted({*env, *(variable for variable in needed if variable in environment)})
    return Job(top, inside, place, resume is not None, workers, tuple(options), tuple(forwarded))


def _read_config(path: Path, options: Sequence[str], environment: Mapping[str, str]) -> tuple[str, set[str]]:
    """Returns the name for a run of a config, and the variables that it refers to."""
    overrides = [value for word, value in itertools.pairwise(options) if word == "--set"]
    overrides += [word.removeprefix("--set=") for word in options if word.startswith("--set=")]
    tree = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    needed = variables([tree, overrides])
    missing = sorted(needed - set(environment))
    if missing:
        _say(
            f"Note: {', '.join(missing)} of {path} is not set here: the job takes the value of the cluster's nodes, or the "
            f"default."
        )
        return str((tree if isinstance(tree, dict) else {}).get("name") or path.stem), needed
    loaded = load_config(path, environment, overrides)
    _check_data_paths(loaded.config, path)
    return loaded.config.name or path.stem, needed


def _check_data_paths(config: Config, path: Path) -> None:
    data = config.data
    for key, given in (
        ("train", data.train),
        ("partitions", data.partitions),
        ("validation", data.validation),
        ("test", data.test),
    ):
        for pattern in [given] if isinstance(given, str) else given or []:
            if "://" not in pattern and not pattern.startswith("/"):
                raise ConfigError(
                    f"{path}: data.{key} is '{pattern}', a relative path. A job begins in a copy of the working directory, "
                    f"which is sent without data. Give a path that all nodes have or a URI; if it begins with a variable, "
                    f"as ${{EMBEDSHARD_DATA}}, export that with one."
                )


def _connect(address: str, environment: Mapping[str, str], anyone_may_run_code: bool) -> JobSubmissionClient:
    token = check_dashboard(address, find_token(environment), anyone_may_run_code=anyone_may_run_code, say=_say)
    os.environ["RAY_AUTH_MODE"] = "token" if token else "disabled"  # read when ray is imported
    # Ray's client takes these before the address that it is given: the job would go where nobody looked.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    os.environ.pop("RAY_ADDRESS", None)
    import logging

    from ray.job_submission import JobSubmissionClient

    for name in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
        "ray._private.runtime_env.packaging",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    return JobSubmissionClient(address)


def _send(
    client: JobSubmissionClient, job: Job, exclude: Sequence[str], resume_command: str, environment: Mapping[str, str]
) -> str:
    with tempfile.TemporaryDirectory(prefix="embedshard-") as folder:
        packed = bundle(job.working_dir, Path(folder) / "working-dir.zip", exclude)
        if job.config is not None and job.config not in packed.files:
            raise ConfigError(
                f"{job.config} is left out of what is sent from {job.working_dir}. Move it, or change --exclude."
            )
        runtime_environment: dict[str, Any] = {
            "working_dir": str(packed.path),
            "env_vars": {
                "RAY_JOB_STOP_WAIT_TIME_S": environment.get("RAY_JOB_STOP_WAIT_TIME_S", _STOP_WAIT_S),
                **{name: environment[name] for name in job.forwarded},
            },
        }
        return client.submit_job(
            entrypoint=job.entrypoint,
            runtime_env=runtime_environment,
            metadata={_RUN: job.run_dir, _RESUME: resume_command},
            entrypoint_num_cpus=0,
        )


def _resume_command(
    job: Job, address: str, working_dir: Path, config: Path | None, env: Sequence[str], exclude: Sequence[str], anyone: bool
) -> str:
    words = ["python", "cluster/submit.py", "--address", address]
    words += ["--workers", job.workers] if job.workers else []
    words += ["--working-dir", str(working_dir)] if working_dir != Path() else []
    words += [word for name in env for word in ("--env", name)]
    words += [word for pattern in exclude for word in ("--exclude", pattern)]
    words += ["--anyone-may-run-code"] if anyone else []
    words += ["--resume", job.run_dir, *([str(config)] if config else []), *(["--", *job.options] if job.options else [])]
    return shlex.join(words)


# ------------------------------------------------------------------------------------------------------- following
def _follow_to_the_end(client: JobSubmissionClient, address: str, name: str) -> int:
    """Shows a job's log until it ends; returns its exit code."""
    log = _Log(client, name)
    while True:
        try:
            details = log.follow()
            break
        except KeyboardInterrupt:
            if not _goes_on_following(client, address, name):
                return _INTERRUPTED
    status, code = str(details.status.value), details.driver_exit_code
    if code is None:
        code = {"SUCCEEDED": 0, "STOPPED": _STOPPED}.get(status, 1)
        if status == "FAILED":
            _say(f"{details.message}")
    code = 128 - code if code < 0 else code
    _say(f"Job {name} {'was stopped' if status == 'STOPPED' else status.lower()}, exit code {code}.")
    if code and (command := (details.metadata or {}).get(_RESUME)):
        _say(f"To go on from its newest checkpoint, if it has one:\n  {command}")
    return code


class _Log:
    """A job's log, shown once, over as many connections as it takes."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self._client, self._name = client, name
        self._shown = 0

    def follow(self) -> JobDetails:
        """Shows what comes until the job has ended.

        Raises:
            LostError: if the cluster does not answer for long, or does not know the job.
            ConfigError: if it is not let in any more.
        """
        import aiohttp
        from ray.exceptions import AuthenticationError

        lost: float | None = None
        while True:
            is_whole = False
            try:
                is_whole = asyncio.run(self._receive())
                details = self._client.get_job_info(self._name)
                if is_whole and details.status.is_terminal():
                    return details
                if lost is not None:
                    _say("Connected again.")
                lost = None
            except AuthenticationError as error:
                raise ConfigError(f"The cluster does not take the token any more; was it started anew? {error}") from error
            except (OSError, aiohttp.ClientError, RuntimeError) as error:
                if "status code 404" in str(error) or getattr(error, "status", None) == 404:  # the log's connection has it
                    raise LostError(f"The cluster does not know job {self._name}: was its head started anew?") from error
                if lost is None:
                    lost = time.monotonic()
                    _say(f"The connection is lost ({type(error).__name__}: {error}); the job goes on. Trying again.")
                if time.monotonic() - lost > _GIVE_UP_S:
                    raise LostError(
                        f"The cluster has not answered for {_GIVE_UP_S:.0f} s. The job may go on; come back to it with "
                        f"--follow {self._name}."
                    ) from error
            time.sleep(1.0)

    async def _receive(self) -> bool:
        """Shows what this connection gives, less what was shown; returns whether it was closed, not silent too long."""
        seen = 0
        texts = self._client.tail_job_logs(self._name)  # from its beginning
        while True:
            try:
                text = await asyncio.wait_for(anext(texts), _QUIET_S)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            new = text[max(0, self._shown - seen) :]
            seen += len(text)
            self._shown = max(self._shown, seen)
            sys.stdout.write(new)
            sys.stdout.flush()


def _goes_on_following(client: JobSubmissionClient, address: str, name: str) -> bool:
    """Asks what a Ctrl-C meant; returns whether to follow on."""
    _say(
        f"\nThe job goes on without this.\n"
        f"  follow it:  python cluster/submit.py --address {address} --follow {name}\n"
        f"  stop it:    RAY_API_SERVER_ADDRESS={address} ray job stop {name}      (it saves a checkpoint first)"
    )
    if not sys.stdin.isatty():
        return False
    try:
        answer = input("Leave it running, stop it, or follow on? [L/s/f] ").strip().lower()
    except (KeyboardInterrupt, EOFError):
        return False
    if answer.startswith("s"):
        client.stop_job(name)
        _say("Asked to stop; it saves a checkpoint.")
    return answer.startswith(("s", "f"))


_say: Callable[[str], None] = typer.echo


def main() -> None:
    """Runs the command line; a user's mistake is shown without a traceback."""
    try:
        app()
    except EmbedshardError as error:
        typer.echo(f"Error: {error.shown}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
