"""What this project asks of its manifests beyond their schemas: Pod Security, limits, probes, tokens, networks, pins.

Each rule returns sentences about what is wrong; `problems` is all of them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

import yaml

from tests.manifests.schema import quantity, walk

PART_OF = {"app.kubernetes.io/part-of": "embedshard"}
COMPONENT = "app.kubernetes.io/component"
DASHBOARD, GCS, CLIENT, SERVE = 8265, 6379, 10001, 8000
METRICS = {8080, 44217, 44227}
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
WORLD = ip_address("203.0.113.7")
Document = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod that a manifest asks for: what it is, and its template."""

    role: str
    labels: dict[str, str]
    spec: Document

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@dataclass(frozen=True)
class Pins:
    """What pyproject, requirements/ and the Dockerfile say."""

    version: str
    ray: str
    python: str


def clusters(documents: list[Document]) -> Iterator[tuple[Document, Document]]:
    """The Ray clusters: the document that makes one, and the cluster's spec."""
    for document in documents:
        if document["kind"] == "RayJob":
            yield document, document["spec"]["rayClusterSpec"]
        if document["kind"] == "RayCluster":
            yield document, document["spec"]
        if document["kind"] == "RayService":
            yield document, document["spec"]["rayClusterConfig"]


def pods(documents: list[Document]) -> list[Pod]:
    """Every pod that the documents ask for; a RayJob's submitter too, whether or not it has a template."""
    found = []

    def add(role: str, template: Document) -> None:
        found.append(Pod(role, template.get("metadata", {}).get("labels", {}), template["spec"]))

    for document, cluster in clusters(documents):
        add("head", cluster["headGroupSpec"]["template"])
        for group in cluster.get("workerGroupSpecs", []):
            add("worker", group["template"])
        if document["kind"] == "RayJob":
            default = {"spec": {"containers": [{"name": "ray-job-submitter"}]}}  # KubeRay's own has no securityContext
            add("submitter", document["spec"].get("submitterPodTemplate", default))
    for document in documents:
        if document["kind"] in ("Job", "Deployment", "StatefulSet", "DaemonSet"):
            add("job", document["spec"]["template"])
    return found


def pod_security(documents: list[Document]) -> Iterator[str]:
    """Pod Security "restricted", and with it a read-only root filesystem and no token."""
    for pod in pods(documents):
        context = pod.spec.get("securityContext", {})
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(name):
                yield f"{pod.role}: {name}"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.role}: a service-account token is mounted (automountServiceAccountToken is not false)"
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{pod.role}: may run as root"
        if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{pod.role}: no seccomp profile"
        for volume in pod.spec.get("volumes", []):
            for kind in volume.keys() - {"name"} - RESTRICTED_VOLUMES:
                yield f"{pod.role}: volume {volume['name']} is of a kind that is not allowed: {kind}"
        autoscaler = [options | {"name": "autoscaler"} for options in _autoscalers(documents)] if pod.role == "head" else []
        for container in pod.containers + autoscaler:
            yield from _container_security(pod, container)


def _container_security(pod: Pod, container: Document) -> Iterator[str]:
    context = container.get("securityContext", {})
    where = f"{pod.role}/{container['name']}"
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"{where}: its root filesystem can be written"
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"{where}: may gain privileges"
    if context.get("capabilities", {}).get("drop") != ["ALL"] or context["capabilities"].get("add"):
        yield f"{where}: keeps capabilities"
    if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
        yield f"{where}: may run as root"
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    if "emptyDir" not in volumes.get(mounts.get("/tmp", ""), {}):
        yield f"{where}: has nowhere to write: no emptyDir at /tmp"
    for name in set(mounts.values()) - volumes.keys():
        yield f"{where}: mounts {name}, which is no volume of the pod"
    memory = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {}).get("medium")
    if container["name"] in ("ray-head", "ray-worker") and memory != "Memory":
        yield f"{where}: no memory at /dev/shm"
    if container["name"] != "autoscaler" and any("serviceaccount" in path for path in mounts):
        yield f"{where}: a service-account token is mounted"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield f"{where}: opens a port of its node"


def _autoscalers(documents: list[Document]) -> list[Document]:
    return [
        cluster.get("autoscalerOptions", {}) for _, cluster in clusters(documents) if cluster.get("enableInTreeAutoscaling")
    ]


