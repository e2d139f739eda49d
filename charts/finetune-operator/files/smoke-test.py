"""`helm test`: does the API server serve FineTuneJobs, and is every operator ready?

    smoke-test.py NAMESPACE SELECTOR PORT

It asks as the ServiceAccount of its pod, needs no DNS, and ends with 1 and a reason.
"""

import json
import os
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ACCOUNT = Path(os.environ.get("ACCOUNT_FOLDER", "/var/run/secrets/kubernetes.io/serviceaccount"))
SECONDS = 10


def ask_api_server(path):
    """What the API server has at a path."""
    host, port = (os.environ[f"KUBERNETES_SERVICE_{part}"] for part in ("HOST", "PORT"))
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}{path}"
    token = (ACCOUNT / "token").read_text().strip()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=SECONDS, context=trust) as answer:
        return json.load(answer)


def is_served():
    """Whether the API server serves FineTuneJobs."""
    try:
        kinds = ask_api_server("/apis/finetune.dev/v1alpha1")["resources"]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise
    return "FineTuneJob" in [kind["kind"] for kind in kinds]


def find_operators(namespace, selector):
    """Name and address of each operator's pod that is not about to end."""
    query = urllib.parse.urlencode({"labelSelector": selector})
    pods = ask_api_server(f"/api/v1/namespaces/{namespace}/pods?{query}")["items"]
    lasting = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    return {pod["metadata"]["name"]: pod["status"].get("podIP", "") for pod in lasting}


def find_problem(address, port):
    """What an operator says is wrong; empty where it is ready."""
    if not address:
        return "has no address yet"
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}/readyz"
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        direct.open(url, timeout=SECONDS).read()
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace").strip()
    except OSError as error:
        return f"can't be reached at {url}: {error}"
    return ""


def main():
    """Say what was found; returns what is wrong."""
    namespace, selector, port = sys.argv[1:]
    if not is_served():
        return "The API server serves no FineTuneJobs: is crds.enabled false?"
    print("The API server serves FineTuneJobs.")
    operators = find_operators(namespace, selector)
    problems = {name: find_problem(address, port) for name, address in operators.items()}
    for name, problem in problems.items():
        print(f"{name} {problem or 'is ready.'}")
    if not operators:
        return f"There is no operator in {namespace}."
    return "An operator is not ready." if any(problems.values()) else ""


if __name__ == "__main__":
    sys.exit(main() or None)
