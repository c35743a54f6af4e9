"""Webhooks: sign, guard, deliver. `docs/webhooks.md` is the integrator's view of the same."""