def resources(documents: list[Document]) -> Iterator[str]:
    """Requests and limits of CPU and memory everywhere, and requests within limits; sized volumes in memory or scratch."""
    for pod in pods(documents):
        autoscaler = [options | {"name": "autoscaler"} for options in _autoscalers(documents)] if pod.role == "head" else []
        for container in pod.containers + autoscaler:
            where = f"{pod.role}/{container['name']}"
            requests, limits = (container.get("resources", {}).get(part, {}) for part in ("requests", "limits"))
            for name in ("cpu", "memory"):
                if name not in requests or name not in limits:
                    yield f"{where}: no request or no limit of {name}"
            for name in requests.keys() & limits.keys():
                if quantity(requests[name]) > quantity(limits[name]):
                    yield f"{where}: asks for more {name} than its limit"
            if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
                yield f"{where}: the request and the limit of GPUs differ"
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield f"{pod.role}: volume {volume['name']} has no sizeLimit"


def probes(documents: list[Document]) -> Iterator[str]:
    """The Ray containers have their own probes, and a hook that has time enough before the end of the grace period."""
    for pod in pods(documents):
        if pod.role not in ("head", "worker"):
            continue
        container = pod.spec["containers"][0]
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" not in container.get(name, {}):
                yield f"{pod.role}: no {name}"
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if "/opt/embedshard/drain.py" not in command or ("--all" in command) != (pod.role == "head"):
            yield f"{pod.role}: its preStop hook does not drain the node"
        elif not 60 <= float(command[command.index("--deadline") + 1]) <= grace - 15:
            yield f"{pod.role}: the hook's deadline and the grace period of {grace} s leave no time for a checkpoint"
        if pod.role == "worker" and "POD_IP" not in {variable["name"] for variable in container.get("env", [])}:
            yield "worker: the hook needs POD_IP"


def ray_settings(documents: list[Document]) -> Iterator[str]:
    """Token authentication, and worker groups that can be what they say."""
    for document, cluster in clusters(documents):
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield f"{document['kind']}: no token authentication"
        if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
            yield f"{document['kind']}: the head takes part in training"
        is_elastic = bool(cluster.get("enableInTreeAutoscaling"))
        for group in cluster.get("workerGroupSpecs", []):
            low, now, high = (group.get(name, -1) for name in ("minReplicas", "replicas", "maxReplicas"))
            if not 1 <= low <= now <= high or (low < high) != is_elastic:
                yield f"{document['kind']}: {low} to {high} workers, {now} at first, autoscaler {is_elastic}"
            if group.get("rayStartParams", {}).get("num-cpus") != "1":
                yield f"{document['kind']}: a pod of {group['groupName']} is not one slot"
        if is_elastic and cluster["autoscalerOptions"].get("version") == "v2":
            for pod in pods([document]):
                if pod.role in ("head", "worker") and pod.spec.get("restartPolicy") != "Never":
                    yield f"{pod.role}: the autoscaler's version 2 needs restartPolicy Never"
        name, longest = document["metadata"]["name"], {"RayJob": 47, "RayService": 47, "RayCluster": 53}[document["kind"]]
        if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{document['kind']}: KubeRay refuses the name {name}"


