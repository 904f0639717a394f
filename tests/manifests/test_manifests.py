"""Everything in k8s/, rendered by kubectl: valid by KubeRay's CRDs and Kubernetes' schemas, as safe as the README says."""

import re

import pytest
import yaml

from embedshard.config import load_config
from embedshard.errors import ConfigError
from tests.manifests.conftest import KUSTOMIZATIONS, ROOT
from tests.manifests.rules import clusters, leaves, pods, problems
from tests.manifests.schema import load_all, quantity, schema_errors

pytestmark = pytest.mark.timeout(120)
THIRD_PARTY = {"monitoring.coreos.com/v1", "kueue.x-k8s.io/v1beta1"}
OVERLAYS = {"overlays/cpu", "overlays/gpu", "overlays/spot", "overlays/kueue", "overlays/object-store"}


def test_every_part_is_there():
    assert {"base", "interactive", "data", "foundation", "monitoring", "queues", "serve"} | OVERLAYS <= set(KUSTOMIZATIONS)


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_schemas(render, crds, folder):
    """KubeRay's kinds by its CRDs, core kinds by Kubernetes' schemas, both strictly; others have none here."""
    documents = [document for document in render(folder) if document["apiVersion"] not in THIRD_PARTY]
    assert documents or folder == "queues"
    assert {
        document["metadata"]["name"]: errors for document in documents if (errors := schema_errors(document, crds))
    } == {}


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_core_kinds_without_the_crds(render, folder):
    documents = [document for document in render(folder) if document["apiVersion"] not in THIRD_PARTY]
    assert {
        document["metadata"]["name"]: errors for document in documents if (errors := schema_errors(document, None))
    } == {}


@pytest.mark.parametrize("folder", [folder for folder in KUSTOMIZATIONS if folder != "queues"])
def test_rules(render, pins, folder):
    assert problems(render(folder), pins) == []


@pytest.mark.parametrize("folder", sorted(OVERLAYS))
def test_an_overlay_keeps_the_rest(render, folder):
    """What an overlay does not name is as in base: a merge would have dropped it."""

    def shape(documents):
        """Names of a worker's environment, volumes, mounts and so on, which no overlay here removes but the bucket's."""
        [(_, cluster)] = clusters(documents)
        [group] = cluster["workerGroupSpecs"]
        [container] = group["template"]["spec"]["containers"]
        named = [
            ("env", container["env"]),
            ("mounts", container["volumeMounts"]),
            ("volumes", group["template"]["spec"]["volumes"]),
        ]
        return (
            {(kind, entry["name"]) for kind, entries in named for entry in entries}
            | set(container)
            | set(group["template"]["spec"])
        )

    dropped = shape(render("base")) - shape(render(folder))
    assert dropped == ({("mounts", "runs"), ("volumes", "runs")} if folder == "overlays/object-store" else set())


def test_overlays_use_json_patches_only():
    for folder in OVERLAYS:
        [kustomization] = load_all((ROOT / "k8s" / folder / "kustomization.yaml").read_text())
        for patch in kustomization["patches"]:
            if patch["target"]["kind"] == "RayJob":
                operations = yaml.safe_load((ROOT / "k8s" / folder / patch["path"]).read_text())
                assert isinstance(operations, list)
                assert {operation["op"] for operation in operations} <= {"add", "replace", "remove", "test"}


def worker_of(documents):
    return next(pod for pod in pods(documents) if pod.role == "worker")


