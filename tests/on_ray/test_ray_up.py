"""The `ray up` definitions: Ray's own check of them, rules of this project beyond it, and faults that must be found."""

import copy
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements/ray.txt")
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "cluster" / "aws.yaml", ROOT / "cluster" / "gcp.yaml"]
PINS = ["torch.txt", "cuda.txt", "ray.txt", "torchrec.txt"]


def load(path):
    return yaml.safe_load(path.read_text())


def problems(config):
    """Returns what is wrong with a definition: what Ray says, else what this project's rules say."""
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # of jsonschema, or ValueError
        return [f"ray: {getattr(error, 'message', error)}"]
    return list(rules(config))


def rules(config):
    types, head = config["available_node_types"], config["head_node_type"]
    yield from names_and_sizes(config, types, head)
    yield from machines(config["provider"]["type"], types, head)
    yield from ray_starts(config)
    yield from setup(config)


def names_and_sizes(config, types, head):
    if "cluster_name" not in config:
        yield "the cluster would be called 'default', as another may be"
    workers = {name: node for name, node in types.items() if name != head}
    if types[head]["resources"] != {"CPU": 0}:
        yield "the head offers CPUs: workers would train on it"
    if not workers or not all(node["resources"].get("GPU") for node in workers.values()):
        yield "a worker type offers no GPU"
    for name, node in workers.items():
        if "min_workers" not in node or "max_workers" not in node or not 0 <= node["min_workers"] <= node["max_workers"]:
            yield f"{name}: min_workers and max_workers"
        if node.get("max_workers", 0) > config["max_workers"]:
            yield f"{name}: max_workers above that of the cluster"
    if not 0 < config.get("idle_timeout_minutes", 0) <= 30:
        yield "idle machines are kept"
    if config["provider"].get("cache_stopped_nodes") is not False:
        yield "machines are stopped, not ended"


def machines(kind, types, head):
    spot = {name for name, node in types.items() if is_spot(kind, node["node_config"])}
    if head in spot:
        yield "the head is a spot machine"
    if not spot or not set(types) - spot - {head}:
        yield "there must be spot workers and others"
    for name, node in types.items():
        asked = node["node_config"]
        if kind == "aws":
            if asked.get("MetadataOptions", {}).get("HttpTokens") != "required":
                yield f"{name}: the metadata service answers without a token"
            if not all(disk["Ebs"].get("Encrypted") for disk in asked["BlockDeviceMappings"]):
                yield f"{name}: a disk is not encrypted"
            if "nvidia" not in asked["ImageId"] and name != head:
                yield f"{name}: the image has no driver"
        else:
            if "nvidia" not in asked["disks"][0]["initializeParams"]["sourceImage"] and name != head:
                yield f"{name}: the image has no driver"
            if "guestAccelerators" in asked and asked.get("scheduling", {}).get("onHostMaintenance") != "TERMINATE":
                yield f"{name}: a machine with a GPU must be TERMINATEd on maintenance"


def is_spot(kind, asked):
    if kind == "aws":
        return asked.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return asked.get("scheduling", {}).get("provisioningModel") == "SPOT"


def ray_starts(config):
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in config.get(key, []):
            if " start " in command and "RAY_AUTH_MODE=token" not in command.partition(" ray start ")[0]:
                yield f"{key}: Ray starts without a token"
            if re.search(r"RAY_AUTH_TOKEN=", command):
                yield f"{key}: a token on the command line"
        if not any(" ray start " in command for command in config.get(key, [])):
            yield f"{key}: no ray start"
    head = " ".join(config.get("head_start_ray_commands", []))
    if "--dashboard-host=127.0.0.1" not in head:
        yield "the dashboard is not on loopback alone"
    if "--autoscaling-config=" not in head:
        yield "the head does not scale"


