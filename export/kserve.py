"""An InferenceService of KServe, which runs `tetdeploy serve` on Kubernetes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tetdeploy.serve.scheduler import GRACE_SECONDS
from tetdeploy.storage.files import atomic_write

MODELS = "/mnt/models"  # where KServe's storage initializer puts what lies at the storage URI
HOST, HTTP_PORT = "::", 8080  # IPv6 and IPv4: a cluster may have either
CPUS, MEMORY = "2", "2Gi"
STATE_MB = "250"  # of sequences: their arrays take up to twice that, beside 0.7 GB for JSON and 0.3 GB for bodies
PERIOD = 5  # seconds between two probes
STARTS = 60  # probes that a start may take: five minutes, for large models on few cores
LONGEST = 63 - len("-predictor")  # of a service's name: KServe adds this, and Kubernetes takes 63 (RFC 1035)
CONFINED = {  # what Pod Security's level `restricted` asks of each container
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
RUNTIMES = {"cpu": "onnxruntime", "openvino": "openvino"}  # of `tetdeploy serve`, by the target of a graph
LEAVES = 5  # seconds in which the pod is taken out of the service, before it is told to stop and accepts no more


def check_service_name(name: str) -> None:
    """Refuse, with ValueError, what Kubernetes takes for no name of a service."""
    if len(name) > LONGEST or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise ValueError(
            f"{name!r} is no name for a service of Kubernetes, which is small letters, digits and '-', begins with a "
            f"letter and has at most {LONGEST} of them, as KServe adds -predictor; choose one with --name"
        )


def check_storage_uri(uri: str) -> None:
    """Refuse, with ValueError, what KServe cannot fetch from: what has no scheme."""
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://\S+", uri):
        raise ValueError(f"{uri!r} is no storage URI; give one such as pvc://models/digits or s3://bucket/digits")


def check_image(image: str) -> None:
    """Refuse, with ValueError, what no container image is called."""
    if not re.fullmatch(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@[\w+.:-]+)?", image, re.ASCII):
        raise ValueError(f"{image!r} is no name of a container image; give one such as REGISTRY/tetdeploy:1")


def check_target(what: object, target: str) -> None:
    """Refuse, with ValueError, what was made, or is to be, for a GPU: neither image nor manifest has one."""
    if target not in RUNTIMES:
        raise ValueError(
            f"{what} is for {target}, and the container that KServe runs has no GPU; choose --target "
            f"{' or '.join(RUNTIMES)}"
        )


def inference_service(name: str, *, model_file: str, storage_uri: str, image: str, runtime: str) -> dict[str, Any]:
    """The InferenceService (v1beta1) that serves one model over the Open Inference Protocol v2, as a Deployment, as
    Knative takes no pod that sleeps before it stops.

    Args:
        name: of the service, and of the model in its requests.
        model_file: the `.onnx` file's name at the storage URI.
        storage_uri: where KServe finds it: `pvc://claim/folder`, `s3://bucket/folder`, ...
        image: of the container, whose entry point is `tetdeploy` and whose user is one by number, not 0.
        runtime: of `tetdeploy serve`, one of `RUNTIMES`; the image has it.

    Raises:
        ValueError: the name is none for Kubernetes, the URI has no scheme, or the image is none.
    """
    check_service_name(name)
    check_storage_uri(storage_uri)
    check_image(image)

    def probe(path: str, **more: int) -> dict[str, Any]:
        return {"httpGet": {"path": path, "port": HTTP_PORT}, "periodSeconds": PERIOD, "timeoutSeconds": 5, **more}

    resources = {"cpu": CPUS, "memory": MEMORY}
    options = ["--runtime", runtime, "--host", HOST, "--http-port", str(HTTP_PORT)]
    options += ["--threads", CPUS, "--max-state-mb", STATE_MB]
    container = {
        "name": "kserve-container",  # by which KServe knows the one that answers
        "image": image,
        "args": ["serve", f"{name}={MODELS}/{model_file}", *options],
        "env": [
            {"name": "STORAGE_URI", "value": storage_uri},
            {"name": "PROTOCOL", "value": "v2"},  # or an InferenceGraph would ask it by version 1
        ],
        "ports": [{"name": "http1", "containerPort": HTTP_PORT, "protocol": "TCP"}],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": CONFINED,
        "readinessProbe": probe("/v2/health/ready"),
        "startupProbe": probe("/v2/health/live", failureThreshold=STARTS),  # the others wait for it
        "livenessProbe": probe("/v2/health/live"),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVES)]}}},
    }
    # Kubernetes counts from before the sleep, and kills: what the server needs, and half as much for a slow machine.
    stops = round(1.5 * (LEAVES + GRACE_SECONDS))
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": {"serving.kserve.io/deploymentMode": "RawDeployment"}},
        "spec": {"predictor": {"minReplicas": 1, "terminationGracePeriodSeconds": stops, "containers": [container]}},
    }


def write_inference_service(path: Path | str, service: dict[str, Any]) -> None:
    """Write it as YAML, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(service, sort_keys=False), encoding="utf-8")