def ray_job(documents: list[Document]) -> Iterator[str]:
    """A RayJob ends, cleans up, tries again from its checkpoints, and starts what its cluster can hold."""
    for document in documents:
        if document["kind"] != "RayJob":
            continue
        spec = document["spec"]
        if spec.get("shutdownAfterJobFinishes") is not True or "deletionStrategy" in spec:
            yield "RayJob: its cluster stays when it has ended (or deletionRules, which exclude shutdownAfterJobFinishes)"
        for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"):
            if not spec.get(name):
                yield f"RayJob: no {name}"
        if "submitterPodTemplate" not in spec:
            yield "RayJob: no submitterPodTemplate: KubeRay's own has no securityContext, and Pod Security refuses it"
        words = spec["entrypoint"].split()
        if (
            words[:2] != ["embedshard", "train"]
            or "--auto-resume" not in words
            or re.search(r"[|&;<>`$\n]", spec["entrypoint"])
        ):
            yield f"RayJob: not an `embedshard train ... --auto-resume` without a shell: {spec['entrypoint']}"
            continue
        low, _, high = words[words.index("--workers") + 1].partition(":")
        groups = spec["rayClusterSpec"].get("workerGroupSpecs", [])
        slots = [sum(group[name] for group in groups) for name in ("minReplicas", "maxReplicas")]
        if [int(low), int(high or low)] != slots:
            yield f"RayJob: --workers {low}:{high or low}, but the cluster holds {slots[0]} to {slots[1]}"
        run_dir = words[words.index("--run-dir") + 1]
        for pod in pods([document]):
            paths = {mount["mountPath"] for container in pod.containers for mount in container.get("volumeMounts", [])}
            if (
                pod.role in ("head", "worker")
                and "://" not in run_dir
                and not any(run_dir.startswith(f"{path}/") for path in paths)
            ):
                yield f"{pod.role}: {run_dir} is on no volume"
        if document["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name"):
            if spec.get("suspend") is not True or spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
                yield "RayJob: Kueue admits it only suspended, and without an autoscaler"
        elif spec.get("suspend"):
            yield "RayJob: suspended, and nobody lifts it"


def ray_service(documents: list[Document]) -> Iterator[str]:
    """A RayService serves an export that its pods reach, to who has the token, on the port that its pods open."""
    for document in documents:
        if document["kind"] != "RayService":
            continue
        spec = document["spec"]
        config = yaml.safe_load(spec.get("serveConfigV2") or "{}") or {}
        if config.get("proxy_location") != "EveryNode" or config.get("http_options", {}).get("host") != "0.0.0.0":
            yield "RayService: not every pod listens to others"
        if spec.get("excludeHeadPodFromServeSvc") is not True:
            yield "RayService: requests are sent to the head, which holds no replica"
        applications = config.get("applications", [])
        if [one.get("import_path") for one in applications] != ["embedshard.serve.deployment:build"]:
            yield "RayService: serves something else than embedshard"
            continue
        args, port = applications[0].get("args", {}), config["http_options"].get("port")
        if args.get("no_token") or "token_file" not in args:
            yield "RayService: everyone is let in"
        replicas = sum(group["replicas"] for group in spec["rayClusterConfig"].get("workerGroupSpecs", []))
        if args.get("replicas", 1) != replicas:
            yield f"RayService: {args.get('replicas', 1)} replicas, but the cluster has places for {replicas}"
        for pod in pods([document]):
            secrets = {volume["name"] for volume in pod.spec.get("volumes", []) if "secret" in volume}
            mounts = {mount["mountPath"]: mount for mount in pod.spec["containers"][0].get("volumeMounts", [])}
            token = mounts.get(str(args.get("token_file", "")).rpartition("/")[0], {})
            if token.get("name") not in secrets or not token.get("readOnly"):
                yield f"{pod.role}: {args.get('token_file')} is not of a Secret"
            out = str(args.get("out", ""))
            if "://" not in out and not any(out.startswith(f"{path}/") and mounts[path].get("readOnly") for path in mounts):
                yield f"{pod.role}: {out} is on no volume that is only read"
            if {"name": "serve", "containerPort": port} not in pod.spec["containers"][0].get("ports", []):
                yield f"{pod.role}: port {port} is not named 'serve', by which KubeRay's service finds it"
            ready = pod.spec["containers"][0].get("readinessProbe", {}).get("httpGet", {})
            if pod.role == "worker" and ready != {"path": "/-/healthz", "port": port}:
                yield "worker: is ready before its proxy knows of a replica"


def references(documents: list[Document]) -> Iterator[str]:
    """Volumes name claims and ConfigMaps that are rendered too."""
    there = {(document["kind"], document["metadata"]["name"]) for document in documents} | {
        ("ConfigMap", "kube-root-ca.crt")
    }
    for pod in pods(documents):
        needed = set()
        for _, node in walk(pod.spec.get("volumes", [])):
            if isinstance(node, dict) and "persistentVolumeClaim" in node:
                needed.add(("PersistentVolumeClaim", node["persistentVolumeClaim"]["claimName"]))
            if isinstance(node, dict) and "configMap" in node:
                needed.add(("ConfigMap", node["configMap"]["name"]))
        if "serviceAccountName" in pod.spec:
            needed.add(("ServiceAccount", pod.spec["serviceAccountName"]))
        for kind, name in needed - there:
            yield f"{pod.role}: needs {kind} {name}, which is not rendered"


