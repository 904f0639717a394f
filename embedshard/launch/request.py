"""What a user asked `embedshard train` for, so that it can be handed to workers."""

from __future__ import annotations

__all__ = ["TrainRequest", "parse_workers"]

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from embedshard.errors import ConfigError

if TYPE_CHECKING:  # pyarrow takes a moment, and --help needs none
    from embedshard.storage import PathOrUri


@dataclass(frozen=True)
class TrainRequest:
    """A run to begin or to continue.

    Attributes:
        config: a YAML config; None: that of the run which is continued.
        overrides: `a.b=value`, as of `--set`.
        run_dir: the run's folder, a path or a URI; None: a new one below `runs/`.
        resume: the folder of the run to go on with.
        auto_resume: whether the run in `run_dir` is continued if it has begun.
        device: `cpu`, `cuda` or `auto`.
        plan: a plan.json to replay; None makes a plan.
        continues: the folder of the run whose weights a new run takes over; None begins anew.
        poll_s: seconds between looks for new partitions; None does not wait for any.
    """

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    run_dir: PathOrUri | None = None
    resume: PathOrUri | None = None
    auto_resume: bool = False
    device: str = "auto"
    plan: Path | None = None
    continues: PathOrUri | None = None
    poll_s: float | None = None

    def arguments(self) -> list[str]:
        """Returns the command line that asks for the same in one process."""
        options: list[tuple[str, object]] = [
            ("--run-dir", self.run_dir),
            ("--resume", self.resume),
            ("--device", self.device),
            ("--plan", self.plan),
        ]
        options += [("--continue", self.continues), ("--poll", self.poll_s)]
        given = [text for name, value in options if value is not None for text in (name, str(value))]
        overrides = [text for override in self.overrides for text in ("--set", override)]
        return [
            "train",
            *([str(self.config)] if self.config else []),
            *given,
            *overrides,
            *(["--auto-resume"] if self.auto_resume else []),
            *(["--watch"] if self.poll_s is not None else []),
        ]

    def resolved(self) -> TrainRequest:
        """Returns the request with `auto_resume` decided by what is in the folder.

        Raises:
            ConfigError: if what was asked for contradicts itself.
            StorageError: if the folder cannot be reached.
        """
        from embedshard.train.run_directory import RunDirectory

        run_dir, resume = (None if place is None else RunDirectory(place) for place in (self.run_dir, self.resume))
        if resume is not None and run_dir is not None and run_dir.folder.address != resume.folder.address:
            raise ConfigError(
                f"--run-dir {self.run_dir} and --resume {self.resume} name two folders. A run continues in its own."
            )
        if resume is not None and self.continues is not None:
            raise ConfigError(
                f"--resume {self.resume} goes on with a run, and --continue {self.continues} begins one with another's "
                "weights: give one of them."
            )
        if self.continues is not None and run_dir is not None:
            former = RunDirectory(self.continues)
            if former.folder.address == run_dir.folder.address:
                raise ConfigError(f"--continue {self.continues} begins a run of its own: give another --run-dir, or none.")
        continued = self.resume
        if self.auto_resume and resume is None:
            if run_dir is None:
                raise ConfigError("--auto-resume needs --run-dir: the folder of the run that is begun or continued.")
            if run_dir.has_begun:
                continued = self.run_dir
        continues = self.continues if continued is None else None
        if continued is None and continues is None and self.config is None:
            raise ConfigError("Give a config: embedshard train CONFIG; or a run to go on with: --resume RUN_DIR.")
        return TrainRequest(
            self.config, self.overrides, self.run_dir, continued, False, self.device, self.plan, continues, self.poll_s
        )


def parse_workers(text: str) -> tuple[int, int]:
    """Returns the least and the greatest number of workers of `4` or `2:8`.

    Raises:
        ConfigError: if it is neither.
    """
    low, _, high = text.partition(":")
    try:
        least, most = int(low), int(high or low)
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most:
        raise ConfigError(f"--workers {text}: give a number of at least 1, such as 4, or a range, such as 2:8.")
    return least, most
