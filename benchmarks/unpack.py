"""Puts files of a source package beside the packages of the Python that runs this, without building or installing it.

python benchmarks/unpack.py vllm==0.33.0 vllm/distributed/eplb/policy

For packages of which one plain module is run, and which do not install without a GPU. They come from the index that
pip is set to, and are checked by its digest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from pip._internal.models.index import PyPI  # what pip asks where nothing else is set

ROOT = Path(sysconfig.get_paths()["purelib"])


def index() -> str:
    """The index that pip is set to."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    told = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return (os.environ.get("PIP_INDEX_URL") or told or PyPI.simple_url).rstrip("/")


def source(name: str, version: str) -> bytes:
    """The source package of that name and version."""
    page = f"{index()}/{name}/"
    with urlopen(Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"}), timeout=60) as answer:
        files = json.load(answer)["files"]
    (file,) = [own for own in files if own["filename"] == f"{name.replace('-', '_')}-{version}.tar.gz"]
    with urlopen(urljoin(page, file["url"]), timeout=180) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != file["hashes"]["sha256"]:
        raise SystemExit(f"{file['filename']} is not what the index says")
    return content


def main(package: str, folder: str) -> None:
    """Unpack the modules in *folder* of *package*."""
    name, version = package.split("==")
    with tarfile.open(fileobj=io.BytesIO(source(name, version))) as archive:
        for member in archive.getmembers():
            path = Path(member.name)
            inside = Path(*path.parts[1:])
            if inside.parent == Path(folder) and inside.suffix == ".py":
                target = ROOT / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())


if __name__ == "__main__":
    main(*sys.argv[1:])
