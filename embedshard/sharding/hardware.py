"""Machines: what a plan is made for. Named ones are in `hardware.yaml`, others in a file of the same form."""

from __future__ import annotations

__all__ = ["Cluster", "Machine", "cluster_of", "find_machine", "this_cluster"]

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError, model_validator
from torchrec.distributed.planner import Topology

from embedshard.config.parts import Strict
from embedshard.errors import ConfigError, nearest
from embedshard.world import World

_GIB = 1024**3
_UNKNOWN_SSD = 2**60  # bytes, more than any
_CGROUP = Path("/sys/fs/cgroup/memory.max")


class Machine(Strict):
    """One machine of a cluster whose machines are all alike."""

    device: Literal["cpu", "cuda"]
    """What a worker computes on."""
    devices: int | None = Field(None, ge=1)
    """GPUs of the machine: as many workers does it have. A cpu machine may leave it out: all workers are on it then."""
    memory: float | None = Field(None, gt=0)
    """GiB of one GPU."""
    host_memory: float | None = Field(None, gt=0)
    """GiB of the machine; that of this machine where absent."""
    ssd: float | None = Field(None, gt=0)
    """GiB of the machine's SSD for tables that lie there; not counted where absent."""
    device_bandwidth: float | None = Field(None, gt=0)
    """GB/s between a GPU and its memory."""
    host_bandwidth: float = Field(gt=0)
    """GB/s between processors and memory."""
    within_machine: float = Field(gt=0)
    """GB/s that a worker sends to others of its machine."""
    between_machines: float = Field(gt=0)
    """GB/s that a worker sends to other machines."""

    @model_validator(mode="after")
    def _gpus_are_described(self) -> Machine:
        if self.device == "cuda":
            missing = [name for name in ("devices", "memory", "device_bandwidth") if getattr(self, name) is None]
            if missing:
                raise ValueError(f"a cuda machine needs {' and '.join(missing)}")
        elif self.memory is not None or self.device_bandwidth is not None:
            raise ValueError("memory and device_bandwidth are a GPU's: a cpu machine has host_memory and host_bandwidth")
        return self


@dataclass(frozen=True)
class Cluster:
    """Workers on machines that are alike.

    Attributes:
        name: the machine's, for messages.
        machine: each of them.
        world_size: workers.
        local_world_size: workers of one machine.
    """

    name: str
    machine: Machine
    world_size: int
    local_world_size: int

    @property
    def num_machines(self) -> int:
        """How many machines there are."""
        return self.world_size // self.local_world_size

    @property
    def memory_bytes(self) -> int:
        """A worker's memory: its GPU's, or its share of the machine's."""
        if self.machine.memory is not None:
            return int(self.machine.memory * _GIB)
        return self._host_bytes // self.local_world_size

    @property
    def host_memory_bytes(self) -> int:
        """A worker's share of the machine's memory."""
        return self._host_bytes // self.local_world_size

    @property
    def ssd_bytes(self) -> int | None:
        """A worker's share of the machine's SSD, where it is known."""
        return None if self.machine.ssd is None else int(self.machine.ssd * _GIB) // self.local_world_size

    @property
    def _host_bytes(self) -> int:
        return host_memory_bytes() if self.machine.host_memory is None else int(self.machine.host_memory * _GIB)

    def topology(
        self,
        usable_bytes: int | None = None,
        usable_host_bytes: int | None = None,
        usable_ssd_bytes: int | None = None,
    ) -> Topology:
        """Returns what TorchRec's planner knows of it. Bandwidths there are bytes a millisecond.

        Args:
            usable_bytes: of a worker's memory, for tables and what they move; all of it where None.
            usable_host_bytes: of its share of the host's memory, where it has a GPU; all of it where None.
            usable_ssd_bytes: of its share of the SSD, the same.
        """
        usable, machine = self.memory_bytes if usable_bytes is None else usable_bytes, self.machine
        host = self.host_memory_bytes if usable_host_bytes is None else usable_host_bytes
        ssd = self.ssd_bytes if usable_ssd_bytes is None else usable_ssd_bytes
        is_cuda, per_ms = machine.device == "cuda", 1e9 / 1e3
        return Topology(
            world_size=self.world_size,
            local_world_size=self.local_world_size,
            compute_device=machine.device,
            hbm_cap=usable if is_cuda else 0,
            ddr_cap=host if is_cuda else usable,
            ssd_cap=(_UNKNOWN_SSD if ssd is None else ssd) if is_cuda else 0,
            hbm_mem_bw=(machine.device_bandwidth or machine.host_bandwidth) * per_ms,
            ddr_mem_bw=machine.host_bandwidth * per_ms,
            intra_host_bw=machine.within_machine * per_ms,
            inter_host_bw=machine.between_machines * per_ms,
        )