def test_gpu(render):
    documents = render("overlays/gpu")
    worker = worker_of(documents)
    limits = worker.spec["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert worker.spec["containers"][0]["image"].endswith("-cuda")
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker.spec["tolerations"]
    shm = next(volume for volume in worker.spec["volumes"] if volume["name"] == "shm")
    assert quantity(shm["emptyDir"]["sizeLimit"]) >= 8 * 1024**3


def test_cpu(render):
    limits = [worker_of(render(folder)).spec["containers"][0]["resources"]["limits"] for folder in ("base", "overlays/cpu")]
    assert quantity(limits[1]["cpu"]) > quantity(limits[0]["cpu"])
    assert all("nvidia.com/gpu" not in limit for limit in limits)


def test_spot(render):
    """Workers come and go between two numbers, and only the autoscaler's container holds a token."""
    documents = render("overlays/spot")
    [(job, cluster)] = clusters(documents)
    assert "--workers 2:8 " in job["spec"]["entrypoint"]
    head = next(pod for pod in pods(documents) if pod.role == "head")
    token = next(volume["name"] for volume in head.spec["volumes"] if "serviceAccountToken" in str(volume))
    assert token in {mount["name"] for mount in cluster["autoscalerOptions"]["volumeMounts"]}
    assert all(token != mount["name"] for container in head.containers for mount in container["volumeMounts"])
    terms = worker_of(documents).spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    [away] = head.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    spot = {(term["key"], tuple(term["values"])) for entry in terms for term in entry["matchExpressions"]}
    assert spot == {(term["key"], tuple(term["values"])) for term in away["matchExpressions"] if term["operator"] == "NotIn"}


@pytest.mark.parametrize(
    ("folder", "roles"), [("base", set()), ("overlays/spot", {"head"}), ("overlays/object-store", {"head", "worker"})]
)
def test_who_reaches_the_world(render, folder, roles):
    """No pod, but the head's autoscaler for the API server, and Ray's pods for a bucket; and HTTPS is all."""
    documents = render(folder)
    policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
    for pod in pods(documents):
        assert leaves(policies, pod.labels, None, None, 443) == (pod.role in roles), pod.role
        assert not leaves(policies, pod.labels, None, None, 80)


def test_kueue(render):
    [(job, cluster)] = clusters(render("overlays/kueue"))
    queue = next(document for document in render("queues") if document["kind"] == "LocalQueue")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert queue["metadata"]["namespace"] == job["metadata"]["namespace"]
    assert job["spec"]["suspend"] is True
    assert all(group["minReplicas"] == group["maxReplicas"] == group["replicas"] for group in cluster["workerGroupSpecs"])


def test_the_quota_admits_the_job(render):
    """The queue's quota covers every resource that the pods ask for, and is large enough for all of them at once."""
    queue = next(document for document in render("queues") if document["kind"] == "ClusterQueue")
    [group] = queue["spec"]["resourceGroups"]
    quota = {entry["name"]: quantity(entry["nominalQuota"]) for entry in group["flavors"][0]["resources"]}
    assert set(group["coveredResources"]) == quota.keys()
    needed = {}
    documents = render("overlays/kueue")
    [(_, cluster)] = clusters(documents)
    for pod in pods(documents):
        count = sum(group["replicas"] for group in cluster["workerGroupSpecs"]) if pod.role == "worker" else 1
        for container in pod.containers:
            for name, amount in container["resources"]["requests"].items():
                needed[name] = needed.get(name, 0) + count * quantity(amount)
    assert {name: amount for name, amount in needed.items() if amount > quota.get(name, 0)} == {}


def test_the_config_is_valid(render, tmp_path):
    """The config in the ConfigMap is one that embedshard reads, with the environment that the pods have."""
    documents = render("base")
    variables = worker_of(documents).spec["containers"][0]["env"]
    environment = {variable["name"]: variable["value"] for variable in variables if "value" in variable}
    config_map = next(document for document in documents if document["kind"] == "ConfigMap")
    path = tmp_path / "config.yaml"
    path.write_text(config_map["data"]["config.yaml"])
    config = load_config(path, environment).config
    assert config.data.train == ["/data/synthetic/train/*.parquet"]
    assert config.checkpoint.every_steps
    mounts = {mount["mountPath"]: mount["name"] for mount in worker_of(documents).spec["containers"][0]["volumeMounts"]}
    assert mounts["/data"] == "data"
    assert mounts["/config"] == "config"


@pytest.mark.parametrize("folder", ["serve", "overlays/serve-object-store"])
def test_the_service_is_one_that_ray_serve_and_embedshard_take(render, folder, tmp_path):
    """The config by Ray Serve's own schema; its arguments by what builds the application, with a token in the file."""
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install -r requirements/ray.txt")
    from ray.serve.schema import ServeDeploySchema

    from embedshard.serve.deployment import build

    [service] = [document for document in render(folder) if document["kind"] == "RayService"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = config.applications
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    built = build({**application.args, "token_file": str(token)})
    assert built._bound_deployment.num_replicas == application.args["replicas"]
    assert application.args["out"].startswith("s3://") == (folder != "serve")
    with pytest.raises(ConfigError, match="cannot be read"):
        build({**application.args, "token_file": str(tmp_path / "nothing")})


def test_the_bucket_of_the_service_keeps_the_rest(render):
    """The overlay takes away the volume, and nothing else of the pods."""

    def named(folder):
        return {
            (pod.role, kind, entry["name"])
            for pod in pods(render(folder))
            for kind, entries in (("volume", pod.spec["volumes"]), ("mount", pod.spec["containers"][0]["volumeMounts"]))
            for entry in entries
        }

    dropped = {(role, kind, "runs") for role in ("head", "worker") for kind in ("volume", "mount")}
    assert named("serve") - named("overlays/serve-object-store") == dropped
    policies = [document for document in render("overlays/serve-object-store") if document["kind"] == "NetworkPolicy"]
    assert all(leaves(policies, pod.labels, None, None, 443) for pod in pods(render("overlays/serve-object-store")))


def test_pins_agree(pyproject, pins):
    """One Ray and one Python: in pyproject, in requirements/, in the image."""
    assert (ROOT / "requirements" / "ray.txt").read_text().split() == pyproject["project"]["optional-dependencies"]["ray"]
    assert pyproject["project"]["requires-python"] == f">={pins.python}"
    [image] = re.findall(r"^ARG PYTHON_VERSION=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert image.startswith(f"{pins.python}.")


def test_the_readme_names_what_there_is():
    """Each overlay and folder is explained, and each command in the README is about a folder that exists."""
    text = (ROOT / "k8s" / "README.md").read_text()
    for folder in KUSTOMIZATIONS:
        assert folder in text, folder
    named = re.findall(r"kubectl (?:apply|delete|diff|kustomize) (?:-k )?(k8s/[\w/-]+)", text)
    assert len(named) >= 5
    assert [
        folder for folder in named if not (ROOT / folder / "kustomization.yaml").is_file() and "mine" not in folder
    ] == []
