"""The models are the ones that were pinned, and nobody who uses them can change them."""

import re
from pathlib import Path

import yaml
from testinfra.host import Host

_FOLDER = "/opt/quern/models"
_PINNED = Path(__file__).resolve().parents[2] / "roles/models/defaults/main.yml"


def test_every_model_is_what_was_pinned(host: Host) -> None:
    pinned = {
        f"{one['model']}/{one['file']}": one["sha256"] for one in yaml.safe_load(_PINNED.read_text())["models_files"]
    }
    found = {name: host.file(f"{_FOLDER}/{name}").sha256sum for name in pinned}
    assert found == pinned


def test_only_root_can_change_a_model(host: Host) -> None:
    assert host.check_output("find %s -type f", _FOLDER) != ""
    assert host.check_output("find %s ! -user root -o ! -group root", _FOLDER) == ""
    assert host.check_output("find %s -type f ! -perm 0444 -o -type d ! -perm 0755", _FOLDER) == ""


def test_the_engine_computes_by_openblas_and_without_openmp(host: Host) -> None:
    """Debian's OpenBLAS, as it is in the memory of its processes: numpy brings one of its own."""
    processes = host.check_output("grep -l quern-engine.service /proc/[0-9]*/cgroup").split()
    maps = "".join(host.file(path.replace("cgroup", "maps")).content_string for path in processes)
    mapped = {line.split()[-1] for line in maps.splitlines()}
    assert [name for name in mapped if re.match(r"/usr/lib/x86_64-linux-gnu/.*/?libopenblas", name)]
    assert [name for name in mapped if re.search(r"lib(gomp|omp|iomp5)", name)] == []