def setup(config):
    commands = config.get("setup_commands", [])
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        yield "the token does not reach the nodes"
    installs = [command for command in commands if "pip install" in command]
    found = [name for command in installs for name in re.findall(r"requirements/([\w-]+\.txt)", command)]
    if found != PINS:
        yield f"the pins are installed as {found}"
    for command in installs:
        if "torchrec.txt" in command and "--no-deps" not in command:
            yield "torchrec is installed with its dependencies"
        if re.search(r"\b(torch|torchrec|ray|fbgemm\S*)==", command):
            yield "a pin outside requirements/"
    if not any("mount -t nfs" in command and "hard" in command for command in commands):
        yield "no shared file system"
    for local in config["file_mounts"].values():
        if not local.startswith("~") and not (ROOT / local).exists():
            yield f"file_mounts: {local} does not exist"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_and_our_rules_accept_the_definition(path):
    assert problems(load(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_must_be_set_is_marked(path):
    marked = [line for line in path.read_text().splitlines() if re.search(r"# SET\b", line)]
    assert len(marked) >= 4


def node(name, **changes):
    def seed(config):
        config["available_node_types"][name].update(changes)

    return seed


def asked(name, *path):
    """A fault in what is asked of the cloud: the value at a path; without it where the last is None."""

    def seed(config):
        *keys, last, value = path
        place = config["available_node_types"][name]["node_config"]
        for key in keys:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return seed


def top(**changes):
    return lambda config: config.update(changes)


def drop(*keys):
    return lambda config: [config.pop(key) for key in keys]


def replace(key, old, new):
    def seed(config):
        before = list(config[key])
        config[key] = [command.replace(old, new) for command in before]
        assert config[key] != before

    return seed


def swap_pins(config):
    commands = config["setup_commands"]
    pins = [number for number, command in enumerate(commands) if "requirements/" in command]
    commands[pins[0]], commands[pins[1]] = commands[pins[1]], commands[pins[0]]


BOTH = {
    "misspelled key": top(max_worker=3),
    "workers as text": top(max_workers="8"),
    "no head type": top(head_node_type="heads"),
    "no cluster name": drop("cluster_name"),
    "unknown key of a type": node("gpu", spot=True),
    "resources missing": lambda config: config["available_node_types"]["gpu"].pop("resources"),
    "fractional resources": node("gpu", resources={"CPU": 8, "GPU": 0.5}),
    "more least workers than workers": node("gpu", min_workers=9, max_workers=9),
    "commands as text": top(setup_commands="pip install ray"),
    "unknown key of auth": top(auth={"ssh_users": "ubuntu"}),
    "training on the head": node("head", resources={"CPU": 4}),
    "no GPU": node("gpu", resources={"CPU": 8}),
    "least above most": node("gpu", min_workers=5, max_workers=4),
    "never idle": top(idle_timeout_minutes=1000),
    "machines are kept": lambda config: config["provider"].update(cache_stopped_nodes=True),
    "open head": replace("head_start_ray_commands", "RAY_AUTH_MODE=token ", ""),
    "open worker": replace("worker_start_ray_commands", "RAY_AUTH_MODE=token ", ""),
    "token in a command": replace(
        "head_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=abc"
    ),
    "public dashboard": replace("head_start_ray_commands", "127.0.0.1", "0.0.0.0"),
    "no scaling": replace("head_start_ray_commands", "--autoscaling-config", "--config"),
    "no token on the nodes": lambda config: config["file_mounts"].pop("~/.ray/auth_token"),
    "pins in another order": swap_pins,
    "torchrec with dependencies": replace("setup_commands", "--no-deps", ""),
    "a pin of its own": replace("setup_commands", "-r ~/embedshard/requirements/torch.txt", "torch==2.13.0"),
    "no shared folder": replace("setup_commands", "mount -t nfs", "echo"),
    "a folder that is not there": lambda config: config["file_mounts"].update({"~/x": "not-there"}),
    "no spot workers": lambda config: config["available_node_types"].pop("gpu-spot"),
    "spot workers alone": lambda config: config["available_node_types"].pop("gpu"),
}
AWS = {
    "spot head": asked("head", "InstanceMarketOptions", {"MarketType": "spot"}),
    "old metadata service": asked("head", "MetadataOptions", None),
    "plain disk": asked("gpu", "BlockDeviceMappings", 0, "Ebs", "Encrypted", False),
    "no driver": asked("gpu-spot", "ImageId", "ami-0123456789"),
}
GCP = {
    "spot head": asked("head", "scheduling", {"provisioningModel": "SPOT"}),
    "GPU that is moved": asked("gpu", "scheduling", "onHostMaintenance", "MIGRATE"),
    "no driver": asked("gpu", "disks", 0, "initializeParams", "sourceImage", "projects/ubuntu-os-cloud/x"),
}
FAULTS = [
    *[(path, name, seed) for path in FILES for name, seed in BOTH.items()],
    *[(FILES[0], name, seed) for name, seed in AWS.items()],
    *[(FILES[1], name, seed) for name, seed in GCP.items()],
]


@pytest.mark.parametrize(("path", "seed"), [(p, s) for p, _, s in FAULTS], ids=[f"{p.stem}: {n}" for p, n, _ in FAULTS])
def test_a_seeded_fault_is_found(path, seed):
    config = copy.deepcopy(load(path))
    seed(config)
    assert problems(config) != []
