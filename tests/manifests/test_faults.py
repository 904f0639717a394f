"""Faults put into what kubectl renders, one at a time: each must be found, by the sentence that is about it."""

import copy
import shutil
import subprocess

import pytest
import yaml

from tests.manifests.conftest import ROOT, kustomize
from tests.manifests.rules import problems
from tests.manifests.schema import load_all, schema_errors

pytestmark = pytest.mark.timeout(120)
WORKER = ("RayJob", "spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec")
HEAD = ("RayJob", "spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
CLUSTER = ("RayJob", "spec", "rayClusterSpec")
SUBMITTER = ("RayJob", "spec", "submitterPodTemplate", "spec")
RAY, MAIN = (*WORKER, "containers", 0), (*HEAD, "containers", 0)
GONE = object()


def change(documents, path, value):
    """Sets what a path leads to, from a document's kind (and its name, after a slash), or takes it away."""
    kind, _, name = path[0].partition("/")
    [node] = [
        document for document in documents if document["kind"] == kind and (not name or document["metadata"]["name"] == name)
    ]
    for part in path[1:-1]:
        node = node[part]
    if value is GONE:
        del node[path[-1]]
    else:
        node[path[-1]] = value


SCHEMA_FAULTS = {
    "an unknown field of the job": (("RayJob", "spec", "backoffLimits"), 3, "backoffLimits"),
    "an unknown field of the cluster": ((*CLUSTER, "rayVersions"), "2.60.0", "rayVersions"),
    "an unknown field deep in a pod": ((*RAY, "securityContext", "readOnlyRootFileSystem"), True, "readOnlyRootFileSystem"),
    "an unknown field of the submitter's pod": ((*SUBMITTER, "restartpolicy"), "Never", "restartpolicy"),
    "an unknown field of metadata": (("RayJob", "metadata", "label"), {}, "label"),
    "a number for a version": ((*CLUSTER, "rayVersion"), 2.6, "rayVersion"),
    "a word for a number": (("RayJob", "spec", "backoffLimit"), "three", "backoffLimit"),
    "a number for a parameter": ((*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus"), 0, "num-cpus"),
    "a word that is not allowed": ((*CLUSTER, "authOptions", "mode"), "tokens", "mode"),
    "a quantity that is none": ((*RAY, "resources", "limits", "memory"), "8 gigabytes", "memory"),
    "a required field missing": ((*CLUSTER, "workerGroupSpecs", 0, "groupName"), GONE, "groupName"),
    "a kind that KubeRay lacks": (("RayJob", "apiVersion"), "ray.io/v2", "no CRD"),
}


@pytest.mark.parametrize("fault", SCHEMA_FAULTS)
def test_the_crds_find(render, crds, fault):
    path, value, word = SCHEMA_FAULTS[fault]
    documents = render("base")
    job = next(document for document in documents if document["kind"] == "RayJob")
    assert schema_errors(job, crds) == []
    change(documents, path, value)
    errors = schema_errors(job, crds)
    assert errors
    assert any(word in error for error in errors), errors


CORE_FAULTS = {
    "an unknown field": (("NetworkPolicy/ray-cluster", "spec", "ingres"), [], "ingres"),
    "a wrong type": (("NetworkPolicy/ray-dashboard", "spec", "policyTypes"), "Ingress", "policyTypes"),
    "a claim without a size, misspelled": (("PersistentVolumeClaim/embedshard-runs", "spec", "resource"), {}, "resource"),
    "a kind that is none": (("Namespace", "kind"), "NameSpaces", "namespaces"),
    "labels that are no words": (("Namespace", "metadata", "labels", "count"), 3, "count"),
}


@pytest.mark.parametrize("fault", CORE_FAULTS)
def test_the_core_schemas_find(render, fault):
    path, value, word = CORE_FAULTS[fault]
    documents = render("base")
    name = path[0].partition("/")[2] or "embedshard"
    document = next(
        document for document in documents if document["metadata"]["name"] == name and document["kind"] != "RayJob"
    )
    change(documents, path, value)
    errors = schema_errors(document, None)
    assert errors
    assert any(word.lower() in error.lower() for error in errors), errors


RULE_FAULTS = {
    "no security context of a container": ((*RAY, "securityContext"), GONE, "worker/ray-worker: keeps capabilities"),
    "no security context of a pod": ((*HEAD, "securityContext"), GONE, "head: may run as root"),
    "a root user": ((*WORKER, "securityContext", "runAsUser"), 0, "worker: may run as root"),
    "a root user in a container": ((*RAY, "securityContext", "runAsUser"), 0, "worker/ray-worker: may run as root"),
    "a mutable root filesystem": (
        (*MAIN, "securityContext", "readOnlyRootFilesystem"),
        False,
        "head/ray-head: its root filesystem",
    ),
    "privileges": ((*RAY, "securityContext", "allowPrivilegeEscalation"), GONE, "worker/ray-worker: may gain privileges"),
    "a capability": (
        (*RAY, "securityContext", "capabilities"),
        {"drop": ["ALL"], "add": ["SYS_PTRACE"]},
        "keeps capabilities",
    ),
    "no seccomp profile": ((*SUBMITTER, "securityContext", "seccompProfile"), GONE, "submitter: no seccomp profile"),
    "the node's network": ((*WORKER, "hostNetwork"), True, "worker: hostNetwork"),
    "a folder of the node": (
        (*WORKER, "volumes", 0),
        {"name": "tmp", "hostPath": {"path": "/tmp"}},
        "not allowed: hostPath",
    ),
    "nowhere to write": ((*MAIN, "volumeMounts", 0), GONE, "head/ray-head: has nowhere to write"),
    "no shared memory": (
        (*WORKER, "volumes", 1, "emptyDir"),
        {"sizeLimit": "1Gi"},
        "worker/ray-worker: no memory at /dev/shm",
    ),
    "a mount of nothing": ((*WORKER, "volumes", 3), GONE, "mounts data, which is no volume"),
    "a token mounted by default": (
        (*HEAD, "automountServiceAccountToken"),
        GONE,
        "head: a service-account token is mounted",
    ),
    "a token mounted": ((*SUBMITTER, "automountServiceAccountToken"), True, "submitter: a service-account token is mounted"),
    "KubeRay's own submitter": (("RayJob", "spec", "submitterPodTemplate"), GONE, "RayJob: no submitterPodTemplate"),
    "no resources": ((*RAY, "resources"), GONE, "worker/ray-worker: no request or no limit of cpu"),
    "no limit of memory": (
        (*MAIN, "resources", "limits", "memory"),
        GONE,
        "head/ray-head: no request or no limit of memory",
    ),
    "more than the limit": ((*RAY, "resources", "requests", "memory"), "80Gi", "asks for more memory than its limit"),
    "a volume without a size": ((*WORKER, "volumes", 0, "emptyDir"), {}, "worker: volume tmp has no sizeLimit"),
    "no probe": ((*RAY, "livenessProbe"), GONE, "worker: no livenessProbe"),
    "no hook": ((*RAY, "lifecycle"), GONE, "worker: its preStop hook does not drain"),
    "a grace period of 30 s": ((*WORKER, "terminationGracePeriodSeconds"), GONE, "worker: the hook's deadline"),
    "no address for the hook": ((*RAY, "env"), [], "worker: the hook needs POD_IP"),
    "no authentication": ((*CLUSTER, "authOptions"), GONE, "RayJob: no token authentication"),
    "authentication off": ((*CLUSTER, "authOptions", "mode"), "disabled", "RayJob: no token authentication"),
    "training on the head": ((*CLUSTER, "headGroupSpec", "rayStartParams"), {}, "RayJob: the head takes part"),
    "two processes in a pod": ((*CLUSTER, "workerGroupSpecs", 0, "rayStartParams"), {}, "is not one slot"),
    "too few workers": ((*CLUSTER, "workerGroupSpecs", 0, "replicas"), 1, "2 to 2 workers, 1 at first"),
    "elastic without an autoscaler": ((*CLUSTER, "workerGroupSpecs", 0, "maxReplicas"), 8, "2 to 8 workers"),
    "a cluster that stays": (("RayJob", "spec", "shutdownAfterJobFinishes"), False, "RayJob: its cluster stays"),
    "rules of deletion": (("RayJob", "spec", "deletionStrategy"), {"deletionRules": []}, "RayJob: its cluster stays"),
    "no deadline": (("RayJob", "spec", "activeDeadlineSeconds"), GONE, "RayJob: no activeDeadlineSeconds"),
    "no second attempt": (("RayJob", "spec", "backoffLimit"), GONE, "RayJob: no backoffLimit"),
    "an attempt that starts anew": (
        ("RayJob", "spec", "entrypoint"),
        "embedshard train /config/config.yaml --launcher ray --workers 2 --run-dir /runs/train",
        "RayJob: not an `embedshard train",
    ),
    "a shell": (
        ("RayJob", "spec", "entrypoint"),
        "embedshard train /config/config.yaml --launcher ray --workers 2 --run-dir /runs/train --auto-resume || true",
        "without a shell",
    ),
    "more workers than there are": (
        ("RayJob", "spec", "entrypoint"),
        "embedshard train /config/config.yaml --launcher ray --workers 8 --run-dir /runs/train --auto-resume",
        "--workers 8:8, but the cluster holds 2 to 2",
    ),
    "a run in a folder that dies with its pod": (
        ("RayJob", "spec", "entrypoint"),
        "embedshard train /config/config.yaml --launcher ray --workers 2 --run-dir /tmp2/train --auto-resume",
        "/tmp2/train is on no volume",
    ),
    "suspended for ever": (("RayJob", "spec", "suspend"), True, "RayJob: suspended"),
    "a claim that is not there": (
        (*WORKER, "volumes", 4, "persistentVolumeClaim", "claimName"),
        "runs",
        "needs PersistentVolumeClaim runs, which is not rendered",
    ),
    "another namespace": (
        ("ConfigMap", "metadata", "namespace"),
        "default",
        "ConfigMap embedshard-config: in namespace default",
    ),
    "Pod Security not enforced": (("Namespace", "metadata", "labels"), {}, "Pod Security restricted is not enforced"),
    "another Ray": ((*CLUSTER, "rayVersion"), "2.59.0", "RayJob: rayVersion 2.59.0"),
    "an image of another Ray": ((*RAY, "image"), "r/embedshard:0.1.0-py3.11-ray2.59.0-cpu", "worker/ray-worker: the image"),
    "an image of another Python": ((*MAIN, "image"), "r/embedshard:0.1.0-py3.12-ray2.60.0-cpu", "head/ray-head: the image"),
    "a moving tag": ((*SUBMITTER, "containers", 0, "image"), "r/embedshard:latest", "submitter/submitter: the image"),
    "a GPU for the CPU's image": (
        (*RAY, "resources", "limits", "nvidia.com/gpu"),
        "1",
        "asks for a GPU, but its image is for CPUs",
    ),
    "the worker's labels lost": (
        ("RayJob", "spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "metadata", "labels"),
        {},
        "is closed to the cluster's worker",
    ),
    "the submitter's labels lost": (
        ("RayJob", "spec", "submitterPodTemplate", "metadata", "labels"),
        {},
        "submitter: port 8265 of the head is closed to it",
    ),
    "a policy that lets everyone in": (
        ("NetworkPolicy/ray-cluster", "spec", "ingress"),
        [{}],
        "a stranger reaches port 6379",
    ),
    "a dashboard open to the world": (
        ("NetworkPolicy/ray-dashboard", "spec", "ingress", 0, "from"),
        [{"ipBlock": {"cidr": "0.0.0.0/0"}}],
        "head: a stranger reaches port 8265",
    ),
    "a dashboard open to every namespace": (
        ("NetworkPolicy/ray-dashboard", "spec", "ingress", 0, "from"),
        [{"namespaceSelector": {}}],
        "head: a stranger reaches port 8265",
    ),
    "a dashboard that the operator cannot reach": (
        ("NetworkPolicy/ray-dashboard", "spec", "ingress", 0, "from", 1),
        GONE,
        "head: the operator does not reach the dashboard",
    ),
    "all ports open to the submitter": (
        ("NetworkPolicy/ray-dashboard", "spec", "ingress", 0, "ports"),
        GONE,
        "the operator reaches more than the dashboard",
    ),
    "metrics closed": (("NetworkPolicy/ray-cluster", "spec", "ingress", 1), GONE, "Prometheus does not reach its metrics"),
    "no DNS": (("NetworkPolicy/ray-cluster", "spec", "egress", 1), GONE, "worker: no way to DNS"),
    "the submitter in the world": (("NetworkPolicy/ray-submitter", "spec", "egress"), [{}], "submitter: reaches the world"),
}


@pytest.mark.parametrize("fault", RULE_FAULTS)
def test_the_rules_find(render, pins, fault):
    path, value, sentence = RULE_FAULTS[fault]
    documents = render("base")
    change(documents, path, value)
    found = problems(documents, pins)
    assert any(sentence in problem for problem in found), found


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("default-deny", "NetworkPolicy: none denies by default"),
        ("ray-cluster", "is closed to the cluster's"),
        ("ray-dashboard", "the operator does not reach the dashboard"),
        ("ray-submitter", "submitter: port 8265 of the head is closed to it"),
    ],
)
def test_a_removed_network_policy_is_found(render, pins, name, sentence):
    documents = [document for document in render("base") if document["metadata"]["name"] != name]
    assert any(sentence in problem for problem in problems(documents, pins))


def test_no_network_policies_are_found(render, pins):
    documents = [document for document in render("base") if document["kind"] != "NetworkPolicy"]
    found = problems(documents, pins)
    assert any("head: a stranger reaches port 8265" in problem for problem in found)
    assert any("head: a stranger reaches port 6379" in problem for problem in found)


SERVICE = ("RayService", "spec")
SERVE_POD = (*SERVICE, "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec")
SERVE_FAULTS = {
    "another application": (("import_path: embedshard", "import_path: other"), "serves something else"),
    "no token": (("token_file: /etc/embedshard/token", "no_token: true"), "everyone is let in"),
    "a token of no Secret": (("/etc/embedshard/token", "/runs/token"), "/runs/token is not of a Secret"),
    "more replicas than places": (("replicas: 2", "replicas: 3"), "3 replicas, but the cluster has places for 2"),
    "another port": (("port: 8000", "port: 9000"), "worker: port 9000 is not named 'serve'"),
    "loopback alone": (("0.0.0.0", "127.0.0.1"), "not every pod listens"),
    "exports that die with their pod": (("/runs/exports", "/tmp2/exports"), "/tmp2/exports is on no volume"),
    "exports that can be written": (
        ((*SERVE_POD, "containers", 0, "volumeMounts", 2, "readOnly"), False),
        "worker: /runs/exports is on no volume that is only read",
    ),
    "a head among the places": ((*SERVICE, "excludeHeadPodFromServeSvc"), "requests are sent to the head"),
    "ready too early": (
        ((*SERVE_POD, "containers", 0, "readinessProbe", "httpGet", "path"), "/api/local_raylet_healthz"),
        "worker: is ready before",
    ),
    "a service open to the world": (
        (("NetworkPolicy/ray-serve", "spec", "ingress", 0, "from"), [{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
        "a stranger reaches the service",
    ),
    "a service closed to its clients": ((("NetworkPolicy/ray-serve", "spec", "ingress"), []), "no client reaches"),
    "clients at every port": (
        ("NetworkPolicy/ray-serve", "spec", "ingress", 0, "ports"),
        "a client reaches more than the service",
    ),
    "no hook": ((*SERVE_POD, "containers", 0, "lifecycle"), "worker: its preStop hook does not drain"),
    "no limit of memory": (
        (*SERVE_POD, "containers", 0, "resources", "limits", "memory"),
        "worker/ray-worker: no request or no limit of memory",
    ),
    "no authentication of Ray": ((*SERVICE, "rayClusterConfig", "authOptions"), "RayService: no token authentication"),
}


@pytest.mark.parametrize("fault", SERVE_FAULTS)
def test_the_rules_find_in_serve(render, pins, fault):
    """A fault is a word of the service's config for another, a path and its value, or a path that is taken away."""
    seed, sentence = SERVE_FAULTS[fault]
    documents = render("serve")
    assert problems(documents, pins) == []
    if isinstance(seed[0], tuple):
        change(documents, *seed)
    elif len(seed) > 2:
        change(documents, seed, GONE)
    else:
        [service] = [document for document in documents if document["kind"] == "RayService"]
        assert seed[0] in service["spec"]["serveConfigV2"]
        service["spec"]["serveConfigV2"] = service["spec"]["serveConfigV2"].replace(*seed)
    assert any(sentence in problem for problem in problems(documents, pins)), problems(documents, pins)


def test_the_crds_find_a_misspelled_field_of_the_service(render, crds):
    documents = render("serve")
    service = next(document for document in documents if document["kind"] == "RayService")
    assert schema_errors(service, crds) == []
    change(documents, (*SERVICE, "serveConfigV3"), "")
    assert any("serveConfigV3" in error for error in schema_errors(service, crds))


SPOT_FAULTS = {
    "an autoscaler that may write": (
        (*CLUSTER, "autoscalerOptions", "securityContext", "readOnlyRootFilesystem"),
        False,
        "head/autoscaler: its root filesystem can be written",
    ),
    "an autoscaler without limits": (
        (*CLUSTER, "autoscalerOptions", "resources"),
        GONE,
        "head/autoscaler: no request or no limit",
    ),
    "a head that restarts": (
        (*HEAD, "restartPolicy"),
        "Always",
        "head: the autoscaler's version 2 needs restartPolicy Never",
    ),
    "the token in the head": (
        (*MAIN, "volumeMounts", 0),
        {"name": "autoscaler-token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"},
        "head/ray-head: a service-account token is mounted",
    ),
}


@pytest.mark.parametrize("fault", SPOT_FAULTS)
def test_the_rules_find_in_spot(render, pins, fault):
    path, value, sentence = SPOT_FAULTS[fault]
    documents = render("overlays/spot")
    change(documents, path, value)
    assert any(sentence in problem for problem in problems(documents, pins))


def test_kueue_with_an_autoscaler_is_found(render, pins):
    documents = render("overlays/kueue")
    change(documents, (*CLUSTER, "enableInTreeAutoscaling"), True)
    change(documents, (*CLUSTER, "autoscalerOptions"), {})
    assert any("Kueue admits it only suspended" in problem for problem in problems(documents, pins))


@pytest.fixture
def overlay(tmp_path):
    """A function that writes an overlay over a copy of k8s/, and returns its folder."""

    def write(patches):
        shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
        folder = tmp_path / "k8s" / "overlays" / "mine"
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": ["../../base"], "patches": patches}))
        return folder

    return write


MERGE = """
apiVersion: ray.io/v1
kind: RayJob
metadata: {name: embedshard-train}
spec:
  rayClusterSpec:
    workerGroupSpecs:
      - groupName: workers
        replicas: 2
        minReplicas: 2
        maxReplicas: 2
        template:
          spec:
            containers: [{name: ray-worker, image: embedshard}]
"""


def test_a_worker_group_replaced_by_a_merge_is_found(overlay, pins):
    """Kustomize knows no merge keys of a RayJob's lists: a merge that means to change one number loses all else."""
    documents = load_all(kustomize(overlay([{"patch": MERGE}])))
    found = problems(documents, pins)
    for lost in (
        "its root filesystem can be written",
        "no request or no limit of memory",
        "does not drain",
        "is mounted",
        "/runs/train",
    ):
        assert any("worker" in problem and lost in problem for problem in found), (lost, found)


def test_a_patch_of_another_group_stops_the_build(overlay):
    """The overlays' `test` operations fail where the group or container is not the one that the patch is about."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on PATH, so nothing can be rendered")
    patch = (ROOT / "k8s" / "overlays" / "gpu" / "workers.yaml").read_text()
    assert "value: workers}" in patch
    folder = overlay([{"target": {"kind": "RayJob"}, "patch": patch.replace("value: workers}", "value: others}")}])
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "test" in done.stderr.lower()


def test_a_key_given_twice_is_found():
    with pytest.raises(yaml.constructor.ConstructorError, match="given twice"):
        load_all("spec: {replicas: 1, replicas: 2}")


def test_a_fault_does_not_reach_the_next_test(render):
    first = render("base")
    second = copy.deepcopy(first)
    change(first, (*CLUSTER, "rayVersion"), "0")
    assert render("base") == second