def namespace(documents: list[Document]) -> Iterator[str]:
    """Everything is in one namespace, which enforces Pod Security."""
    for document in documents:
        name = document["metadata"].get("namespace")
        if document["kind"] == "Namespace":
            if document["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
                yield "Namespace: Pod Security restricted is not enforced"
        elif name != "embedshard":
            yield f"{document['kind']} {document['metadata']['name']}: in namespace {name}"


def reaches(
    policies: list[Document], pod: dict[str, str], peer: dict[str, str] | None, place: dict[str, str] | None, port: int
) -> bool:
    """Whether the policies let a peer reach a port of a pod, as a network plug-in decides it.

    Args:
        policies: NetworkPolicies of the pod's namespace.
        pod: its labels.
        peer: the peer's labels; none for an address outside the cluster.
        place: the labels of the peer's namespace; none for the pod's own.
        port: of TCP.
    """
    applying = [
        policy["spec"]
        for policy in policies
        if "Ingress" in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], pod)
    ]
    return not applying or any(
        _allows(rule, "from", peer, place, port) for spec in applying for rule in spec.get("ingress", [])
    )


def leaves(
    policies: list[Document],
    pod: dict[str, str],
    peer: dict[str, str] | None,
    place: dict[str, str] | None,
    port: int,
    protocol: str = "TCP",
) -> bool:
    """Whether the policies let a pod reach a port of a peer; the arguments are those of `reaches`."""
    applying = [
        policy["spec"]
        for policy in policies
        if "Egress" in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], pod)
    ]
    return not applying or any(
        _allows(rule, "to", peer, place, port, protocol) for spec in applying for rule in spec.get("egress", [])
    )


def _allows(
    rule: Document, side: str, peer: dict[str, str] | None, place: dict[str, str] | None, port: int, protocol: str = "TCP"
) -> bool:
    ports = rule.get("ports")
    if ports is not None and not any(
        entry.get("protocol", "TCP") == protocol and entry.get("port", port) == port for entry in ports
    ):
        return False
    if not rule.get(side):
        return True
    if peer is None:
        blocks = [ip_network(entry["ipBlock"]["cidr"]) for entry in rule[side] if "ipBlock" in entry]
        return any(WORLD in block for block in blocks)
    return any(_is_peer(entry, peer, place) for entry in rule[side] if "ipBlock" not in entry)


def _is_peer(entry: Document, peer: dict[str, str], place: dict[str, str] | None) -> bool:
    if "namespaceSelector" in entry:
        if not _selects(entry["namespaceSelector"], place or {"kubernetes.io/metadata.name": "embedshard"}):
            return False
    elif place is not None:
        return False
    return "podSelector" not in entry or _selects(entry["podSelector"], peer)


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for term in selector.get("matchExpressions", []):
        value = labels.get(term["key"])
        if term["operator"] not in ("In", "NotIn", "Exists", "DoesNotExist"):
            raise ValueError(f"a selector's operator is {term['operator']}")
        holds = {
            "In": value in term.get("values", []),
            "NotIn": value not in term.get("values", []),
            "Exists": value is not None,
        }
        if not holds.get(term["operator"], value is None):
            return False
    return True


OPERATOR = {"app.kubernetes.io/name": "kuberay-operator", COMPONENT: "kuberay-operator"}
PROMETHEUS, MONITORING = {"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"}
DNS, SYSTEM = {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}
STRANGER = {"app": "stranger"}


