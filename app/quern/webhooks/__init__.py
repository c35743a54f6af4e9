"""Webhooks: sign, guard, deliver. `docs/webhooks.md` is the integrator's view of the same."""

from typing import Final

#: Kinds of jobs that are no steps of a workflow.
TEST_KIND: Final = "webhook_test"
RESEND_KIND: Final = "webhook_resend"
