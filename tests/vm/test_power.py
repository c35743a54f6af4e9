"""Reboots and power cuts: it comes back serving, and nothing acknowledged is lost."""

import os

from tests.vm.client import Client
from tests.vm.confinement import denials
from tests.vm.guest import Guest, wait_until
from tests.vm.power import cut_during_intake, lost

#: Three by `make test-vm`; `QUERN_POWER_CUTS=10` by hand.
CUTS = int(os.environ.get("QUERN_POWER_CUTS", "3"))


def test_a_reboot_comes_back_serving(guest: Guest, client: Client, services: list[str]) -> None:
    form = client.form("Reboot")
    accepted = client.insist("POST", f"/api/v1/forms/{form}/responses", {"answers": {"comment": "Before the reboot."}})
    boot = guest.say("cat /proc/sys/kernel/random/boot_id")
    guest.ask("systemctl reboot")

    def is_back() -> bool:
        said = guest.ask("cat /proc/sys/kernel/random/boot_id")
        return said.status == 0 and said.out != boot

    wait_until(is_back, "another boot")
    guest.wait_serving(services)
    assert client.processed(accepted["id"])["answers"]["comment"] == "Before the reboot."
    assert guest.say("systemctl list-units --failed --no-legend --plain") == ""
    assert denials(guest) == []


def test_power_cuts_during_intake_lose_nothing_acknowledged(guest: Guest, client: Client, services: list[str]) -> None:
    form = client.form("Power cuts", {"name": "mood", "type": "sentiment", "fields": ["comment"]})
    intake = cut_during_intake(guest, client, services, form, times=CUTS, between=15)
    print(f"{CUTS} power cuts, {len(intake.acknowledged)} acknowledged")
    assert len(intake.acknowledged) >= 15 * (CUTS + 1)
    with guest.time_for_ai():
        assert lost(client, form, intake) == []
    assert guest.say("quern audit verify --json >/dev/null && echo holds") == "holds"
