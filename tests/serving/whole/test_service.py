"""A server as the unit of systemd in ``examples`` starts it."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import pytest

from delineate.errors import ServingError

UNIT = Path(__file__).parents[3] / "examples/serving/delineate.service"
LIMITED = (sys.executable, str(Path(__file__).with_name("families.py")))

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the filter of system calls is written for Linux on these processors",
)


def families() -> list[str]:
    """The kinds of network that the unit allows."""
    [found] = re.findall(r"^RestrictAddressFamilies=(.*)", UNIT.read_text(encoding="utf-8"), re.M)
    return found.split()


def test_the_kinds_of_network_that_the_service_may_use_are_enough(drivers, bundles, small, tmp_path) -> None:
    within = (*LIMITED, ",".join(families()))
    asked = {"bind": "tcp://0.0.0.0:*", "http": "127.0.0.1:0", "plain": False, "within": within}
    server = drivers.serve(bundles.folders, **asked)
    server.about["zmq"] = server.address.replace("0.0.0.0", "127.0.0.1")
    with server.client(key=server.make_key("anna", "client", tmp_path)) as client:
        client.segment(small[0].path, tmp_path / "label.nii.gz", model="one")
    assert (tmp_path / "label.nii.gz").read_bytes() == small[0].label
    assert server.end() == 0


def test_a_server_that_may_not_do_what_it_needs_says_so_and_ends(drivers, bundles) -> None:
    """libzmq ends the process in which it may not ask for the machine's addresses."""
    within = (*LIMITED, ",".join(family for family in families() if family != "AF_NETLINK"))
    server = drivers.serve(bundles.folders, bind="tcp://0.0.0.0:*", plain=False, within=within)
    assert server.about["code"] == ServingError.code
    assert "the front door ended with status -6" in server.about["message"]
    assert server.process.wait(30) == 0


def test_a_worker_that_takes_too_much_memory_ends_alone() -> None:
    """systemd's own default is to stop the service."""
    assert re.findall(r"^OOMPolicy=(.*)", UNIT.read_text(encoding="utf-8"), re.M) == ["continue"]