def network(documents: list[Document]) -> Iterator[str]:
    """Who reaches which port of the Ray pods: asked of the policies for each rendered pod, not read from their text."""
    policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
    there = pods(documents)
    if not there:
        return
    if not any(
        policy["spec"]["podSelector"] == {} and set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        for policy in policies
    ):
        yield "NetworkPolicy: none denies by default"
    ray = [pod for pod in there if pod.role in ("head", "worker")]
    elsewhere = {"kubernetes.io/metadata.name": "default"}
    for pod in ray:
        for port in (GCS, DASHBOARD, CLIENT, 52365, 8080, 31000):
            strangers = [
                (STRANGER, None),
                (STRANGER, elsewhere),
                (None, elsewhere),
                (PROMETHEUS, elsewhere),
                (pod.labels, elsewhere),
            ]
            if any(reaches(policies, pod.labels, peer, place, port) for peer, place in strangers):
                yield f"{pod.role}: a stranger reaches port {port}"
            for other in ray:
                if not reaches(policies, pod.labels, other.labels, None, port) or not leaves(
                    policies, other.labels, pod.labels, None, port
                ):
                    yield f"{pod.role}: port {port} is closed to the cluster's {other.role}"
        if not reaches(policies, pod.labels, PROMETHEUS, MONITORING, 8080):
            yield f"{pod.role}: Prometheus does not reach its metrics"
        if any(reaches(policies, pod.labels, PROMETHEUS, MONITORING, port) for port in (GCS, DASHBOARD, CLIENT)):
            yield f"{pod.role}: Prometheus reaches more than metrics"
        if pod.role == "head" and not reaches(
            policies, pod.labels, OPERATOR, {"kubernetes.io/metadata.name": "kuberay"}, DASHBOARD
        ):
            yield "head: the operator does not reach the dashboard"
        if any(
            reaches(policies, pod.labels, OPERATOR, {"kubernetes.io/metadata.name": "kuberay"}, port)
            for port in (GCS, CLIENT)
        ):
            yield f"{pod.role}: the operator reaches more than the dashboard"
    if any(document["kind"] == "RayService" for document in documents):
        clients = {"kubernetes.io/metadata.name": "shop", "embedshard-clients": "true"}
        for pod in ray:
            if not reaches(policies, pod.labels, STRANGER, clients, SERVE):
                yield f"{pod.role}: no client reaches the service"
            if any(reaches(policies, pod.labels, STRANGER, clients, port) for port in (GCS, DASHBOARD, CLIENT)):
                yield f"{pod.role}: a client reaches more than the service"
            if any(reaches(policies, pod.labels, peer, elsewhere, SERVE) for peer in (STRANGER, None)):
                yield f"{pod.role}: a stranger reaches the service"
    for pod in there:
        if pod.role in ("head", "worker", "submitter") and not leaves(policies, pod.labels, DNS, SYSTEM, 53, "UDP"):
            yield f"{pod.role}: no way to DNS"
        if pod.role == "submitter":
            for head in (other for other in ray if other.role == "head"):
                for port, wanted in ((DASHBOARD, True), (GCS, False), (CLIENT, False)):
                    both = reaches(policies, head.labels, pod.labels, None, port) and leaves(
                        policies, pod.labels, head.labels, None, port
                    )
                    if both != wanted:
                        yield f"submitter: port {port} of the head is {'open' if both else 'closed'} to it"
            if leaves(policies, pod.labels, None, elsewhere, 443):
                yield "submitter: reaches the world"


def pins_agree(documents: list[Document], pins: Pins) -> Iterator[str]:
    """The images' tags and rayVersion say the Ray, the Python and the version that are pinned."""
    for document, cluster in clusters(documents):
        if cluster.get("rayVersion") != pins.ray:
            yield f"{document['kind']}: rayVersion {cluster.get('rayVersion')}, but {pins.ray} is pinned"
    for pod in pods(documents):
        needs_gpu = any("nvidia.com/gpu" in group for c in pod.containers for group in c.get("resources", {}).values())
        for container in pod.containers:
            image = container.get("image", "")
            wanted = f"embedshard:{pins.version}-py{pins.python}-ray{pins.ray}-(cpu|cuda)"
            match = re.search(rf"(^|/){wanted}$", image)
            if match is None:
                yield f"{pod.role}/{container['name']}: the image {image} is not {wanted}"
            elif needs_gpu and match[2] != "cuda":
                yield f"{pod.role}/{container['name']}: asks for a GPU, but its image is for CPUs"
    images = {container.get("image") for pod in pods(documents) for container in pod.containers}
    if len(images) > 1:
        yield f"pods of different images: {sorted(map(str, images))}"


RULES = (pod_security, resources, probes, ray_settings, ray_job, ray_service, references, namespace, network)


def problems(documents: list[Document], pins: Pins) -> list[str]:
    """Everything that is wrong, in sentences."""
    return [sentence for rule in RULES for sentence in rule(documents)] + list(pins_agree(documents, pins))
