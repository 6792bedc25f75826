"""Owns a reader of kustomizations for tests, where no kubectl is: what configs/kuberay uses of kustomize, and no more.

Anything else in a kustomization is an error, so that nothing is passed over.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

KNOWN = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "configMapGenerator",
    "generatorOptions",
    "images",
    "patches",
}
CLUSTER_SCOPED = {"Namespace"}


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization. Raises ValueError for what this reader does not know."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(kustomization) - KNOWN:
        raise ValueError(f"{folder}/kustomization.yaml: this reader knows no {', '.join(sorted(unknown))}")
    if kustomization.get("configMapGenerator") and kustomization.get("generatorOptions") != {
        "disableNameSuffixHash": True
    }:
        raise ValueError(f"{folder}/kustomization.yaml: this reader gives generated names no hash")
    objects: list[Object] = []
    for resource in kustomization["resources"]:
        path = folder / resource
        objects += build(path.resolve()) if path.is_dir() else documents(path)
    for entry in kustomization.get("configMapGenerator", []):
        _generate(objects, entry, folder)
    for image in kustomization.get("images", []):
        for holder in [holder for one in objects for holder in _images(one)]:
            _rename(holder, image)
    for patch in kustomization.get("patches", []):
        (target,) = [one for one in objects if is_called(one, **patch["target"])]
        for operation in yaml.safe_load((folder / patch["path"]).read_text()):
            _apply(target, operation)
    for one in objects:
        if one["kind"] not in CLUSTER_SCOPED:
            one["metadata"]["namespace"] = kustomization["namespace"]
    return objects


def documents(path: Path) -> list[Object]:
    """Of a file; what an anchor shares is shared no more, so that a patch changes one place."""
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all(path.read_text()) if document]


def is_called(one: Object, kind: str, name: str) -> bool:
    return one["kind"] == kind and one["metadata"]["name"] == name


def _generate(objects: list[Object], entry: Object, folder: Path) -> None:
    if unknown := set(entry) - {"name", "files", "behavior"}:
        raise ValueError(f"{folder}/kustomization.yaml: this reader knows no {', '.join(sorted(unknown))}")
    before = [one for one in objects if is_called(one, "ConfigMap", entry["name"])]
    if len(before) != (entry.get("behavior", "create") == "replace"):
        raise ValueError(f"{folder}/kustomization.yaml: {entry['name']} is there {len(before)} times before")
    for one in before:
        objects.remove(one)
    data = {name: (folder / name).read_text() for name in entry["files"]}
    objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data})


def _images(node: Any) -> Iterator[Object]:
    """Whatever has an `image`, at any depth."""
    if isinstance(node, dict):
        if isinstance(node.get("image"), str):
            yield node
        for value in node.values():
            yield from _images(value)
    elif isinstance(node, list):
        for value in node:
            yield from _images(value)


def _rename(holder: Object, image: Object) -> None:
    name, _, tag = holder["image"].partition(":")
    if name == image["name"]:
        name, tag = image.get("newName", name), image.get("newTag", tag)
        holder["image"] = f"{name}:{tag}"


def _apply(target: Object, operation: Object) -> None:
    """One operation of a JSON patch (RFC 6902). Raises KeyError or IndexError when there is nothing at its path."""
    *parents, last = operation["path"].removeprefix("/").split("/")
    node: Any = target
    for key in parents:
        node = node[_key(node, key)]
    place = _key(node, last)
    node[place]
    match operation["op"]:
        case "replace":
            node[place] = operation["value"]
        case "remove":
            del node[place]
        case other:
            raise ValueError(f"this reader knows no {other}")


def _key(node: Any, key: str) -> Any:
    return int(key) if isinstance(node, list) else key.replace("~1", "/").replace("~0", "~")