def host_memory_bytes() -> int:
    """Returns the memory of this machine, or of this container."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP.read_text(encoding="ascii").strip() if _CGROUP.exists() else "max"
    return whole if limit == "max" else min(whole, int(limit))


def named_machines() -> dict[str, Machine]:
    """Returns the machines that have a name."""
    text = resources.files("embedshard.sharding").joinpath("hardware.yaml").read_text(encoding="utf-8")
    return _parse(text, "hardware.yaml")


def find_machine(wanted: str) -> tuple[str, Machine]:
    """Returns a machine and its name.

    Args:
        wanted: a name of `hardware.yaml`; the path of a file that describes one; or path:name where it describes several.

    Raises:
        ConfigError: if there is none of that name, or the file does not describe one.
    """
    known = named_machines()
    if wanted in known:
        return wanted, known[wanted]
    path, _, name = wanted.partition(":")
    if not Path(path).is_file():
        if path.endswith((".yaml", ".yml")):
            raise ConfigError(f"--hardware {wanted}: there is no such file.")
        raise ConfigError(
            f"--hardware {wanted}: there is no machine of that name. {nearest(wanted, known)} Or give a YAML file."
        )
    machines = _parse(Path(path).read_text(encoding="utf-8"), path)
    if name and name not in machines:
        raise ConfigError(f"--hardware {wanted}: {path} has no machine '{name}'. {nearest(name, machines)}")
    if not name and len(machines) > 1:
        raise ConfigError(
            f"--hardware {wanted}: {path} describes {', '.join(machines)}. Choose one: {path}:{next(iter(machines))}"
        )
    name = name or next(iter(machines))
    return name, machines[name]


def cluster_of(name: str, machine: Machine, workers: int) -> Cluster:
    """Returns so many workers on as few machines as hold them, equally many on each.

    Raises:
        ConfigError: if they cannot be equally many on each.
    """
    if machine.devices is None or workers <= machine.devices:
        return Cluster(name, machine, workers, workers)
    machines = -(-workers // machine.devices)
    if workers % machines:
        low, high = workers // machine.devices * machine.devices, machines * machine.devices
        raise ConfigError(
            f"--workers {workers}: they cannot be equally many on {machines} machines of {machine.devices}. "
            f"Use {low} or {high} workers."
        )
    return Cluster(name, machine, workers, workers // machines)


def this_cluster(world: World) -> Cluster:
    """Returns the machines that train, as far as one knows: this one's memory, and bandwidths of its kind."""
    known = named_machines()
    local = world.local_world_size if world.world_size % world.local_world_size == 0 else world.world_size
    if world.device.type == "cpu":
        return Cluster("cpu", known["cpu"], world.world_size, local)
    memory = torch.cuda.get_device_properties(world.device).total_memory / _GIB
    machine = known["h100x8"].model_copy(update={"memory": memory, "devices": local, "host_memory": None})
    return Cluster(torch.cuda.get_device_name(world.device), machine, world.world_size, local)


def _parse(text: str, source: str) -> dict[str, Machine]:
    try:
        tree: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, Mapping) or not tree or not all(isinstance(value, Mapping) for value in tree.values()):
        raise ConfigError(
            f"{source} must hold machines by name, each a mapping: {', '.join(Machine.model_fields)}. "
            f"embedshard/sharding/hardware.yaml is an example."
        )
    found = {}
    for name, value in tree.items():
        try:
            found[str(name)] = Machine.model_validate(value)
        except ValidationError as error:
            lines = [_told(f"{source}: {name}", detail) for detail in error.errors()]
            raise ConfigError("\n".join(lines)) from error
    return found


def _told(where: str, detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where}.{path}: unknown key. {nearest(path, Machine.model_fields)}"
    if detail["type"] == "missing":
        return f"{where}.{path}: is missing. It is needed."
    if detail["type"] == "value_error":
        return f"{where}: {detail['ctx']['error']}."
    return f"{where}.{path}: {detail['input']!r} does not fit. {detail['msg']}."
